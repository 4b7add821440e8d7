"""A protocol run: every held-out episode of a task played once, to predictions, with a progress bar."""

import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.task import Episode, Task
from vstar_jax.errors import UserError
from vstar_jax.evaluation.episodes import EpisodeRunner
from vstar_jax.evaluation.journal import Journal
from vstar_jax.evaluation.report import Prediction

EVALUATION_STREAM = 0xE7A1
"""Keeps the draws of evaluation (labels, names) apart from those of training under the same seed."""

Numbered = tuple[int, tuple[str, Any]]
"""A record's place in the whole evaluation, its group and itself."""


def evaluate(
    graphdef: Any,
    state: Any,
    task: Task,
    chat: Chat,
    config: Config,
    mesh: Mesh,
    title: str,
    journal: Journal | None = None,
) -> list[Prediction]:
    """Plays the held-out clips of every group of `task`; clips that cannot be read stay in the denominator.

    An episode's labels and names follow from the seed and its place in the list, so that every model is asked the same.
    journal: takes the predictions of each batch as it is done; the clips that it has already are not played again.
    """
    runner = EpisodeRunner(graphdef, state, chat, task.prompts, config, mesh)
    records = [(group, record) for group in task.groups for record in task.test_records(group)]
    for group in task.groups:
        if not any(g == group for g, _ in records):
            raise UserError(f"the split {group} of {config.data.dataset} holds no clip: prepare it again or choose another.")
    predictions = list(journal.predictions) if journal else []
    if [(p.group, p.clip) for p in predictions] != [(group, record.name) for group, record in records[: len(predictions)]]:
        raise UserError("the clips have changed since this evaluation was begun: give another --out, or remove what is there.")
    numbered, size = list(enumerate(records)), config.evaluation.batch_size
    right = sum(p.correct for p in predictions)

    def prepare(item: Numbered) -> Episode | None:
        index, (group, record) = item
        return task.episode(record, np.random.default_rng((config.seed, EVALUATION_STREAM, zlib.crc32(group.encode()), index)))

    with (
        ThreadPoolExecutor(config.data.threads) as pool,
        tqdm(total=len(records), initial=len(predictions), desc=f"evaluate {title}", unit="clip") as bar,
    ):
        while (done := len(predictions)) < len(records):
            # Batches end where they would have without an interruption, so that an episode keeps its neighbours.
            batch = numbered[done : (done // size + 1) * size]
            made = _played(runner, task, batch, list(pool.map(prepare, batch)))
            if journal:
                journal.add(made)
            predictions += made
            bar.update(len(batch))
            right += sum(p.correct for p in made)
            bar.set_postfix_str(f"top-1 {100 * right / len(predictions):.1f} %")
    return predictions


def _played(runner: EpisodeRunner, task: Task, batch: list[Numbered], episodes: list[Episode | None]) -> list[Prediction]:
    """The predictions of a batch, in its order."""
    there = [(index, episode) for (index, _), episode in zip(batch, episodes, strict=True) if episode is not None]
    transcripts = runner.run([episode for _, episode in there], [index for index, _ in there]) if there else []
    played = {index: _prediction(e, t) for (index, e), t in zip(there, transcripts, strict=True)}
    return [played.get(index) or _unreadable(group, record, task.label_count(group)) for index, (group, record) in batch]


def _prediction(episode: Episode, transcript: Any) -> Prediction:
    return Prediction(
        clip=episode.name,
        group=episode.group,
        label=episode.answer,
        answer=transcript.reply.answer or "",
        well_formed=transcript.reply.well_formed,
        tools=transcript.decision.chosen(),
        turns=transcript.turns,
        labels=len(episode.labels),
    )


def _unreadable(group: str, record: Any, labels: int) -> Prediction:
    return Prediction(record.name, group, record.label, "", False, (), (), labels, readable=False)
