"""The policy behind OpenAI's chat protocol: what a client of OpenAI sends is understood, and what is wrong is said."""

import base64
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policy_servers import MODEL, ROOT, PolicyServer, png

from vstar_jax.config import VideoConfig
from vstar_jax.data import video
from vstar_jax.data.chat import Chat

httpx, openai = pytest.importorskip("httpx"), pytest.importorskip("openai")
ROWS, QUEUE, NEW_TOKENS = 2, 2, 400
FRAMES = np.zeros((8, 112, 112, 3), np.uint8)
"""Of which the tiny base model writes without an end."""
LOOK = "Which tools do you need to name this motion?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyServer]:
    flags = (f"--rows={ROWS}", f"--queue={QUEUE}", f"--new-tokens={NEW_TOKENS}", "--chunk=4")
    running = PolicyServer(tmp_path_factory.mktemp("serve"), *flags)
    yield running
    running.close()


@pytest.fixture
def client(server: PolicyServer) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def patient(client: Any) -> Any:
    """A client that comes back when the queue is full: requests may come faster than the first ones get their rows."""
    return client.with_options(max_retries=10)


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": LOOK}]}]


CLIP = {"type": "video", "video": [png(frame) for frame in FRAMES], "fps": 4.0}


def ask(client: Any, messages: Any, **settings: Any) -> Any:
    settings = {"max_tokens": 12, "temperature": 0.0, "model": MODEL, **settings}
    return client.chat.completions.create(messages=messages, **settings)


def text(reply: Any) -> str:
    return reply.choices[0].message.content


def refused(client: Any, messages: Any, **settings: Any) -> tuple[int, str]:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, messages, **settings)
    message = caught.value.body["message"]  # type: ignore[index]
    assert message.endswith(".")
    return caught.value.status_code, message


def test_the_model_is_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_a_clip_as_frames_is_answered_with_usage(client: Any) -> None:
    chat = Chat(ROOT / "vstar_jax" / "assets" / MODEL, VideoConfig())
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": LOOK}]}]
    prompt = chat.encode(messages, [chat.clip(FRAMES, 4.0)], add_generation_prompt=True)
    reply = ask(client, user(CLIP))
    assert reply.usage.prompt_tokens == len(prompt.tokens)
    assert reply.usage.completion_tokens == 12
    assert reply.choices[0].finish_reason == "length"


def test_a_reply_that_ends_by_itself_has_stopped(client: Any) -> None:
    reply = ask(client, user(), max_tokens=NEW_TOKENS)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < NEW_TOKENS


def test_a_video_file_and_an_image_are_seen(client: Any, tmp_path: Path) -> None:
    video.write(tmp_path / "clip.mp4", FRAMES, 8.0)
    url = "data:video/mp4;base64," + base64.b64encode((tmp_path / "clip.mp4").read_bytes()).decode()
    plain = ask(client, user()).usage.prompt_tokens
    for part in ({"type": "video_url", "video_url": {"url": url}}, {"type": "image_url", "image_url": {"url": png(FRAMES[0])}}):
        assert ask(client, user(part)).usage.prompt_tokens > plain


