"""The two-stage dialogue: what is asked, and what is read from the replies (paper, section 3.1; the tags are an interface).

Turn 1 shows the clip and the tools, and the policy decides on each tool. Turn 2 shows what the tools returned and the allowed
labels, and the policy observes, compares candidates and answers. Parsing is total: no text makes it raise.

Decisions are written in one of two dialects: tags, one `<name>yes|no</name>` for each tool (the released checkpoints), or
hermes, one `<tool_call>` with a JSON object for each tool that is wanted (the format of Qwen's function calling).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import numpy as np

from vstar_jax.errors import UserError

Dialect = Literal["tags", "hermes"]

TOOLS = {
    "pose_estimation": "Returns the clip with the skeletons of the people in it drawn on every frame.",
    "person_detection": "Returns the clip with a box drawn around every person in it.",
    "video_explanation": "Returns a short text on what the key frames show.",
    "noun_explanation": "Returns, for each action that may be the answer, the motion that its name stands for.",
}
"""What each tool of a `Decision` returns, as the schemas of the hermes dialect tell it to the policy."""

PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "look": (),
    "annotated": (),
    "explanation": ("explanation",),
    "description": ("description",),
    "ask": ("labels", "label_lines"),
}
"""What each text must have a place for: one of these."""

_TITLE = re.compile(r"^[^:,\n]*:")


@dataclass(frozen=True)
class Prompts:
    """The texts of the two user turns.

    look: turn 1. annotated, explanation, description: turn 2's pieces, one for each kind of tool result. ask: turn 2's
    question with the list of {labels}, in one line with commas between them, or of {label_lines}, one a line, for labels that
    have commas themselves.
    """

    look: str
    annotated: str
    explanation: str
    description: str
    ask: str

    @classmethod
    def load(cls, path: str | Path) -> "Prompts":
        """Reads a YAML file of these texts; UserError when one or a placeholder is missing or is not known."""
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text())
        except OSError:
            raise UserError(f"there is no prompt file {path}: give the path of a YAML file of prompts.") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {str(error).splitlines()[0]}.") from None
        expected = {f.name for f in fields(cls)}
        if not isinstance(content, dict) or set(content) != expected:
            raise UserError(f"{path} must hold exactly the texts {', '.join(sorted(expected))}.")
        for name, text in content.items():
            if _placeholders(text) not in ([{p} for p in PLACEHOLDERS[name]] or [set()]):
                wanted = " or ".join(f"{{{p}}}" for p in PLACEHOLDERS[name]) or "none"
                raise UserError(f"{path}: the text {name} must be a text that uses this placeholder and no other: {wanted}.")
        return cls(**{name: text.strip() for name, text in content.items()})


def _placeholders(text: object) -> set[str] | None:
    """The names in braces of a prompt text; None when it is no text or its braces do not match."""
    try:
        return {field for _, field, _, _ in Formatter().parse(text) if field is not None} if isinstance(text, str) else None
    except ValueError:
        return None


@dataclass(frozen=True)
class Decision:
    """The tools asked for: noun_explanation is the paper's action explanation, video_explanation its description."""

    pose_estimation: bool = False
    person_detection: bool = False
    video_explanation: bool = False
    noun_explanation: bool = False

    def chosen(self) -> tuple[str, ...]:
        """Names of the tools that were asked for."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name))

    def tags(self, dialect: Dialect = "tags") -> str:
        """The decision as the policy writes it."""
        if dialect == "hermes":
            calls = (json.dumps({"name": name, "arguments": {}}) for name in self.chosen())
            return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
        return "".join(f"<{f.name}>{'yes' if getattr(self, f.name) else 'no'}</{f.name}>" for f in fields(self))


@dataclass(frozen=True)
class ToolResult:
    """What the tools returned: the annotated clip uint8 [T, H, W, 3], and texts; None where a tool was not asked.

    failures: sentences on the tools that were asked and gave nothing.
    """

    frames: np.ndarray | None = None
    explanation: str | None = None
    description: str | None = None
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What was read from the last turn: observed sub-motions in order, candidates and their scores, the answer.

    candidates: each written as a name, as "name: more", or as "what it means = name".
    comparisons: candidate -> what the comparison says of it, in the policy's words.
    well_formed: the text is exactly one <think>...</think> followed by one <answer>...</answer>.
    """

    sub_motions: tuple[str, ...]
    candidates: tuple[str, ...]
    scores: Mapping[str, float]
    comparisons: Mapping[str, str]
    answer: str | None
    well_formed: bool


def first_messages(prompts: Prompts, dialect: Dialect = "tags") -> list[dict[str, Any]]:
    """Turn 1's user message: the clip and the tools; in the hermes dialect a system message with the schemas goes before."""
    user = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": prompts.look}]}
    if dialect == "tags":
        return [user]
    return [{"role": "system", "content": [{"type": "text", "text": _system_text()}]}, user]


def _system_text() -> str:
    """The tools and how to call them (Hermes function calling): a JSON schema a line, between <tools> tags."""
    empty = {"type": "object", "properties": {}, "required": []}
    schemas = (
        json.dumps({"type": "function", "function": {"name": name, "description": text, "parameters": empty}})
        for name, text in TOOLS.items()
    )
    return "\n".join(
        (
            "These tools are at hand, each with its JSON schema:",
            "<tools>",
            *schemas,
            "</tools>",
            "Ask for a tool by writing its name and arguments as JSON between tags, with a pair of tags for each tool:",
            "<tool_call>",
            '{"name": "NAME", "arguments": {}}',
            "</tool_call>",
        )
    )


