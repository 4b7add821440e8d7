"""Claims about starting again with huge pages: once, as the same process with the same arguments, and not against the user."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vstar_jax import huge_pages

PROGRAM = """
import json, os, sys
from pathlib import Path
from vstar_jax import huge_pages
huge_pages.GIVEN = Path(sys.argv[1])
print("started", os.getpid(), file=sys.stderr)
huge_pages.ask()
print(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "tunables": os.environ.get("GLIBC_TUNABLES")}))
"""


def started(given: Path, tunables: str | None) -> tuple[dict[str, object], list[str]]:
    """What the program says, and the lines of its starts."""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {} if tunables is None else {"GLIBC_TUNABLES": tunables}
    command = [sys.executable, "-X", "dev", "-c", PROGRAM, str(given), "--text=two words"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), [line for line in done.stderr.splitlines() if line.startswith("started")]


@pytest.mark.parametrize(
    ("system", "before", "after", "starts"),
    [
        ("always [madvise] never", None, f"{huge_pages.TUNABLE}=1", 2),
        ("always [madvise] never", "glibc.malloc.check=0", f"glibc.malloc.check=0:{huge_pages.TUNABLE}=1", 2),
        ("always [madvise] never", f"{huge_pages.TUNABLE}=0", f"{huge_pages.TUNABLE}=0", 1),
        ("[always] madvise never", None, None, 1),
        ("always madvise [never]", None, None, 1),
        (None, None, None, 1),
    ],
)
def test_a_program_starts_again_only_where_that_gives_it_huge_pages(tmp_path, system, before, after, starts):
    given = tmp_path / "enabled"
    if system:
        given.write_text(system)
    told, lines = started(given, before)
    assert told["tunables"] == after
    assert told["argv"] == [str(given), "--text=two words"]
    assert lines == [f"started {told['pid']}"] * starts
