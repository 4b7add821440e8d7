"""What a teacher writes, as data: read from its JSON, or from a dialogue that it wrote itself, and written as our dialogue."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from vstar_jax.data.assessment import CANDIDATES
from vstar_jax.dialogue import Decision, Dialect, parse_decision, parse_reply, same_label
from vstar_jax.synthesis.endpoint import ReplyError


@dataclass(frozen=True)
class First:
    """Turn 1: why, and which tools."""

    thought: str
    decision: Decision


@dataclass(frozen=True)
class SubMotion:
    """A part of the body, or a movement, and what was seen of it."""

    name: str
    seen: str


@dataclass(frozen=True)
class Candidate:
    """A label that may be the answer, how well it fits from 0 to 1, and why."""

    label: str
    score: float
    because: str


@dataclass(frozen=True)
class Second:
    """Turn 2: the motion taken apart, the candidates compared, why the best one is it, and the answer."""

    sub_motions: tuple[SubMotion, ...]
    candidates: tuple[Candidate, ...]
    decision: str
    answer: str


def read_first(text: str) -> First:
    """Turn 1 from JSON {"thought": text, "tools": [names]}. ReplyError says what is wrong."""
    item = json_object(text)
    thought, tools = _line(item, "thought"), item.get("tools")
    known = [f.name for f in fields(Decision)]
    if not isinstance(tools, list) or not all(isinstance(tool, str) and tool in known for tool in tools):
        raise ReplyError(f"`tools` must be a list of {', '.join(known)}")
    return First(thought, Decision(**dict.fromkeys(tools, True)))


def read_second(text: str, labels: Sequence[str]) -> Second:
    """Turn 2 from JSON {"sub_motions": [{name, seen}], "candidates": [{label, score, because}], "decision", "answer"}; labels
    are spelt as the list spells them. ReplyError says what is wrong.
    """
    item = json_object(text)
    moves = [SubMotion(_name(part, "name"), _line(part, "seen")) for part in _parts(item, "sub_motions")]
    found = [
        Candidate(_spelt(_name(part, "label"), labels), _score(part), _line(part, "because"))
        for part in _parts(item, "candidates")
    ]
    names = [candidate.label for candidate in found]
    if not CANDIDATES[0] <= len(set(names)) == len(names) <= CANDIDATES[1]:
        raise ReplyError(f"there must be {CANDIDATES[0]} or {CANDIDATES[1]} candidates, all different")
    return Second(tuple(moves), tuple(found), _line(item, "decision"), _spelt(_name(item, "answer"), labels))


def write_first(first: First, dialect: Dialect) -> str:
    """Turn 1 as the policy is to write it; `parse_decision` reads the same decision back."""
    return f"<think>{first.thought}</think>{first.decision.tags(dialect)}"


def write_second(second: Second) -> str:
    """Turn 2 as the policy is to write it, in the sections that `parse_reply` reads."""
    observed = "\n".join(f"- {part.name}: {part.seen}" for part in second.sub_motions)
    named = "\n".join(f"- {candidate.label}" for candidate in second.candidates)
    compared = "\n".join(f"- {c.label}: {c.score:.2f}, {c.because}" for c in second.candidates)
    return (
        f"<think>[1] Observed body parts and movements:\n{observed}\n[2] Candidates:\n{named}\n[3] Comparison:\n{compared}\n"
        f"[4] Decision: {second.decision}</think>\n<answer>{second.answer}</answer>"
    )


def check_written(second: Second, text: str) -> None:
    """ReplyError when `parse_reply` would read something else, as from names that look like the format itself."""
    reply = parse_reply(text)
    moves = [" ".join(part.name.split()).strip(" .-").lower() for part in second.sub_motions]
    if not reply.well_formed or list(reply.sub_motions) != list(dict.fromkeys(moves)):
        raise ReplyError("names of sub-motions must be short words without brackets or colons")
    if len(reply.candidates) != len(second.candidates) or not same_label(reply.answer or "", second.answer):
        raise ReplyError("labels must be written as the list spells them")


def own_first(text: str, dialect: Dialect) -> str:
    """Turn 1 of a policy that writes dialogues itself. ReplyError when it asks for nothing and says nothing."""
    if not parse_decision(text, dialect).chosen() and "</think>" not in text.lower():
        raise ReplyError("it neither thinks nor asks for a tool")
    return text.strip()


def own_second(text: str) -> str:
    """Turn 2 of a policy that writes dialogues itself. ReplyError when it is not one think part and one answer."""
    reply = parse_reply(text)
    if not reply.well_formed or not reply.answer:
        raise ReplyError("it is not one think part with one answer after it")
    return text.strip()


def structure(text: str) -> dict[str, Any]:
    """What `parse_reply` reads from turn 2, as JSON for people and programs that do not know the format."""
    return asdict(parse_reply(text))


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in a reply, alone or in a fenced block after other words."""
    fenced = re.findall(r"```(?:json)?\s*(\{.*?\})\s*```", text, flags=re.DOTALL)
    whole = fenced[-1] if fenced else text[text.find("{") : text.rfind("}") + 1]
    try:
        item = json.loads(whole)
    except (ValueError, RecursionError):
        raise ReplyError("it is not one JSON object") from None
    if not isinstance(item, dict):
        raise ReplyError("it is not one JSON object")
    return item


def _parts(item: dict[str, Any], name: str) -> list[dict[str, Any]]:
    parts = item.get(name)
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise ReplyError(f"`{name}` must be a list of objects")
    return parts


def _line(item: dict[str, Any], name: str) -> str:
    """A text in one line, without what the dialogue's own format is made of."""
    text = item.get(name)
    if not isinstance(text, str) or not text.strip():
        raise ReplyError(f"`{name}` must be a text")
    text = re.sub(r"<[^<>]*>|\[[1-9]\]", " ", text)
    return re.sub(r"(^|\s)-\s", r"\1", " ".join(text.split())).strip()


def _name(item: dict[str, Any], name: str) -> str:
    return _line(item, name).strip(" .:-")


def _score(item: dict[str, Any]) -> float:
    score = item.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise ReplyError("`score` must be a number from 0 to 1")
    return float(score)


def _spelt(name: str, labels: Sequence[str]) -> str:
    """The label of the list that this is; ReplyError when it is none."""
    for label in labels:
        if same_label(name, label):
            return label
    raise ReplyError("a candidate or the answer is not in the list of labels")
