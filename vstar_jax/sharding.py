"""The device mesh and the one table that maps logical axes to it; no other file names a mesh axis.

A mesh "DxM" has D devices over which the batch and the parameters are split (data parallel and FSDP) and M over which
heads, feed-forward widths and the vocabulary are split (tensor parallel). A dimension that a mesh axis does not divide
stays whole, so that two KV heads on eight devices are replicated and not cut.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vstar_jax.errors import UserError

RULES: Mapping[str, str | None] = {
    "batch": "data",
    "embed": "data",  # FSDP: the width of every parameter
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "vocab": "model",
}
"""Logical axis -> mesh axis; an axis that is not listed is never split."""


def mesh_shape(text: str) -> tuple[int, int]:
    """Parses "DxM" into (data, model); UserError when it is not that."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or "0" in match.groups():
        raise UserError(f"mesh is {text!r}: write DATAxMODEL with two positive numbers, such as 8x1 or 4x2.")
    return int(match[1]), int(match[2])


def simulate_devices(text: str, processes: int = 1) -> bool:
    """Asks for as many simulated CPU devices as this one of `processes` adds to the mesh; call it before JAX starts its
    backends.

    The count has an effect on the CPU backend alone, and a count that the user chose in XLA_FLAGS stays.
    """
    data, model = mesh_shape(text)
    flags = os.environ.get("XLA_FLAGS", "")
    if data * model == 1 or "xla_force_host_platform_device_count" in flags:
        return False
    own = -(-data * model // processes)
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={own}".strip()
    return True


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A Mesh with axes data and model from "DxM" over `devices` (all of JAX's when not given).

    Raises UserError when there are fewer devices than the mesh needs, and when rows of it would belong to several processes or
    processes would have no row.
    """
    shape = mesh_shape(text)
    devices = jax.devices() if devices is None else devices
    need = shape[0] * shape[1]
    if need > len(devices):
        raise UserError(
            f"mesh {text} needs {need} devices and this machine has {len(devices)} ({devices[0].platform}): "
            f"choose a mesh of at most {len(devices)} devices, or JAX_PLATFORMS=cpu to simulate them."
        )
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices[:need])
    owners = [{device.process_index for device in row} for row in mesh.devices]
    processes = {device.process_index for device in devices}
    if any(len(owner) > 1 for owner in owners) or len(set.union(*owners)) < len(processes):
        raise UserError(
            f"mesh {text} does not give each of the {len(processes)} processes rows of its own: choose a first number that "
            f"{len(processes)} divides, and a second one of at most {len(devices) // len(processes)}, the devices of a process."
        )
    return mesh


def platform() -> str:
    """Platform that the program being traced is for: the mesh's, so that it is right when compiling ahead of time."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Logical axis names of an array of `shape` -> PartitionSpec on `mesh`."""
    names = [RULES.get(a) if a else None for a in axes]
    return PartitionSpec(*(n if n and size % mesh.shape[n] == 0 else None for n, size in zip(names, shape, strict=True)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the logical `axes` under the current mesh; without a mesh it returns `x` as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def map_over_data(function: Callable[[Any, Any], Any], shared: Any, rows: Any) -> Any:
    """`function(shared, rows)`, arrays [B, ...], each device of the data axis with its own rows [B, ...] of the batch.

    For functions that scan over their rows: `shared` is gathered once before and its gradient summed once after, where
    the compiler alone does both in every iteration.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["data"] == 1 or jax.tree.leaves(rows)[0].shape[0] % mesh.shape["data"]:
        return function(shared, rows)

    def local(shared: Any, rows: Any) -> Any:
        return function(jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), shared), rows)

    specs = (PartitionSpec(), PartitionSpec("data"))
    return jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec("data"), axis_names={"data"})(shared, rows)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """NamedSharding for every variable of an NNX state, from the axes that it was declared with."""

    def sharding(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        return variable.replace(NamedSharding(mesh, spec(variable.get_metadata("axes"), value.shape, mesh)))

    return jax.tree.map(sharding, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays that lead with the batch: split over data, whole over model."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
    """The rows of a batch of `count` that this process has, int [n] ascending; all of them when it is the only one.

    UserError when `count` does not split over the data axis.
    """
    data = mesh.shape["data"]
    if count % data:
        raise UserError(f"a batch of {count} rows does not split over {data} devices: choose a batch size that {data} divides.")
    own = [n for n, row in enumerate(mesh.devices) if row[0].process_index == jax.process_index()]
    return np.arange(count).reshape(data, -1)[own].reshape(-1)


def put_batch(tree: Any, mesh: Mesh) -> Any:
    """Puts this process's rows of a batch, host arrays [n, ...], on the mesh, split over data; UserError when n does not
    divide.
    """
    own = len(local_rows(mesh, mesh.shape["data"]))
    rows = jax.tree.leaves(tree)[0].shape[0]
    if rows % own:
        raise UserError(f"a batch of {rows} rows does not split over {own} devices: choose a batch size that {own} divides.")
    if jax.process_count() == 1:
        return jax.device_put(jax.tree.map(np.asarray, tree), batch_sharding(mesh))
    split = partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return jax.tree.map(lambda x: split(np.asarray(x), (rows // own * mesh.shape["data"], *x.shape[1:])), tree)


def fetch_batch(tree: Any, mesh: Mesh) -> Any:
    """This process's rows, numpy [n, ...], of device arrays [B, ...]: the other way round."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def rows(x: jax.Array) -> np.ndarray:
        shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(rows, jax.device_put(tree, batch_sharding(mesh)))


def put(tree: Any, shardings: Any) -> Any:
    """Puts arrays that every process has whole, or that are on the mesh already, where `shardings` say."""

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        # Without a comparison of what the processes have, for which device_put would send whole weights around.
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    return jax.tree.map(place, tree, shardings)


def announce(mesh: Mesh, simulated: bool) -> None:
    """Says on which devices the program runs, and whether they are simulated; the first process does."""
    if jax.process_index():
        return
    devices = list(mesh.devices.flat)
    kind = (
        f"{len(devices)} {'simulated ' if simulated and devices[0].platform == 'cpu' else ''}{devices[0].device_kind} device(s)"
    )
    where = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(f"mesh {mesh.shape['data']}x{mesh.shape['model']} (data x model) on {kind}{where}", flush=True)
