"""The results' cache: bounded, shared by processes, intact after a crash in the middle of a write."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tools_server.cache import Cache, key

WRITER = """
import sys
from pathlib import Path
from tools_server.cache import Cache, key
name, count = sys.argv[2], int(sys.argv[3])
cache = Cache(Path(sys.argv[1]), 1 << 30)
print("open", flush=True)
for i in range(count):
    cache.put(key(name, i), f"{name} {i} ".encode() * 500)
"""


def writer(path: Path, name: str, count: int) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(count)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


@pytest.fixture(params=["file", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "new" / "cache.sqlite" if request.param == "file" else None


def test_a_value_is_kept_and_the_newest_one_counts(path: Path | None) -> None:
    cache = Cache(path, 1000)
    assert cache.get("a") is None
    cache.put("a", b"first")
    cache.put("b", b"\x00\xff")
    cache.put("a", b"second")
    assert (cache.get("a"), cache.get("b"), cache.size()) == (b"second", b"\x00\xff", 8)
    cache.close()


def test_a_key_changes_with_each_of_its_parts() -> None:
    assert key("pose", "abc", [0, 1]) == key("pose", "abc", (0, 1))
    assert len({key("pose", "abc", [0, 1]), key("pose", "abc", [1, 0]), key("pose", "ab", "c"), key("pose", "abc", None)}) == 4


def test_the_least_recently_used_values_make_room(path: Path | None) -> None:
    cache = Cache(path, 1000)
    for name in "abcd":
        cache.put(name, bytes(250))
    assert cache.get("a") is not None
    cache.put("e", bytes(400))
    assert [name for name in "abcde" if cache.get(name) is not None] == ["a", "d", "e"]
    cache.put("too large", bytes(1001))
    assert cache.get("too large") is None
    assert cache.size() == 900
    cache.close()


def test_values_outlive_the_process(tmp_path: Path) -> None:
    assert writer(tmp_path / "c", "x", 3).wait() == 0
    cache = Cache(tmp_path / "c", 1 << 30)
    assert cache.get(key("x", 2)) == b"x 2 " * 500


def test_two_processes_and_many_threads_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "c"
    processes = [writer(path, name, 300) for name in "xy"]
    cache = Cache(path, 1 << 30)
    wrong: list[int] = []

    def work(thread: int) -> None:
        for i in range(100):
            cache.put(key(thread, i), b"%d %d" % (thread, i))
            if cache.get(key(thread, i)) != b"%d %d" % (thread, i):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0]
    assert not wrong
    assert all(cache.get(key(name, i)) == f"{name} {i} ".encode() * 500 for name in "xy" for i in range(300))
    sizes = sum(len(f"{name} {i} ") * 500 for name in "xy" for i in range(300))
    assert cache.size() == sizes + sum(len(b"%d %d" % (t, i)) for t in range(4) for i in range(100))


def test_a_crash_while_writing_leaves_no_wrong_value(tmp_path: Path) -> None:
    path = tmp_path / "c"
    for _ in range(3):
        process = writer(path, "x", 1_000_000)
        time.sleep(0.15)
        process.send_signal(signal.SIGKILL)
        process.wait()
    cache = Cache(path, 1 << 30)
    kept = [value for i in range(20_000) if (value := cache.get(key("x", i))) is not None]
    assert kept
    assert all(value == value[: value.index(b" ", 2) + 1] * 500 for value in kept)
    assert cache.size() == sum(map(len, kept))
    cache.put("still", b"works")
    assert cache.get("still") == b"works"
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("content", [b"no database at all" * 1000, b"SQLite format 3\x00" + bytes(4096)])
def test_a_file_that_cannot_be_used_is_put_aside(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "c"
    path.write_bytes(content)
    cache = Cache(path, 1000)
    cache.put("a", b"1")
    assert cache.get("a") == b"1"
    assert "put aside" in caplog.text
    (aside,) = tmp_path.glob("c.unusable-*")
    assert aside.read_bytes() == content


def test_a_file_of_another_version_is_put_aside(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "c") as other:
        other.execute("CREATE TABLE entries (id)")
    cache = Cache(tmp_path / "c", 1000)
    cache.put("a", b"1")
    assert cache.get("a") == b"1"


def test_a_lock_that_another_process_holds_costs_a_value_and_no_request(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tools_server.cache.BUSY_SECONDS", 0.05)
    cache = Cache(tmp_path / "c", 1000)
    cache.put("a", b"1")
    other = sqlite3.connect(tmp_path / "c", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    cache.put("b", b"2")
    assert (cache.get("a"), cache.get("b")) == (b"1", None)
    other.execute("ROLLBACK")
    cache.put("b", b"2")
    assert cache.get("b") == b"2"
