"""The tools over HTTP: clips are uploaded once under their hashes, and a batch call asks for everything that a step needs.

Each route is a thin face of `Service`. Every call passes the `Gate` first.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from tools_server import annotate, glossary, mcp_app, yolo
from tools_server.cache import Cache
from tools_server.clips import ClipStore
from tools_server.describe import Describer, LlmDescriber, OfflineDescriber
from tools_server.failure import Busy
from tools_server.flights import Flights
from tools_server.gate import Gate, refusal
from tools_server.llm_proxy import LlmProxy
from tools_server.metrics import Metrics
from tools_server.service import Missing, Reply, Service
from tools_server.settings import KEY_VARIABLES, LimitSettings, Settings, SettingsError
from vstar_jax.tools import protocol
from vstar_jax.tools.protocol import Answer, BatchRequest, BatchResponse, ClipHeader, ClipId, Refusal, Tool

Result = TypeVar("Result")

REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": Refusal, "description": "no bearer token, or a wrong one"},
    404: {"model": Refusal, "description": "clips in `missing` must be uploaded first"},
    413: {"model": Refusal, "description": "the body is larger than allowed"},
    422: {"model": Refusal, "description": "the request is not what the schema says"},
    503: {"model": Refusal, "description": "too much work is waiting: try again after Retry-After seconds"},
}


def create(settings: Settings, token: str | None, key: str | None) -> tuple[Gate, Service]:
    """The application with its models loaded; token: what clients must show; key: of the LLM, None to work offline.

    Raises SettingsError or yolo.YoloError, in one sentence, when something that the settings name cannot be used.
    """
    metrics = Metrics()
    explained = glossary.read(settings.glossary) if settings.glossary else {}
    if settings.describer == "llm" and not key:
        raise SettingsError(f"--describer=llm needs a key in the environment variable {' or '.join(KEY_VARIABLES)}.")
    results = Cache(settings.cache.path, settings.cache.bytes)
    models = {task: _load(task, settings, metrics) for task in yolo.WEIGHTS}
    llm = LlmProxy(settings.llm, key, lambda outcome: metrics.upstream.labels(outcome).inc()) if key else None
    describer: Describer = OfflineDescriber()
    if llm and settings.describer != "offline":
        describer = LlmDescriber(llm, settings.llm.pictures)
    flights = Flights()
    service = Service(
        models,
        glossary.Explainer(explained, llm, results, flights, settings.limits.seconds),
        describer,
        results,
        flights,
        ClipStore(settings.cache.clip_bytes, results if settings.cache.share_clips else None),
        annotate.Style(**settings.style.model_dump()),
        settings.limits,
        metrics,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if settings.mcp:
                await stack.enter_async_context(mcp_app.add(app, service))
            yield
        for model in models.values():
            await asyncio.to_thread(model.close)
        if llm:
            await llm.close()
        results.close()

    app = FastAPI(title="vstar_jax tools", version=protocol.VERSION, lifespan=lifespan, redoc_url=None)
    _add_routes(app, service, metrics)
    _add_refusals(app)
    gate = Gate(app, settings.limits, token, metrics)
    metrics.watch("tools_calls", "calls being served", lambda: gate.calls)
    metrics.watch("tools_waiting_frames", "frames that wait for the models", lambda: sum(m.queue_size for m in models.values()))
    metrics.watch("tools_cache_bytes", "bytes of results", results.size)
    metrics.watch("tools_clip_bytes", "bytes of clips", lambda: service.clips.bytes)
    if llm:
        metrics.watch("tools_llm_open", "1 while the language model is left alone", lambda: llm.breaker.open)
    return gate, service


def _load(task: yolo.Task, settings: Settings, metrics: Metrics) -> yolo.Yolo:
    y = settings.yolo

    def observe(frames: int, seconds: float) -> None:
        metrics.batches.labels(task).observe(frames)
        metrics.inference.labels(task).observe(seconds)

    return yolo.Yolo(
        Path(getattr(y, task)),
        task,
        device=y.device,
        confidence=y.confidence,
        image_size=y.image_size or None,
        batch=y.batch,
        wait_ms=y.wait_ms,
        queue=2 * settings.limits.queue,
        threads=y.threads or None,
        on_batch=observe,
    )


def _add_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    limits = service.limits

    @app.get("/live", summary="Whether the process is there")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/ready", summary="Whether calls are answered")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.get("/metrics", summary="Counters for Prometheus", response_class=Response)
    async def show_metrics() -> Response:
        return Response(await asyncio.to_thread(metrics.text), media_type="text/plain; version=0.0.4")

    @app.get("/v1/tools", summary="The tools as OpenAI function schemas")
    async def tools() -> list[dict[str, Any]]:
        return schemas()

    @app.put("/v1/clips/{clip}", status_code=201, responses=_refusals(401, 413, 422, 503), openapi_extra=_OCTETS_BODY)
    async def upload(clip: ClipId, request: Request, x_clip_shape: Annotated[str, Header()]) -> ClipHeader:
        """Keeps a clip, the octets of uint8 [T, H, W, 3], under its id: the SHA-256 of "T,H,W,3\\n" and those octets."""
        shape = _shape(x_clip_shape, limits)
        pixels = await _receive(request, clip, shape)
        service.clips.put(clip, pixels)
        return ClipHeader(id=clip, shape=shape)  # type: ignore[arg-type]

    @app.get("/v1/clips/{clip}", response_class=Response, responses={**_refusals(401, 404, 422), 200: _OCTETS})
    async def download(clip: ClipId) -> Response:
        """The octets of a clip that was uploaded or drawn lately; the header X-Clip-Shape has its shape T,H,W,3."""
        pixels = service.clips.get(clip)
        if pixels is None:
            raise Missing([clip])
        shape = ",".join(map(str, pixels.shape))
        return Response(pixels.tobytes(), media_type=protocol.OCTETS, headers={protocol.SHAPE_HEADER: shape})

    @app.post(
        "/v1/batch",
        response_model=BatchResponse,
        responses={**_refusals(401, 404, 413, 422, 503), 200: {"content": {protocol.BINARY: {}}}},
    )
    async def batch(body: BatchRequest, request: Request, accept: Annotated[str, Header()] = protocol.JSON) -> Response:
        """Answers many requests at once, each on its own.

        With `Accept: application/vnd.vstar.batch` the JSON, in one line, is followed by the octets of the annotated clips.
        """
        reply = await _unless_gone(request, service.answer(body.requests, body.timeout))
        return _binary(reply) if protocol.BINARY in accept else _json(BatchResponse(answers=reply.answers))

    for tool in protocol.TOOLS:
        _add_tool(app, service, tool)


def _add_tool(app: FastAPI, service: Service, tool: Tool) -> None:
    arguments = protocol.ARGUMENTS[tool]

    @app.post(
        f"/v1/tools/{tool}",
        response_model=Answer,
        responses=_refusals(401, 404, 413, 422, 503),
        description=protocol.TOOLS[tool],
        operation_id=tool,
    )
    async def call(body: arguments, request: Request, timeout: Annotated[float, Query(gt=0, le=600)] = 10.0) -> Response:  # type: ignore[valid-type]
        return _json(await _unless_gone(request, call_tool(service, tool, body, timeout)))


async def call_tool(service: Service, tool: Tool, arguments: Any, timeout: float) -> Answer:
    """The answer of one tool alone; arguments: of the type that `protocol.ARGUMENTS` has for it."""
    request = protocol.Request(episode="", turn=0, tools=(tool,), **arguments.model_dump())
    return (await service.answer([request], timeout)).answers[0]


def schemas() -> list[dict[str, Any]]:
    """The tools as OpenAI function schemas."""
    found = []
    for tool, description in protocol.TOOLS.items():
        parameters = protocol.ARGUMENTS[tool].model_json_schema()
        found.append({"type": "function", "function": {"name": tool, "description": description, "parameters": parameters}})
    return found


def _shape(header: str, limits: LimitSettings) -> tuple[int, int, int, int]:
    """T, H, W, 3 of a clip, as its header declares them."""
    if not re.fullmatch(r"[0-9]{1,6},[0-9]{1,6},[0-9]{1,6},3", header, re.ASCII):
        raise HTTPException(422, "X-Clip-Shape must be T,H,W,3 in decimal numbers.")
    frames, height, width, _ = map(int, header.split(","))
    if not 0 < frames <= limits.frames:
        raise HTTPException(422, f"the clip has {frames} frames and must have 1 to {limits.frames}.")
    if not 0 < height * width <= limits.pixels:
        raise HTTPException(422, f"a frame has {height * width} pixels and must have 1 to {limits.pixels}.")
    return frames, height, width, 3


async def _receive(request: Request, clip: str, shape: tuple[int, int, int, int]) -> np.ndarray:
    """The body as a clip of this shape; its length and hash must be what was announced."""
    wanted = int(np.prod(shape))
    if (size := int(request.headers.get("content-length", 0))) != wanted:
        raise HTTPException(422, f"the body has {size} octets, but a clip of this shape has {wanted}.")
    octets, at, digest = np.empty(wanted, np.uint8), 0, protocol.clip_hash(shape)
    async for chunk in request.stream():
        octets[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
        digest.update(chunk)
        at += len(chunk)
    if at != wanted or digest.hexdigest() != clip:
        raise HTTPException(422, "the body's hash is not the clip's id.")
    octets.flags.writeable = False
    return octets.reshape(shape)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the caller leaves before it is there."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the caller has left.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _json(model: Answer | BatchResponse) -> Response:
    return Response(model.model_dump_json(), media_type=protocol.JSON)


def _binary(reply: Reply) -> Response:
    clips = tuple(ClipHeader(id=name, shape=pixels.shape) for name, pixels in reply.clips.items())
    head = BatchResponse(answers=reply.answers, clips=clips).model_dump_json().encode()
    body = b"".join([head, b"\n", *(np.ascontiguousarray(pixels).data.cast("B") for pixels in reply.clips.values())])
    return Response(body, media_type=protocol.BINARY)


_OCTETS = {"content": {protocol.OCTETS: {"schema": {"type": "string", "format": "binary"}}}, "description": "the clip"}
_OCTETS_BODY = {"requestBody": {"required": True, "content": _OCTETS["content"]}}


def _refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: REFUSALS[code] for code in codes}


def _add_refusals(app: FastAPI) -> None:
    """Every error in the form of `Refusal`, without repeating what was sent."""

    @app.exception_handler(Missing)
    async def missing(request: Request, error: Missing) -> Response:
        return refusal(404, "missing", str(error), missing=error.clips)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return refusal(503, "busy", str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isascii())[:200]
        return refusal(422, "invalid", f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}.")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        response = refusal(error.status_code, "refused", str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return refusal(500, "fault", "the server failed; its log says why.")
