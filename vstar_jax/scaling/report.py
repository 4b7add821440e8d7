"""What a compiled program says of one device: memory by what it is for, operations, bytes, and bytes on the wire.

A `Record` is plain data, so that tables are made of records of many runs; `page` is a record for people.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from vstar_jax.scaling.chips import GIB, Chip
from vstar_jax.scaling.collectives import collective_bytes
from vstar_jax.scaling.hlo import FREE, Module, flops, moved
from vstar_jax.scaling.programs import Program
from vstar_jax.sharding import mesh_shape

SHOWN = 6
"""Largest buffers that a page lists."""


@dataclass(frozen=True)
class Record:
    """One program on one device of a slice; sizes in bytes.

    identity: model, topology, mesh, program, settings and versions. parts: what lies on the device before and after the program
    (parameters, optimizer, reference, batch); cache: the KV cache at its largest; peak: all of it at the moment when most is
    there, or what the compiler asked for when it refused; limit: usable HBM. flops, moved: operations and bytes read and
    written, loops counted as often as they run at most; sent: axis -> kind of collective -> bytes. largest: (bytes, what).
    refused: the compiler's first sentence, empty when it compiled. seconds: to lower, to compile, and of processor for both.
    """

    identity: Mapping[str, Any]
    parts: Mapping[str, int]
    cache: int
    peak: int
    limit: int
    flops: float
    moved: float
    sent: Mapping[str, Mapping[str, float]]
    largest: Sequence[tuple[int, str]]
    refused: str
    seconds: Mapping[str, float]

    @property
    def fits(self) -> bool:
        return not self.refused and self.peak <= self.limit

    @property
    def activations(self) -> int:
        """What the program itself needs beside its cache: activations, gradients and other temporaries, padding and code."""
        return self.peak - sum(self.parts.values()) - self.cache

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "activations": self.activations, "fits": self.fits}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Record":
        fields = {k: v for k, v in raw.items() if k not in ("activations", "fits")}
        return cls(**{**fields, "largest": [(int(size), what) for size, what in raw["largest"]]})


def device_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on one device, by their shardings."""

    def one(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return int(np.prod(shape)) * (8 if key else np.dtype(x.dtype).itemsize)

    return sum(map(one, jax.tree.leaves(tree)))


def record(
    program: Program,
    identity: Mapping[str, Any],
    mesh: Mapping[str, int],
    chip: Chip,
    compiled: Any,
    seconds: Mapping[str, float],
) -> Record:
    """What a compiled program says; mesh: axis -> size."""
    memory = compiled.memory_analysis()
    return analysed(
        program,
        identity,
        mesh,
        chip,
        memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
        compiled.as_text(),
        seconds,
    )


def analysed(
    program: Program,
    identity: Mapping[str, Any],
    mesh: Mapping[str, int],
    chip: Chip,
    peak: int,
    text: str,
    seconds: Mapping[str, float],
) -> Record:
    """`record` from the program's own peak and its HLO text."""
    module, parts = Module(text, program.loops), held(program)
    resident = sum(map(device_bytes, program.resident.values()))
    cache = device_bytes(program.cache)
    buffers = [(size, name) for name, size in parts.items()] + ([(cache, "KV cache")] if cache else [])
    return Record(
        identity={**identity, "program": program.name},
        parts=parts,
        cache=cache,
        peak=peak + resident,
        limit=chip.usable,
        flops=module.total(flops),
        moved=module.total(moved(module)),
        sent=collective_bytes(module, mesh),
        largest=sorted(buffers + _buffers(module), reverse=True)[:SHOWN],
        refused="",
        seconds=dict(seconds),
    )


def held(program: Program) -> dict[str, int]:
    """Name -> bytes of all that lies on a device while a program runs and that it did not make."""
    return {name: device_bytes(tree) for name, tree in (*program.parts.items(), *program.resident.items())}


def _buffers(module: Module) -> list[tuple[int, str]]:
    """The largest single results of a program's instructions, one of each shape."""
    found: dict[str, tuple[int, str]] = {}
    for visit in module.visits():
        instruction = visit.instruction
        if visit.fused or instruction.opcode in FREE or len(instruction.shapes) != 1:
            continue
        shape = instruction.shapes[0]
        text = f"{shape.dtype}[{','.join(map(str, shape.dims))}]"
        place = re.search(r'op_name="([^"]*)"', instruction.attributes)
        if text not in found and place:
            found[text] = (shape.bytes, f"{text} of {_short(place[1])}")
    return sorted(found.values(), reverse=True)[:SHOWN]


def _short(place: str) -> str:
    """The end of an operation's path, which says the most."""
    return "/".join(place.split("/")[-3:])


def too_large(program: Program, identity: Mapping[str, Any], chip: Chip) -> Record | None:
    """The record of a program of which what must be there at once exceeds a device: there is nothing to compile."""
    parts, cache, gradient = held(program), device_bytes(program.cache), device_bytes(program.gradient)
    needed = sum(parts.values()) + cache + gradient
    if needed <= chip.usable:
        return None
    named = {**parts, "KV cache": cache, "gradient": gradient}
    return Record(
        identity={**identity, "program": program.name},
        parts=parts,
        cache=cache,
        peak=needed,
        limit=chip.usable,
        flops=0.0,
        moved=0.0,
        sent={},
        largest=sorted(((size, name) for name, size in named.items() if size), reverse=True),
        refused="not compiled, for these alone are too much",
        seconds={"lower": 0.0, "compile": 0.0, "processor": 0.0},
    )


USED = re.compile(
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"
    r"|HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
)
ALLOCATION = re.compile(r"Size: ([\d.]+)([KMGT]?)\n\s*(?:Operator: op_name=\"([^\"]*)\"[^\n]*\n\s*)?Shape: (\S+)", re.MULTILINE)
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def refused(program: Program, identity: Mapping[str, Any], message: str, seconds: Mapping[str, float]) -> Record | None:
    """What the compiler says when memory does not suffice; None when it refused for another reason."""
    used = USED.search(message)
    if "RESOURCE_EXHAUSTED" not in message or not used:
        return None
    need, unit, limit, limit_unit = (field for field in used.groups() if field is not None)
    # Of temporaries alone the compiler says nothing of the arguments; with them it has counted what the program is given.
    beside = program.resident if used[1] else {**program.parts, **program.resident}
    buffers = [
        (_size(number, unit), f"{shape.partition('{')[0]} of {_short(place)}" if place else shape.partition("{")[0])
        for number, unit, place, shape in ALLOCATION.findall(message)
    ]
    return Record(
        identity={**identity, "program": program.name},
        parts=held(program),
        cache=device_bytes(program.cache),
        peak=_size(need, unit) + sum(map(device_bytes, beside.values())),
        limit=_size(limit, limit_unit),
        flops=0.0,
        moved=0.0,
        sent={},
        largest=buffers[:SHOWN],
        refused=f"the compiler refuses it: {used[0]}",
        seconds=dict(seconds),
    )


def _size(number: str, unit: str) -> int:
    return int(float(number) * UNITS[unit])


def page(found: Record) -> str:
    """A record as text."""
    about = found.identity
    lines = [
        f"{about['program']} of {about['model']} on {about['topology']}, mesh {about['mesh']}, for each device:",
        *(f"  {name:<28}{_gib(size)}" for name, size in found.parts.items()),
        f"  {'KV cache':<28}{_gib(found.cache)}" if found.cache else "",
        f"  {'activations and temporaries':<28}{_gib(found.activations)}",
        f"  {'peak':<28}{_gib(found.peak)} of {found.limit / GIB:.2f} GiB ({found.peak / found.limit:.0%})",
    ]
    if not found.refused:
        lines += [
            f"  {'operations':<28}{found.flops / 1e12:10.3f} TFLOP",
            f"  {'bytes read and written':<28}{found.moved / 1e9:10.3f} GB",
            *(_wire(axis, kinds) for axis, kinds in found.sent.items()),
        ]
    lines.append(f"  {'lowered, compiled':<28}{found.seconds['lower']:10.1f} s, {found.seconds['compile']:.1f} s")
    if not found.fits:
        lines += _over(found)
    return "\n".join(line for line in lines if line) + "\n"


def _gib(size: int) -> str:
    return f"{size / GIB:10.3f} GiB"


def _wire(axis: str, kinds: Mapping[str, float]) -> str:
    told = ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in sorted(kinds.items(), key=lambda item: -item[1]))
    return f"  {f'sent along {axis}':<28}{sum(kinds.values()) / 1e9:10.3f} GB ({told})"


