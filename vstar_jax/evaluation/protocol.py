"""A protocol run: every held-out episode of a task played once, to predictions, with a progress bar."""

import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.task import Episode, Task
from vstar_jax.distributed import first, gather, told
from vstar_jax.errors import UserError
from vstar_jax.evaluation.journal import Journal
from vstar_jax.evaluation.report import Prediction
from vstar_jax.rollout.episode import Sampling
from vstar_jax.rollout.player import Played, Player
from vstar_jax.sharding import local_rows
from vstar_jax.tools.host import Tools, failed_share

EVALUATION_STREAM = 0xE7A1
"""Keeps the draws of evaluation (labels, names) apart from those of training under the same seed."""

Numbered = tuple[int, tuple[str, Any]]
"""A record's place in the whole evaluation, its group and itself."""


def evaluate(
    graphdef: Any,
    state: Any,
    task: Task,
    chat: Chat,
    tools: Tools,
    config: Config,
    mesh: Mesh,
    title: str,
    journal: Journal | None = None,
) -> list[Prediction]:
    """Plays the held-out clips of every group of `task` with the tools; clips that cannot be read stay in the denominator.

    An episode's labels and names follow from the seed and its place in the list, so that every model is asked the same.
    journal: takes the predictions of each batch as it is done; the clips that it has already are not played again. Of several
    processes the first has the journal and returns all predictions, the others return those made here. UserError when a group
    has no clip, a prompt does not fit, or most of a batch's tool calls failed, for that measures no policy; what was played
    before stays in the journal.
    """
    sampling = Sampling(config.rollout.max_new_tokens, config.evaluation.temperature, turns=config.rollout.turns)
    player = Player(graphdef, chat, task.prompts, tools, config, mesh, sampling, config.evaluation.batch_size)
    records = [(group, record) for group in task.groups for record in task.test_records(group)]
    for group in task.groups:
        if not any(g == group for g, _ in records):
            raise UserError(f"the split {group} of {config.data.dataset} holds no clip: prepare it again or choose another.")
    predictions = list(journal.predictions) if journal else []
    if [(p.group, p.clip) for p in predictions] != [(group, record.name) for group, record in records[: len(predictions)]]:
        raise UserError("the clips have changed since this evaluation was begun: give another --out, or remove what is there.")
    state = player.weights(state)
    numbered, size = list(enumerate(records)), config.evaluation.batch_size
    own = local_rows(mesh, size)
    done, right = told((len(predictions), sum(p.correct for p in predictions)))

    def prepare(item: Numbered) -> Episode | None:
        index, (group, record) = item
        return task.episode(record, np.random.default_rng((config.seed, EVALUATION_STREAM, zlib.crc32(group.encode()), index)))

    with (
        ThreadPoolExecutor(config.data.threads) as pool,
        tqdm(total=len(records), initial=done, desc=f"evaluate {title}", unit="clip", disable=not first()) as bar,
    ):
        while done < len(records):
            # Batches end where they would have without an interruption, so that an episode keeps its neighbours.
            batch = numbered[done : (done // size + 1) * size]
            mine = [batch[row] for row in own if row < len(batch)]
            parts = gather((_played(player, state, task, mine, list(pool.map(prepare, mine))), player.host.counts.statuses))
            statuses = sum((part for _, part in parts), Counter[str]())
            if failed_share(statuses) > config.tools.failures:
                raise UserError(
                    f"{statuses.total() - statuses['ok']} of {statuses.total()} tool calls of a batch failed while {title} was "
                    "evaluated: look at the tools server and its log, then run the same command again; tools.failures sets how "
                    "many may fail."
                )
            made = [prediction for _, prediction in sorted((pair for part, _ in parts for pair in part), key=itemgetter(0))]
            if journal:
                journal.add(made)
            predictions += made
            done += len(batch)
            bar.update(len(batch))
            right += sum(p.correct for p in made)
            bar.set_postfix_str(f"top-1 {100 * right / done:.1f} %")
    return predictions


def _played(
    player: Player, state: Any, task: Task, batch: list[Numbered], episodes: list[Episode | None]
) -> list[tuple[int, Prediction]]:
    """The predictions of a batch by their places; of several processes each takes part, even without a clip of its own."""
    there = [(index, episode) for (index, _), episode in zip(batch, episodes, strict=True) if episode is not None]
    takes_part = there or jax.process_count() > 1
    played = player.play(state, [episode for _, episode in there], [index for index, _ in there]) if takes_part else []
    made = {index: _prediction(e, p) for (index, e), p in zip(there, played, strict=True)}
    return [(i, made.get(i) or _unreadable(group, record, task.label_count(group))) for i, (group, record) in batch]


def _prediction(episode: Episode, played: Played) -> Prediction:
    return Prediction(
        clip=episode.name,
        group=episode.group,
        label=episode.answer,
        answer=played.reply.answer or "",
        well_formed=played.reply.well_formed,
        tools=dict(played.statuses),
        turns=played.turns,
        labels=len(episode.labels),
    )


def _unreadable(group: str, record: Any, labels: int) -> Prediction:
    return Prediction(record.name, group, record.label, "", False, {}, (), labels, readable=False)
