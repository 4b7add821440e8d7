"""What every call passes before any work is done for it: who calls, how much they bring, and whether there is room.

It is plain ASGI around the whole application, so that no route, and neither MCP nor the documentation, is outside of it. It
also counts calls, names the protocol's version in every response, and turns a fault into an answer that says nothing of it.
"""

import asyncio
import hmac
import logging
import time
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tools_server.metrics import Metrics
from tools_server.settings import LimitSettings
from vstar_jax.tools.protocol import VERSION, VERSION_HEADER, Refusal

log = logging.getLogger(__name__)

OPEN_ROUTES = ("/live", "/ready")
"""Routes that need no token: they tell whether the server is there, and nothing else."""
RETRY_SECONDS = 1


def refusal(status: int, error: str, message: str, **more: object) -> Response:
    """An answer that says why there is none; more: fields of `Refusal`."""
    content = Refusal.model_validate({"error": error, "message": message, **more}).model_dump_json()
    headers = {"retry-after": str(RETRY_SECONDS)} if status in (429, 503) else {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(content, status, headers, "application/json")


class Gate:
    """ASGI middleware; calls, buffered: how many are being served, and the octets of their bodies."""

    def __init__(self, app: ASGIApp, limits: LimitSettings, token: str | None, metrics: Metrics):
        self._app, self._limits, self._metrics = app, limits, metrics
        self._token = token.encode() if token else None
        self.calls, self.buffered = 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One call; see ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[VERSION_HEADER] = VERSION
            await send(message)

        size, refused = self._check(scope, Headers(scope=scope))
        if refused:
            await refused(scope, receive, answer)
        else:
            self.calls += 1
            self.buffered += size
            try:
                await self._app(scope, self._limited(receive, size), answer)
            except Exception:
                log.exception("%s %s failed", scope["method"], scope["path"])
                if not status:
                    await self._refuse(500, "fault", "the server failed; its log says why.")(scope, receive, answer)
            finally:
                self.calls -= 1
                self.buffered -= size
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.calls.labels(route, str(status)).observe(time.perf_counter() - begin)

    def _check(self, scope: Scope, headers: Headers) -> tuple[int, Response | None]:
        """The octets of the body, and why the call is refused, if it is."""
        limits, size = self._limits, 0
        if scope["path"] not in OPEN_ROUTES:
            if self._token is None and not _names_this_machine(headers.get("host", "")):
                return 0, self._refuse(403, "host", "the server is called by a name that is not this machine's own.")
            if self._token is not None and not self._knows(headers.get("authorization", "")):
                return 0, self._refuse(401, "token", "a bearer token is needed in the authorization header.")
        if "content-encoding" in headers:
            return 0, self._refuse(415, "encoding", "bodies must not be compressed: send them as they are.")
        if "content-length" in headers:
            size = int(headers["content-length"])  # the HTTP parser has checked that it is a number
        elif "transfer-encoding" in headers:
            return 0, self._refuse(411, "length", "the body's length must be given in a content-length header.")
        if size > limits.body_bytes:
            return 0, self._refuse(413, "too_large", f"the body has {size} octets and may have {limits.body_bytes}.")
        if self.calls >= limits.calls or (self.buffered and self.buffered + size > limits.buffered_bytes):
            return 0, self._refuse(503, "busy", "too many calls are being served: try again later.")
        return size, None

    def _refuse(self, status: int, error: str, message: str) -> Response:
        self._metrics.refused.labels(error).inc()
        return refusal(status, error, message)

    def _knows(self, header: str) -> bool:
        scheme, _, token = header.partition(" ")
        return hmac.compare_digest(token.strip().encode(), self._token or b"") and scheme.lower() == "bearer"

    def _limited(self, receive: Receive, size: int) -> Receive:
        """Receives a body of `size` octets in bounded time; what comes after it may take as long as it likes."""
        left, more, until = size, size > 0, asyncio.get_running_loop().time() + self._limits.body_seconds

        async def limited() -> Message:
            nonlocal left, more
            if not more:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {self._limits.body_seconds:g} s.") from None
            left -= len(message.get("body", b""))
            more = message.get("more_body", False)
            if left < 0:
                raise HTTPException(413, "the body is longer than its header says.")
            return message

        return limited


def _names_this_machine(host: str) -> bool:
    """Whether a Host header names this machine, as it does unless a web page has been made to call here."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name == "localhost":
        return True
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
