"""One episode on one video file, by a checkpoint and with the tools: what scripts/predict.py plays, prints and writes as JSON.

The clip is an `Episode` without a known answer; it goes through the rollout that training and evaluation use. `strip` draws it.
"""

import dataclasses
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from vstar_jax.config import Config, resolve
from vstar_jax.data.chat import Chat
from vstar_jax.data.clips import label_key
from vstar_jax.data.datasets import STICK_MOTION
from vstar_jax.data.task import Episode
from vstar_jax.data.video import Clip
from vstar_jax.dialogue import Decision, Prompts, ToolResult, same_label
from vstar_jax.errors import UserError
from vstar_jax.evaluation.checkpoint import restore
from vstar_jax.rollout.episode import Sampling
from vstar_jax.rollout.player import Played, Player
from vstar_jax.sharding import row_devices
from vstar_jax.tools.host import Exchange, Tools
from vstar_jax.tools.launch import open_tools, serve
from vstar_jax.tools.protocol import SENTENCES, clean

if TYPE_CHECKING:
    from rich.console import RenderableType

DRAWN = {"pose_estimation": "the clip with joints drawn on it", "person_detection": "the clip with boxes drawn on it"}


@dataclass(frozen=True)
class Watched:
    """A clip that the policy has named.

    name: of the file; labels: the names that it could choose from; exchanges: what passed with the tools after each reply but
    the last, in order; turn_tokens: room of a turn's input; seconds: by part, load (the policy), server (until it answers),
    clip, compile, tools, and policy (all the rest of the episode).
    """

    name: str
    clip: Clip
    labels: tuple[str, ...]
    played: Played
    exchanges: tuple[Exchange, ...]
    turn_tokens: int
    seconds: Mapping[str, float]

    @property
    def label(self) -> str | None:
        """The label that the answer means, or None: there is no answer that can be read, or it is none of the labels."""
        answer = self.played.reply.answer or ""
        return next((label for label in self.labels if same_label(label, answer)), None)

    @property
    def drawn(self) -> np.ndarray | None:
        """The clip as the tools drew on it last, uint8 [T, H, W, 3], or None."""
        frames = [e.outcome.result.frames for e in self.exchanges if e.outcome.result.frames is not None]
        return frames[-1] if frames else None

    def candidates(self) -> list[tuple[str, float | None, str]]:
        """Name, score and comparison of what the policy weighed; a name is spelt as in `labels` where it is one of them."""
        reply = self.played.reply
        names = dict.fromkeys((*reply.candidates, *reply.scores, *reply.comparisons))
        spelt = {name: next((label for label in self.labels if same_label(label, name)), name) for name in names}
        return [(spelt[name], reply.scores.get(name), reply.comparisons.get(name, "")) for name in names]

    def summary(self) -> dict[str, Any]:
        """The episode as JSON; texts stand as they were written."""
        reply = self.played.reply
        results = [e.outcome.result for e in self.exchanges]
        return {
            "clip": self.name,
            "frames": len(self.clip.frames),
            "fps": self.clip.fps,
            "labels": self.labels,
            "answer": reply.answer,
            "label": self.label,
            "well_formed": reply.well_formed,
            "sub_motions": reply.sub_motions,
            "candidates": [{"name": n, "score": s, "comparison": c} for n, s, c in self.candidates()],
            "tools": dict(self.played.statuses),
            "explanation": next((r.explanation for r in results if r.explanation is not None), None),
            "description": next((r.description for r in results if r.description is not None), None),
            "turns": self.played.turns,
            "seconds": dict(self.seconds),
        }


