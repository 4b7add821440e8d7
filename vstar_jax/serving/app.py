"""The policy behind OpenAI's chat protocol: POST /v1/chat/completions, GET /v1/models and GET /health.

A call is checked, read and decoded within limits before the engine sees it. A caller that leaves gives its row back.
"""

import asyncio
import hmac
import json
import logging
import secrets
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from vstar_jax.batch import Example
from vstar_jax.data.chat import Chat
from vstar_jax.data.processor import ProcessedClip, process_image
from vstar_jax.serving import media, schema
from vstar_jax.serving.engine import Ask, Busy, Engine, Job
from vstar_jax.serving.schema import ChatRequest
from vstar_jax.serving.text import Text

log = logging.getLogger(__name__)

RETRY_SECONDS = 1
DECODERS = 2
"""Requests whose pictures are decoded at once."""
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """Why a call is not answered: an HTTP status, one sentence, and OpenAI's code for it."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request; body_seconds: until it has arrived; calls: served at once, those that wait among them."""

    body_bytes: int = 64 << 20
    body_seconds: float = 60.0
    calls: int = 64
    files: media.MediaLimits = field(default_factory=media.MediaLimits)


@dataclass(frozen=True)
class Service:
    """What the routes work with; name: of the model, as clients ask for it."""

    name: str
    chat: Chat
    engine: Engine
    limits: Limits