def second_messages(
    prompts: Prompts, result: ToolResult, labels: Sequence[str], dialect: Dialect = "tags"
) -> list[dict[str, Any]]:
    """Turn 2's user message: the annotated clip if there is one, the tools' texts, and the allowed labels."""
    content: list[dict[str, Any]] = []
    texts: list[str] = []
    if result.frames is not None:
        content.append({"type": "video"})
        texts.append(prompts.annotated)
    if result.explanation is not None:
        texts.append(prompts.explanation.format(explanation=result.explanation))
    if result.description is not None:
        texts.append(prompts.description.format(description=result.description))
    texts += result.failures
    if dialect == "hermes":
        texts = [_response(text) for text in texts]
    texts.append(prompts.ask.format(labels=", ".join(labels), label_lines="\n".join(labels)))
    content.append({"type": "text", "text": "\n".join(texts)})
    return [{"role": "user", "content": content}]


def _response(text: str) -> str:
    """A tool's text between tags that nothing in it can close."""
    while (stripped := re.sub("</?tool_response>", "", text, flags=re.IGNORECASE)) != text:
        text = stripped
    return f"<tool_response>\n{text}\n</tool_response>"


def assistant(text: str) -> dict[str, Any]:
    """A reply as a message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def parse_decision(text: str, dialect: Dialect = "tags") -> Decision:
    """The decision in a turn-1 reply: a tag that is missing, empty or contradicts itself counts as no, and so does a call
    that is not a JSON object with the name of a tool and, if any, an object of arguments.
    """
    flat = re.sub(r"\s+", "", text).lower()
    if dialect == "hermes":
        called = {_called(body) for body in re.findall("<tool_call>((?:(?!<tool_call>).)*?)</tool_call>", flat)}
        return Decision(**{f.name: f.name in called for f in fields(Decision)})
    values = {f.name: set(re.findall(rf"<{f.name}>(\w*)</{f.name}>", flat)) for f in fields(Decision)}
    return Decision(**{name: found == {"yes"} for name, found in values.items()})


def _called(body: str) -> str | None:
    """The name in the JSON object of a tool call, or None."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("arguments", {}), dict):
        return None
    name = call.get("name")
    return name if isinstance(name, str) else None


def parse_reply(text: str) -> Reply:
    """Reads a turn-2 reply; what is not there is empty, and case and the number of blanks do not count."""
    shape = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", text, flags=re.DOTALL | re.IGNORECASE)
    well_formed = shape is not None and not re.search(r"</?(think|answer)>", shape[1] + shape[2], flags=re.IGNORECASE)
    answers = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL | re.IGNORECASE)
    parts = sections(text)
    candidates = (_plain(item.rpartition("=")[2].partition(":")[0]) for item in _listed(_TITLE.sub("", parts.get(2, ""))))
    scores: dict[str, float] = {}
    comparisons: dict[str, str] = {}
    for name, rest in _items(parts.get(3, "")):
        comparisons.setdefault(name, rest.strip())
        if number := re.search(r"[0-9]+(\.[0-9]+)?", rest):
            scores.setdefault(name, float(number[0]))
    return Reply(
        sub_motions=tuple(dict.fromkeys(name for name, _ in _items(parts.get(1, "")))),
        candidates=tuple(dict.fromkeys(name for name in candidates if name)),
        scores=scores,
        comparisons=comparisons,
        answer=answers[0].strip() if len(answers) == 1 and answers[0].strip() else None,
        well_formed=well_formed,
    )


def sections(text: str) -> dict[int, str]:
    """Section number -> its text in the thoughts of a reply, for headings [1], [2], ...; of one number the first counts."""
    thoughts = re.split("</think>|<answer>", text, maxsplit=1, flags=re.IGNORECASE)[0]
    parts = re.split(r"\[([1-9])\]", thoughts)
    found: dict[int, str] = {}
    for number, body in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(int(number), body)
    return found


def _listed(section: str) -> list[str]:
    """The names of a list: its "- name" items where it has any, since a name may have commas, or what commas part."""
    items = [item.partition("\n")[0] for item in re.split(r"(?:^|\s)-\s", section)[1:]]
    return items or re.split(r"[,\n]", section)


def _items(section: str) -> list[tuple[str, str]]:
    """Name and rest of the "- name: rest" or "- what it means = name: rest" items of a section, in lines or in one."""
    found: list[tuple[str, str]] = []
    for part in re.split(r"(?:^|\s)-\s", section)[1:]:
        before, colon, rest = part.partition(":")
        name = _plain(before.rpartition("=")[2])
        if colon and name:
            found.append((name, rest))
    return found


def _plain(name: str) -> str:
    return " ".join(name.split()).strip(" .-").lower()


def same_label(a: str, b: str) -> bool:
    """Whether two labels are equal but for case, blanks, underscores and line breaks (the released scorer's rule)."""
    return bool(_bare(a)) and _bare(a) == _bare(b)


def _bare(label: str) -> str:
    return re.sub(r"[\s_]+", "", label.lower())
