"""StickMotion: actions, names, kinematics, rendering, tokenizer, dialogues and lessons."""

import itertools
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vstar_jax.data.annotate import LEFT_ANKLE, LEFT_WRIST, NOSE, RIGHT_WRIST, annotate
from vstar_jax.data.builders.stick_motion import Record, Records, prepare, render_clip
from vstar_jax.data.stick_motion import dialogues, motions, names, pretraining, render, tokenizer
from vstar_jax.data.video import read
from vstar_jax.dialogue import Decision, Prompts, assistant, first_messages, parse_decision, parse_reply, second_messages
from vstar_jax.training.pretrain import words

PROMPTS = Prompts.load(Path(__file__).resolve().parents[1] / "configs/prompts/stick_motion.yaml")
DIALOGUE_TOKENS = 384  # both turns with eight labels and two clips: one of the buckets of configs
REPLY_TOKENS = 120  # turn 2, below the second of rollout.max_new_tokens
VISUAL_TOKENS = 32  # a clip of 16 frames of 56 x 56
VOCABULARY = 640  # rows of the embedding, which the tiny model pays for at every token
CODING_ERROR = 8.0  # mean grey levels: H.264 at crf 18 halves the resolution of colours
LABELS = 8


# Actions and names


def test_there_are_60_base_and_30_novel_actions_and_no_shared_combination() -> None:
    assert (len(motions.actions("base")), len(motions.actions("novel"))) == (60, 30)
    assert len({a.sub_motions for a in motions.ACTIONS}) == 90
    assert [a.number for a in motions.ACTIONS] == list(range(90))
    assert all(len(set(a.sub_motions)) == len(a.sub_motions) for a in motions.ACTIONS)


def test_no_action_is_the_beginning_of_another() -> None:
    assert not any(
        motions.one_begins_other(a.sub_motions, b.sub_motions) for a, b in itertools.combinations(motions.ACTIONS, 2)
    )


@pytest.mark.parametrize(("group", "least"), [("base", 10), ("novel", 5)])
def test_every_sub_motion_is_well_represented(group, least: int) -> None:
    uses = Counter(m for a in motions.actions(group) for m in a.sub_motions)
    assert set(uses) == set(motions.SUB_MOTIONS)
    assert min(uses.values()) >= least


def test_a_name_has_one_owner_and_one_pool() -> None:
    owned = [(pool, n) for a in motions.ACTIONS for pool in ("train", "eval") for n in names.names(a, pool)]
    assert len({n for _, n in owned}) == len(owned) == len(names.glossary()) == 90 * 17
    assert not names.pool_names("train") & names.pool_names("eval")


def test_no_name_is_a_word_of_the_prompts() -> None:
    assert not {w.strip().lower() for w in words()} & set(names.all_names())


# Kinematics and rendering


@pytest.mark.parametrize("sub_motion", motions.SUB_MOTIONS)
@pytest.mark.parametrize("seed", range(5))
def test_the_figure_stays_in_the_picture(sub_motion: str, seed: int) -> None:
    points = motions.keypoints([sub_motion], 16, np.random.default_rng(seed))
    assert points.shape == (16, 17, 3)
    assert points.dtype == np.float32
    # A kick or a long arm may leave at the side; most of the body does not.
    assert points[..., 2].mean() > 0.97


def test_left_is_the_figures_left() -> None:
    left = motions.keypoints(["raise left arm"], 16, np.random.default_rng(0))
    right = motions.keypoints(["raise right arm"], 16, np.random.default_rng(0))
    assert left[8, LEFT_WRIST, 1] < left[8, NOSE, 1] < left[8, RIGHT_WRIST, 1]
    assert right[8, RIGHT_WRIST, 1] < right[8, NOSE, 1] < right[8, LEFT_WRIST, 1]
    assert left[0, LEFT_WRIST, 0] > left[0, RIGHT_WRIST, 0]


def test_sub_motions_follow_each_other_in_order() -> None:
    points = motions.keypoints(["raise left arm", "kick left leg"], 16, np.random.default_rng(0))
    assert points[:8, LEFT_WRIST, 1].min() < points[8:, LEFT_WRIST, 1].min()
    assert points[8:, LEFT_ANKLE, 1].min() < points[:8, LEFT_ANKLE, 1].min()


