"""Measures the rollout: tokens a second of G replies to each prompt with a clip, alone or in turns with another implementation.

A rival gets the same weights (a model directory), the same prompts, sampling and group size. It is timed only when it continues
the prompts greedily by the same tokens as we do. Nothing stops early, so that both write exactly the same number of tokens.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vstar_jax import sharding
from vstar_jax.batch import Example, Turn, collate
from vstar_jax.benchmark import common
from vstar_jax.benchmark.decoding import decode_bytes
from vstar_jax.benchmark.operations import rollout_operations
from vstar_jax.benchmark.rates import copy_bandwidth, matrix_rate
from vstar_jax.benchmark.size import Size, parameters
from vstar_jax.errors import UserError
from vstar_jax.models import hf
from vstar_jax.models.qwen2_5_vl import Qwen25VL, abstract
from vstar_jax.rollout.episode import PHASES, Rollout, Sampling, episode_keys

CHECKED_TOKENS = 16  # greedy ones that must agree: so few that two tokens of equal logits are not to be expected among them


@dataclass(frozen=True)
class Workload:
    """prompts, each continued by `group` replies of exactly `tokens` tokens, drawn at `temperature` from the top `top_p`."""

    prompts: int = 8
    group: int = 4
    tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def written(self) -> int:
        """Tokens of all replies."""
        return self.prompts * self.group * self.tokens


class Contender(Protocol):
    """An implementation of generation, with its own weights and copy of the prompts."""

    name: str
    compile_seconds: float

    def sample(self) -> np.ndarray:
        """The replies int [prompts * group, tokens] to all prompts, those of a prompt side by side."""
        ...

    def greedy(self, tokens: int) -> np.ndarray:
        """The most likely replies int [prompts, tokens], computed in float32: shorter types tie too many tokens."""
        ...

    def device_peak(self) -> float | None:
        """See `common.device_peak`."""
        ...


Rival = Callable[[Path, Sequence[Example], Workload, Size], Contender]
"""Makes a contender from a model directory in Hugging Face format, prompts of one length, and what to do with them."""


class Ours:
    """The rollout that training runs, one turn of it, on one device; `seconds` by phase, of every call of `sample`.

    model: with weights in the type that they are read in, as training's rollout has them.
    """

    name = "vstar_jax"

    def __init__(self, model: Qwen25VL, prompts: Sequence[Example], work: Workload, size: Size):
        self.graphdef, self.state = nnx.split(model)
        self.mesh, self.work, self.size = sharding.make_mesh("1x1"), work, size
        batch = collate([[p] for p in prompts], (len(prompts[0].tokens),), (len(prompts[0].patches),))
        self.batch = sharding.put_batch(batch, self.mesh)
        self.starts = np.asarray([p.positions.max() + 1 for p in prompts], np.int32)
        self.rollout = self._rollout(self.graphdef, Sampling((work.tokens,), work.temperature, work.top_p, turns=1))
        self.calls = 0
        self.seconds: list[dict[str, float]] = []
        self.compile_seconds = 0.0

    def sample(self) -> np.ndarray:
        """See `Contender`; every call draws anew."""
        self.calls += 1
        started = time.perf_counter()
        tokens = self._play(self.rollout, self.state, self.work.group, seed=self.calls)
        if self.calls == 1:
            self.compile_seconds = time.perf_counter() - started
        self.seconds.append(dict(self.rollout.seconds))
        return tokens

    def greedy(self, tokens: int) -> np.ndarray:
        """See `Contender`."""
        graphdef, _ = nnx.split(abstract(self.size.architecture, replace(self.size.policy, dtype="float32")))
        state = jax.tree.map(lambda x: x.astype(jnp.float32), self.state)
        with jax.default_matmul_precision("highest"):  # accelerators would shorten the factors
            return self._play(self._rollout(graphdef, Sampling((tokens,), 0.0, turns=1)), state, 1, seed=0)

    def device_peak(self) -> float | None:
        """See `Contender`."""
        return common.device_peak()

    def _rollout(self, graphdef: Any, sampling: Sampling) -> Rollout:
        return Rollout(graphdef, no_host, 0, np.zeros(0, np.int32), sampling, self.mesh, "callback")

    def _play(self, rollout: Rollout, state: Any, members: int, seed: int) -> np.ndarray:
        keys = episode_keys(seed, range(self.work.prompts), members)
        numbers = np.arange(self.work.prompts * members, dtype=np.int32)
        (completion,) = rollout(state, self.batch, self.starts, keys, numbers)
        return np.asarray(completion.tokens)


def no_host(*_: Any) -> Turn:
    """The host of episodes of one turn, which ask for nothing."""
    raise AssertionError("an episode of one turn asked the host")


def measure_rollout(size: Size, work: Workload, repeats: int, rival: Rival | None = None) -> dict[str, Any]:
    """Times `repeats` rollouts of one turn on one device, in turns with the rival's when there is one.

    Returns what `report` takes. Raises UserError for too few repeats, and when greedy replies disagree or a contender writes
    another number of tokens: then no speed is worth a report.
    """
    common.check_repeats(repeats)
    rng, dtype = np.random.default_rng(0), size.policy.dtype
    prompts = [size.example(rng, size.prompt) for _ in range(work.prompts)]
    with common.Compilations() as compiled:
        rate, bandwidth = matrix_rate(dtype), copy_bandwidth()
        policy = size.random_policy(replace(size.policy, param_dtype=dtype))
        contenders: list[Contender] = []
        if rival is not None:
            with tempfile.TemporaryDirectory() as folder:
                hf.save(policy, Path(folder) / "model")
                contenders.append(rival(Path(folder) / "model", prompts, work, size))
        ours = Ours(policy, prompts, work, size)
        contenders.insert(0, ours)
        if rival is not None:
            check_agreement({c.name: c.greedy(CHECKED_TOKENS) for c in contenders})
        check_written({c.name: c.sample() for c in contenders}, work)
        memory = {c.name: common.peak_memory(c.sample, c.device_peak) for c in contenders}
    ours.seconds.clear()
    with common.Compilations() as recompiled:
        seconds = common.in_turns({c.name: c.sample for c in contenders}, repeats)
    prompt, text = len(prompts[0].tokens), size.architecture.text
    operations = rollout_operations(size, len(size.prompt) - 1, work.prompts, prompt, work.group, work.tokens)
    phases = {phase: [s[phase] for s in ours.seconds] for phase in PHASES if phase != "tools"}
    moved = decode_bytes(text, work.prompts, prompt, work.group, work.tokens, jnp.dtype(dtype).itemsize)
    return {
        "what": "rollout",
        **size.told(),
        "parameters": parameters(policy),
        "prompts": work.prompts,
        "group": work.group,
        "prompt_tokens": prompt,
        "patches": len(prompts[0].patches),
        "new_tokens": work.tokens,
        "temperature": work.temperature,
        "top_p": work.top_p,
        "machine": common.machine(),
        "operations": operations,
        "matrix_rate": rate,
        "copy_bandwidth": bandwidth,
        "decode_bytes": moved,
        "decode_bytes_per_s": moved / float(np.median(phases["decode"])),
        "compilations": compiled.told(recompiled),
        "phases": phases,
        "contenders": {
            c.name: {
                "compile_seconds": c.compile_seconds,
                "peak_memory_mib": memory[c.name],
                "seconds": seconds[c.name],
                "tokens_per_s": work.written / float(np.median(seconds[c.name])),
                **common.efficiency(operations, rate, seconds[c.name]),
            }
            for c in contenders
        },
        "ratios": [ratio for c in contenders[1:] for ratio in common.ratios(seconds[ours.name], seconds[c.name])],
    }


def check_agreement(greedy: Mapping[str, np.ndarray]) -> None:
    """Raises UserError when the greedy tokens of the first contender and of another differ."""
    (ours, expected), *others = greedy.items()
    for name, tokens in others:
        if tokens.shape != expected.shape or (tokens != expected).any():
            same = (tokens == expected).mean() if tokens.shape == expected.shape else 0.0
            raise UserError(
                f"{ours} and {name} continue the prompts by other tokens (equal in {same:.0%} of the places), so they do not "
                "do the same work and their speed is not compared: find the cause with tests/test_parity.py first."
            )


def check_written(sampled: Mapping[str, np.ndarray], work: Workload) -> None:
    """Raises UserError when a contender wrote another number of tokens, or the same reply for all members of a group."""
    for name, tokens in sampled.items():
        wanted = (work.prompts * work.group, work.tokens)
        if tokens.shape != wanted:
            raise UserError(f"{name} wrote tokens {list(tokens.shape)} and not {list(wanted)}: its speed is not compared.")
        by_group = tokens.reshape(work.prompts, work.group, -1)
        if work.group > 1 and (by_group == by_group[:, :1]).all():
            raise UserError(
                f"{name} wrote the same reply for all members of a group, so it did not sample: give it a temperature."
            )


def report(result: Mapping[str, Any]) -> str:
    """The result of a measurement as a Markdown table with a sentence on what was measured."""
    contenders = result["contenders"]
    rows = common.contender_rows(contenders, "a rollout", "new tokens", "first call, s")
    text = (
        f"Rollout of {result['model']} ({result['parameters']:,} parameters) in {result['dtype']}: {result['prompts']} prompts "
        f"of {result['prompt_tokens']} tokens with a clip of {result['patches']} patches, {result['group']} replies of "
        f"{result['new_tokens']} tokens each, temperature {result['temperature']:g}, top-p {result['top_p']:g} "
        f"({result['machine']}); median (min to max) of {len(next(iter(contenders.values()))['seconds'])} repeats.\n\n"
    )
    text += common.table(list(contenders), rows)
    text += common.by_phase(result["phases"])
    text += common.efficiency_told(result, "A rollout")
    reached, bandwidth = result["decode_bytes_per_s"], result["copy_bandwidth"]
    text += (
        f"\nOur decoding must move {result['decode_bytes'] / 1e9:,.4g} GB and did so at {reached / 1e9:,.4g} GB/s, "
        f"{reached / bandwidth:.1%} of the {bandwidth / 1e9:,.4g} GB/s of a copy on the same device.\n"
    )
    if result["ratios"]:
        ours, theirs = contenders
        text += f"\n{ours} is {common.spread(result['ratios'], '.2f')} times as fast as {theirs}, repeat by repeat; "
        text += f"their first {CHECKED_TOKENS} greedy tokens agree.\n"
    return text
