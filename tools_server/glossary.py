"""Explains actions: what the user's file says, else what the cache holds, else what the LLM answers."""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools_server import cache, prompts
from tools_server.failure import ToolFailure
from tools_server.flights import Flights
from tools_server.llm_proxy import LlmProxy
from tools_server.settings import SettingsError
from vstar_jax.tools.protocol import clean

CHARS = 400
"""Of an explanation, at most."""
UNKNOWN = "no explanation is known."


def read(path: Path) -> dict[str, str]:
    """Label, as `plain` spells it -> explanation, from a JSON file {"0": "Label: explanation", ...} or {label: explanation}.

    Raises SettingsError when the file cannot be read or has another form.
    """
    try:
        content = json.loads(path.read_text())
    except OSError:
        raise SettingsError(f"there is no glossary at {path}: give the path of a JSON file.") from None
    except ValueError:
        raise SettingsError(f"{path} is not valid JSON: correct it or give another glossary.") from None
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise SettingsError(f'{path} must hold explanations as {{label: text}} or {{"0": "label: text"}}: correct it.')
    pairs = [_pair(name, value) for name, value in content.items()]
    if pairs and not any(text for _, text in pairs):
        raise SettingsError(f"{path} names {len(pairs)} labels and explains none: give a file with explanations.")
    return {plain(label): _line(text) for label, text in pairs if text}


def _pair(name: str, value: str) -> tuple[str, str]:
    if not name.isdigit():
        return name, value.strip()
    label, _, text = value.partition(":")
    return label.strip(), text.strip()


def plain(label: str) -> str:
    """A label without what spellings differ in: case, blanks, underscores, hyphens and punctuation at its end."""
    return re.sub(r"[\s_-]+", "", label.lower()).rstrip(".,;:!?")


def _line(text: str) -> str:
    return " ".join(clean(text).split())


class Explainer:
    """The action_explanation tool."""

    def __init__(
        self, glossary: Mapping[str, str], llm: LlmProxy | None, results: cache.Cache, flights: Flights, seconds: float
    ):
        """seconds: that the LLM has for a label, whoever waits for it."""
        self._glossary, self._llm, self._cache, self._flights, self._seconds = glossary, llm, results, flights, seconds
        self._prompt = prompts.load("explain")

    @property
    def backend(self) -> str:
        """Who explains, for people."""
        names = ["glossary"] * bool(self._glossary or not self._llm) + ([self._llm.model] if self._llm else [])
        return "+".join(names)

    async def explain(self, labels: Sequence[str]) -> tuple[str, str]:
        """The line "- label: explanation" of each label, in order, and who spoke.

        Without an LLM a label that nobody knows gets a line that says so. Raises ToolFailure when no label is known then, and
        when the LLM fails for one.
        """
        if not labels:
            raise ToolFailure("error", "no labels were given to explain.")
        distinct = {label: None for label in map(_line, labels)}
        known = {label: self._glossary.get(plain(label)) for label in distinct}
        unknown = [label for label, text in known.items() if text is None]
        if self._llm:
            known.update(zip(unknown, await self._asked(self._llm, unknown), strict=True))
        elif len(unknown) == len(known):
            raise ToolFailure("unavailable", "the glossary knows none of the labels, and there is no language model to ask.")
        speakers = ["glossary"] * (len(unknown) < len(known)) + ([self._llm.model] if self._llm and unknown else [])
        lines = (f"- {label}: {known[label] or UNKNOWN}" for label in map(_line, labels))
        return "\n".join(lines), "+".join(speakers)

    async def _asked(self, llm: LlmProxy, labels: Sequence[str]) -> list[str]:
        tasks = [asyncio.create_task(self._one(llm, label)) for label in labels]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, llm: LlmProxy, label: str) -> str:
        key = cache.key("explain", plain(label), llm.model, self._prompt.template, CHARS)
        if (kept := self._cache.get(key)) is not None:
            return kept.decode()

        async def ask() -> str:
            request = self._prompt.substitute(label=json.dumps(label, ensure_ascii=False))
            read = lambda reply: _line(prompts.sentences(reply, 2, CHARS))  # noqa: E731
            text = await llm.ask([{"type": "text", "text": request}], read, self._seconds)
            await asyncio.to_thread(self._cache.put, key, text.encode())
            return text

        return await self._flights.join(key, ask)
