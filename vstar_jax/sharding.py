"""The device mesh and the one table that maps logical axes to it; no other file names a mesh axis.

A mesh "DxM" has D devices over which the batch and the parameters are split (data parallel and FSDP) and M over which
heads, feed-forward widths and the vocabulary are split (tensor parallel). "RxDxM" is R such meshes side by side, with the
same parameters and other rows each (hybrid FSDP): only gradients cross from one to another, so that pieces of a parameter
do not become ever smaller as devices are added. A dimension that a mesh axis does not divide stays whole, so that two KV
heads on eight devices are replicated and not cut.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vstar_jax.errors import UserError

AXES = ("replica", "data", "model")
ROWS = AXES[:2]
"""The axes over which rows of a batch are split."""
RULES: Mapping[str, str | tuple[str, ...]] = {
    "batch": ROWS,
    "replica": "replica",  # a batch whose rows are split over the replicas alone
    "embed": "data",  # FSDP: the width of every parameter
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "vocab": "model",
}
"""Logical axis -> mesh axis; an axis that is not listed is never split."""


def mesh_shape(text: str) -> tuple[int, int, int]:
    """Parses "DxM" or "RxDxM" into (replicas, data, model); UserError when it is neither."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+)", text)
    shape = [int(n or 1) for n in match.groups()] if match else [0]
    if not all(shape):
        raise UserError(
            f"mesh is {text!r}: write DATAxMODEL with two positive numbers, such as 8x1 or 4x2, or REPLICASxDATAxMODEL."
        )
    replicas, data, model = shape
    return replicas, data, model


