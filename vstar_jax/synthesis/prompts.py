"""The texts that a teacher and a judge are asked with, from a YAML file of the user's choice."""

from dataclasses import dataclass, fields
from pathlib import Path
from string import Formatter

from vstar_jax.errors import UserError

PLACEHOLDERS = {
    "first": set[str](),
    "second": {"labels"},
    "hint": {"label"},
    "annotated": set[str](),
    "explanation": {"explanation"},
    "description": {"description"},
    "judge": {"label", "first", "tools", "second"},
}


@dataclass(frozen=True)
class TeacherPrompts:
    """first: asks which tools; second: asks for the analysis over {labels}; hint: tells the {label}; annotated, explanation,
    description: go before what the tools returned; judge: asks for a verdict on a dialogue. Braces of JSON are written twice.
    """

    first: str
    second: str
    hint: str
    annotated: str
    explanation: str
    description: str
    judge: str

    @classmethod
    def load(cls, path: str | Path) -> "TeacherPrompts":
        """Reads the file; UserError when it is not there or a text or a placeholder of it is missing or not known."""
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            raise UserError(f"{path} is no YAML file of prompts: give one like configs/synthesis/prompts.yaml.") from None
        if not isinstance(content, dict) or set(content) != {f.name for f in fields(cls)}:
            raise UserError(f"{path} must hold exactly the texts {', '.join(PLACEHOLDERS)}.")
        for name, text in content.items():
            if not isinstance(text, str) or _places(text) != PLACEHOLDERS[name]:
                wanted = ", ".join(f"{{{place}}}" for place in sorted(PLACEHOLDERS[name])) or "none"
                raise UserError(f"{path}: the text {name} must have these placeholders and no other: {wanted}.")
        return cls(**{name: text.strip() for name, text in content.items()})


def _places(text: str) -> set[str] | None:
    try:
        return {field for _, field, _, _ in Formatter().parse(text) if field is not None}
    except ValueError:
        return None
