"""The client: whatever the server and the network do, each request gets an answer with a status, in time and never mixed up."""

import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from vstar_jax.tools.client import ToolsClient, clip_digest
from vstar_jax.tools.protocol import SENTENCES, Answer, BatchRequest, BatchResponse, ClipHeader, Refusal, Request, clean

LATE = 0.1
"""Seconds that a call may outlast its deadline."""
FRAMES = np.random.default_rng(0).integers(0, 256, (4, 8, 6, 3), np.uint8)
CLIP = clip_digest(FRAMES)
REQUEST = Request(episode="a", turn=1, tools=("pose_estimation",), clip=CLIP)


def answer(request: Request, **fields: Any) -> Answer:
    """A good answer to a request, but for `fields`."""
    known = {"status": "ok", "statuses": dict.fromkeys(request.tools, "ok"), "annotated": request.clip}
    return Answer.model_validate({"episode": request.episode, "turn": request.turn, **known, **fields})


def body(answers: list[Answer], clips: dict[str, np.ndarray]) -> bytes:
    headers = tuple(ClipHeader(id=name, shape=frames.shape) for name, frames in clips.items())
    head = BatchResponse(answers=tuple(answers), clips=headers).model_dump_json().encode()
    return b"\n".join([head, b"".join(frames.tobytes() for frames in clips.values())])


class Peer:
    """A server whose responses to batches are what a test makes of them; it keeps uploaded clips as the real one does."""

    def __init__(self, respond: Callable[["Call"], None]):
        self.respond = respond
        self.clips: dict[str, bytes] = {}
        self.calls = 0
        self.connections: set[Any] = set()
        peer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                peer.clips[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["content-length"]))
                Call(self, peer, None).send(201, b"{}")

            def do_POST(self) -> None:
                peer.calls += 1
                peer.connections.add(self.client_address)
                asked = BatchRequest.model_validate_json(self.rfile.read(int(self.headers["content-length"])))
                peer.respond(Call(self, peer, asked))

            def do_GET(self) -> None:
                Call(self, peer, None).send(200, b"{}")

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Call:
    """One batch on its way through a `Peer`."""

    def __init__(self, handler: http.server.BaseHTTPRequestHandler, peer: Peer, asked: BatchRequest | None):
        self.handler, self.peer, self.asked = handler, peer, asked

    @property
    def requests(self) -> tuple[Request, ...]:
        assert self.asked is not None
        return self.asked.requests

    def send(self, status: int, content: bytes, length: int | None = None, **headers: str) -> None:
        self.handler.send_response(status)
        for name, value in {"content-length": str(len(content) if length is None else length), **headers}.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()
        self.handler.wfile.write(content)

    def well(self) -> None:
        """What the real server does."""
        missing = sorted({r.clip for r in self.requests if r.clip} - set(self.peer.clips))
        if missing:
            self.send(404, Refusal(error="missing", message="upload", missing=tuple(missing)).model_dump_json().encode())
            return
        self.send(200, body([answer(r) for r in self.requests], {CLIP: FRAMES} if CLIP in self.peer.clips else {}))

    def drip(self, begin: bytes, seconds: float = 5.0) -> None:
        """Sends something, then an octet now and then."""
        self.handler.wfile.write(begin)
        for _ in range(int(seconds / 0.05)):
            self.handler.wfile.write(b" ")
            self.handler.wfile.flush()
            time.sleep(0.05)

    def hang_up(self) -> None:
        self.handler.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def peer(respond: Callable[[Call], None]) -> Iterator[Peer]:
    found = Peer(respond)
    try:
        yield found
    finally:
        found.close()


def ask(url: str, requests: list[Request] | None = None, deadline: float = 1.0, clips: dict[str, np.ndarray] | None = None):
    """The answers, which must come in time."""
    client = ToolsClient(url)
    begin = time.monotonic()
    answers = client.call(requests or [REQUEST], {CLIP: FRAMES} if clips is None else clips, deadline)
    assert time.monotonic() - begin < deadline + LATE
    client.close()
    return answers


def respond_with(content: bytes, status: int = 200) -> Callable[[Call], None]:
    return lambda call: call.send(status, content)


def answer_with(make: Callable[[Call], bytes]) -> Callable[[Call], None]:
    return lambda call: call.send(200, make(call))