def check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels without blanks around them; UserError for fewer than two and for one that is there twice."""
    found = tuple(label.strip() for label in labels if label.strip())
    if len(found) < 2:
        raise UserError(f"{len(found) or 'no'} label is given, which leaves nothing to recognise: give two or more.")
    for n, label in enumerate(found):
        for before in found[:n]:
            if same_label(before, label):
                raise UserError(f"the labels {before!r} and {label!r} are one and the same: give each name once.")
    return found


def read_clip(path: Path, config: Config) -> Clip:
    """The frames that a policy of `config` sees, read in a process that can be killed; UserError when there are none."""
    from vstar_jax.data.decoding import Decoder

    if not path.is_file():
        raise UserError(f"there is no file {path}: give the path of a video.")
    frames = config.video.frames
    with Decoder(1) as decoder:
        return decoder.read(path, frames, exact=frames if config.data.dataset == STICK_MOTION else None)


def watch(
    checkpoint: str,
    config: Config,
    mesh: Mesh,
    path: Path,
    labels: Sequence[str],
    folder: Path,
    meanings: Mapping[str, str] | None = None,
) -> Watched:
    """Plays the episode of the video at `path`.

    checkpoint: as in `checkpoint.config_of`, whose config this takes; folder: of the log and the cache of a tools server that
    is started; meanings: label -> explanation, what that server explains in the place of StickMotion's own names. Nobody has
    annotated the file: with `tools.source=annotations` a policy for recorded videos gets the meanings and no other tool, and
    one for StickMotion asks the server all the same. UserError when the clip or the policy cannot be read, there are no tools,
    or the labels do not fit the config's shapes.
    """
    seconds: dict[str, float] = {}
    if config.data.dataset == STICK_MOTION:
        config = dataclasses.replace(config, tools=dataclasses.replace(config.tools, source="server"))
    labels = check_labels(labels)
    with _timed(seconds, "clip"):
        clip = read_clip(path, config)
    with _timed(seconds, "load"):
        chat = Chat(resolve(config.policy.path), config.video)
        graphdef, state = restore(checkpoint, config, mesh)
    known = partial(_known, labels, meanings or {})
    episode = Episode(path.name, "", clip.frames, clip.fps, labels, answer="", tools=known)
    sampling = Sampling(config.rollout.max_new_tokens, config.evaluation.temperature, turns=config.rollout.turns)
    started = time.perf_counter()
    with _tools(config, folder, meanings) as tools:
        seconds["server"] = time.perf_counter() - started
        prompts = Prompts.load(resolve(config.data.prompts))
        player = Player(graphdef, chat, prompts, tools, config, mesh, sampling, rows=row_devices(mesh))
        with _timed(seconds, "policy"), _compiling(seconds):
            (played,) = player.play(player.weights(state), [episode], [0])
    seconds["tools"] = player.seconds["tools"]
    seconds["policy"] -= seconds["compile"] + seconds["tools"]
    exchanges = (player.host.exchanges.get((0, turn)) for turn in range(1, len(played.turns)))
    there = tuple(e for e in exchanges if e is not None)
    return Watched(path.name, clip, labels, played, there, config.rollout.turn_tokens, seconds)


def _known(labels: Sequence[str], meanings: Mapping[str, str], asked: Decision) -> ToolResult:
    """What is known without a server."""
    texts = {label_key(label): text for label, text in meanings.items()}
    lines = [f"- {label}: {texts[key]}" for label in labels if (key := label_key(label)) in texts]
    return ToolResult(explanation="\n".join(lines) if asked.noun_explanation and lines else None)


@contextmanager
def _tools(config: Config, folder: Path, meanings: Mapping[str, str] | None) -> Iterator[Tools]:
    asked = config.tools
    if meanings is not None and asked.url:
        raise UserError(
            f"the server at tools.url {asked.url} has explanations of its own: start it with --glossary=FILE and leave "
            "--meanings out, or leave tools.url out."
        )
    with ExitStack() as stack:
        if meanings is not None and config.data.dataset == STICK_MOTION:
            asked = dataclasses.replace(asked, url=stack.enter_context(serve(meanings, folder)))
        yield stack.enter_context(open_tools(dataclasses.replace(config, tools=asked), folder))


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - started


@contextmanager
def _compiling(seconds: dict[str, float]) -> Iterator[None]:
    """Adds `compile`: how long JAX traced, lowered or compiled anything, by its own events, of which some lie in others."""
    spans: list[tuple[float, float]] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            spans.append(((now := time.perf_counter()) - duration_secs, now))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    seconds["compile"], reached = 0.0, 0.0
    for start, end in sorted(spans):
        seconds["compile"] += max(end - max(start, reached), 0.0)
        reached = max(reached, end)


def show(watched: Watched, checkpoint: str) -> None:
    """Prints the episode for a person to read: what was thought, asked, seen, weighed and answered, and how long it took."""
    from rich.console import Console, Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    clip, reply = watched.clip, watched.played.reply
    height, width = clip.frames.shape[1:3]
    page = Table.grid(padding=(0, 2))
    page.add_column(style="bold cyan", no_wrap=True)
    page.add_column()

    def section(title: str, content: "RenderableType") -> None:
        page.add_row(title, Padding(content, (0, 0, 1, 0)))

    shown = f"{len(clip.frames)} frames of {width} x {height} pixels, {clip.fps:.3g} a second"
    section("Clip", Text(f"{_line(watched.name)}: {shown}\nnamed by {_line(checkpoint)}"))
    section("First look", Text(thought(watched.played.turns[0])))
    section("Tools", _tools_table(watched))
    if reply.sub_motions:
        section("Sub-motions", Text("\n".join(f"{n}. {_line(name)}" for n, name in enumerate(reply.sub_motions, 1))))
    if weighed := watched.candidates():
        table = Table.grid(padding=(0, 2))
        for name, score, comparison in weighed:
            style = "bold blue" if watched.label == name else ""
            table.add_row(
                Text(_line(name), style), Text("-" if score is None else f"{score:g}", style), Text(_line(comparison))
            )
        section("Candidates", table)
    if not reply.sub_motions and not weighed:
        section("Reply", Text(thought(watched.played.turns[-1])))
    good = watched.label is not None
    page.add_row("Answer", Text(verdict(watched), "bold blue" if good else "bold red"))
    parts = ("load", "clip", "server", "compile", "policy", "tools")
    took = ", ".join(f"{part} {watched.seconds[part]:.1f}" for part in parts)
    Console().print(Group("", page, "", Text(f"Seconds: {took}.", "dim")))


def _tools_table(watched: Watched) -> "RenderableType":
    """A row a call: the tool, how it went, and what came back or why nothing did."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for exchange in watched.exchanges:
        result = exchange.outcome.result
        texts = {**DRAWN, "noun_explanation": result.explanation, "video_explanation": result.description}
        for tool, status in exchange.outcome.statuses.items():
            text = texts[tool] if status == "ok" else SENTENCES[status]
            if status == "ok" and tool in DRAWN and result.frames is None:
                text = None
            if status == "malformed":
                text = f"{text} It may be longer than rollout.turn_tokens={watched.turn_tokens} holds."
            told = "\n".join(_line(line) for line in (text or "nothing is known").split("\n"))
            table.add_row(Text(tool), Text(status, "green" if status == "ok" else "red"), Text(told))
    return table if table.row_count else Text("none were asked for")


def verdict(watched: Watched) -> str:
    """The answer, or in words that there is none which counts."""
    answer = watched.played.reply.answer
    if answer is None:
        return "no answer that can be read"
    return watched.label or f"{_line(answer)} (which is none of the labels)"


def thought(reply: str) -> str:
    """What a reply says between its think tags, or all of it where there are none, in one line for people."""
    found = re.search(r"<think>(.*?)</think>", reply, flags=re.DOTALL | re.IGNORECASE)
    return _line(found[1] if found else reply) or "(nothing)"


def _line(text: str) -> str:
    """A text that the policy or a file may have written, without what a terminal would obey."""
    return " ".join(clean(text).split())
