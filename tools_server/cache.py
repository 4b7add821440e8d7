"""Results that outlive a request and the process: octets by content address in an SQLite file, bounded in bytes.

A key is a hash over everything that the value depends on, so a value never goes stale, and losing one costs time only. Several
processes may share the file; a crash in the middle of a write leaves it as it was before that write.
"""

import hashlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SCHEMA = 1
BUSY_SECONDS = 2.0
"""For how long a write waits for another process's."""
TOUCHED_MOST = 4096
"""Reads that are remembered until the next write tells the file about them."""

_TABLES = """
CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB NOT NULL, used REAL NOT NULL) STRICT;
CREATE INDEX by_use ON entries (used);
CREATE TABLE total (bytes INTEGER NOT NULL) STRICT;
INSERT INTO total VALUES (0);
CREATE TRIGGER added AFTER INSERT ON entries BEGIN UPDATE total SET bytes = bytes + length(new.value); END;
CREATE TRIGGER removed AFTER DELETE ON entries BEGIN UPDATE total SET bytes = bytes - length(old.value); END;
"""


def key(*parts: Any) -> str:
    """The content address of what follows from `parts` (anything that JSON can write)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Cache:
    """Octets by key; the least recently used go first when there are more than `capacity` bytes of values.

    path: the file, None for one in memory that goes with the process. A file that is damaged, or from another version, is put
    aside and a new one begun. A read or write that fails later (a full disk, a lock held too long) is logged and counts as a
    miss: the cache never makes a request fail. Safe to use from many threads.
    """

    def __init__(self, path: Path | None, capacity: int):
        self._capacity = capacity
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._touched: dict[str, float] = {}
        if path is None:
            self._writer = self._reader = _connect(":memory:")
            self._reading = self._writing
            _create(self._writer)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = _open(path)
            self._reader = _connect(str(path))

    def get(self, key: str) -> bytes | None:
        """The value, or None when there is none (any more)."""
        with self._reading, _logged("read"):
            row = self._reader.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
            if row is not None:
                if len(self._touched) < TOUCHED_MOST:
                    self._touched[key] = time.time()
                return row[0]
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps the value, unless it is larger than the whole cache; the same key again keeps the newer one."""
        if len(value) > self._capacity:
            return
        with self._writing, _logged("write"), _transaction(self._writer) as execute:
            for touched, used in self._take_touched():
                execute("UPDATE entries SET used = ? WHERE key = ?", (used, touched))
            execute("DELETE FROM entries WHERE key = ?", (key,))
            execute("INSERT INTO entries VALUES (?, ?, ?)", (key, value, time.time()))
            while execute("SELECT bytes FROM total").fetchone()[0] > self._capacity:
                execute(
                    "DELETE FROM entries WHERE key = (SELECT key FROM entries WHERE key != ? ORDER BY used LIMIT 1)", (key,)
                )

    def size(self) -> int:
        """Bytes of all values."""
        with self._reading, _logged("read"):
            return self._reader.execute("SELECT bytes FROM total").fetchone()[0]
        return 0

    def close(self) -> None:
        """Lets go of the file."""
        with self._writing:
            self._writer.close()
            self._reader.close()

    def _take_touched(self) -> list[tuple[str, float]]:
        taken = []
        while self._touched:
            taken.append(self._touched.popitem())
        return taken


@contextmanager
def _logged(action: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        log.warning("the cache could not %s: %s", action, error)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[Callable[..., sqlite3.Cursor]]:
    connection.execute("BEGIN IMMEDIATE")  # a lock that is only asked for at the first write can fail at once
    try:
        yield connection.execute
    except BaseException:
        connection.rollback()
        raise
    connection.commit()


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _open(path: Path) -> sqlite3.Connection:
    """The file at `path` with our tables; what cannot be used is put aside."""
    try:
        connection = _connect(str(path))
        with _transaction(connection) as execute:
            version, tables = (execute(q).fetchone()[0] for q in ("PRAGMA user_version", "SELECT count(*) FROM sqlite_schema"))
            if not tables:
                _create(connection)
        if tables and version != SCHEMA:
            raise sqlite3.DatabaseError(f"its version is {version}, not {SCHEMA}")
        return connection
    except sqlite3.OperationalError:
        raise  # locked for long, or no right to write: not the file's fault
    except sqlite3.DatabaseError as error:
        aside = path.with_name(f"{path.name}.unusable-{time.time_ns()}")
        log.warning("the cache %s cannot be used (%s): it was put aside as %s and a new one is begun", path, error, aside)
        path.rename(aside)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        return _open(path)


def _create(connection: sqlite3.Connection) -> None:
    for statement in _TABLES.strip().split("\n"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {SCHEMA}")