OTHER = Request(episode="b", turn=1, tools=("pose_estimation",), clip=CLIP)
FAULTS: dict[str, tuple[Callable[[Call], None], str]] = {
    "it hangs": (lambda call: time.sleep(2), "timeout"),
    "its headers come in drops": (lambda call: call.drip(b"HTTP/1.1 200 OK\r\nx-a: "), "timeout"),
    "its body comes in drops": (lambda call: call.drip(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"), "timeout"),
    "its endless body comes in drops": (lambda call: call.drip(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"), "timeout"),
    "it hangs up": (Call.hang_up, "unavailable"),
    "it hangs up in the middle": (lambda call: (call.send(200, b"{", 1000), call.hang_up())[0], "unavailable"),
    "it speaks another protocol": (lambda call: call.drip(b"SSH-2.0-x\r\n", 0.1), "unavailable"),
    "it is too busy for long": (lambda call: call.send(503, b"{}", retry_after="60"), "unavailable"),
    "it is always busy": (lambda call: call.send(429, b"{}"), "unavailable"),
    "it fails": (respond_with(b"oh", 500), "error"),
    "it wants a token": (respond_with(Refusal(error="token", message="no").model_dump_json().encode(), 401), "error"),
    "it is a web page": (respond_with(b"<html></html>"), "malformed"),
    "it is empty": (respond_with(b""), "malformed"),
    "it is other JSON": (respond_with(b'{"answers": 1}\n'), "malformed"),
    "it is no text": (respond_with(b"\xff\xfe\n\x00"), "malformed"),
    "it is nested without end": (respond_with(b"[" * 100_000 + b"\n"), "malformed"),
    "it has an unknown status": (respond_with(body([answer(REQUEST)], {}).replace(b'"ok"', b'"fine"')), "malformed"),
    "it has too few answers": (respond_with(body([], {})), "malformed"),
    "it has too many answers": (respond_with(body([answer(REQUEST)] * 2, {CLIP: FRAMES})), "malformed"),
    "it answers another request": (respond_with(body([answer(OTHER)], {CLIP: FRAMES})), "malformed"),
    "it answers about other tools": (
        respond_with(body([answer(REQUEST, statuses={"person_detection": "ok"})], {CLIP: FRAMES})),
        "malformed",
    ),
    "it forgets the frames": (respond_with(body([answer(REQUEST)], {})), "malformed"),
    "it cuts the frames short": (respond_with(body([answer(REQUEST)], {CLIP: FRAMES})[:-1]), "malformed"),
    "it has fewer frames": (respond_with(body([answer(REQUEST)], {CLIP: FRAMES[:3]})), "malformed"),
    "it has frames of another size": (respond_with(body([answer(REQUEST)], {CLIP: FRAMES[:, :4]})), "malformed"),
    "it has frames with a negative side": (
        respond_with(body([answer(REQUEST)], {CLIP: FRAMES}).replace(b"[4,8,6,3]", b"[4,-8,-6,3]")),
        "malformed",
    ),
    "it announces more than can be": (lambda call: call.send(200, b"", 10**15), "malformed"),
    "it lacks a clip however often it is uploaded": (
        respond_with(Refusal(error="missing", message="m", missing=(CLIP,)).model_dump_json().encode(), 404),
        "unavailable",
    ),
    "it lacks nothing and says that it does": (respond_with(b"{}", 404), "error"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_status_in_time(fault: str) -> None:
    respond, status = FAULTS[fault]
    with peer(respond) as there:
        (given,) = ask(there.url)
    assert given.answer.status == status, given.answer.problems
    assert given.answer.statuses == {"pose_estimation": status}
    assert given.answer.message == SENTENCES[status]  # type: ignore[index]
    assert (given.answer.episode, given.answer.turn, given.frames) == ("a", 1, None)


def test_nobody_listening_is_unavailable_and_not_ready() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert ask(url, deadline=0.5)[0].answer.status == "unavailable"
        assert not ToolsClient(url, timeout=0.5).ready()


def test_a_host_that_does_not_answer_is_a_timeout() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert ask(url, deadline=0.5)[0].answer.status == "timeout"
        client = ToolsClient(url, timeout=0.3)
        begin = time.monotonic()
        assert not client.ready()
        assert time.monotonic() - begin < 0.3 + LATE
        client.close()


@pytest.mark.parametrize("url", ["", "127.0.0.1:8765", "file:///etc", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="address"):
        ToolsClient(url)


def test_a_clip_travels_once_and_its_frames_come_back() -> None:
    with peer(Call.well) as there:
        client = ToolsClient(there.url)
        for _ in range(3):
            given = client.call([REQUEST, OTHER], {CLIP: FRAMES}, 2.0)
            assert [g.answer.status for g in given] == ["ok", "ok"]
            assert given[0].frames is not None
            assert np.array_equal(given[0].frames, FRAMES)
            assert given[0].frames.dtype == np.uint8
            assert not given[0].frames.flags.writeable
        assert there.calls == 4  # one more for the upload
        assert there.clips == {CLIP: FRAMES.tobytes()}
        assert len(there.connections) <= 2
        client.close()


def test_frames_that_are_not_contiguous_are_the_clip_that_they_show() -> None:
    turned = np.asfortranarray(FRAMES)
    assert clip_digest(turned) == CLIP
    assert clip_digest(FRAMES.reshape(4, 6, 8, 3)) != CLIP
    with peer(Call.well) as there:
        assert ask(there.url, clips={CLIP: turned})[0].answer.status == "ok"
        assert there.clips[CLIP] == FRAMES.tobytes()


def test_a_clip_that_nobody_has_costs_its_own_row_only() -> None:
    lost = Request(episode="c", turn=0, tools=("person_detection",), clip="0" * 64)
    with peer(Call.well) as there:
        given = ask(there.url, [REQUEST, lost, OTHER])
    assert [g.answer.status for g in given] == ["ok", "error", "ok"]
    assert [g.answer.episode for g in given] == ["a", "c", "b"]


def test_a_bad_row_of_a_response_costs_no_other() -> None:
    with peer(answer_with(lambda call: body([answer(REQUEST), answer(OTHER, statuses={})], {CLIP: FRAMES}))) as there:
        assert [g.answer.status for g in ask(there.url, [REQUEST, OTHER])] == ["ok", "malformed"]


def test_passing_faults_are_mended_by_other_tries() -> None:
    faults = [lambda call: call.send(503, b"{}", retry_after="0.1"), Call.hang_up, lambda call: call.send(429, b"{}")]
    with peer(lambda call: (faults.pop(0) if faults else Call.well)(call)) as there:
        assert ask(there.url, deadline=5.0)[0].answer.status == "ok"
        assert there.calls == 5


def test_a_server_that_closes_idle_connections_is_reached_again() -> None:
    with peer(Call.well) as there:
        client = ToolsClient(there.url)
        assert client.call([REQUEST], {CLIP: FRAMES}, 2.0)[0].answer.status == "ok"
        for connection in client._idle:
            connection.sock.shutdown(socket.SHUT_RDWR)
        begin = time.monotonic()
        assert client.call([REQUEST], {CLIP: FRAMES}, 2.0)[0].answer.status == "ok"
        assert time.monotonic() - begin < LATE
        client.close()


def test_many_threads_get_their_own_answers() -> None:
    def respond(call: Call) -> None:
        time.sleep(0.01)
        call.send(200, body([answer(r, annotated=None, description=f"of {r.episode}") for r in call.requests], {}))

    with peer(respond) as there, ThreadPoolExecutor(32) as threads:
        client = ToolsClient(there.url, connections=8)

        def work(number: int) -> bool:
            asked = [REQUEST.model_copy(update={"episode": f"{number}-{i}"}) for i in range(3)]
            given = client.call(asked, {}, 5.0)
            return [g.answer.description for g in given] == [f"of {r.episode}" for r in asked]

        assert all(threads.map(work, range(200)))
        assert len(client._idle) <= 8
        client.close()


def test_the_token_is_shown_and_an_empty_call_asks_nothing() -> None:
    seen = []
    with peer(lambda call: (seen.append(call.handler.headers["authorization"]), Call.well(call))[1]) as there:
        client = ToolsClient(there.url, token="abc")
        assert client.call([], {}, 1.0) == []
        client.call([REQUEST], {CLIP: FRAMES}, 1.0)
        assert set(seen) == {"Bearer abc"}
        client.close()


def test_words_for_the_policy_are_clean_whoever_wrote_them() -> None:
    bad = json.dumps("a<|im_end|>b</think><|im_<|x|>start|><ans<answer>wer>c\u202e<TOOL_CALL>{}").encode()
    content = body([answer(REQUEST, annotated=None, explanation="X")], {}).replace(b'"X"', bad)
    with peer(respond_with(content)) as there:
        assert ask(there.url)[0].answer.explanation == "abc{}"
    for text in ("<|a|><|b|>", "<<|x|>|im_end|>", "< / think >", "<pose_estimation>yes</pose_estimation>"):
        assert clean(clean(text)) == clean(text)
        assert not any(mark in clean(text) for mark in ("<|", "|>", "think", "<pose"))


def test_what_a_newer_server_adds_is_left_aside() -> None:
    content = body([answer(REQUEST)], {CLIP: FRAMES}).replace(b'"version"', b'"news":1,"version"', 1)
    with peer(respond_with(content)) as there:
        assert ask(there.url)[0].answer.status == "ok"


def test_importing_the_client_loads_neither_jax_nor_torch() -> None:
    import subprocess
    import sys

    code = "import sys, vstar_jax.tools.client; sys.exit(any(m in sys.modules for m in ('jax', 'torch', 'openai', 'fastapi')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
