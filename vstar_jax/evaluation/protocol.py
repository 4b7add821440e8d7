"""A protocol run: every held-out episode of a task played once, to predictions, with a progress bar."""

import zlib
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.task import Episode, Task
from vstar_jax.errors import UserError
from vstar_jax.evaluation.episodes import EpisodeRunner
from vstar_jax.evaluation.report import Prediction

EVALUATION_STREAM = 0xE7A1
"""Keeps the draws of evaluation (labels, names) apart from those of training under the same seed."""


def evaluate(graphdef: Any, state: Any, task: Task, chat: Chat, config: Config, mesh: Mesh, title: str) -> list[Prediction]:
    """Plays the held-out clips of every group of `task`; clips that cannot be read stay in the denominator.

    An episode's labels and names follow from the seed and its place in the list, so that every model is asked the same.
    """
    runner = EpisodeRunner(graphdef, state, chat, task.prompts, config, mesh)
    records = [(group, record) for group in task.groups for record in task.test_records(group)]
    for group in task.groups:
        if not any(g == group for g, _ in records):
            raise UserError(f"the split {group} of {config.data.dataset} holds no clip: prepare it again or choose another.")
    predictions: list[Prediction] = []
    with tqdm(total=len(records), desc=f"evaluate {title}", unit="clip") as bar:
        for start in range(0, len(records), config.evaluation.batch_size):
            batch = list(enumerate(records))[start : start + config.evaluation.batch_size]
            episodes: list[Episode] = []
            indices: list[int] = []
            for index, (group, record) in batch:
                rng = np.random.default_rng((config.seed, EVALUATION_STREAM, zlib.crc32(group.encode()), index))
                episode = task.episode(record, rng)
                if episode is None:
                    predictions.append(_unreadable(group, record, config.data.labels))
                else:
                    episodes.append(episode)
                    indices.append(index)
            if episodes:
                transcripts = runner.run(episodes, indices)
                predictions += [_prediction(e, t) for e, t in zip(episodes, transcripts, strict=True)]
            bar.update(len(batch))
            bar.set_postfix_str(f"top-1 {100 * np.mean([p.correct for p in predictions]):.1f} %")
    return predictions


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
    return Prediction(record.name, group, "", "", False, (), (), labels, readable=False)
