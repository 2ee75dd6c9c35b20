"""The head's HTTP application: every route of the table behind the same door, and the gateway beside them.

Each route's handler is wrapped once: who asks (head/auth.py), may they (the route's role), what do they send
(strictly decoded), then the handler. What the daemon needs: `build_app(context)`, an `AppRunner` on it, done.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from common import limits
from common.errors import HerderError
from common.tasks import Supervisor
from head.api import (
    artifacts,
    backup,
    benchmark_results,
    benchmarks,
    bodies,
    copies,
    docs,
    events,
    health,
    jobs,
    keys,
    logs,
    middleware,
    models,
    nodes,
    openapi,
    operations,
    plan,
    prometheus,
    recipes,
    services,
    story,
)
from head.api.audit import AuditLog
from head.api.call import Call, Shared
from head.api.routes import OPEN, Media, Route
from head.context import HeadContext

SHARED = web.AppKey("shared", Shared)
ROUTES: tuple[Route, ...] = (
    *health.ROUTES,
    *docs.ROUTES,
    *models.ROUTES,
    *operations.ROUTES,
    *copies.ROUTES,
    *nodes.ROUTES,
    *services.ROUTES,
    *logs.ROUTES,
    *recipes.ROUTES,
    *jobs.ROUTES,
    *benchmarks.ROUTES,
    *benchmark_results.ROUTES,
    *artifacts.ROUTES,
    *events.ROUTES,
    *story.ROUTES,
    *keys.ROUTES,
    *prometheus.ROUTES,
    *backup.ROUTES,
    *plan.ROUTES,
)


def routes_of(context: HeadContext) -> tuple[Route, ...]:
    """The table as this head is configured."""
    if not context.config.metrics_open:
        return ROUTES
    return tuple(
        dataclasses.replace(route, role=OPEN) if route.path == prometheus.METRICS_PATH else route for route in ROUTES
    )


def build_app(context: HeadContext) -> web.Application:
    """The application, gateway included where the context has one. Start it with `AppRunner(app)`."""
    routes = routes_of(context)
    audit = AuditLog(context.config.state_path / "audit.log")
    shared = Shared(context, audit)
    shared.documents = docs.Documents(openapi.document(routes, version=context.version))
    door = middleware.Door(context)
    app = web.Application(
        middlewares=[middleware.around(context, audit)],
        client_max_size=limits.BODY_BYTES,
        handler_args={
            "access_log": None,
            "auto_decompress": False,  # no gzip bombs; compressed bodies are refused, or passed on by the gateway
            "keepalive_timeout": context.config.door.keep_alive_s,
            "lingering_time": limits.LINGER_S,
        },
    )
    app[SHARED] = shared
    app.on_response_prepare.append(middleware.add_headers)
    for route in routes:
        app.router.add_route(route.method, route.path, _entry(route, shared, door), expect_handler=_on_expect)
    if context.gateway_routes is not None:
        context.gateway_routes(app)
    app.cleanup_ctx.append(_background(shared, audit))
    return app


def _background(shared: Shared, audit: AuditLog) -> Callable[[web.Application], AsyncIterator[None]]:
    async def run(app: web.Application) -> AsyncIterator[None]:
        backup.remove_leftovers(shared.context.config.state_path)
        for ordered in shared.lists.values():
            ordered.order()  # sorted now rather than during the first request
        audit.start()
        tasks = Supervisor("api")
        tasks.start("waiters", shared.waiters.run())
        yield
        shared.waiters.close()
        await shared.planner.close()
        await tasks.close()
        audit.close()

    return run


def _entry(
    route: Route, shared: Shared, door: middleware.Door
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The route's handler behind authentication, role and strict decoding, timed by route template."""
    metrics = shared.context.metrics
    template = route.openapi_path

    is_stream = isinstance(route.answer, Media) and route.answer.is_stream  # these last as long as somebody listens

    async def entry(request: web.Request) -> web.StreamResponse:
        started = time.perf_counter()
        status = 500
        call = Call(request, route, shared, request[middleware.REQUEST_ID])
        request[middleware.CALL] = call
        try:
            response = await _handle(call, door)
            status = response.status
        except HerderError as error:
            status = error.status
            raise
        finally:
            if not is_stream:
                metrics.http(template, route.method, status, time.perf_counter() - started)
        return response

    return entry


async def _handle(call: Call, door: middleware.Door) -> web.StreamResponse:
    request, route = call.request, call.route
    if route.role != OPEN:
        call.principal = door.identify(request)
        call.principal.require(route.role)
    query = bodies.decode_query(list(request.query.items()), route.query)
    body, raw_body = None, b""
    if route.streams_body:
        pass  # of any length: the handler bounds it, and reads it as it comes
    elif route.body is None:
        await bodies.read_nothing(request)
    else:
        raw_body = await bodies.read_body(request, takes_yaml=route.takes_yaml, is_optional=route.is_body_optional)
        if raw_body:
            body = await bodies.decode_body(raw_body, route.body, content_type=request.content_type)
    call.set_input(query=query, body=body, raw_body=raw_body)
    return await route.handler(call)


async def _on_expect(request: web.Request) -> None:
    """`Expect: 100-continue` is answered when the body is about to be read: after the door, within the limit."""
