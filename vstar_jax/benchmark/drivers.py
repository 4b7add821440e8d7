"""Measures what the host's part of two-turn episodes costs: the callback against returning to Python after every turn.

The drivers play the same episodes by random weights, with a host that answers at once.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from vstar_jax import sharding
from vstar_jax.batch import Turn, collate
from vstar_jax.benchmark.common import check_repeats, in_turns, ratios, spread
from vstar_jax.benchmark.rollout import Workload
from vstar_jax.benchmark.size import Size
from vstar_jax.errors import UserError
from vstar_jax.rollout.episode import Mode, Rollout, Sampling, episode_keys

TURN_TEXT = (6, 153)
"""Tokens before and after the annotated clip."""


class Answering:
    """A host that answers every row at once with the same turn."""

    def __init__(self, rng: np.random.Generator, size: Size, rows: int):
        example = size.example(rng, TURN_TEXT)
        self.tokens, self.next = len(example.tokens), int(example.positions.max()) + 1
        self.batch = collate([[example]] * rows, (self.tokens,), (len(example.patches),))

    def __call__(self, turn: int, episodes: np.ndarray, tokens: Any, lengths: Any, positions: np.ndarray) -> Turn:
        """See `rollout.episode.Host`."""
        rows = jax.tree.map(lambda x: x[: len(episodes)], self.batch)
        batch = replace(rows, positions=rows.positions + positions[:, None, None])
        return Turn(batch, (positions + self.next).astype(np.int32), np.ones(len(episodes), bool))


def measure_drivers(size: Size, work: Workload, repeats: int) -> dict[str, Any]:
    """Times `repeats` rollouts of two turns by each driver, in turns; both replies have `work.tokens` tokens.

    UserError for too few repeats, and when the drivers disagree.
    """
    check_repeats(repeats)
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(size.random_policy(replace(size.policy, param_dtype=size.policy.dtype)))
    prompts = [size.example(rng, size.prompt) for _ in range(work.prompts)]
    mesh, rows = sharding.make_mesh("1x1"), work.prompts * work.group
    host = Answering(rng, size, rows)
    batch = sharding.put_batch(collate([[p] for p in prompts], (len(prompts[0].tokens),), (len(prompts[0].patches),)), mesh)
    starts = np.asarray([p.positions.max() + 1 for p in prompts], np.int32)
    sampling = Sampling((work.tokens,), work.temperature, work.top_p)

    def player(mode: Mode) -> Any:
        rollout = Rollout(graphdef, host, host.tokens, np.zeros(0, np.int32), sampling, mesh, mode)
        keys = episode_keys(0, range(work.prompts), work.group)
        return partial(rollout, state, batch, starts, keys, np.arange(rows, dtype=np.int32))

    modes: tuple[Mode, ...] = ("callback", "segmented")
    players: dict[str, Any] = {mode: player(mode) for mode in modes}
    first, second = ([np.asarray(c.tokens) for c in play()] for play in players.values())
    if any((a != b).any() for a, b in zip(first, second, strict=True)):
        raise UserError(
            "the drivers callback and segmented give other tokens: find the cause with tests/test_rollout.py first."
        )
    seconds = in_turns(players, repeats)
    return {"new_tokens": work.tokens, "seconds": seconds, "ratios": ratios(seconds["callback"], seconds["segmented"])}


def report(drivers: Mapping[str, Any]) -> str:
    """What `measure_drivers` gave, as a sentence."""
    return (
        f"Episodes of two turns with two replies of {drivers['new_tokens']} tokens and a host that answers at once: callback "
        f"{spread(drivers['seconds']['callback'], '.3f')} s, segmented {spread(drivers['seconds']['segmented'], '.3f')} s; "
        f"callback is {spread(drivers['ratios'], '.2f')} times as fast, repeat by repeat.\n"
    )
