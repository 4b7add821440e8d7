"""TPU chips and slices that are not there: what a chip has, and the devices of a named slice for the compiler."""

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
    """A TPU generation. usable: bytes of HBM that libtpu 0.0.42 leaves to a program; nominal: GB that the chip is sold with."""

    name: str
    nominal: int
    usable: int


CHIPS = {
    chip.name: chip
    for chip in (Chip("v5e", 16, int(15.75 * GIB)), Chip("v5p", 95, int(95.74 * GIB)), Chip("v6e", 32, int(31.25 * GIB)))
}
"""Usable figures are those that the compiler itself names when a program does not fit."""


def chip_of(topology: str) -> Chip:
    """The chip of a slice such as v5e:2x4; UserError when the name is none or the chip is unknown."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", topology)
    if not match:
        raise UserError(f"topology is {topology!r}: write CHIP:SHAPE, such as v5e:2x4, v6e:4x4 or v5p:2x2x1.")
    if match[1] not in CHIPS:
        raise UserError(f"topology {topology} is of the chip {match[1]!r}: choose one of {', '.join(CHIPS)}.")
    axes = 3 if match[1] == "v5p" else 2
    if match[2].count("x") + 1 != axes:
        example = "v5p:2x2x1" if axes == 3 else f"{match[1]}:2x4"
        raise UserError(
            f"topology {topology} does not have the {axes} numbers of a {match[1]} slice: write it as in {example}."
        )
    return CHIPS[match[1]]


def size(topology: str) -> int:
    """How many chips a slice has; UserError when the name is none."""
    chip_of(topology)
    return math.prod(int(n) for n in topology.partition(":")[2].split("x"))


def devices(topology: str) -> Sequence[Any]:
    """The devices of a slice, which only a compiler can use.

    UserError when the name is none, when libtpu is missing, and when there is no such slice.
    """
    chip_of(topology)
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
