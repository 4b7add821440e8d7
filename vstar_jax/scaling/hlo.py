"""Compiled HLO text as a tree of computations: what one device computes, moves and sends in a whole program.

XLA's own cost analysis counts the body of a loop once, and a model whose layers are scanned is loops of loops. Here each
computation counts as often as it runs.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "f16": 16,
    "bf16": 16,
    "s64": 64,
    "u64": 64,
    "f64": 64,
}
"""Width of an element; types that are not listed have 32 bits, and f8 types 8."""


@dataclass(frozen=True)
class Shape:
    """The type and the dimensions of one array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype.startswith("f8") else BITS.get(self.dtype, 32)
        return 0 if self.dtype == "token" else math.prod(self.dims) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line: its shapes (several for a tuple), opcode, names of operands, and the attributes as text."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    arguments: str

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    def called(self, key: str) -> list[str]:
        """Computations named by the attribute `key`, which may list several in braces."""
        match = re.search(rf"\b{key}=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.attributes)
        if not match:
            return []
        return [match[1]] if match[1] else re.findall(r"%([\w.\-]+)", match[2])


@dataclass
class Computation:
    """Instructions by name, in the order of the text; the last marked ROOT is the result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.arguments): i for i in found}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> the instructions that have it as an operand."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclass(frozen=True)
class Visit:
    """An instruction that runs `times` times in a program; fused: inside a fusion, which touches memory only as a whole."""

    instruction: Instruction
    computation: Computation
    times: float
    fused: bool


HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(")
LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations of an HLO module's text by name, and the name of its entry."""
    found: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if (match := HEADER.match(line)) and line.endswith("{"):
                current = found[match[2]] = Computation(match[2])
                entry = match[2] if match[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            current = None
        elif match := LINE.match(line):
            instruction = _instruction(match[2], line[match.end() :])
            current.instructions[instruction.name] = instruction
            if match[1]:
                current.root = instruction
    return found, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shapes, rest = text[:end], text[end:].lstrip()
    start = rest.index("(")
    close = _closing(rest, start)
    arguments = rest[start + 1 : close]
    arrays = tuple(Shape(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in ARRAY.findall(shapes))
    return Instruction(name, arrays, rest[:start], tuple(re.findall(r"%([\w.\-]+)", arguments)), rest[close + 1 :], arguments)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    raise ValueError(f"HLO with an open bracket: {text[:100]}")


class Module:
    """A compiled program of one device; loops: how often a loop runs whose text does not tell."""

    def __init__(self, text: str, loops: int = 1):
        self.computations, self.entry = parse(text)
        self.loops = loops

    def visits(self) -> Iterator[Visit]:
        """Every instruction that runs; of the branches of a conditional, the dearest in floating-point operations."""
        yield from self._visits(self.entry, 1.0, False)

    def _visits(self, name: str, times: float, fused: bool) -> Iterator[Visit]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield Visit(instruction, computation, times, fused)
            if instruction.opcode == "while":
                count = times * self.trips(instruction)
                for key in ("condition", "body"):
                    yield from self._visits(instruction.called(key)[0], count, fused)
            elif instruction.opcode == "conditional":
                branches = instruction.called("branch_computations") or [
                    *instruction.called("true_computation"),
                    *instruction.called("false_computation"),
                ]
                yield from self._visits(max(branches, key=self._dear), times, fused)
            elif instruction.opcode == "fusion":
                yield from self._visits(instruction.called("calls")[0], times, True)
            elif instruction.opcode in ("call", "async-start"):
                for callee in instruction.called("to_apply") + instruction.called("calls"):
                    yield from self._visits(callee, times, fused)

    def _dear(self, name: str) -> float:
        return sum(flops(v) * v.times for v in self._visits(name, 1.0, False))

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs at most: what XLA found out, or the bound that its condition compares with."""
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(match[1])
        condition = self.computations[loop.called("condition")[0]]
        bounds = {
            int(i.arguments)
            for i in condition.instructions.values()
            if i.opcode == "constant" and i.shapes[0] in (Shape("s32", ()), Shape("u32", ()))
        }
        return -(-bounds.pop() // self._stride(loop, condition)) if len(bounds) == 1 else self.loops

    def _stride(self, loop: Instruction, condition: Computation) -> int:
        """By how much a loop counts: XLA unrolls those in which it sends and computes at once by two."""
        body = self.computations[loop.called("body")[0]]
        compared = next((i for i in condition.instructions.values() if i.opcode == "compare"), None)
        counters = [i for i in condition.operands(compared) if i.opcode == "get-tuple-element"] if compared else []
        if not counters or body.root is None or body.root.opcode != "tuple":
            return 1
        at, stride = int(counters[0].attributes.split("index=")[1].split(",")[0]), 0
        value = body.instructions[body.root.operands[at]]
        while value.opcode == "add":
            operands = body.operands(value)
            steps = [int(i.arguments) for i in operands if i.opcode == "constant"]
            if not steps:
                break
            stride += steps[0]
            value = next(i for i in operands if i.opcode != "constant")
        return stride or 1

    def total(self, measure: Callable[[Visit], float]) -> float:
        """The sum of a measure over everything that runs."""
        return sum(measure(visit) * visit.times for visit in self.visits())


def flops(visit: Visit) -> float:
    """Floating-point operations of the matrix products and convolutions, two for each product of two numbers."""
    instruction, operands = visit.instruction, visit.computation.operands(visit.instruction)
    if instruction.opcode == "dot":
        contracted = _numbers(instruction.attributes, "lhs_contracting_dims")
        return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(operands[0].shapes[0].dims[d] for d in contracted)
    if instruction.opcode == "convolution":
        return _convolution(instruction, operands[0].shapes[0], operands[1].shapes[0])
    if instruction.opcode == "custom-call":
        return _kernel(instruction)
    return 0.0


KERNELS = {
    **{"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4},
    **{"dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5},
}
"""Attention kernels of Pallas and cuDNN, whose text XLA does not open -> their products of scores with the width of a head."""
SCORES = re.compile(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)\].*?"mask_type":\s*"(\w+)"')
"""What cuDNN's kernels tell: the shape of their scores, and which of them are hidden."""


def _kernel(instruction: Instruction) -> float:
    """A causal attention kernel computes half of the square of its scores, as all of the splash kernel are here."""
    products = next((n for name, n in KERNELS.items() if instruction.name.startswith(name)), 0)
    if not products:
        return 0.0
    *heads, length, width = max(instruction.shapes, key=lambda shape: math.prod(shape.dims)).dims
    if told := SCORES.search(instruction.attributes):
        computed = math.prod(int(n.strip('"')) for n in told[1].replace(" ", "").split(","))
        return products * computed * width * (1 if "CAUSAL" in told[2] else 2)
    return products * math.prod(heads) * length * length * width


def _numbers(attributes: str, key: str) -> list[int]:
    match = re.search(rf"\b{key}=\{{([\d,]*)\}}", attributes)
    return [int(n) for n in match[1].split(",") if n] if match else []


def _convolution(instruction: Instruction, left: Shape, right: Shape) -> float:
    """TPU writes every matrix product as a convolution, batches as dilated windows: only places that exist are counted."""
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not match:
        return 0.0
    lhs, rhs, out = match.groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}

    def each(key: str, default: int) -> list[int]:
        return [int(n) for n in fields[key].split("x")] if key in fields else [default] * len(lhs)

    stride, base, dilation = each("stride", 1), each("lhs_dilate", 1), each("rhs_dilate", 1)
    pads = [int(p.split("_")[0]) for p in fields["pad"].split("x")] if "pad" in fields else [0] * len(lhs)
    places = 1
    for at in range(sum(label.isdigit() for label in lhs)):
        label = str(at)
        size = instruction.shapes[0].dims[out.index(label)]
        kernel, inner = right.dims[rhs.index(label)], left.dims[lhs.index(label)]
        span = (inner - 1) * base[at] + 1
        places *= sum(
            0 <= (x := o * stride[at] + k * dilation[at] - pads[at]) < span and x % base[at] == 0
            for o in range(size)
            for k in range(kernel)
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = instruction.shapes[0].dims[out.index("b")] // (int(groups[1]) if groups else 1)
    return 2.0 * places * batch * right.dims[rhs.index("i")] * right.dims[rhs.index("o")]


FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
"""Opcodes that move nothing themselves."""


UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Opcodes that write a part of their first operand in its place -> the operand that is written."""


def _asynchronous(instruction: Instruction) -> bool:
    """Whether it only carries the buffers of a collective that is under way."""
    return instruction.opcode == "tuple" or (
        instruction.opcode == "custom-call" and '"AsyncCollectiveStart"' in instruction.attributes
    )


def moved(module: Module) -> Callable[[Visit], float]:
    """Bytes that an instruction reads and writes, those of a slice where a fusion takes only a slice of an operand."""
    cache: dict[str, float] = {}

    def bytes_of(visit: Visit) -> float:
        instruction = visit.instruction
        if visit.fused or instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            return 0.0
        operands = visit.computation.operands(instruction)
        if instruction.opcode == "fusion":
            body = instruction.called("calls")[0]
            if body not in cache:
                cache[body] = _fusion_bytes(module, module.computations[body])
            return cache[body]
        return _touched(instruction, operands)

    return bytes_of


def _touched(instruction: Instruction, operands: list[Instruction]) -> float:
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return 2.0 * instruction.bytes
    if instruction.opcode in UPDATES:
        return 2.0 * operands[UPDATES[instruction.opcode]].bytes
    return float(instruction.bytes + sum(o.bytes for o in operands))


def _fusion_bytes(module: Module, body: Computation) -> float:
    def written(instruction: Instruction) -> float:
        if instruction.opcode == "bitcast" or instruction.opcode == "tuple":
            return sum(written(o) for o in body.operands(instruction))
        if instruction.opcode in UPDATES:
            return float(body.operands(instruction)[UPDATES[instruction.opcode]].bytes)
        if instruction.opcode == "parameter" or _asynchronous(instruction):
            return 0.0
        return float(instruction.bytes)

    return sum(_read(module, body, p) for p in body.parameters.values()) + (written(body.root) if body.root else 0.0)


def _read(module: Module, body: Computation, array: Instruction) -> float:
    """Bytes that are read of an array inside a fusion, and inside fusions in it: slices alone, when nobody takes more of it."""
    total, whole = 0.0, float(array.bytes)
    for user in body.users.get(array.name, ()):
        if user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == array.name:
            total += user.bytes
        elif (user.opcode in UPDATES and user.operands[0] == array.name) or _asynchronous(user):
            continue
        elif user.opcode == "bitcast":
            total += _read(module, body, user)
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")[0]]
            places = [n for n, name in enumerate(user.operands) if name == array.name]
            total += sum(_read(module, inner, inner.parameters[n]) for n in places)
        else:
            return whole
    return min(total, whole)
