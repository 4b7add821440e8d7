"""Errors that a user can mend, and how scripts show them."""

import errno
import os
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """One sentence: what was wrong, what is possible, what to do."""


class Interrupted(Exception):
    """The work was asked to stop by the signal `number` and has saved what it had at `step`."""

    def __init__(self, step: int, number: int):
        super().__init__(f"stopped and saved at step {step}: run the same command again to go on.")
        self.signal = number


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what a user can mend or has asked for becomes one line on stderr and an exit code.

    The code is 1 after a UserError or a full disk and 128 + signal after an interruption. VSTAR_DEBUG=1 shows the traceback
    instead; any other exception is a fault of the program and always keeps it.
    """
    try:
        main()
    except (UserError, OSError, Interrupted, KeyboardInterrupt) as error:
        line, code = _explain(error)
        if not line or os.environ.get("VSTAR_DEBUG") == "1":
            raise
        print(line, file=sys.stderr)
        sys.exit(code)


def _explain(error: BaseException) -> tuple[str, int]:
    match error:
        case UserError():
            return f"error: {error}", 1
        case Interrupted():
            return str(error), 128 + error.signal
        case KeyboardInterrupt():
            return "stopped at once; what was saved last stays.", 128 + signal.SIGINT
        case OSError(errno=errno.ENOSPC):
            name = f" (writing {error.filename})" if error.filename else ""
            return f"error: the disk is full{name}: free some space and start again.", 1
    return "", 1
