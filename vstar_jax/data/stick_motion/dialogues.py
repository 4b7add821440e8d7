"""Who plays in a StickMotion episode, and what a good policy would write in it.

Every episode draws a fresh name for each of its K actions from the pool of names for training or for evaluation; the
explanations are the only link from a name to what is seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vstar_jax.data import annotate
from vstar_jax.data.stick_motion.motions import Action, actions
from vstar_jax.data.stick_motion.names import Pool, defined, names
from vstar_jax.dialogue import TOOLS, Decision, Dialect, Prompts, ToolResult, second_messages

CANDIDATES = 3
HARD_NEGATIVES = 3
STAGES = ("first", "second", "third")
PARTS = {
    "left arm": annotate.LEFT_WRIST,
    "right arm": annotate.RIGHT_WRIST,
    "left leg": annotate.LEFT_ANKLE,
    "right leg": annotate.RIGHT_ANKLE,
    "head": annotate.NOSE,
}
"""The parts of the body that a description tells of, and the keypoint whose path stands for each."""


@dataclass(frozen=True)
class Cast:
    """The actions of an episode in the order of the prompt's label list, their names, and which one is shown."""

    actions: tuple[Action, ...]
    names: tuple[str, ...]
    shown: int

    @property
    def explanations(self) -> str:
        """A line "- name: explanation" for each label; a name has a blank before it everywhere, so that it is always two tokens
        of one kind.
        """
        lines = (f"- {name}: {defined(action, name)}" for name, action in zip(self.names, self.actions, strict=True))
        return "\n".join(lines)


def overlap(a: Action, b: Action) -> int:
    """How many places of two actions hold the same sub-motion."""
    return sum(x == y for x, y in zip(a.sub_motions, b.sub_motions, strict=False))


def draw_cast(action: Action, labels: int, pool: Pool, rng: np.random.Generator) -> Cast:
    """`action` among `labels` actions of its group: some share a sub-motion in its place, the rest are any."""
    others = [a for a in actions(action.group) if a != action]
    others = [others[i] for i in rng.permutation(len(others))]
    near = sorted(others, key=lambda a: -overlap(a, action))[:HARD_NEGATIVES]
    rest = [a for a in others if a not in near]
    chosen = [action, *(near + rest)[: labels - 1]]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    return Cast(tuple(chosen), tuple(str(rng.choice(names(a, pool))) for a in chosen), chosen.index(action))


def decision(cluttered: bool, offered: Sequence[str] = tuple(TOOLS)) -> Decision:
    """What is worth asking of the tools that are offered: the pose where clutter hides the figure, and always what the names
    mean.
    """
    return Decision(pose_estimation=cluttered and "pose_estimation" in offered, noun_explanation="noun_explanation" in offered)


def first_reply(cluttered: bool, offered: Sequence[str] = tuple(TOOLS), dialect: Dialect = "tags") -> str:
    """Turn 1: a thought about the picture and the decision."""
    thought = "the background is busy so the pose helps" if cluttered else "the background is plain so the pose is clear"
    return f"<think>{thought}, the names are new</think>{decision(cluttered, offered).tags(dialect)}"


def second_reply(cast: Cast, rng: np.random.Generator, sub_motions: bool = True) -> str:
    """Turn 2: what is seen, the nearest candidates, a verdict for each of their sub-motions, their scores, the answer.

    A definition is always repeated as it was given, name last, and judged after: with verdicts among its moves the name could
    not be copied by what stands before it, and a model of this size did not learn to find it.

    Without `sub_motions` candidates are named and one is chosen (the ablation).
    """
    shown, name = cast.actions[cast.shown], cast.names[cast.shown]
    order = sorted(rng.permutation(len(cast.actions)), key=lambda i: (i != cast.shown, -overlap(cast.actions[i], shown)))
    picked = [order[i] for i in rng.permutation(min(CANDIDATES, len(order)))]
    if not sub_motions:
        return f"<think>[2] Candidates: {', '.join(cast.names[i] for i in picked)}</think><answer> {name}</answer>"
    observed = " ".join(f"- {m}: {when}" for m, when in zip(shown.sub_motions, STAGES, strict=False))
    definitions = {i: defined(cast.actions[i], cast.names[i]) for i in picked}
    compared = " ".join(f"- {definitions[i]}: {_compare(cast.actions[i], shown)}" for i in picked)
    return (
        f"<think>[1] Observed: {observed} [2] Candidates: {', '.join(definitions.values())} [3] Comparison: {compared} "
        f"[4] Decision: 1.0 = {name}</think>"
        f"<answer> {name}</answer>"
    )


def _compare(candidate: Action, shown: Action) -> str:
    same = [x == y for x, y in zip(candidate.sub_motions, shown.sub_motions, strict=False)]
    same += [False] * (len(candidate.sub_motions) - len(same))
    words = [f"{m} {'yes' if s else 'no'}" for m, s in zip(candidate.sub_motions, same, strict=True)]
    score = sum(same) / max(len(candidate.sub_motions), len(shown.sub_motions))
    return f"{' '.join(words)} score {score:.1f}"


def description(keypoints: np.ndarray) -> str:
    """Which part of the body moves most in each third of a clip, from keypoints float [T, 17, 3]; it names no sub-motion."""
    told = []
    for stage, third in zip(STAGES, np.array_split(keypoints[:, list(PARTS.values()), :2], len(STAGES)), strict=True):
        lengths = np.linalg.norm(np.diff(third, axis=0), axis=-1).sum(0)
        told.append(f"{stage} the {tuple(PARTS)[int(lengths.argmax())]} moves")
    return ", ".join(told)


def tool_result(asked: Decision, frames: np.ndarray, keypoints: np.ndarray, boxes: np.ndarray, explanations: str) -> ToolResult:
    """What perfect tools return, from a clip's annotations.

    frames uint8 [T, H, W, 3]; keypoints float [T, 17, 3] and boxes float [T, 1, 4] in pixels;
    explanations as a `Cast` has them.
    """
    visual = asked.pose_estimation or asked.person_detection
    poses = keypoints[:, None] if asked.pose_estimation else None
    return ToolResult(
        frames=annotate.annotate(frames, poses, boxes if asked.person_detection else None) if visual else None,
        explanation=explanations if asked.noun_explanation else None,
        description=description(keypoints) if asked.video_explanation else None,
    )


def texts(prompts: Prompts, rng: np.random.Generator) -> Iterator[str]:
    """Texts that together hold every word of the dialogues, for the tokenizer."""
    yield from (prompts.look, prompts.annotated, prompts.description)
    yield " 0.0"  # a score that the casts drawn here may not show
    yield from (f" {stage} the {part} moves" for stage in STAGES for part in PARTS)
    for action in actions("base"):
        cast = draw_cast(action, 8, "train", rng)
        result = ToolResult(None, cast.explanations, None)
        yield from (part["text"] for m in second_messages(prompts, result, cast.names) for part in m["content"])
        yield from (first_reply(True), first_reply(False), second_reply(cast, rng))