def test_the_pieces_of_a_stream_make_the_whole_reply(client: Any) -> None:
    whole = ask(client, user(CLIP), seed=5, temperature=1.0, max_tokens=30)
    pieces = list(
        ask(client, user(CLIP), seed=5, temperature=1.0, max_tokens=30, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == text(whole)
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == whole.choices[0].finish_reason
    assert pieces[-1].usage == whole.usage


def test_a_seed_gives_the_same_reply_whoever_else_is_served(client: Any) -> None:
    def sampled(seed: int) -> str:
        return text(ask(patient(client), user(CLIP), seed=seed, temperature=1.5, top_p=0.95, max_tokens=24))

    alone = [sampled(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(sampled, range(4))) == alone
    assert len(set(alone)) > 1


def test_a_reply_ends_before_a_stop_text(client: Any) -> None:
    whole = text(ask(client, user(CLIP), max_tokens=30))
    words = whole.split()
    stopped = ask(client, user(CLIP), max_tokens=30, stop=[words[-1]])
    assert text(stopped) == whole[: whole.index(words[-1])]
    assert stopped.choices[0].finish_reason == "stop"


BAD: dict[str, tuple[Any, dict[str, Any], int, str]] = {
    "another model": (user(), {"model": "gpt"}, 404, MODEL),
    "too many tokens": (user(), {"max_tokens": NEW_TOKENS + 1}, 400, str(NEW_TOKENS)),
    "two replies": (user(), {"n": 2}, 400, "n: "),
    "a field that is not known": (user(), {"logprobs": True}, 400, "logprobs: it takes model"),
    "an address": (user({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}), {}, 400, "data URL"),
    "a path": (user({"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}), {}, 400, "data URL"),
    "no base64": (user({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}), {}, 400, "base64"),
    "no picture": (user({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}), {}, 400, "PNG"),
    "no video": (user({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,aGk="}}), {}, 400, "MP4"),
    "frames of two sizes": (
        user({"type": "video", "video": [png(FRAMES[0]), png(FRAMES[0, :56])]}),
        {},
        400,
        "differ in size",
    ),
    "more frames than fit": (user({**CLIP, "video": CLIP["video"] * 12}), {}, 400, "largest bucket"),
    "a long text": ([{"role": "user", "content": "it " * 2000}], {}, 400, "largest bucket of tokens"),
    "no message": ([], {}, 400, "messages"),
    "a reply at the end": ([{"role": "assistant", "content": "it"}], {}, 400, "user"),
    "another role": ([{"role": "tool", "content": "it", "tool_call_id": "1"}], {}, 400, "role"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_in_a_sentence(client: Any, name: str) -> None:
    messages, settings, status, words = BAD[name]
    found, message = refused(client, messages, **settings)
    assert found == status
    assert words in message


def test_a_body_that_is_too_large_or_no_json_is_refused(server: PolicyServer) -> None:
    where = f"{server.url}/v1/chat/completions"
    assert httpx.post(where, content=b"{").status_code == 400
    large = httpx.post(where, content=b"0" * ((64 << 20) + 1), timeout=60)
    assert large.status_code == 413
    assert httpx.get(f"{server.url}/v1/none").json()["error"]["message"].startswith("the server has")
    assert httpx.get(f"{server.url}/v1/models", headers={"host": "evil.example"}).status_code == 403


def test_a_full_queue_is_refused_with_the_time_to_come_back_and_leaving_frees_the_rows(
    server: PolicyServer, client: Any
) -> None:
    long = dict(max_tokens=NEW_TOKENS, stream=True)
    streams = [ask(patient(client), user(CLIP), **long) for _ in range(ROWS + QUEUE)]
    begun = [next(iter(stream)) for stream in streams]
    assert len(begun) == ROWS + QUEUE
    statuses = []
    for _ in range(3):
        reply = httpx.post(f"{server.url}/v1/chat/completions", json={"model": MODEL, "messages": user(), "max_tokens": 1})
        statuses.append((reply.status_code, reply.headers.get("retry-after")))
    for stream in streams:
        stream.close()
    server.wait_until(lambda: server.health()[1]["busy"] == 0, 20)
    assert text(ask(client, user())) is not None
    assert (429, "1") in statuses


def test_the_token_is_asked_for_and_a_stop_lets_replies_end(tmp_path: Path) -> None:
    guarded = PolicyServer(tmp_path, "--new-tokens=200", "--chunk=2", token="canary-7d21")
    try:
        assert httpx.get(f"{guarded.url}/v1/models").status_code == 401
        with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="canary-7d21", max_retries=0) as client:
            stream = ask(client, user(CLIP), max_tokens=200, stream=True)
            next(iter(stream))
            stopper = threading.Thread(target=guarded.process.send_signal, args=(signal.SIGTERM,))
            stopper.start()
            reasons = [piece.choices[0].finish_reason for piece in stream]
            stopper.join()
        assert reasons[-1] in ("stop", "length")
        assert guarded.process.wait(30) in (0, -signal.SIGTERM)
        assert "canary" not in guarded.log.read_text()
    finally:
        guarded.close()


def test_another_address_needs_a_token(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="SERVE_TOKEN"):
        PolicyServer(tmp_path, "--host=0.0.0.0")
