"""/health, /healthz and the root: whether the head is well, in full for people and in brief for machines."""

from __future__ import annotations

from aiohttp import web

from head.api import render
from head.api.call import Call
from head.api.routes import OPEN, PREFIX, Media, Route
from herder import types as api

TAG = "head"


async def health(call: Call) -> web.StreamResponse:
    """In full. Answers also while the journal cannot be written: that is when it is needed most."""
    driver = call.context.driver
    alarms = tuple(f"{name}: {text}" for name, text in sorted(driver.alarms.items()))
    if call.shared.audit.lost:
        alarms += (f"audit_log: {call.shared.audit.lost} lines were lost since the start",)
    view = render.health_view(
        call.state,
        version=call.context.version,
        now_ms=call.now_ms,
        is_read_only=driver.is_read_only,
        alarms=alarms,
    )
    return call.answer(view)


async def healthz(call: Call) -> web.StreamResponse:
    """In brief, without a token: the process answers."""
    return web.Response(text="ok\n")


async def root(call: Call) -> web.StreamResponse:
    """What answers here."""
    about = api.About(
        name="herder",
        version=call.context.version,
        api=PREFIX,
        docs="/docs",
        openapi=f"{PREFIX}/openapi.json",
        health="/healthz",
    )
    return call.answer(about)


async def agent(call: Call) -> web.StreamResponse:
    """An agent's session; it says the rest over the websocket."""
    return await call.context.sessions.handle_agent(call.request)


ROUTES = (
    Route("GET", "/", root, OPEN, TAG, "What answers here", api.About),
    Route(
        "GET",
        "/healthz",
        healthz,
        OPEN,
        TAG,
        "Is the process alive",
        Media("text/plain", "`ok`"),
        description="For load balancers and watchdogs: says nothing about the cluster.",
    ),
    Route(
        "GET",
        f"{PREFIX}/health",
        health,
        "viewer",
        TAG,
        "How the head is",
        api.Health,
        description="`degraded` while the journal cannot be written, replacement is frozen or an alarm is on.",
    ),
    Route(
        "GET",
        f"{PREFIX}/agent",
        agent,
        "agent",
        TAG,
        "The agents' websocket",
        Media("application/json", "The session protocol; see docs/protocol.md.", is_stream=True),
        status=101,
        codes=("wrong_cluster", "protocol_unsupported"),
    ),
)
