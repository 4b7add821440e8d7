"""Calls the tools server for a whole batch of rows at once, and always comes back in time with an answer for each.

It keeps connections open and may be used from many threads. A clip is named by its digest and travels once: the server says
which clips it lacks, these are uploaded, and the call is repeated. Every call is idempotent, so that one which was refused or
cut off is repeated, too, as long as the deadline allows. Nothing that the server or the network does makes `call` raise.
"""

import http.client
import logging
import random
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import numpy as np
from pydantic import ValidationError

from vstar_jax.tools.protocol import (
    BINARY,
    JSON,
    OCTETS,
    SENTENCES,
    SHAPE_HEADER,
    Answer,
    BatchRequest,
    BatchResponse,
    Refusal,
    Request,
    Status,
    clip_hash,
)

log = logging.getLogger(__name__)

FIRST_PAUSE = 0.05
"""Seconds before a call is repeated, on average; each later pause is twice as long, up to a second."""
MARGIN = 0.05
"""Share of the remaining time that the server leaves for its answer to travel."""
UPLOADS = 8
"""Clips that are uploaded at once."""
UPLOAD_ROUNDS = 3
"""A server that still lacks clips after so many uploads has no room for them."""
CHUNK = 1 << 20
MOST_OCTETS = 8 << 30
"""Of a response; more is not the tools server's."""


@dataclass(frozen=True)
class ClientAnswer:
    """The answer to a request; frames: the annotated clip uint8 [T, H, W, 3], read-only, None when nothing was drawn."""

    answer: Answer
    frames: np.ndarray | None = None


class _Failed(Exception):
    """The rows of a call that have no answer get `status`."""

    def __init__(self, status: Status, problem: str):
        super().__init__(problem)
        self.status: Status = status


class _Retry(Exception):
    """Another try may help, after `pause` seconds at least."""

    def __init__(self, problem: str, pause: float = 0.0):
        super().__init__(problem)
        self.pause = pause


def clip_digest(frames: np.ndarray) -> str:
    """The id of a clip uint8 [T, H, W, 3] on the wire: compute it once, where the clip is loaded."""
    digest = clip_hash(frames.shape)
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()


