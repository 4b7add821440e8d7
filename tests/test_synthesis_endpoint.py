"""Asking a model: its faults are mended by another try or told in time, its limits are kept, and its key is never seen."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from policy_servers import MODEL, PolicyServer
from tool_servers import Behaviour, completion, endpoint, fails, in_turn, says, send

from vstar_jax.errors import UserError
from vstar_jax.synthesis.endpoint import Endpoint, EndpointError, EndpointSettings, ReplyError, Usage, asked_pause

KEY = "canary-51d0e2"
LATE = 1.0
"""Seconds that a question may outlast its deadline on a busy machine."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyServer]:
    running = PolicyServer(tmp_path_factory.mktemp("serve"), "--new-tokens=64", "--rows=2", "--queue=1")
    yield running
    running.close()


def ask(url: str, read: Any = str, questions: int = 1, **settings: Any) -> tuple[list[Any], Usage]:
    """What came of some questions at once, results or exceptions, and what they used."""
    settings = {"model": "m", "attempts": 3, "attempt_seconds": 5.0, "seconds": 10.0, **settings}

    async def run() -> tuple[list[Any], Usage]:
        asked = Endpoint(EndpointSettings(url, **settings), KEY)
        try:
            messages = [{"role": "user", "content": "Which of these is it?"}]
            found = await asyncio.gather(*(asked.ask(messages, read) for _ in range(questions)), return_exceptions=True)
        finally:
            await asked.close()
        return found, asked.usage

    found, usage = asyncio.run(run())
    assert not any(KEY in str(result) for result in found)
    return found, usage


def breaks_off(handler: Any, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id"')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


def hangs(handler: Any, body: dict[str, Any]) -> None:
    time.sleep(2)


def raw(content: bytes, kind: str = "application/json") -> Behaviour:
    return lambda handler, body: send(handler, content, 200, kind)


def streams(*events: Any, done: bool = True) -> Behaviour:
    """A streamed reply of these pieces; without `done` the connection ends before it is complete."""

    def behave(handler: Any, body: dict[str, Any]) -> None:
        lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events]
        content = "".join([*lines, "data: [DONE]\n\n"] if done else lines).encode()
        send(handler, content, 200, "text/event-stream")

    return behave


def piece(text: str, reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}


FAULTS: dict[str, tuple[Behaviour, str, dict[str, Any]]] = {
    "too many requests": (fails(429), "429", {}),
    "an error of the server": (fails(500), "500", {}),
    "a page of HTML": (raw(b"<html>please log in</html>", "text/html"), "malformed", {}),
    "JSON cut short": (raw(completion("hello")[:40]), "malformed", {}),
    "a list": (raw(b"[1, 2]"), "malformed", {}),
    "no choices": (raw(b'{"id": "x", "object": "chat.completion", "choices": []}'), "malformed", {}),
    "no text": (raw(completion(None)), "truncated", {}),
    "a text cut off": (raw(completion("The arm", "length")), "truncated", {}),
    "a connection that breaks off": (breaks_off, "connection", {}),
    "no reply at all": (hangs, "timeout", {"attempt_seconds": 0.5}),
    "a stream that ends early": (streams(piece("The"), piece(" arm"), done=False), "truncated", {"stream": True}),
    "a stream of no JSON": (streams("{nonsense"), "malformed", {"stream": True}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_mended_by_another_try(fault: str) -> None:
    behave, kind, settings = FAULTS[fault]
    good = streams(piece("Well", None), piece(".", "stop")) if settings.get("stream") else says("Well.")
    with endpoint(in_turn(behave, good)) as there:
        (text,), usage = ask(there.url, **settings)
    assert text == "Well."
    assert usage.tries == {kind: 1, "ok": 1}


@pytest.mark.parametrize("fault", ["an error of the server", "a page of HTML", "no reply at all", "a stream that ends early"])
def test_a_fault_that_stays_is_told_in_time(fault: str) -> None:
    behave, kind, settings = FAULTS[fault]
    with endpoint(behave) as there:
        begin = time.monotonic()
        (error,), usage = ask(there.url, **settings)
        assert len(there.requests) == 3
    assert isinstance(error, EndpointError)
    assert usage.tries == {kind: 3}
    assert time.monotonic() - begin < 10.0


def test_a_reply_of_no_use_is_asked_for_again() -> None:
    def read(text: str) -> str:
        if text != "two":
            raise ReplyError("it is not two")
        return text

    with endpoint(in_turn(says("one"), says("two"))) as there:
        assert ask(there.url, read)[0] == ["two"]


def test_the_pause_that_the_endpoint_asks_for_is_kept() -> None:
    with endpoint(in_turn(fails(429, retry_after="1"), says("Well."))) as there:
        begin = time.monotonic()
        assert ask(there.url)[0] == ["Well."]
        assert time.monotonic() - begin >= 1.0


def test_a_pause_beyond_the_deadline_is_not_waited_for() -> None:
    with endpoint(fails(429, retry_after="60")) as there:
        begin = time.monotonic()
        (error,), _ = ask(there.url, seconds=3.0)
        assert isinstance(error, EndpointError)
        assert time.monotonic() - begin < 3.0
        assert len(there.requests) == 1


def test_all_tries_share_one_deadline() -> None:
    with endpoint(hangs) as there:
        begin = time.monotonic()
        (error,), _ = ask(there.url, seconds=0.5, attempt_seconds=60.0)
        assert isinstance(error, EndpointError)
        assert time.monotonic() - begin < 0.5 + LATE + 2.0  # the endpoint's own thread ends after that


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_try_can_mend_ends_the_work(status: int) -> None:
    with endpoint(fails(status)) as there:
        (error,), _ = ask(there.url)
        assert isinstance(error, UserError)
        assert len(there.requests) == 1


def test_a_refused_request_is_not_repeated() -> None:
    with endpoint(fails(400)) as there:
        (error,), _ = ask(there.url)
        assert isinstance(error, EndpointError)
        assert len(there.requests) == 1


def test_no_more_requests_a_minute_than_allowed() -> None:
    with endpoint(says("Well.")) as there:
        begin = time.monotonic()
        found, _ = ask(there.url, questions=5, per_minute=600.0)
        assert found == ["Well."] * 5
        assert time.monotonic() - begin >= 0.4


def test_a_retry_after_may_be_a_date() -> None:
    assert asked_pause("2.5") == 2.5
    assert asked_pause("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert asked_pause("Wed, 21 Oct 2099 07:28:00 GMT") > 1e6
    assert asked_pause("soon") == asked_pause(None) == 0.0


@pytest.mark.parametrize("stream", [False, True])
def test_the_policys_own_server_is_understood_and_its_tokens_are_counted(server: PolicyServer, stream: bool) -> None:
    (text,), usage = ask(f"{server.url}/v1", model=MODEL, stream=stream, temperature=0.0, max_tokens=64)
    assert isinstance(text, str)
    assert usage.prompt > 0
    assert usage.written > 0
    assert usage.cost((2e6, 1e6)) == 2 * usage.prompt + usage.written


def test_more_questions_than_the_server_takes_are_all_answered(server: PolicyServer) -> None:
    found, usage = ask(
        f"{server.url}/v1", model=MODEL, questions=12, concurrency=12, attempts=20, seconds=60.0, temperature=0.0, max_tokens=64
    )
    assert all(isinstance(text, str) for text in found)
    assert usage.tries["ok"] == 12


def test_a_model_that_the_server_does_not_have_is_told(server: PolicyServer) -> None:
    (error,), _ = ask(f"{server.url}/v1", model="another")
    assert isinstance(error, UserError)