@pytest.mark.parametrize("look", ["clean", "cluttered"])
def test_rendering_is_a_function_of_the_seed(look) -> None:
    def clip(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return render.render(motions.keypoints(["jump", "bow"], 16, rng), rng, look)

    assert clip(3).shape == (16, 112, 112, 3)
    assert np.array_equal(clip(3), clip(3))
    assert not np.array_equal(clip(3), clip(4))


def test_boxes_hold_the_visible_keypoints() -> None:
    points = motions.keypoints(["squat"], 16, np.random.default_rng(0))[:, None]
    box = render.boxes(points)
    inside = np.clip(points[..., :2], 0, 1)
    assert (box[..., None, :2] <= inside).all()
    assert (box[..., None, 2:] >= inside).all()


# Files


def test_a_rendered_file_is_close_to_what_was_drawn_and_the_same_again(tmp_path: Path) -> None:
    key = (0, 0, 5, 1)
    record = render_clip((str(tmp_path), key, 0.0))
    rng = np.random.default_rng(list(key))
    rng.random()
    keypoints = motions.keypoints(motions.ACTIONS[5].sub_motions, render.FRAMES, rng)
    drawn = render.render(keypoints, rng, "clean")
    decoded = read(tmp_path / record["video"], 16, exact=16)
    assert decoded.fps == render.FPS
    assert decoded.frames.shape == drawn.shape
    assert np.abs(decoded.frames.astype(int) - drawn).mean() < CODING_ERROR
    first = (tmp_path / record["video"]).read_bytes()
    render_clip((str(tmp_path), key, 0.0))
    assert (tmp_path / record["video"]).read_bytes() == first


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Records]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vstar_jax.data.builders.stick_motion.TEST_CLIPS", {"base_test": 1, "novel_test": 1})
        folder = tmp_path_factory.mktemp("data")
        with ThreadPoolExecutor(2) as pool:  # as two runs do that are started at once: one must wait for the other
            builder, same = pool.map(lambda _: prepare(folder, "mixed", 1, 0), range(2))
    assert builder.data_dir == same.data_dir
    return {split: Records(builder, split) for split in ("train", "base_test", "novel_test")}


def test_the_splits_hold_their_groups_and_their_files(prepared: dict[str, Records]) -> None:
    for split, group in (("train", "base"), ("base_test", "base"), ("novel_test", "novel")):
        records: list[Record] = list(prepared[split])
        assert {r.action for r in records} == set(motions.actions(group))
        assert all(r.video.is_file() for r in records)
        assert records[0].keypoints.shape == (16, 17, 3)
        assert records[0].boxes.shape == (16, 1, 4)
    share = np.mean([r.cluttered for split in prepared.values() for r in split])
    assert 0.6 < share < 0.9


def test_annotations_lie_on_the_figure(prepared: dict[str, Records]) -> None:
    record = next(r for r in prepared["train"] if not r.cluttered)
    frame = read(record.video, 16, exact=16).frames[0].astype(int)
    x, y = record.keypoints[0, LEFT_WRIST, :2].round().astype(int)
    assert np.abs(frame[y, x] - frame[0, 0]).sum() > 60  # the figure is at least 90 levels brighter in each colour


# Tokenizer


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("tokenizer")
    ids = tokenizer.build(directory, words())
    loaded = AutoTokenizer.from_pretrained(str(directory))
    assert ids.size == len(loaded) <= VOCABULARY
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert loaded.convert_tokens_to_ids("<|video_pad|>") == ids.video_pad
    return loaded


def test_every_name_is_two_tokens_wherever_it_stands(tok) -> None:
    for name in names.all_names():
        assert tok.tokenize(name) == [name[:2], name[2:]]
        assert tok.tokenize(" " + name) == ["Ġ" + name[:2], name[2:]]


def test_every_word_score_heading_and_tag_is_one_token(tok) -> None:
    for word in [*words(), *tokenizer.TAGS, "[1]", " [3]", " 0.0", " 0.7", " head"]:
        assert len(tok.encode(word)) == 1, word
    assert not set(tokenizer.TAGS) & set(tok.all_special_tokens)


@settings(max_examples=50)
@given(text=st.text())
def test_any_text_round_trips(tok, text: str) -> None:
    assert tok.decode(tok.encode(text), clean_up_tokenization_spaces=False) == text


