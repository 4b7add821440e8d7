"""Which mesh axis a collective of a compiled program runs along, and how many bytes a device sends for it."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from vstar_jax.scaling.hlo import Instruction, Module, Visit

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})?\}")


def groups(attributes: str, devices: int) -> list[list[int]]:
    """The devices that take part with each other, by their place in the mesh; one group of all where none is given.

    ValueError for a notation that is not known: to take it for all devices would count many times what is sent.
    """
    if match := IOTA.search(attributes):
        return _numbered(match[2], match[3]).reshape(_numbers(match[1])).tolist()
    if match := NAMED.search(attributes):
        axes = re.findall(r"'(\w+)'=(\d+)", match[1])
        names, sizes = [name for name, _ in axes], [int(size) for _, size in axes]
        along = [names.index(name) for name in re.findall(r"'(\w+)'", match[4])]
        across = [n for n in range(len(names)) if n not in along]
        places = _numbered(match[2] or str(math.prod(sizes)), match[3]).reshape(sizes).transpose(*across, *along)
        return places.reshape(-1, math.prod(sizes[n] for n in along)).tolist()
    if match := LISTED.search(attributes):
        return [_numbers(inner) for inner in re.findall(r"\{([\d,]+)\}", match[1])] if match[1] else [list(range(devices))]
    if "replica_groups=" in attributes:
        raise ValueError(f"the groups of a collective are written in a way that is not known: {attributes[:200]}")
    return [list(range(devices))]


def _numbered(sizes: str, order: str | None) -> np.ndarray:
    """Devices as an array of `sizes`, with its axes in another order where one is given."""
    numbers = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def axis_of(members: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> str:
    """The mesh axis along which groups run, axes joined by x when several are crossed, and "none" for groups of one device.

    mesh: axis -> its size, in the order in which devices are numbered.
    """
    shape = tuple(mesh.values())
    places = [np.stack(np.unravel_index(group, shape), -1) for group in members]
    crossed = [name for n, name in enumerate(mesh) if any(np.ptp(place[:, n]) for place in places)]
    return "x".join(crossed) or "none"


def kind(visit: Visit) -> str | None:
    """The kind of collective that an instruction starts; on TPU a reduce-scatter is an all-reduce fused with its slice."""
    opcode = visit.instruction.opcode.removesuffix("-start")
    if opcode not in KINDS:
        return None
    scattered = visit.fused and "from-cross-replica-sharding" in visit.instruction.attributes
    return "reduce-scatter" if opcode == "all-reduce" and scattered else opcode


def sent(name: str, given: float, size: int) -> float:
    """Bytes that each of `size` devices sends around a ring, when each gives `given` bytes to a collective."""
    share = {
        "all-gather": size - 1,
        "reduce-scatter": (size - 1) / size,
        "all-reduce": 2 * (size - 1) / size,
        "all-to-all": (size - 1) / size,
        "collective-permute": 1,
    }
    return given * share[name]


def collective_bytes(module: Module, mesh: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Axis -> kind of collective -> bytes that a device sends in a whole program.

    What is started in one fusion and ended in another one stands in both, under one channel: it counts once.
    """
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    devices, seen = math.prod(mesh.values()), set[tuple[str, str]]()
    for visit in module.visits():
        name = kind(visit)
        if name is None:
            continue
        instruction = visit.instruction
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        if visit.fused and channel:
            key = (name, channel[1])
            if key in seen:
                continue
            seen.add(key)
        members = groups(instruction.attributes, devices)
        axis = axis_of(members, mesh)
        if axis != "none":
            found[axis][name] += visit.times * sent(name, _given(instruction, visit), max(map(len, members)))
    return {axis: dict(kinds) for axis, kinds in found.items()}


def _given(instruction: Instruction, visit: Visit) -> float:
    return float(sum(operand.bytes for operand in visit.computation.operands(instruction)))
