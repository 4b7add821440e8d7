"""What a script prints and returns when something goes wrong."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("statement", "code", "line"),
    [
        ("raise UserError('no such clip: give another.')", 1, "error: no such clip: give another."),
        ("raise OSError(28, 'No space left on device', 'x.bin')", 1, "error: the disk is full (writing x.bin)"),
        ("raise Interrupted(7, 15)", 143, "stopped and saved at step 7: run the same command again to go on."),
        ("raise KeyboardInterrupt", 130, "stopped at once"),
    ],
)
def test_what_a_user_can_mend_is_one_line_without_a_traceback(statement: str, code: int, line: str):
    done = run(statement)
    assert done.returncode == code
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("statement", ["raise ValueError('a fault')", "open('/nowhere/at/all')"])
def test_a_fault_of_the_program_keeps_its_traceback(statement: str):
    done = run(statement)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_debugging_shows_the_traceback_of_a_user_error():
    assert "Traceback" in run("raise UserError('x')", VSTAR_DEBUG="1").stderr


def test_a_script_without_errors_returns_zero():
    assert run("print('done')").returncode == 0


def run(statement: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = f"from vstar_jax.errors import *\ndef main():\n    {statement}\nrun_script(main)"
    environment = {**os.environ, "VSTAR_DEBUG": "0", **environment}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
