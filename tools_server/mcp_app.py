"""The tools over MCP (streamable HTTP at /mcp), for agents: a thin face of the same service.

A clip is named by its id and is uploaded over HTTP before. No session is kept, so any replica can answer any call.
"""

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import ValidationError

from vstar_jax.tools import protocol
from vstar_jax.tools.protocol import Answer, LabelArguments, Tool

if TYPE_CHECKING:
    from tools_server.service import Service

SECONDS = 60.0
"""What a call may take: agents are more patient than rollouts."""


def add(app: FastAPI, service: "Service") -> AbstractAsyncContextManager[None]:
    """Adds the route; what is returned must be entered while the application runs."""
    server = MCPServer("vstar_jax tools", version=protocol.VERSION, log_level="WARNING")
    for tool, description in protocol.TOOLS.items():
        server.add_tool(_function(service, tool), name=tool, description=description)
    open_to_the_gate = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    inner = server.streamable_http_app(json_response=True, stateless_http=True, transport_security=open_to_the_gate)
    app.router.routes.extend(inner.routes)
    return server.session_manager.run()


def _function(service: "Service", tool: Tool):  # type: ignore[no-untyped-def]
    from tools_server.app import call_tool

    async def call(**given: object) -> Answer:
        try:
            arguments = protocol.ARGUMENTS[tool].model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            raise ToolError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return await call_tool(service, tool, arguments, SECONDS)

    async def look(clip: str, frames: list[int] | None = None) -> Answer:
        return await call(clip=clip, frames=frames)

    async def explain(labels: list[str]) -> Answer:
        return await call(labels=labels)

    return explain if protocol.ARGUMENTS[tool] is LabelArguments else look
