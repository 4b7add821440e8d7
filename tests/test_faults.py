"""Claims about the faults put into StickMotion's dialogues, and about which of them the rules of the assessment find."""

from pathlib import Path

import numpy as np
import pytest

from vstar_jax import config as config_module
from vstar_jax.config import resolve
from vstar_jax.data.assessment import Item, Rules, assess
from vstar_jax.data.chat import Chat
from vstar_jax.data.stick_motion import motions
from vstar_jax.data.stick_motion.dialogues import draw_cast, first_reply, second_reply
from vstar_jax.data.stick_motion.faults import FAULTS, Draft, audit, fault_of
from vstar_jax.data.stick_motion.task import StickMotion
from vstar_jax.dialogue import TOOLS, parse_decision, parse_reply

FOUND_BY = {
    "answer": "answer",
    "candidates": "candidates",
    "form": "parses",
    "leak": "leak",
    "observation": "grounded",
    "scores": "candidates",
}
"""Fault -> the rule that finds it; of the others nothing but the clip tells."""


def draft(seed: int, dialect="tags") -> Draft:
    rng = np.random.default_rng(seed)
    cast = draw_cast(motions.actions("base")[rng.integers(60)], 8, "train", rng)
    cluttered, offered = bool(seed % 2), tuple(TOOLS)
    return Draft(first_reply(cluttered, offered, dialect), second_reply(cast, rng), cast, cluttered, offered, dialect)


def problems(d: Draft, replies: tuple[str, str]) -> set[str]:
    item = Item("clip", *replies, label=d.name, labels=d.cast.names)
    return set(assess(item, Rules(d.dialect, motions.SUB_MOTIONS)).problems)


@pytest.mark.parametrize("dialect", ["tags", "hermes"])
@pytest.mark.parametrize("name", FAULTS)
def test_the_rules_find_the_faults_that_the_text_shows_and_no_others(name: str, dialect) -> None:
    for seed in range(50):
        right = draft(seed, dialect)
        faulty = FAULTS[name](right, np.random.default_rng(seed))
        assert faulty != (right.first, right.second)
        assert not problems(right, (right.first, right.second))
        expected = {FOUND_BY[name]} if name in FOUND_BY else set()
        assert problems(right, faulty) >= expected
        assert bool(problems(right, faulty)) == bool(expected)


@pytest.mark.parametrize("seed", range(20))
def test_faults_are_what_they_are_called(seed: int) -> None:
    right, rng = draft(seed), np.random.default_rng(seed)
    told = {name: [parse_reply(text) if n else text for n, text in enumerate(FAULTS[name](right, rng))] for name in FAULTS}
    clean = parse_reply(right.second)
    assert told["answer"][1].answer in set(clean.candidates) - {right.name}
    assert told["candidates"][1].answer == right.name not in told["candidates"][1].candidates
    assert parse_decision(told["decision"][0]).pose_estimation != right.cluttered
    assert told["form"][1].answer is None
    assert right.name in told["leak"][0]
    assert sum(m in told["observation"][1].sub_motions for m in right.seen) == len(right.seen) - 1
    assert sorted(told["order"][1].sub_motions) == sorted(right.seen)
    assert told["order"][1].sub_motions != right.seen
    assert max(told["scores"][1].scores, key=told["scores"][1].scores.__getitem__) != right.name
    assert told["verdict"][1].scores == clean.scores
    assert told["verdict"][1].comparisons != clean.comparisons


def test_a_clip_keeps_its_fault_and_the_share_is_kept() -> None:
    clips = [f"clip{n}" for n in range(4000)]
    faults = [fault_of(clip, 0.3, 0) for clip in clips]
    assert faults == [fault_of(clip, 0.3, 0) for clip in clips]
    assert faults != [fault_of(clip, 0.3, 1) for clip in clips]
    # Four standard deviations of a share of 4000.
    assert abs(np.mean([f is not None for f in faults]) - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert set(faults) == {None, *FAULTS}
    assert all(fault_of(clip, 0.0, 0) is None for clip in clips)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("data")

    def make(*flags: str) -> StickMotion:
        config = config_module.parse([f"--data.dir={folder}", "--data.clips_per_action=2", *flags])
        return StickMotion(config, Chat(resolve(config.policy.path), config.video))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vstar_jax.data.builders.stick_motion.TEST_CLIPS", {"base_test": 1, "novel_test": 1})
        yield make


def test_training_learns_from_all_dialogues_or_from_those_that_the_assessment_keeps(make) -> None:
    plain, faulty, assessed = make(), make("--data.faulty=0.5"), make("--data.faulty=0.5", "--data.assess=true")
    records = list(plain.train_records())

    def examples(task: StickMotion):
        return [task.example(record, np.random.default_rng(n)) for n, record in enumerate(records)]

    right, wrong, kept = examples(plain), examples(faulty), examples(assessed)
    for record, a, b, c in zip(records, right, wrong, kept, strict=True):
        fault = fault_of(record.name, 0.5, 0)
        assert a is not None
        assert b is not None
        assert (a.tokens.tolist() == b.tokens.tolist()) == (fault is None)
        assert (c is None) == (fault in FOUND_BY)
        assert c is None or c.tokens.tolist() == b.tokens.tolist()
    told = assessed.audit()
    assert sum(total for _, total in told.values()) == len(records)
    assert all(dropped == (total if fault in FOUND_BY else 0) for fault, (dropped, total) in told.items())


def test_a_policy_that_learns_from_a_wrong_decision_sees_what_it_asked_for(make) -> None:
    task = make("--data.faulty=1")
    patches: dict[bool, set[int]] = {True: set(), False: set()}
    for record in task.train_records():
        if fault_of(record.name, 1.0, 0) == "decision":
            example = task.example(record, np.random.default_rng(0))
            assert example is not None
            patches[record.cluttered].add(len(example.patches))
    ((raw,), (both,)) = patches[True], patches[False]
    assert both == 2 * raw


def test_an_audit_counts_what_was_dropped() -> None:
    right = draft(0)
    verdicts = [assess(Item("clip", right.first, text, label=right.name), Rules()) for text in (right.second, "nothing")]
    assert audit([(None, verdicts[0]), ("form", verdicts[1]), ("order", verdicts[0]), ("form", verdicts[0])]) == {
        "form": (1, 2),
        "order": (0, 1),
        "none": (0, 1),
    }


def test_the_card_of_faults_names_them_all() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs/study.md").read_text()
    assert all(f"`{name}`" in text for name in FAULTS)
