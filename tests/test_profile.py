"""Claims about traces: the wanted steps and no others, in files that TensorBoard and Perfetto open."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from vstar_jax.training.profile import SKIPPED, TRACED, Profile


def steps(folder: Path, wanted: bool, done: int, last: int) -> list[int]:
    """Runs the steps from `done` on, each a program that is named after it; returns those whose names are in the trace."""
    with Profile(wanted, folder, done) as profile:
        for step in range(done + 1, last + 1):
            profile.reached(step)
            with jax.profiler.TraceAnnotation(f"my step {step}"):
                jnp.ones(8).sum().block_until_ready()
    found = set()
    for path in folder.rglob("perfetto_trace.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found |= {e["name"] for e in events if e.get("name", "").startswith("my step ")}
    return sorted(int(name.rpartition(" ")[2]) for name in found)


@pytest.mark.parametrize("done", [0, 7])
def test_a_few_warm_steps_are_traced(done: int, tmp_path: Path):
    first = done + 1 + SKIPPED
    assert steps(tmp_path, True, done, done + 10) == list(range(first, first + TRACED))
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_a_loop_that_ends_early_leaves_what_it_had(tmp_path: Path):
    assert steps(tmp_path, True, 0, SKIPPED + 1) == [SKIPPED + 1]


def test_nothing_is_written_when_nothing_is_wanted(tmp_path: Path):
    assert steps(tmp_path / "profile", False, 0, 10) == []
    assert not (tmp_path / "profile").exists()
