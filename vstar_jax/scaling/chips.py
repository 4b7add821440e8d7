"""Chips that are not there: what a TPU or a GPU has, and the devices of a named slice or node for the compiler."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vstar_jax.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """A generation of TPUs, or a GPU.

    usable: bytes of HBM for a program: of a TPU those that libtpu 0.0.42 leaves, which the compiler itself names when a program
    does not fit, of a GPU those that its driver shows; example: a slice or node as a user writes it, which tells how many
    numbers it takes; bandwidth: of a GPU, bytes a second.
    """

    name: str
    usable: int
    example: str
    bandwidth: int = 0

    @property
    def is_gpu(self) -> bool:
        return bool(self.bandwidth)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", int(15.75 * GIB), "v5e:2x4"),
        Chip("v5p", int(95.74 * GIB), "v5p:2x2x1"),
        Chip("v6e", int(31.25 * GIB), "v6e:2x4"),
        Chip("h100", 79 * GIB, "h100:8", 3_352_320_000_000),
        Chip("h200", 139 * GIB, "h200:8", 4_800_000_000_000),
    )
}
NODE = 8
"""Most GPUs of a node."""
HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 20 }} runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
"""XLA's description of a Hopper (GpuTargetConfigProto): H100 and H200 differ in memory alone."""


def chip_of(topology: str) -> Chip:
    """The chip of a slice such as v5e:2x4 or a node such as h200:8; UserError when the name is none or the chip is unknown."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){0,2})", topology)
    if not match:
        raise UserError(f"topology is {topology!r}: write CHIP:SHAPE, such as v5e:2x4, v6e:4x4, v5p:2x2x1 or h200:8.")
    if match[1] not in CHIPS:
        raise UserError(f"topology {topology} is of the chip {match[1]!r}: choose one of {', '.join(CHIPS)}.")
    chip = CHIPS[match[1]]
    axes = chip.example.count("x") + 1
    if match[2].count("x") + 1 != axes:
        raise UserError(f"topology {topology} does not have the {axes} numbers of {chip.name}: write it as in {chip.example}.")
    if chip.is_gpu and int(match[2]) > NODE:
        raise UserError(f"topology {topology} is more than a node of {NODE} GPUs: choose {chip.name}:1 to {chip.name}:{NODE}.")
    return chip


def size(topology: str) -> int:
    """How many chips a slice has; UserError when the name is none."""
    chip_of(topology)
    return math.prod(int(n) for n in topology.partition(":")[2].split("x"))


def devices(topology: str) -> Sequence[Any]:
    """The devices of a slice or a node, which only a compiler can use.

    UserError when the name is none, when the compiler is not installed, and when there is no such slice.
    """
    chip = chip_of(topology)
    return _gpus(chip, size(topology)) if chip.is_gpu else _tpus(topology)


def _tpus(topology: str) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed, and it is the compiler for TPU: pip install -e '.[tpu]'.")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks the cloud's metadata server, and waits
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")  # it complains that it is not on a TPU
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a compiler holds no chip, so that several may run

    from jax.experimental import topologies

    host = {"chips_per_host_bounds": (1, 1, 1)} if size(topology) == 1 else {}  # else a host has four chips
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **host).devices
    except Exception as error:  # libtpu raises types of its own
        raise UserError(f"there is no slice {topology} ({error}): choose one such as v5e:2x4, v6e:4x4 or v5p:2x2x1.") from error


def _gpus(chip: Chip, count: int) -> Sequence[Any]:
    from jax.experimental import topologies

    config = HOPPER.format(name=f"NVIDIA {chip.name.upper()}", memory=chip.usable, bandwidth=chip.bandwidth)
    try:
        # One partition, of one host.
        return topologies.get_topology_desc(chip.name, "cuda", target_config=config, topology=f"1x1x{count}").devices
    except NotImplementedError:
        missing = "JAX's plugin for CUDA is not installed, and it is the compiler for GPU: pip install -e '.[gpu]'."
        raise UserError(missing) from None