class _Exchange:
    """One call's connection at a time and its deadline; `abort` makes whatever it waits for fail at once."""

    def __init__(self, until: float):
        self.until = until
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._aborted = False

    def left(self) -> float:
        """Seconds until the deadline; _Failed when there are none."""
        seconds = self.until - time.monotonic()
        if seconds <= 0 or self._aborted:
            raise _Failed("timeout", "the deadline has passed.")
        return seconds

    def enter(self, connection: socket.socket | None) -> None:
        """Uses the connection, for no longer than the deadline allows."""
        with self._lock:
            if connection is not None:
                self._sockets.add(connection)
                connection.settimeout(self.left())

    def leave(self, connection: socket.socket | None) -> None:
        """Does not use the connection any more."""
        with self._lock:
            self._sockets.discard(cast(socket.socket, connection))

    def abort(self) -> None:
        """Gives up, whatever is being waited for."""
        with self._lock:
            self._aborted = True
            for connection in self._sockets:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class ToolsClient:
    """A client of the server at `url`, such as http://127.0.0.1:8765.

    token: the bearer token that a server on another machine asks for; timeout: seconds of `ready`; connections: most that are
    kept open; threads: most calls and uploads at once.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 10.0, connections: int = 16, threads: int = 64):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a tools server: give one such as http://127.0.0.1:8765.")
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._prefix = parts.hostname, parts.port, parts.path.rstrip("/")
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._timeout, self._most = timeout, connections
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._calls = ThreadPoolExecutor(threads, "tools-call")
        self._uploads = ThreadPoolExecutor(UPLOADS, "tools-upload")

    def call(self, requests: Sequence[Request], clips: Mapping[str, np.ndarray], deadline: float) -> list[ClientAnswer]:
        """An answer for each request, in order, within `deadline` seconds.

        clips: digest -> frames uint8 [T, H, W, 3] of the clips that the requests name, for the server that lacks them. A fault
        of the server or the network is a status of the answers: timeout, error, malformed or unavailable.
        """
        if not requests:
            return []
        exchange = _Exchange(time.monotonic() + deadline)
        try:
            future = self._calls.submit(self._exchange, exchange, list(requests), clips)
            return future.result(deadline)
        except FutureTimeout:
            exchange.abort()
            failed = _Failed("timeout", "the deadline has passed.")
        except _Failed as error:
            failed = error
        except Exception as error:  # whatever a broken server makes of this code, the rollout goes on
            log.exception("the tools client failed")
            failed = _Failed("error", f"{type(error).__name__}: {error}")
        log.warning("%d tool requests failed: %s", len(requests), failed)
        return [_without(request, failed) for request in requests]

    def ready(self) -> bool:
        """Whether the server answers calls now."""
        try:
            exchange = _Exchange(time.monotonic() + self._timeout)
            future = self._calls.submit(self._once, exchange, "GET", "/ready", b"", {})
            return future.result(self._timeout)[0] == 200
        except Exception:
            return False

    def close(self) -> None:
        """Closes all connections; calls that are still running end by themselves."""
        self._calls.shutdown(wait=False, cancel_futures=True)
        self._uploads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            idle, self._idle, self._most = self._idle, [], 0
        for connection in idle:
            connection.close()

    def _exchange(self, exchange: _Exchange, requests: list[Request], clips: Mapping[str, np.ndarray]) -> list[ClientAnswer]:
        """Asks until every request is answered, uploading what the server lacks."""
        answers: list[ClientAnswer | None] = [None] * len(requests)
        for _ in range(UPLOAD_ROUNDS + 1):
            open_rows = [row for row, answer in enumerate(answers) if answer is None]
            asked = [requests[row] for row in open_rows]
            timeout = exchange.left() * (1 - MARGIN)
            body = BatchRequest(requests=tuple(asked), timeout=timeout).model_dump_json().encode()
            headers = {"content-type": JSON, "accept": BINARY}
            status, _, content = self._request(exchange, "POST", "/v1/batch", body, headers)
            if status == 200:
                for row, answer in zip(open_rows, _read(content, asked, clips), strict=True):
                    answers[row] = answer
                return cast(list[ClientAnswer], answers)
            missing = _missing(status, content)
            for row in open_rows:
                if requests[row].clip in missing and requests[row].clip not in clips:
                    answers[row] = _without(requests[row], _Failed("error", "the clip is neither here nor on the server."))
            if all(answers):
                return cast(list[ClientAnswer], answers)
            self._upload(exchange, {name: clips[name] for name in missing if name in clips})
        raise _Failed("unavailable", "the server has no room for the clips of one call: raise its --cache.clip_bytes.")

    def _upload(self, exchange: _Exchange, clips: Mapping[str, np.ndarray]) -> None:
        uploads: list[Future[tuple[int, Mapping[str, str], bytearray]]] = []
        for name, frames in clips.items():
            octets = np.ascontiguousarray(frames).data.cast("B")
            headers = {"content-type": OCTETS, SHAPE_HEADER: ",".join(map(str, frames.shape))}
            uploads.append(self._uploads.submit(self._request, exchange, "PUT", f"/v1/clips/{name}", octets, headers))
        try:
            for upload in uploads:
                status, _, content = upload.result(exchange.left())
                if status != 201:
                    raise _Failed("error", f"a clip was refused: {_reason(status, content)}")
        finally:
            for upload in uploads:
                upload.cancel()

    def _request(
        self, exchange: _Exchange, method: str, path: str, body: bytes | memoryview, headers: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytearray]:
        """Status, headers and body of the first try that is neither refused for now nor cut off."""
        pause, last = FIRST_PAUSE, ""
        while True:
            try:
                status, given, content = self._once(exchange, method, path, body, headers)
                if status not in (408, 429, 502, 503, 504):
                    return status, given, content
                raise _Retry(_reason(status, content), _seconds(given.get("retry-after")))
            except _Retry as error:
                last = str(error)
                wait = max(pause * random.uniform(0.5, 1.5), error.pause * random.uniform(1.0, 1.25))
                if wait >= exchange.until - time.monotonic():
                    raise _Failed("unavailable", f"the server cannot be used: {last}") from None
                time.sleep(wait)
                pause = min(2 * pause, 1.0)

    def _once(
        self, exchange: _Exchange, method: str, path: str, body: bytes | memoryview, headers: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytearray]:
        """One try; _Retry when the connection fails, at once on a fresh one if it was an old one that had been closed."""
        connection, old = self._take(exchange)
        try:
            if not old:
                connection.connect()
            exchange.enter(connection.sock)
            sent = {**self._headers, **headers, "content-length": str(len(body))}
            with suppress(BrokenPipeError, ConnectionResetError):  # who refuses a body closes, and has said why
                connection.request(method, self._prefix + path, body, sent)
            response = connection.getresponse()
            content = _content(response, connection, exchange)
        except (OSError, http.client.HTTPException) as error:
            exchange.leave(connection.sock)
            connection.close()
            exchange.left()  # a connection that ran into the deadline is no fault of the server's
            if old:
                return self._once(exchange, method, path, body, headers)
            raise _Retry(f"{type(error).__name__}: {error}") from None
        except BaseException:
            exchange.leave(connection.sock)
            connection.close()
            raise
        exchange.leave(connection.sock)
        self._give(connection, keep=not response.will_close)
        return response.status, {name.lower(): value for name, value in response.getheaders()}, content

    def _take(self, exchange: _Exchange) -> tuple[http.client.HTTPConnection, bool]:
        """A connection, and whether it was used before."""
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        return self._connect(self._host, self._port, timeout=exchange.left()), False

    def _give(self, connection: http.client.HTTPConnection, keep: bool) -> None:
        with self._lock:
            if keep and len(self._idle) < self._most:
                self._idle.append(connection)
                return
        connection.close()


def _content(response: http.client.HTTPResponse, connection: http.client.HTTPConnection, exchange: _Exchange) -> bytearray:
    """The body; a server that sends it drop by drop does not stretch the deadline."""
    length = response.length
    if length is not None and length > MOST_OCTETS:
        raise _Failed("malformed", f"the response would have {length} octets.")
    content = bytearray(length or 0)
    at = 0
    while len(content) <= MOST_OCTETS:
        seconds = exchange.left()
        if connection.sock is not None:  # None when the response owns it, because it ends with the connection
            connection.sock.settimeout(seconds)
        if length is None:
            if not (chunk := response.read1(CHUNK)):
                return content
            content += chunk
        elif at == length:
            response.read()  # marks the response as finished, so that its connection can be used again
            return content
        else:
            count = response.readinto(memoryview(content)[at : at + CHUNK])
            if not count:
                raise http.client.IncompleteRead(b"", length - at)
            at += count
    raise _Failed("malformed", "the response does not end.")


def _read(content: bytearray, asked: Sequence[Request], clips: Mapping[str, np.ndarray]) -> list[ClientAnswer]:
    """The answers and clips of a batch's response; _Failed when it cannot be what was asked for."""
    at = content.find(b"\n") + 1 or len(content)
    try:
        response = BatchResponse.model_validate_json(content[:at])
    except ValidationError:
        raise _Failed("malformed", "the response is not the JSON of a batch.") from None
    if [(a.episode, a.turn) for a in response.answers] != [(r.episode, r.turn) for r in asked]:
        raise _Failed("malformed", "the answers are not those of the requests.")
    drawn = {}
    for clip in response.clips:
        size = int(np.prod(clip.shape, dtype=object))
        if at + size > len(content):
            raise _Failed("malformed", "the response is shorter than its clips.")
        drawn[clip.id] = np.frombuffer(content, np.uint8, size, at).reshape(clip.shape)
        drawn[clip.id].flags.writeable = False
        at += size
    return [_checked(request, answer, drawn, clips) for request, answer in zip(asked, response.answers, strict=True)]


