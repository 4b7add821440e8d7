"""Checkpoints of a run with orbax: parameters, optimizer, step, random key and data iterator are one checkpoint.

Parameters are an item of their own, so that evaluation restores them alone, on any mesh.
"""

import errno
import logging
import os
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from vstar_jax.distributed import gather
from vstar_jax.errors import UserError
from vstar_jax.sharding import put
from vstar_jax.training.state import TrainState


class Checkpointer:
    """Saves asynchronously under `directory` and keeps the last few; an interrupted save is never seen again."""

    def __init__(self, directory: str | Path, keep: int = 2):
        _say_failures_once()
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """The last complete step, or None."""
        return self.manager.latest_step()

    def save(self, state: TrainState, data: Mapping[str, Any]) -> None:
        """Begins to save; the arrays may be donated as soon as this returns. UserError when the disk refuses.

        data: where this process's data iterator stands.
        """
        step = int(state.step)
        if step == self.latest():
            return
        progress = {"step": step, "key": jax.random.key_data(state.key).tolist(), "data": gather(dict(data))}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(nnx.to_pure_dict(state.params)),
            optimizer=ocp.args.StandardSave(_plain(state.optimizer)),
            progress=ocp.args.JsonSave(progress),
        )
        with self._explained():
            self._require_room(state)
            self.manager.save(step, args=items)

    def _require_room(self, state: TrainState) -> None:
        """A full disk is found before anything is written, where that can be known."""
        arrays = jax.tree.leaves((state.params, state.optimizer))
        needed = sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards if shard.replica_id == 0)
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")

    def restore(self, state: TrainState) -> tuple[TrainState, Mapping[str, Any]]:
        """The last checkpoint in the shapes and shardings of `state`, and where this process's data iterator stood.

        UserError when it was saved by another number of processes, whose iterators stood elsewhere.
        """
        optimizer, structure = jax.tree.flatten(state.optimizer)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(_targets(nnx.to_pure_dict(state.params))),
            optimizer=ocp.args.StandardRestore(_targets(_plain(state.optimizer))),
            progress=ocp.args.JsonRestore(),
        )
        restored = self.manager.restore(self.latest(), args=items)
        progress = restored["progress"]
        if len(progress["data"]) != jax.process_count():
            raise UserError(
                f"{self.directory} was saved by {len(progress['data'])} processes, but there are {jax.process_count()}: start "
                "as many, or begin another run."
            )
        leaves = [restored["optimizer"][str(i)] for i in range(len(optimizer))]
        return TrainState(
            step=put(np.int32(progress["step"]), state.step.sharding),
            key=jax.random.wrap_key_data(put(np.asarray(progress["key"], np.uint32), state.key.sharding)),
            params=_replaced(state.params, restored["params"]),
            frozen=state.frozen,
            optimizer=jax.tree.unflatten(structure, leaves),
        ), progress["data"][jax.process_index()]

    def restore_params(self, params: nnx.State) -> nnx.State:
        """The parameters of the last checkpoint in the shardings of `params`, which may be abstract."""
        if self.latest() is None:
            raise UserError(f"{self.directory} holds no complete checkpoint: train first, or give another run.")
        items = ocp.args.Composite(params=ocp.args.StandardRestore(_targets(nnx.to_pure_dict(params))))
        return _replaced(params, self.manager.restore(self.latest(), args=items)["params"])

    def wait(self) -> None:
        """Returns when the last save is complete on disk."""
        with self._explained():
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the manager's threads."""
        self.wait()
        self.manager.close()

    def _explained(self) -> "_DiskErrors":
        return _DiskErrors(self)


@cache
def _say_failures_once() -> None:
    """Keeps off the screen what orbax's threads log of a failed save: it is raised again where the run saves next or waits.

    VSTAR_DEBUG=1 shows everything.
    """
    if os.environ.get("VSTAR_DEBUG") == "1":
        return
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda r: not (r.exc_info and "orbax" in r.pathname + r.getMessage()))


class _DiskErrors:
    """Turns what orbax and tensorstore raise when the disk refuses a write into one sentence."""

    def __init__(self, checkpointer: Checkpointer):
        self.checkpointer = checkpointer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        refused = isinstance(error, OSError) or any(
            w in text for w in ("RESOURCE_EXHAUSTED", "No space left", "File too large")
        )
        if error is not None and refused:
            raise UserError(
                f"the checkpoint cannot be written to {self.checkpointer.directory} ({text.splitlines()[0]}): free some space "
                f"and run the same command again, it resumes from step {self.checkpointer.latest() or 0}."
            ) from error


def _plain(optimizer: Any) -> dict[str, jax.Array]:
    """The optimizer state's arrays by number: optax's own containers are no part of the file format."""
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(optimizer))}


def _targets(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _replaced(state: nnx.State, values: Mapping[str, Any]) -> nnx.State:
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, dict(values))
    return state
