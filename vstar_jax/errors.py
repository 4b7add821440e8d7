"""Errors that a user can mend, and how scripts show them."""

import errno
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """One sentence: what was wrong, what is possible, what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main` and exits: 1 with one line on stderr after a UserError or a full disk, 130 after Ctrl-C.

    VSTAR_DEBUG=1 shows the traceback instead. Any other exception is a fault of the program and keeps its traceback.
    """
    try:
        main()
    except (UserError, OSError, KeyboardInterrupt) as error:
        message = _message(error)
        if message is None or os.environ.get("VSTAR_DEBUG") == "1":
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _message(error: BaseException) -> str | None:
    match error:
        case UserError():
            return str(error)
        case KeyboardInterrupt():
            return "interrupted."
        case OSError(errno=errno.ENOSPC, filename=name):
            return f"the disk is full{f' (writing {name})' if name else ''}: free some space and start again."
    return None
