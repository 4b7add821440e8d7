"""Whether a dialogue is fit to learn from, by rules: pure functions of what was written and of what the tools saw.

Each rule gives a sentence on what is wrong, or None. The paper's data assessment asks a model; synthesis asks both.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from vstar_jax.dialogue import Dialect, Reply, parse_decision, parse_reply, same_label, sections

CANDIDATES = (2, 3)
"""How many candidates a comparison has, from and to."""
BODY = frozenset(
    (
        "head",
        "neck",
        "face",
        "mouth",
        "eye",
        "shoulder",
        "arm",
        "elbow",
        "forearm",
        "wrist",
        "hand",
        "finger",
        "palm",
        "fist",
        "chest",
        "torso",
        "trunk",
        "back",
        "waist",
        "hip",
        "leg",
        "thigh",
        "knee",
        "shin",
        "calf",
        "ankle",
        "foot",
        "toe",
    )
)
"""Parts of the body, whose mention in the verdict must come from the observations."""
PLURALS = {"feet": "foot"}
NUMBERS = dict(one=1, single=1, two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, seventeen=17)
_COUNT = rf"\b(\d{{1,3}}|{'|'.join(NUMBERS)})\s+(?:\w+\s+)?"
_PEOPLE = re.compile(_COUNT + r"(?:persons?|people|figures?|men|man|women|woman|players?|individuals?)\b")
_JOINTS = re.compile(_COUNT + r"(?:joints?|key ?points?)\b")
LEAST_ID = 4
"""Letters of the shortest file name that can tell anything: shorter ones stand in ordinary words."""


@dataclass(frozen=True)
class Item:
    """A dialogue that was made. The first five fields are those of `data.recorded.Dialogue`.

    path: of the clip, as its list spells it; label: what is shown; labels: what could be answered; structure: what the second
    reply says, for programs that do not know the format; tools: how the calls ended; persons: fewest and most people that the
    tools saw in a frame, joints: those that they saw of a person, None where none looked.
    """

    path: str
    first: str
    second: str
    explanation: str = ""
    description: str = ""
    label: str = ""
    labels: tuple[str, ...] = ()
    structure: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    persons: tuple[int, int] | None = None
    joints: int | None = None


@dataclass(frozen=True)
class Rules:
    """What the rules need to know beside the dialogue.

    dialect: in which the first reply decides; motions: names of sub-motions that a verdict may mention only if they were
    observed.
    """

    dialect: Dialect = "tags"
    motions: Collection[str] = BODY


@dataclass(frozen=True)
class Verdict:
    """What was found: rule -> sentence, empty for a dialogue that is kept."""

    path: str
    label: str
    problems: Mapping[str, str]

    @property
    def kept(self) -> bool:
        """Whether the dialogue is fit to learn from."""
        return not self.problems


Rule = Callable[[Item, Reply, Rules], str | None]


def parses(item: Item, reply: Reply, rules: Rules) -> str | None:
    """The second reply is one think part, with observations and candidates, and one answer; the first asks for what it got."""
    if not reply.well_formed or reply.answer is None:
        return "the second reply is not one think part with one answer after it."
    if not reply.sub_motions or not reply.candidates:
        return "the second reply has no observations or no candidates."
    if set(item.tools) - set(parse_decision(item.first, rules.dialect).chosen()):
        return "tools were called that the first reply does not ask for."
    return None


def answers(item: Item, reply: Reply, rules: Rules) -> str | None:
    """The answer is the label."""
    if reply.answer is not None and not same_label(reply.answer, item.label):
        return f"the answer is {reply.answer!r}, but the clip shows {item.label!r}."
    return None


def candidates(item: Item, reply: Reply, rules: Rules) -> str | None:
    """There are two or three candidates, all of the list, the label among them, and none scores higher than it."""
    low, high = CANDIDATES
    if not low <= len(reply.candidates) <= high:
        return f"there are {len(reply.candidates)} candidates and must be {low} to {high}."
    if not any(same_label(name, item.label) for name in reply.candidates):
        return "the label is not among the candidates."
    if item.labels and not all(any(same_label(name, label) for label in item.labels) for name in reply.candidates):
        return "a candidate is not in the list of labels."
    scores = {name: score for name, score in reply.scores.items() if any(same_label(name, c) for c in reply.candidates)}
    own = [score for name, score in scores.items() if same_label(name, item.label)]
    if own and max(scores.values()) > own[0]:
        return "another candidate scores higher than the label."
    return None


def grounded(item: Item, reply: Reply, rules: Rules) -> str | None:
    """The sub-motions that the verdict on the label names were observed."""
    parts = sections(item.second)
    known = set(map(_plain, rules.motions))
    seen = _terms(parts.get(1, ""), known)
    argued = " ".join(text for name, text in reply.comparisons.items() if same_label(name, item.label))
    unseen = _terms(f"{argued} {parts.get(4, '')}", known) - seen
    return f"the verdict names what was not observed: {', '.join(sorted(unseen))}." if unseen else None


def silent(item: Item, reply: Reply, rules: Rules) -> str | None:
    """No label is named before the candidates, and no path or file name anywhere."""
    before = f"{item.first}\n{sections(item.second).get(1, '')}"
    if _holds(before, item.label):
        return "the label is named before the candidates."
    path = PurePosixPath(item.path.replace("\\", "/"))
    for name in (item.path, path.name, path.stem):
        if (
            len(name) >= LEAST_ID
            and not same_label(name, item.label)
            and name.lower() in f"{item.first}\n{item.second}".lower()
        ):
            return "the clip's path or name is written out."
    return None


def counted(item: Item, reply: Reply, rules: Rules) -> str | None:
    """Numbers of people and joints are those that the tools found, where they looked."""
    text = f"{item.first}\n{item.second}".lower()
    if item.persons is not None:
        fewest, most = item.persons
        for number in _numbers(_PEOPLE, text):
            if not fewest <= number <= most:
                return f"it counts {number} people, but the tools saw {fewest} to {most} in a frame."
    if item.joints is not None:
        for number in _numbers(_JOINTS, text):
            if number > item.joints:
                return f"it counts {number} joints, but the tools saw {item.joints} of a person."
    return None


RULES: dict[str, Rule] = {
    "parses": parses,
    "answer": answers,
    "candidates": candidates,
    "grounded": grounded,
    "leak": silent,
    "counts": counted,
}
"""Rule by its name in the report, in the order in which they are told."""


def assess(item: Item, rules: Rules) -> Verdict:
    """All rules on one dialogue."""
    reply = parse_reply(item.second)
    found = {name: rule(item, reply, rules) for name, rule in RULES.items()}
    return Verdict(item.path, item.label, {name: problem for name, problem in found.items() if problem})


def _terms(text: str, known: Collection[str]) -> set[str]:
    """The known names, of one word or of several, that stand in a text."""
    words = f" {_plain(text)} "
    return {name for name in known if f" {name} " in words}


def _plain(text: str) -> str:
    return " ".join(map(_singular, re.findall(r"[a-z]+", text.lower())))


def _singular(word: str) -> str:
    return PLURALS.get(word) or (word[:-1] if word.endswith("s") and len(word) > 3 else word)


def _holds(text: str, label: str) -> bool:
    """Whether a label stands in a text as words of its own, however its blanks are written."""
    words = [re.escape(word) for word in re.split(r"[\s_]+", label.lower()) if word]
    return bool(words) and re.search(r"(?<!\w)" + r"[\s_]*".join(words) + r"(?!\w)", text.lower()) is not None


def _numbers(pattern: re.Pattern[str], text: str) -> list[int]:
    return [NUMBERS[found] if found in NUMBERS else int(found) for found in pattern.findall(text)]
