"""Tests run on eight simulated CPU devices; set before JAX starts, and inherited by the programs that tests start."""

import importlib.util
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from collections.abc import Callable

import jax
import pytest
from jax.sharding import Mesh

from vstar_jax.sharding import make_mesh

# The tools server has extras of its own (tools, yolo), one of them AGPL-3.0: its tests run where they are installed.
collect_ignore_glob = [] if importlib.util.find_spec("ultralytics") else ["test_tools_*.py"]

jax.config.update("jax_cpu_enable_async_dispatch", False)  # a host callback that waits for an asynchronous step can hang


@pytest.fixture(scope="session")
def mesh() -> Callable[[str], Mesh]:
    """Makes a mesh of the simulated devices: mesh("4x2")."""
    return make_mesh
