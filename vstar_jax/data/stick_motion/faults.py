"""Faults such as a teacher's dialogues have, put into a share of StickMotion's on purpose, and how many of them the rules find.

Each fault changes the replies of a dialogue that is right. Some break what the rules of `data.assessment` look at; others are
consistent and wrong, and only the clip would tell.
"""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vstar_jax.data.assessment import Verdict
from vstar_jax.data.stick_motion.dialogues import Cast, first_reply
from vstar_jax.data.stick_motion.motions import SUB_MOTIONS
from vstar_jax.dialogue import Dialect

_OBSERVED = re.compile(r"(?<=\[1\] Observed: ).*?(?= \[2\])")
_VERDICT = re.compile(r"(?<= )(?:yes|no)(?= )")
_SCORE = re.compile(r"(?<= score )\d\.\d")
_DECIDED = "[4] Decision"


@dataclass(frozen=True)
class Draft:
    """The two replies of a dialogue, and what they are about."""

    first: str
    second: str
    cast: Cast
    cluttered: bool
    offered: Sequence[str]
    dialect: Dialect

    @property
    def name(self) -> str:
        """The right answer."""
        return self.cast.names[self.cast.shown]

    @property
    def seen(self) -> tuple[str, ...]:
        """The sub-motions of the clip."""
        return self.cast.actions[self.cast.shown].sub_motions

    def others(self, compared: bool) -> list[str]:
        """The names but the right one, which the reply compares or does not."""
        return [n for n in self.cast.names if n != self.name and (n in self.second) == compared]


Replies = tuple[str, str]
Fault = Callable[[Draft, np.random.Generator], Replies]


def answer(draft: Draft, rng: np.random.Generator) -> Replies:
    """Another candidate is decided for and answered."""
    before, decided, after = draft.second.partition(_DECIDED)
    return draft.first, before + decided + after.replace(draft.name, str(rng.choice(draft.others(True))))


def candidates(draft: Draft, rng: np.random.Generator) -> Replies:
    """The right name is answered, and stands nowhere among the candidates."""
    before, decided, after = draft.second.partition(_DECIDED)
    return draft.first, before.replace(draft.name, str(rng.choice(draft.others(False)))) + decided + after


def decision(draft: Draft, rng: np.random.Generator) -> Replies:
    """The background is taken for what it is not, and the tools are asked for by that."""
    return first_reply(not draft.cluttered, draft.offered, draft.dialect), draft.second


def form(draft: Draft, rng: np.random.Generator) -> Replies:
    """The second reply ends with its comparison."""
    return draft.first, draft.second.partition(_DECIDED)[0].rstrip()


def leak(draft: Draft, rng: np.random.Generator) -> Replies:
    """The first reply names the action, of which nothing was said yet."""
    return draft.first.replace("<think>", f"<think> {draft.name}, ", 1), draft.second


def observation(draft: Draft, rng: np.random.Generator) -> Replies:
    """One of the observed sub-motions is another; the comparison goes on with the right one."""
    wrong = {str(rng.choice(draft.seen)): str(rng.choice([m for m in SUB_MOTIONS if m not in draft.seen]))}
    return draft.first, _observed(draft.second, wrong)


def order(draft: Draft, rng: np.random.Generator) -> Replies:
    """Two observed sub-motions stand in each other's place."""
    a, b = (draft.seen[i] for i in rng.permutation(len(draft.seen))[:2])
    return draft.first, _observed(draft.second, {a: b, b: a})


def scores(draft: Draft, rng: np.random.Generator) -> Replies:
    """The score of the right name and that of another candidate stand in each other's place."""
    places = [found.span() for found in _SCORE.finditer(draft.second)]
    best = max(places, key=lambda span: float(draft.second[slice(*span)]))
    rest = [span for span in places if span != best]
    one, two = sorted((best, rest[rng.integers(len(rest))]))
    parts = draft.second[: one[0]], draft.second[slice(*two)], draft.second[one[1] : two[0]], draft.second[slice(*one)]
    return draft.first, "".join(parts) + draft.second[two[1] :]


def verdict(draft: Draft, rng: np.random.Generator) -> Replies:
    """A sub-motion of a candidate is judged the other way; the scores stay."""
    places = list(_VERDICT.finditer(draft.second))
    at = places[rng.integers(len(places))]
    other = "no" if at.group() == "yes" else "yes"
    return draft.first, draft.second[: at.start()] + other + draft.second[at.end() :]


FAULTS: Mapping[str, Fault] = {
    fault.__name__: fault for fault in (answer, candidates, decision, form, leak, observation, order, scores, verdict)
}
"""Fault by name; each is as frequent as any other."""
CLEAN = "none"
"""Stands for the name of a fault where there is none."""


def fault_of(clip: str, share: float, seed: int) -> str | None:
    """The fault of a clip's dialogue, the same whenever it is written; `share` of the clips have one."""
    rng = np.random.default_rng([seed, zlib.crc32(clip.encode())])
    return str(rng.choice(list(FAULTS))) if rng.random() < share else None


def _observed(second: str, other: Mapping[str, str]) -> str:
    moves = re.compile("|".join(map(re.escape, other)))
    return _OBSERVED.sub(lambda told: moves.sub(lambda move: other[move.group()], told.group()), second)


def audit(assessed: Iterable[tuple[str | None, Verdict]]) -> dict[str, tuple[int, int]]:
    """Fault, or CLEAN -> how many dialogues were dropped, and how many there were; assessed: fault and verdict of each."""
    dropped: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for fault, verdict in assessed:
        total[fault or CLEAN] += 1
        dropped[fault or CLEAN] += not verdict.kept
    return {name: (dropped[name], total[name]) for name in (*FAULTS, CLEAN) if total[name]}