def _checked(
    request: Request, answer: Answer, drawn: Mapping[str, np.ndarray], clips: Mapping[str, np.ndarray]
) -> ClientAnswer:
    """The answer with its frames, if these are as many and as large as those asked about."""
    if set(answer.statuses) != set(request.tools):
        return _without(request, _Failed("malformed", "the answer is not about the tools asked for."))
    if answer.annotated is None:
        return ClientAnswer(answer)
    frames = drawn.get(answer.annotated)
    raw = clips.get(request.clip or "")
    if frames is None:
        return _without(request, _Failed("malformed", "the annotated clip is not in the response."))
    if raw is not None:
        count = len(raw) if request.frames is None else len(request.frames)
        if frames.shape != (count, *raw.shape[1:]):
            return _without(request, _Failed("malformed", "the annotated clip has another shape than the clip."))
    return ClientAnswer(answer, frames)


def _without(request: Request, failed: _Failed) -> ClientAnswer:
    """The answer to a request that the server did not answer."""
    return ClientAnswer(
        Answer(
            episode=request.episode,
            turn=request.turn,
            status=failed.status,
            message=SENTENCES[failed.status],
            statuses=dict.fromkeys(request.tools, failed.status),
            problems=dict.fromkeys(request.tools, str(failed)),
        )
    )


def _missing(status: int, content: bytearray) -> set[str]:
    """The clips that the server lacks; _Failed when that is not why it refused."""
    try:
        missing = Refusal.model_validate_json(content).missing if status == 404 else ()
    except ValidationError:
        missing = ()
    if not missing:
        raise _Failed("malformed" if status < 400 else "error", _reason(status, content))
    return set(missing)


def _reason(status: int, content: bytearray) -> str:
    with suppress(ValidationError):
        return f"{status}: {Refusal.model_validate_json(content).message}"
    return f"the server answered with status {status}."


def _seconds(header: str | None) -> float:
    with suppress(ValueError):
        return max(float(header or 0), 0.0)
    return 0.0
