"""A program's memory in huge pages, where Linux gives them to those who ask.

XLA on CPU takes the memory of a step from malloc and gives it back after it, hundreds of MiB that the kernel then clears and
maps anew, page by page: a fifth of an SFT step of a miniature (docs/performance.md). glibc asks for huge pages when a variable
of its environment says so, which it reads before a program's first line.
"""

import os
import sys
from pathlib import Path

GIVEN = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb"


def ask() -> None:
    """Starts this program again with huge pages, unless it has them, cannot have them, or GLIBC_TUNABLES decides on them.

    Same process, same arguments; call it before anything that is slow to import or to undo.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or not sys.executable or not GIVEN.exists() or "[madvise]" not in GIVEN.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{TUNABLE}=1")))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