def _over(found: Record) -> list[str]:
    missing = (found.peak - found.limit) / GIB
    why = found.refused or "with what stays on the device beside the program"
    return [
        f"DOES NOT FIT: {missing:.2f} GiB too many ({why}). Largest:",
        *(f"  {size / GIB:8.3f} GiB  {what}" for size, what in found.largest),
        "What would help: " + "; ".join(advice(found)) + ".",
    ]


def advice(found: Record) -> list[str]:
    """Settings that lower what is largest, the most promising first."""
    about, settings = found.identity, found.identity["settings"]
    replicas, data, model = mesh_shape(about["mesh"])
    state = sum(size for name, size in found.parts.items() if name != "batch")
    told = []
    if found.activations > state and about["program"] in ("sft", "update"):
        key = "sft" if about["program"] == "sft" else "grpo"
        if settings["policy.remat"] != "full":
            told.append("--policy.remat=full keeps only one activation a layer")
        rows = settings[f"{key}.rows"] // settings[f"{key}.accumulate"]
        if rows > replicas * data:
            told.append(f"--{key}.accumulate={settings[f'{key}.rows'] // (replicas * data)} leaves a row a device at a time")
    if about["program"] == "rollout":
        if settings["rollout.weights"] == "gathered" and data > 1:
            told.append("--rollout.weights=split leaves weights where they lie, and gathers them for every token")
        if settings["rollout.cache"] == "same":
            told.append("--rollout.cache=float8_e4m3fn makes the KV cache shorter")
        told.append(
            "fewer --grpo.prompts, a shorter --rollout.max_new_tokens or smaller --data.tokens and --rollout.turn_tokens"
        )
    if not settings["policy.lora.rank"]:
        held_to = "" if about["program"] == "sft" else " with --grpo.reference=adapters_off"
        told.append(f"--policy.lora.rank=16{held_to} needs no optimizer state for what is frozen")
    if settings["policy.param_dtype"] != "bfloat16":
        told.append("--policy.param_dtype=bfloat16 halves parameters")
    if settings["policy.moment_dtype"] != "bfloat16":
        told.append("--policy.moment_dtype=bfloat16 halves the optimizer's state")
    if settings["policy.dtype"] != "bfloat16":
        told.append("--policy.dtype=bfloat16 halves activations")
    told.append(f"a larger slice, or a larger model axis than {model}, splits them further")
    return told
