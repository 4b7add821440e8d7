"""Settings as text: fills a tree of frozen dataclasses from YAML and from flags, and describes it.

It knows no particular tree (`vstar_jax.config` holds ours). A setting is a leaf of the tree and its key is the dotted path
to it; its type is the field's annotation and its help is its line in the docstring's Args.
"""

import dataclasses
import difflib
import inspect
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from vstar_jax.errors import UserError

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A leaf of the tree: dotted key, annotated type, present value and one line of help."""

    key: str
    type: Any
    value: Any
    help: str


def settings(tree: Any, prefix: str = "") -> Iterator[Setting]:
    """The leaves of a dataclass tree in the order of their declaration."""
    types, helps = get_type_hints(type(tree)), _field_help(type(tree))
    for field in dataclasses.fields(tree):
        key, value = prefix + field.name, getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{key}.")
        else:
            yield Setting(key, types[field.name], value, helps[field.name])


def _field_help(cls: type) -> dict[str, str]:
    """Field name -> its text in the Args section of the docstring, on one line."""
    _, _, section = inspect.getdoc(cls).partition("Args:\n")  # type: ignore[union-attr]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def update(tree: Tree, values: Mapping[str, Any], source: str) -> Tree:
    """`tree` with the settings of `values` (dotted key -> value as YAML gives it) replaced.

    source: where the values come from, for the error. Raises UserError for an unknown key and for a wrong type.
    """
    known = {s.key: s for s in settings(tree)}
    for key in values:
        if key not in known:
            raise UserError(f"{source}: there is no setting {key}{_suggestion(key, known)}")
    return _replace(tree, {key: _coerce(known[key], value, source) for key, value in values.items()})


def _replace(tree: Tree, values: Mapping[str, Any]) -> Tree:
    here: dict[str, Any] = {key: value for key, value in values.items() if "." not in key}
    for branch in {key.partition(".")[0] for key in values if "." in key}:
        below = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{branch}.")}
        here[branch] = _replace(getattr(tree, branch), below)
    return dataclasses.replace(tree, **here)  # type: ignore[type-var]


def _suggestion(key: str, known: Mapping[str, Setting]) -> str:
    below = [k for k in known if k.startswith(f"{key}.")]
    if below:
        return f" with a value of its own, it is a group: set {below[0]} or another of it."
    leaf = key.rpartition(".")[2]
    close = [k for k in known if k.rpartition(".")[2] == leaf] or difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {' or '.join(close)}?" if close else ": --help lists all."


def type_name(annotation: Any) -> str:
    """What a user may write for a setting of this type."""
    if get_origin(annotation) is Literal:
        return " or ".join(get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"a list of {type_name(get_args(annotation)[0]).removeprefix('an ').removeprefix('a ')}s"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text"}[annotation]


def _coerce(setting: Setting, value: Any, source: str) -> Any:
    try:
        return _convert(setting.type, value)
    except (TypeError, ValueError):
        raise UserError(f"{source}: {setting.key} is {value!r}, but must be {type_name(setting.type)}.") from None


def _convert(annotation: Any, value: Any) -> Any:
    """`value` as the annotated type: an integer passes for a number and a list for a tuple, and nothing else is converted."""
    if get_origin(annotation) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(value)
        return tuple(_convert(get_args(annotation)[0], item) for item in value)
    if annotation is float and not isinstance(value, bool):
        return float(value)  # also from text, since YAML reads 1e-3 (without a point) as text
    if value not in get_args(annotation) if get_origin(annotation) is Literal else type(value) is not annotation:
        raise TypeError(value)
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of nested settings as dotted key -> value; UserError when it is missing or is not a mapping."""
    try:
        content = yaml.safe_load(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"there is no configuration file {path}: give the path of a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{path} is not valid YAML{where}: correct it or start from configs/default.yaml.") from None
    if not isinstance(content or {}, dict):
        raise UserError(f"{path} must hold settings such as `seed: 0`, not {content!r}.")
    return dict(_flatten(content or {}))


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def write_yaml(tree: Any, path: Path) -> None:
    """Writes all settings of `tree`; a reader sees the old file or the new one, never half of one."""
    content: dict[str, Any] = {}
    for setting in settings(tree):
        *groups, name = setting.key.split(".")
        at = content
        for group in groups:
            at = at.setdefault(group, {})
        at[name] = list(setting.value) if isinstance(setting.value, tuple) else setting.value
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(yaml.safe_dump(content, sort_keys=False))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_flags(tree: Any, argv: Sequence[str]) -> tuple[list[Path], dict[str, Any]]:
    """Command line -> (the files of --config in order, dotted key -> value).

    A flag is --key=value or --key value; a switch may stand alone for true; dashes in a key pass for underscores.
    """
    types = {s.key: s.type for s in settings(tree)}
    files: list[Path] = []
    values: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"command line: {flag!r} is not a flag: write settings as --key=value.")
        name, equals, text = flag[2:].partition("=")
        key = name.replace("-", "_")
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif types.get(key) is bool:
                text = "true"
            elif key in types or key == "config":
                raise UserError(f"command line: --{name} needs a value: write --{name}=value.")
        if key == "config":
            files.append(Path(text))
        else:
            values[key] = _parse_text(types.get(key), text)
    return files, values


def _parse_text(annotation: Any, text: str) -> Any:
    if annotation is str or get_origin(annotation) is Literal:
        return text
    if get_origin(annotation) is tuple and not text.startswith("["):
        text = f"[{text}]"
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def describe(tree: Any) -> str:
    """The settings as the help of a command line."""
    wrapper = textwrap.TextWrapper(110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(f"  --{s.key}={_text(s.value)}\n{wrapper.fill(f'{s.help} ({type_name(s.type)})')}" for s in settings(tree))


def table(tree: Any) -> str:
    """The settings as a Markdown table."""
    rows = [(f"`{s.key}`", f"`{_text(s.value)}`", s.help) for s in settings(tree)]
    lines = [("setting", "default", "meaning"), ("---",) * 3, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _text(value: Any) -> str:
    """A value as a flag takes it."""
    if isinstance(value, tuple):
        return f"[{','.join(map(_text, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