def simulate_devices(text: str, processes: int = 1) -> bool:
    """Asks for as many simulated CPU devices as this one of `processes` adds to the mesh; call it before JAX starts its
    backends.

    The count has an effect on the CPU backend alone, and a count that the user chose in XLA_FLAGS stays.
    """
    count = math.prod(mesh_shape(text))
    flags = os.environ.get("XLA_FLAGS", "")
    if count == 1 or "xla_force_host_platform_device_count" in flags:
        return False
    own = -(-count // processes)
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={own}".strip()
    return True


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A Mesh with the axes `AXES` from "DxM" or "RxDxM" over `devices` (all of JAX's when not given).

    Raises UserError when there are fewer devices than the mesh needs, and when rows of it would belong to several processes or
    processes would have no row.
    """
    shape = mesh_shape(text)
    devices = jax.devices() if devices is None else devices
    need = math.prod(shape)
    if need > len(devices):
        raise UserError(
            f"mesh {text} needs {need} devices and this machine has {len(devices)} ({devices[0].platform}): "
            f"choose a mesh of at most {len(devices)} devices, or JAX_PLATFORMS=cpu to simulate them."
        )
    types = (AxisType.Auto,) * len(AXES)
    mesh = Mesh(create_device_mesh(shape, devices[:need], allow_split_physical_axes=True), AXES, axis_types=types)
    if any(len(owner) > 1 for owner in _owners(mesh)):
        # Axes lie along the network; where that splits a row of the mesh over hosts, hosts come first.
        ordered = sorted(devices[:need], key=lambda device: (device.process_index, device.id))
        mesh = Mesh(np.asarray(ordered).reshape(shape), AXES, axis_types=types)
    owners = _owners(mesh)
    processes = {device.process_index for device in devices}
    if any(len(owner) > 1 for owner in owners) or len(set.union(*owners)) < len(processes):
        raise UserError(
            f"mesh {text} does not give each of the {len(processes)} processes rows of its own: choose a first number that "
            f"{len(processes)} divides, and a last one of at most {len(devices) // len(processes)}, the devices of a process."
        )
    return mesh


def _owners(mesh: Mesh) -> list[set[int]]:
    """The processes that devices of each row belong to."""
    return [{device.process_index for device in row} for row in _by_row(mesh)]


def _by_row(mesh: Mesh) -> np.ndarray:
    """The devices [R * D, M] of a mesh: those of a row of the array have the same rows of a batch."""
    return mesh.devices.reshape(-1, mesh.shape["model"])


def row_devices(mesh: Any) -> int:
    """Over how many devices the rows of a batch are split."""
    return mesh.shape["replica"] * mesh.shape["data"]


def platform() -> str:
    """Platform that the program being traced is for: the mesh's, so that it is right when compiling ahead of time."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Logical axis names of an array of `shape` -> PartitionSpec on `mesh`."""

    def split(axis: str | None, size: int) -> str | tuple[str, ...] | None:
        names = RULES.get(axis) if axis else None
        if names is None:
            return None
        count = math.prod(mesh.shape[n] for n in ((names,) if isinstance(names, str) else names))
        return names if size % count == 0 else None

    return PartitionSpec(*(split(axis, size) for axis, size in zip(axes, shape, strict=True)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the logical `axes` under the current mesh; without a mesh it returns `x` as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def rows_by_device(x: jax.Array) -> jax.Array:
    """Rows [B, ...] as [devices, B / devices, ...], split as `map_over_rows` splits them."""
    mesh = jax.sharding.get_abstract_mesh()
    return x.reshape(row_devices(mesh) if _splits(x, mesh) else 1, -1, *x.shape[1:])


def _splits(x: jax.Array, mesh: Any) -> bool:
    """Whether there are devices over which the rows of `x` can be split."""
    return not mesh.empty and row_devices(mesh) > 1 and x.shape[0] % row_devices(mesh) == 0


def map_over_rows(function: Callable[[Any, Any], Any], shared: Any, rows: Any) -> Any:
    """`function(shared, rows)`, arrays [B, ...], each device with its own rows [B, ...] of the batch.

    shared: an NNX state. For functions that scan over their rows: `shared` is gathered once before and its gradient summed
    once after, each device keeping its part of the sum, where the compiler alone does both in every iteration.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _splits(jax.tree.leaves(rows)[0], mesh):
        return function(shared, rows)

    def along(variable: nnx.Variable) -> int | None:
        """Which dimension of a parameter is split over data."""
        split = spec(variable.get_metadata("axes"), variable.get_value().shape, mesh)
        return split.index("data") if "data" in split else None

    def is_variable(x: Any) -> bool:
        return isinstance(x, nnx.Variable)

    variables, structure = jax.tree.flatten(shared, is_leaf=is_variable)
    dimensions = [along(variable) for variable in variables]

    def whole(x: jax.Array, dimension: int | None) -> jax.Array:
        if dimension is None:
            return jax.lax.pcast(x, ROWS, to="varying")
        return jax.lax.all_gather(jax.lax.pcast(x, "replica", to="varying"), "data", axis=dimension, tiled=True)

    def local(parts: Sequence[jax.Array], rows: Any) -> Any:
        gathered = [v.replace(whole(x, d)) for v, x, d in zip(variables, parts, dimensions, strict=True)]
        return function(jax.tree.unflatten(structure, gathered), rows)

    parts = [variable.get_value() for variable in variables]
    split = [PartitionSpec(*[None] * d, "data") if d is not None else PartitionSpec() for d in dimensions]
    by_row = PartitionSpec(ROWS)
    return jax.shard_map(local, in_specs=(split, by_row), out_specs=by_row, axis_names=set(ROWS))(parts, rows)


def state_shardings(state: Any, mesh: Mesh, fsdp: bool = True) -> Any:
    """NamedSharding for every variable of an NNX state, from the axes that it was declared with.

    fsdp: split widths over data; else variables are whole along it.
    """

    def sharding(variable: nnx.Variable) -> nnx.Variable:
        value, axes = variable.get_value(), variable.get_metadata("axes")
        axes = axes if fsdp else [None if axis == "embed" else axis for axis in axes]
        return variable.replace(NamedSharding(mesh, spec(axes, value.shape, mesh)))

    return jax.tree.map(sharding, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays that lead with the batch: split over replicas and data, whole over model."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
    """The rows of a batch of `count` that this process has, int [n] ascending; all of them when it is the only one.

    UserError when `count` does not split over the devices.
    """
    devices = row_devices(mesh)
    if count % devices:
        raise UserError(
            f"a batch of {count} rows does not split over {devices} devices: choose a batch size that {devices} divides."
        )
    own = [n for n, row in enumerate(_by_row(mesh)) if row[0].process_index == jax.process_index()]
    return np.arange(count).reshape(devices, -1)[own].reshape(-1)


def put_batch(tree: Any, mesh: Mesh) -> Any:
    """Puts this process's rows of a batch, host arrays [n, ...], on the mesh; UserError when n does not split."""
    own = len(local_rows(mesh, row_devices(mesh)))
    rows = jax.tree.leaves(tree)[0].shape[0]
    if rows % own:
        raise UserError(f"a batch of {rows} rows does not split over {own} devices: choose a batch size that {own} divides.")
    if jax.process_count() == 1:
        return jax.device_put(jax.tree.map(np.asarray, tree), batch_sharding(mesh))
    split = partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return jax.tree.map(lambda x: split(np.asarray(x), (rows // own * row_devices(mesh), *x.shape[1:])), tree)


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
    axes = AXES if mesh.shape["replica"] > 1 else AXES[1:]
    print(f"mesh {'x'.join(str(mesh.shape[a]) for a in axes)} ({' x '.join(axes)}) on {kind}{where}", flush=True)
