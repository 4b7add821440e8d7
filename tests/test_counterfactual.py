"""Claims about counterfactual tools: what they change, what they leave, and that two runs change the same."""

from dataclasses import replace

import numpy as np
import pytest

from vstar_jax.data.task import Episode
from vstar_jax.dialogue import Decision, ToolResult
from vstar_jax.tools.counterfactual import Counterfactual
from vstar_jax.tools.host import Call, Outcome

EXPLANATION = "- kaba: jump then bow = kaba\n- tilo: squat then clap = tilo\n- zumo: bow then squat = zumo"
FAILURE = "The tool did not answer."


def call(number: int) -> Call:
    frames = np.random.default_rng(number).integers(1, 255, (8, 4, 4, 3), np.uint8)
    return Call(
        Episode(f"clip {number}", "base", frames, 8.0, ("kaba", "tilo"), "kaba", lambda d: ToolResult()), 1, Decision(True)
    )


def tools(calls, deadline):
    """Inverts the frames, and tells of every clip something else."""
    return [
        Outcome(
            ToolResult(255 - c.episode.frames, EXPLANATION, f"seen in {c.episode.name}", (FAILURE,)), {"pose_estimation": "ok"}
        )
        for c in calls
    ]


CALLS = [call(0), call(1), call(2)]
TRUE = tools(CALLS, 1.0)


@pytest.mark.parametrize("kind", ["blank", "shuffled", "other"])
def test_statuses_failures_and_shapes_stay_and_two_runs_agree(kind):
    found, again = (Counterfactual(tools, kind)(CALLS, 1.0) for _ in range(2))
    for a, b, true in zip(found, again, TRUE, strict=True):
        assert a.statuses == true.statuses
        assert a.result.failures == (FAILURE,)
        assert a.result.frames.shape == true.result.frames.shape
        assert a.result.frames.dtype == np.uint8
        assert (a.result.frames != true.result.frames).any()
        np.testing.assert_array_equal(a.result.frames, b.result.frames)
        assert (a.result.explanation, a.result.description) == (b.result.explanation, b.result.description)


def test_blank_shows_nothing():
    for outcome in Counterfactual(tools, "blank")(CALLS, 1.0):
        assert not outcome.result.frames.any()
        assert outcome.result.explanation == outcome.result.description == ""


def test_shuffled_shows_the_same_frames_and_words_in_another_order_and_no_label_keeps_its_meaning():
    for outcome, true in zip(Counterfactual(tools, "shuffled")(CALLS, 1.0), TRUE, strict=True):
        frames = outcome.result.frames
        assert sorted(f.tobytes() for f in frames) == sorted(f.tobytes() for f in true.result.frames)
        lines, before = outcome.result.explanation.splitlines(), EXPLANATION.splitlines()
        assert [line.partition(":")[0] for line in lines] == [line.partition(":")[0] for line in before]
        assert not set(lines) & set(before)
        names = [line.removeprefix("- ").partition(":")[0] for line in lines]
        assert all(line.endswith(f"= {name}") and line.count(name) == 2 for line, name in zip(lines, names, strict=True))
        assert sorted(outcome.result.description.split()) == sorted(true.result.description.split())


def test_other_shows_another_clip_and_nothing_where_there_is_none():
    found = Counterfactual(tools, "other")(CALLS, 1.0)
    assert [o.result.description for o in found] == ["seen in clip 1", "seen in clip 2", "seen in clip 0"]
    (alone,) = Counterfactual(tools, "other")(CALLS[:1], 1.0)
    assert not alone.result.frames.any()
    members = [CALLS[0], replace(CALLS[0], turn=2)]  # of one clip: none shows another
    assert all(not o.result.frames.any() for o in Counterfactual(tools, "other")(members, 1.0))
