"""Measures the SFT step: seconds, tokens a second, MFU and memory, alone or in turns with another implementation.

A rival gets the same weights (a model directory), the same dialogues and the same settings. It is timed only when its loss
agrees with ours before and after the first update, so that both are known to do the same work; in bfloat16, whose rounding
hides small differences, also the loss and the gradient of one dialogue in float32.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vstar_jax import sharding
from vstar_jax.batch import Batch, Example, collate
from vstar_jax.benchmark import common
from vstar_jax.benchmark.operations import TRAINING, row_operations
from vstar_jax.benchmark.rates import matrix_rate
from vstar_jax.benchmark.size import Size, parameters
from vstar_jax.config import PolicyConfig, SftConfig
from vstar_jax.errors import UserError
from vstar_jax.models import hf
from vstar_jax.models.qwen2_5_vl import Qwen25VL, abstract
from vstar_jax.objectives.sft import sft_loss
from vstar_jax.training.state import create_state, make_optimizer, make_train_step

TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-3}
"""Relative, by type: sums of float32 in another order differ by some 1e-6, and another computation by more. In bfloat16 the
losses of tiny differ by at most 3e-4 (two batches, parameters in either type); twice or ten times the learning rate, or clips
that are blank, by at least 4e-3.
"""
CHECKED_STEPS = 2  # the loss of the second one has gone through gradients, clipping and AdamW
SFT = SftConfig(learning_rate=1e-4, warmup=0, steps=1_000_000)  # so long a cosine that the rate is constant


class Contender(Protocol):
    """An implementation of the SFT step, with its own weights, optimizer state and copy of the batch."""

    name: str
    compile_seconds: float

    def exact(self) -> tuple[float, float]:
        """The loss and the norm of the gradient of the first dialogue in float32; called before the first step."""
        ...

    def step(self) -> float:
        """One full step (forward, backward, clipping, AdamW), finished when it returns; gives the loss before the update."""
        ...

    def device_peak(self) -> float | None:
        """See `common.device_peak`."""
        ...


Rival = Callable[[Path, Sequence[Example], SftConfig, Size], Contender]
"""Makes a contender from a model directory in Hugging Face format, dialogues of one length, and settings."""


class Ours:
    """The step that training runs, compiled ahead of time, on one device."""

    name = "vstar_jax"

    def __init__(self, model: Qwen25VL, dialogues: Sequence[Example], config: SftConfig, size: Size):
        """model: is given away; its arrays are gone after the first step."""
        self.mesh, self.config, self.size = sharding.make_mesh("1x1"), config, size
        self.dialogues, self.model = dialogues, model
        self.compile_seconds = 0.0

    def exact(self) -> tuple[float, float]:
        """See `Contender`."""
        graphdef, _ = nnx.split(abstract(self.size.architecture, replace(self.size.policy, dtype="float32")))

        @jax.jit
        def measured(state: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            return _loss_and_norm(graphdef, jax.tree.map(lambda x: x.astype(jnp.float32), state), batch, self.config)

        with jax.default_matmul_precision("highest"):  # accelerators would shorten the factors
            loss, norm = measured(nnx.state(self.model), self._batch(self.dialogues[:1]))
        return float(loss), float(norm)

    def start(self) -> None:
        """Makes the optimizer's state and compiles the step."""
        optimizer = make_optimizer(self.config, self.size.policy.moment_dtype)
        self.graphdef, self.state = create_state(self.model, optimizer, PolicyConfig().lora, self.mesh, seed=0)
        del self.model
        self.batch = self._batch(self.dialogues)
        step: Any = make_train_step(self.graphdef, optimizer, self.config, False, self.state)
        start = time.perf_counter()
        self.compiled = step.lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start

    def step(self) -> float:
        """One step; the loss before the update."""
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["sft/loss"])

    def device_peak(self) -> float | None:
        """See `Contender`."""
        return common.device_peak()

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Parts of a step as programs of their own, compiled: the step itself is one program and cannot be looked into."""
        graphdef, config = self.graphdef, self.config

        def encode(state: Any, batch: Batch) -> jax.Array:
            assert batch.vision is not None
            return nnx.merge(graphdef, state).encode(batch.vision)

        def forward(state: Any, batch: Batch) -> jax.Array:
            return sft_loss(nnx.merge(graphdef, state), batch, chunk=config.chunk, packed=False).loss

        programs = {
            "vision tower": encode,
            "forward": forward,
            "forward and backward": lambda state, batch: _loss_and_norm(graphdef, state, batch, config),
        }
        compiled = {n: jax.jit(f).lower(self.state.params, self.batch).compile() for n, f in programs.items()}
        return {n: partial(lambda c: jax.block_until_ready(c(self.state.params, self.batch)), c) for n, c in compiled.items()}

    def _batch(self, dialogues: Sequence[Example]) -> Batch:
        batch = collate([[d] for d in dialogues], (len(dialogues[0].tokens),), (len(dialogues[0].patches),))
        return sharding.put_batch(batch, self.mesh)


def _loss_and_norm(graphdef: Any, state: Any, batch: Batch, config: SftConfig) -> tuple[jax.Array, jax.Array]:
    """The mean loss and the norm of its gradient."""

    def mean(state: Any) -> jax.Array:
        totals = sft_loss(nnx.merge(graphdef, state), batch, chunk=config.chunk, packed=False)
        return totals.loss / totals.count

    loss, grads = jax.value_and_grad(mean)(state)
    return loss, optax.tree.norm(grads)


def measure_sft(size: Size, batch_size: int | None, repeats: int, rival: Rival | None = None) -> dict[str, Any]:
    """Times `repeats` full SFT steps on one device, in turns with the rival's when there is one.

    batch_size: dialogues, as many as `size.rows` when not given. Returns what `report` takes. Raises UserError for too few
    repeats, and when the losses of the first steps disagree: then the two do not do the same work and no speed is worth a
    report.
    """
    common.check_repeats(repeats)
    rows, rng = batch_size or size.rows, np.random.default_rng(0)
    dialogues = [size.example(rng, size.dialogue, learned=size.dialogue[-1]) for _ in range(rows)]
    with common.Compilations() as compiled:
        rate, policy = matrix_rate(size.policy.dtype), size.random_policy()
        count = parameters(policy)
        contenders: list[Contender] = []
        if rival is not None:
            with tempfile.TemporaryDirectory() as folder:
                hf.save(policy, Path(folder) / "model")
                contenders.append(rival(Path(folder) / "model", dialogues, SFT, size))
        ours = Ours(policy, dialogues, SFT, size)
        del policy
        contenders.insert(0, ours)
        if rival is not None and size.policy.dtype != "float32":
            check_agreement(
                {c.name: c.exact() for c in contenders}, "float32", ("loss (in float32)", "gradient's norm (in float32)")
            )
        ours.start()
        losses = {c.name: [c.step() for _ in range(CHECKED_STEPS)] for c in contenders}
        told = tuple(f"loss of step {step}" for step in range(1, CHECKED_STEPS + 1))
        difference = check_agreement(losses, size.policy.dtype, told)
        memory = {c.name: common.peak_memory(c.step, c.device_peak) for c in contenders}
        parts = ours.parts()
        common.in_turns(parts, 1)
    with common.Compilations() as recompiled:
        seconds = common.in_turns({c.name: c.step for c in contenders}, repeats)
        phases = common.in_turns({**parts, "whole step": ours.step}, repeats)
    tokens = rows * len(dialogues[0].tokens)
    clips, learned = len(size.dialogue) - 1, size.dialogue[-1]
    operations = TRAINING * rows * row_operations(size, clips, len(dialogues[0].tokens), learned)
    return {
        "what": "sft",
        **size.told(),
        "parameters": count,
        "dialogues": rows,
        "tokens": tokens,
        "patches": rows * len(dialogues[0].patches),
        "machine": common.machine(),
        "operations": operations,
        "matrix_rate": rate,
        "loss_difference": difference,
        "compilations": compiled.told(recompiled),
        "phases": phases,
        "contenders": {
            c.name: {
                "losses": losses[c.name],
                "compile_seconds": c.compile_seconds,
                "peak_memory_mib": memory[c.name],
                "seconds": seconds[c.name],
                "tokens_per_s": tokens / float(np.median(seconds[c.name])),
                **common.efficiency(operations, rate, seconds[c.name]),
            }
            for c in contenders
        },
        "ratios": [r for c in contenders[1:] for r in common.ratios(seconds[ours.name], seconds[c.name])],
    }


def check_agreement(values: Mapping[str, Sequence[float]], dtype: str, what: Sequence[str]) -> float:
    """The largest relative difference between the values of the first contender and of the others, computed in `dtype`.

    what: their names. Raises UserError when one is above `TOLERANCES` or not a number.
    """
    (ours, expected), *others = values.items()
    largest = 0.0
    for name, found in others:
        for a, b, told in zip(expected, found, what, strict=True):
            difference = abs(a - b) / abs(b)
            if not difference <= TOLERANCES[dtype]:
                raise UserError(
                    f"{ours} and {name} disagree on the {told} ({a:.6f} and {b:.6f}), so they do not do the same "
                    "work and their speed is not compared: find the cause with tests/test_parity.py first."
                )
            largest = max(largest, difference)
    return largest


def report(result: Mapping[str, Any]) -> str:
    """The result of a measurement as a Markdown table with a sentence on what was measured."""
    contenders = result["contenders"]
    rows = {
        **common.contender_rows(contenders, "a step", "tokens", "compile time, s"),
        "loss of the first steps": [", ".join(f"{x:.6f}" for x in c["losses"]) for c in contenders.values()],
    }
    text = (
        f"SFT step of {result['model']} ({result['parameters']:,} parameters) in {result['dtype']} (parameters in "
        f"{result['param_dtype']}, remat {result['remat']}) on {result['dialogues']} dialogues, "
        f"{result['tokens']:,} tokens and {result['patches']:,} patches ({result['machine']}); median (min to max) of "
        f"{len(next(iter(contenders.values()))['seconds'])} repeats.\n\n"
    )
    text += common.table(list(contenders), rows)
    text += common.efficiency_told(result, "A step")
    told = ", ".join(f"{part} {common.spread(seconds, '.3f')}" for part, seconds in result["phases"].items())
    text += f"\nOurs by parts, each a program of its own, in seconds: {told}.\n"
    if result["ratios"]:
        ours, theirs = contenders
        text += f"\n{ours} is {common.spread(result['ratios'], '.2f')} times as fast as {theirs}, repeat by repeat; "
        text += f"their losses differ by {result['loss_difference']:.1e} (relative).\n"
    return text