def test_the_template_is_chatml_and_speaks_only_as_given(tok) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "Q"}]},
    ]
    rendered = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pictures = "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>"
    assert rendered == (f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{pictures}Q<|im_end|>\n<|im_start|>assistant\n")
    assert tok.apply_chat_template(messages[1:], tokenize=False).startswith("<|im_start|>user")


# Dialogues


def cast_of(seed: int, pool="train", labels: int = LABELS) -> dialogues.Cast:
    rng = np.random.default_rng(seed)
    return dialogues.draw_cast(motions.ACTIONS[rng.integers(90)], labels, pool, rng)


def tools(decision: Decision, cast: dialogues.Cast):
    shown = cast.actions[cast.shown]
    keypoints = motions.keypoints(shown.sub_motions, 16, np.random.default_rng(0)) * np.array([112, 112, 1])
    return dialogues.tool_result(
        decision, np.zeros((16, 112, 112, 3), np.uint8), keypoints, np.zeros((16, 1, 4)), cast.explanations
    )


def turns(cast: dialogues.Cast, cluttered: bool) -> list[dict]:
    result = tools(dialogues.decision(cluttered), cast)
    reply = dialogues.second_reply(cast, np.random.default_rng(0))
    first = [*first_messages(PROMPTS), assistant(dialogues.first_reply(cluttered))]
    return [*first, *second_messages(PROMPTS, result, cast.names), assistant(reply)]


def text_of(message: dict) -> str:
    return "".join(p["text"] for p in message["content"] if p["type"] == "text")


@pytest.mark.parametrize("seed", range(40))
def test_dialogues_are_short_and_start_with_a_decision_that_depends_on_the_picture(tok, seed: int) -> None:
    cluttered = seed % 2 == 0
    messages = turns(cast_of(seed), cluttered)
    count = len(tok.encode(tok.apply_chat_template(messages, tokenize=False)))
    assert count + (VISUAL_TOKENS - 1) * (1 + cluttered) <= DIALOGUE_TOKENS
    assert len(tok.encode(text_of(messages[3]))) <= REPLY_TOKENS
    assert parse_decision(text_of(messages[1])) == Decision(pose_estimation=cluttered, noun_explanation=True)


@pytest.mark.parametrize("seed", range(40))
def test_the_written_reply_is_read_back_and_its_best_score_is_the_answer(seed: int) -> None:
    cast = cast_of(seed)
    reply = parse_reply(dialogues.second_reply(cast, np.random.default_rng(seed)))
    assert reply.well_formed
    assert reply.answer == cast.names[cast.shown]
    assert reply.sub_motions == cast.actions[cast.shown].sub_motions
    assert len(reply.candidates) == 3
    assert set(reply.scores) == set(reply.candidates) <= set(cast.names)
    assert [n for n, s in reply.scores.items() if s == max(reply.scores.values())] == [reply.answer]


def test_without_sub_motions_candidates_are_named_and_one_is_chosen() -> None:
    cast = cast_of(1)
    reply = parse_reply(dialogues.second_reply(cast, np.random.default_rng(1), sub_motions=False))
    assert reply.well_formed
    assert reply.answer == cast.names[cast.shown]
    assert reply.answer in reply.candidates
    assert not reply.sub_motions
    assert not reply.comparisons


@pytest.mark.parametrize("dialect", ["tags", "hermes"])
def test_decisions_are_written_in_the_dialect_that_reads_them(dialect) -> None:
    reply = dialogues.first_reply(True, dialect=dialect)
    assert parse_decision(reply, dialect) == dialogues.decision(True)
    assert "<think>" in reply


def test_a_tool_that_is_not_offered_is_not_asked_for() -> None:
    assert dialogues.decision(True, ["noun_explanation"]) == Decision(noun_explanation=True)
    assert parse_decision(dialogues.first_reply(True, ["pose_estimation"])) == Decision(pose_estimation=True)


@pytest.mark.parametrize("pool", ["train", "eval"])
def test_a_cast_is_drawn_from_the_actions_group_and_the_pool(pool) -> None:
    for seed in range(30):
        cast = cast_of(seed, pool)
        assert len(set(cast.actions)) == len(set(cast.names)) == LABELS
        assert len({a.group for a in cast.actions}) == 1
        assert set(cast.names) <= names.pool_names(pool)
        assert cast.explanations.splitlines() == [f"- {n}: {names.glossary()[n]}" for n in cast.names]
        near = [dialogues.overlap(a, cast.actions[cast.shown]) for a in cast.actions]
        assert sum(n > 0 for n in near) >= 2  # the shown action and a hard negative at least


def test_the_shown_action_may_stand_anywhere_in_the_list() -> None:
    places = Counter(cast_of(seed).shown for seed in range(400))
    assert set(places) == set(range(LABELS))
    assert max(places.values()) < 100


def test_prompts_do_not_tell_the_label_from_the_other_labels() -> None:
    everything = Decision(True, True, True, True)
    for seed in range(20):
        cast = cast_of(seed)
        result = tools(everything, cast)
        prompt = text_of(second_messages(PROMPTS, result, cast.names)[0])
        assert {prompt.count(name) for name in cast.names} == {3}  # in the list, and before and after its explanation
        assert not any(name in text_of(first_messages(PROMPTS)[0]) for name in cast.names)
        assert not any(m in result.description for m in motions.SUB_MOTIONS)
        assert not re.search(r"mp4|clip-|/", prompt)


def test_tools_return_what_was_asked_and_nothing_else() -> None:
    cast = cast_of(0)
    for asked in (Decision(*flags) for flags in itertools.product([False, True], repeat=4)):
        result = tools(asked, cast)
        assert (result.frames is not None) == (asked.pose_estimation or asked.person_detection)
        assert (result.explanation is not None) == asked.noun_explanation
        assert (result.description is not None) == asked.video_explanation
    pose = tools(Decision(pose_estimation=True), cast).frames
    assert pose is not None
    assert pose.any()


def test_descriptions_tell_what_moves() -> None:
    points = motions.keypoints(["raise left arm", "kick right leg"], 16, np.random.default_rng(0))
    told = dialogues.description(points)
    assert told.startswith("first the left arm moves")
    assert told.endswith("third the right leg moves")


# Lessons of the base model


def test_lessons_show_no_action_and_no_name_of_the_evaluation() -> None:
    taken = {motions.explanation(a.sub_motions) for a in motions.ACTIONS}
    for seed in range(200):
        question, reply = pretraining.lookup_texts(np.random.default_rng(seed))
        definitions = question.splitlines()[:-1]
        moves = {re.sub(r"^- | makes \w+$", "", line) for line in definitions}
        assert all(re.fullmatch(r"[a-z ]+( then [a-z ]+)*", m) for m in moves)
        assert not moves & taken
        assert not set(re.findall(r"\w+", question + reply)) & names.pool_names("eval")


def test_rows_to_repeat_have_no_token_twice_and_no_name_of_the_evaluation(tok) -> None:
    known = [f" {m}" for m in motions.SUB_MOTIONS] + [" yes", " then", " makes", " fits"]
    for seed in range(50):
        question, reply = pretraining.repeat_texts(known, np.random.default_rng(seed))
        tokens = tok.encode(question)
        assert question == reply
        assert len(set(tokens)) == len(tokens) >= 3
        assert not set(question.split()) & names.pool_names("eval")


def test_lessons_clips_show_no_action() -> None:
    taken = {a.sub_motions for a in motions.ACTIONS}
    drawn = [pretraining.draw_clip((0, i)) for i in range(60)]
    assert not {moves for _, moves in drawn} & taken
    assert all(frames.shape == (16, 112, 112, 3) for frames, _ in drawn)


def test_the_overlay_looks_the_same_on_any_clutter() -> None:
    """What the pose tool returns depends on the motion far more than on the clip behind it."""
    points = motions.keypoints(["squat", "jump"], 16, np.random.default_rng(0))
    pixels = (points * np.array([112, 112, 1]))[:, None]
    clips = [render.render(points, np.random.default_rng(seed), "cluttered") for seed in range(2)]
    raw = np.abs(clips[0].astype(int) - clips[1]).mean()
    drawn = [annotate(clip, pixels).astype(int) for clip in clips]
    assert np.abs(drawn[0] - drawn[1]).mean() < 0.3 * raw
