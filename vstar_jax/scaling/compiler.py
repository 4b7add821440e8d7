"""Compiles programs ahead of time, one after the other, and prints a page for each as soon as it is known."""

import math
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
from jax.sharding import Mesh

from vstar_jax import settings, sharding
from vstar_jax.config import Config
from vstar_jax.errors import UserError
from vstar_jax.scaling import chips
from vstar_jax.scaling.programs import WHATS, Program, architecture_of, programs
from vstar_jax.scaling.report import Record, page, record, refused, too_large


def compile_all(config: Config, model: str, topology: str, what: str, flags: Sequence[str]) -> list[Record]:
    """Compiles the programs of `what` for a slice and prints a page for each.

    flags: the settings as the user gave them, for the record. UserError when the mesh does not cover the slice or does not
    suit the model.
    """
    chip = chips.chip_of(topology)
    devices = math.prod(sharding.mesh_shape(config.mesh))
    if devices != (count := chips.size(topology)):
        raise UserError(
            f"mesh {config.mesh} is of {devices} devices and {topology} has {count}: choose a mesh DxM with D times "
            f"M = {count}, such as {count}x1."
        )
    if what not in WHATS:
        raise UserError(f"there is no program {what!r}: choose one of {', '.join(WHATS)}.")
    if what not in compilable(chip):
        raise UserError(
            f"a {what} asks its tools in the middle, which JAX compiles for a GPU only where there is one: choose one of "
            f"{', '.join(compilable(chip))}."
        )
    mesh = sharding.make_mesh(config.mesh, chips.devices(topology))
    identity = {
        "model": model,
        "topology": topology,
        "mesh": config.mesh,
        "flags": [flag for flag in flags if not flag.startswith("--mesh")],
        "settings": told(config),
        "versions": {"jax": jax.__version__, "compiler": _version("jax-cuda13-plugin" if chip.is_gpu else "libtpu")},
    }
    found = []
    for program in programs(config, architecture_of(model), mesh, what):
        found.append(compiled(program, identity, mesh, chip))
        print(page(found[-1]), flush=True)
    return found


def compilable(chip: chips.Chip) -> tuple[str, ...]:
    """Which of `WHATS` can be compiled for a chip that is not there: jax 0.10.2 asks a GPU's own client for its callbacks."""
    return tuple(what for what in WHATS if not (chip.is_gpu and what == "rollout"))


def compiled(program: Program, identity: dict[str, Any], mesh: Mesh, chip: chips.Chip) -> Record:
    """The record of a program, compiled unless what must lie on a device at once is too much already."""
    if over := too_large(program, identity, chip):
        return over
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = program.function.lower(*program.arguments)
    at = time.perf_counter()
    processor = time.process_time()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = refused(program, identity, str(error), _seconds(started, at, processor))
        if found is None:
            raise
        return found
    return record(program, identity, dict(mesh.shape), chip, executable, _seconds(started, at, processor))


def _seconds(started: float, lowered: float, processor: float) -> dict[str, float]:
    return {
        "lower": lowered - started,
        "compile": time.perf_counter() - lowered,
        "processor": time.process_time() - processor,
    }


def told(config: Config) -> dict[str, Any]:
    """The settings that sizes follow from."""
    told = {s.key: s.value for s in settings.settings(config) if s.key.startswith(("policy.", "sft.", "grpo.", "rollout."))}
    rows = {"sft.rows": config.sft.batch_size, "grpo.rows": config.grpo.prompts * config.grpo.group}
    return {**told, **rows}


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return "unknown"