def create(service: Service, token: str | None) -> FastAPI:
    """The application; token: the bearer token that clients must show, None for clients of this machine alone."""
    app = FastAPI(title="vstar_jax policy", docs_url=None, redoc_url=None, openapi_url=None)
    expected, calls, decoders = token.encode() if token else None, [0], asyncio.Semaphore(DECODERS)

    def known(request: Request) -> None:
        _check_caller(request, expected)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _refusal(error)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        message = "the server has POST /v1/chat/completions, GET /v1/models and GET /health."
        return _refusal(Refused(error.status_code, message))

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return _refusal(Refused(500, "the server failed; its log says why."))

    @app.get("/health")
    async def health() -> Response:
        if not service.engine.ready:
            return _refusal(_loading())
        return JSONResponse(
            {"status": "ok", "model": service.name, "rows": service.engine.sizes.rows, "busy": service.engine.busy}
        )

    @app.get("/v1/models", dependencies=[Depends(known)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": service.name, "object": "model", "created": 0, "owned_by": "vstar_jax"}]}

    @app.post("/v1/chat/completions", dependencies=[Depends(known)])
    async def chat(request: Request) -> Response:
        if not service.engine.ready:
            raise _loading()
        if calls[0] >= service.limits.calls:
            raise _full()
        calls[0] += 1
        handed_over = False

        def leave() -> None:
            calls[0] -= 1

        try:
            body = _parse(await _body(request, service.limits))
            _check_body(body, service)
            async with decoders:
                prompt = await asyncio.to_thread(_prompt, body, service)
            reply = _Reply(body, prompt, service)
            if body.stream:
                handed_over = True
                return _Events(reply, leave)
            return JSONResponse(await _unless_gone(request, reply.whole()))
        finally:
            if not handed_over:
                leave()

    return app


class _Reply:
    """A reply as it grows; the job is queued when this is made. Raises Refused when the queue is full."""

    def __init__(self, body: ChatRequest, prompt: Example, service: Service):
        self._body, self._model = body, service.name
        self._name = f"chatcmpl-{uuid.uuid4().hex}"
        self._prompt_tokens, self._text = len(prompt.tokens), Text(service.chat.decode, body.stops)
        self._news: asyncio.Queue[tuple[list[int], str | Exception | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(ids: list[int], end: str | Exception | None) -> None:
            loop.call_soon_threadsafe(self._news.put_nowait, (ids, end))

        limit = body.max_completion_tokens or body.max_tokens or service.engine.sizes.new_tokens
        ask = Ask(
            prompt,
            limit,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=(secrets.randbits(32) if body.seed is None else body.seed) % 2**32,
        )
        self._job = Job(ask, tell)
        try:
            service.engine.submit(self._job)
        except Busy:
            raise _full() from None

    async def whole(self) -> dict[str, Any]:
        """The reply when it is complete."""
        reason = ""
        async for _, end in self._pieces():
            reason = end or reason
        return schema.completion(self._name, self._model, self._text.text, reason, self._usage())

    def cancel(self) -> None:
        """Gives the row back, if the reply still has one."""
        self._job.cancelled.set()

    async def events(self) -> AsyncIterator[str]:
        """The reply as server-sent events."""
        try:
            yield _event(schema.piece(self._name, self._model, {"role": "assistant", "content": ""}))
            async for text, end in self._pieces():
                if text:
                    yield _event(schema.piece(self._name, self._model, {"content": text}))
                if end:
                    yield _event(schema.piece(self._name, self._model, {}, end))
            if self._body.stream_options and self._body.stream_options.include_usage:
                yield _event(schema.last_piece(self._name, self._model, self._usage()))
            yield "data: [DONE]\n\n"
        except Refused as error:
            yield _event(schema.error(str(error), "server_error"))

    async def _pieces(self) -> AsyncIterator[tuple[str, str | None]]:
        """New text, and with the last of it why the reply ended: stop or length."""
        try:
            while True:
                ids, end = await self._news.get()
                if isinstance(end, Exception):
                    log.warning("a reply was lost: %s", end)
                    raise Refused(500, "the server could not finish the reply: try again.")
                new = self._text.add(ids, last=end is not None)
                if self._text.stopped:
                    end = "stop"
                yield new, end
                if end:
                    return
        finally:
            self.cancel()

    def _usage(self) -> dict[str, int]:
        return schema.usage(self._prompt_tokens, self._text.tokens)


class _Events(StreamingResponse):
    """A streamed reply; however it ends, and if it never begins, its row is given back and `leave` called."""

    def __init__(self, reply: _Reply, leave: Callable[[], None]):
        super().__init__(reply.events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._reply, self._leave = reply, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.cancel()
            self._leave()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled when the caller leaves before it is there."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the caller has left.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _refusal(error: Refused) -> Response:
    kind = KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    headers = {"retry-after": str(RETRY_SECONDS)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(schema.error(str(error), kind, error.code), error.status, headers)


def _loading() -> Refused:
    return Refused(503, "the model is being loaded: try again in a moment.")


def _full() -> Refused:
    return Refused(429, f"too many requests are waiting: try again after {RETRY_SECONDS} s.", "rate_limit_exceeded")


def _check_caller(request: Request, token: bytes | None) -> None:
    if token is None:
        if not _names_this_machine(request.headers.get("host", "")):
            raise Refused(403, "the server is called by a name that is not this machine's own.")
        return
    scheme, _, shown = request.headers.get("authorization", "").partition(" ")
    if not (hmac.compare_digest(shown.strip().encode(), token) and scheme.lower() == "bearer"):
        raise Refused(401, "a bearer token is needed in the authorization header, as the client's api_key.", "invalid_api_key")


def _names_this_machine(host: str) -> bool:
    """Whether a Host header names this machine, as it does unless a web page has been made to call here."""
    name = host if host.endswith("]") else host.rsplit(":", 1)[0]
    try:
        return name == "localhost" or ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


async def _body(request: Request, limits: Limits) -> bytes:
    too_large = Refused(413, f"the body may have {limits.body_bytes} bytes: send fewer or smaller pictures.")
    if int(request.headers.get("content-length", 0)) > limits.body_bytes:  # the HTTP parser has checked that it is a number
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                content += part
                if len(content) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {limits.body_seconds:g} s.") from None
    return bytes(content)


def _parse(content: bytes) -> ChatRequest:
    try:
        return ChatRequest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isascii())[:100]
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            known = ", ".join(ChatRequest.model_fields)
            raise Refused(400, f"the server does not know the field {where}: it takes {known}.") from None
        said = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        raise Refused(400, f"{where}: {said}." if where else f"{said}.") from None


def _check_body(body: ChatRequest, service: Service) -> None:
    most = service.engine.sizes.new_tokens
    if body.model != service.name:
        raise Refused(404, f"there is no model of this name: the server has {service.name}.", "model_not_found")
    if max(body.max_tokens or 0, body.max_completion_tokens or 0) > most:
        raise Refused(400, f"a reply may have {most} tokens at most: ask for 1 to {most}.")
    if body.messages[-1].role == "assistant":
        raise Refused(400, "the last message is the assistant's: end with a message of the user.")


def _prompt(body: ChatRequest, service: Service) -> Example:
    """The request as an Example. Raises Refused when a picture is not usable or nothing fits."""
    chat, clips = service.chat, list[ProcessedClip]()
    messages = []
    try:
        for message in body.messages:
            content: Any = message.content
            if not isinstance(content, str):
                content = [_part(part, service, clips) for part in content]
            messages.append({"role": "system" if message.role == "developer" else message.role, "content": content})
        prompt = chat.encode(messages, clips, add_generation_prompt=True)
        service.engine.check(prompt)
    except media.MediaError as error:
        raise Refused(400, str(error)) from None
    except ValueError as error:
        raise Refused(400, f"the request does not fit the model: {error}.", "context_length_exceeded") from None
    return prompt


def _part(part: schema.Part, service: Service, clips: list[ProcessedClip]) -> dict[str, str]:
    """A part of a message for the chat; its picture goes to the end of `clips`."""
    chat, limits = service.chat, service.limits.files
    match part:
        case schema.TextPart(text=text):
            return {"type": "text", "text": text}
        case schema.ImagePart(image_url=url):
            clips.append(process_image(media.image(media.payload(url.url, "image", limits), limits), chat.video))
            return {"type": "image"}
        case schema.VideoPart(video_url=url):
            content = media.payload(url.url, "video", limits)
            clips.append(chat.clip(*media.video(content, chat.video.frames, limits)))
        case schema.FramesPart(video=urls, fps=fps):
            clips.append(chat.clip(media.pictures(urls, limits), fps))
    return {"type": "video"}
