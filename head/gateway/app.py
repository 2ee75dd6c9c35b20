"""The gateway's routes at /v1 and the way of a request through it: door, body, choice, exchange, account.

Only `attach` is for others. Every answer, refusals included, has OpenAI's form, so that any client library of that
form works. What is decided (who may pass, which replica) is decided before the first await where that is possible:
the gateway shares its loop with the head's own work.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web

from common import limits
from common.errors import (
    HerderError,
    MethodNotAllowed,
    ModelNotFound,
    NoReplicaReady,
    NotFound,
    TooMany,
    UpstreamFailed,
)
from head.api.call import near
from head.api.middleware import REQUEST_ID, Door, as_herder_error
from head.context import HeadContext
from head.core.events import ModelsUsed
from head.core.service_views import Route, is_serving, routes, service_state
from head.core.state import State
from head.gateway import bodies, drains, openai
from head.gateway.bodies import Body, ClientGone, Room
from head.gateway.metering import NOBODY, Metering
from head.gateway.probing import Prober
from head.gateway.proxy import Outcome, Proxy, Timeouts, Unreachable
from head.gateway.routing import FindRoutes, LeastOutstanding, Loads, Lookup, Policy, eligible

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
ROLE = "inference"
TRIES = 3  # replicas that may refuse the connection of one request
USED_S = 1.0  # between two ModelsUsed events
RETRY_STARTING_S = 5
RETRY_ABSENT_S = 30
CLIENT_GONE = 499  # nginx's status for a client that left; nobody sees it but the log

_encode = msgspec.json.Encoder().encode


def attach(app: web.Application, context: HeadContext, *, find: FindRoutes = routes) -> None:
    """Adds the gateway to the application. `find` tells which replicas serve a name."""
    gateway = Gateway(context, find)
    for path in PATHS:
        app.router.add_route("POST", path, gateway.complete, expect_handler=_expect_later)
    app.router.add_route("GET", "/v1/models", gateway.models)
    app.router.add_route("GET", "/v1/models/{name:.+}", gateway.model)
    app.router.add_route("*", "/v1/{tail:.*}", gateway.nothing, expect_handler=_expect_later)
    app.cleanup_ctx.append(gateway.run)


class Gateway:
    """The gateway of one head."""

    def __init__(self, context: HeadContext, find: FindRoutes, *, policy: Policy | None = None) -> None:
        settings = context.config.gateway
        self._context = context
        self._driver = context.driver
        self._door = Door(context)
        self._in_flight_max = settings.in_flight_max
        self._lookup = Lookup(find)
        self._loads = Loads()
        self._policy = policy or LeastOutstanding()
        self._proxy = Proxy(
            Timeouts(settings.connect_timeout_s, settings.first_byte_timeout_s, settings.idle_timeout_s)
        )
        self._prober = Prober(context.driver, self._proxy.pool, context.ids.uniform)
        self._used: Counter[str] = Counter()
        self._used_timer: asyncio.TimerHandle | None = None
        self._room = Room(settings.bodies_bytes_max)
        self._drains = drains.Drains(self._loads, self._driver.post, self._proxy.cut)
        self.metering = Metering(self._room)

    async def run(self, _app: web.Application) -> AsyncIterator[None]:
        """Lives as long as the application."""
        registry = self._context.metrics.registry
        registry.register(self.metering)
        self._driver.drainer = self._drains
        yield
        self._driver.drainer = None
        registry.unregister(self.metering)
        if self._used_timer is not None:
            self._used_timer.cancel()
            self._tell_used()
        await self._prober.close()
        self._proxy.close()

    # handlers

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """chat/completions, completions and embeddings: passed on to a replica of the model."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        metering = self.metering
        service, code = NOBODY, "internal"
        metering.in_flight += 1
        body = Body(self._room)
        try:
            self._door.identify(request).require(ROLE)
            if metering.in_flight > self._in_flight_max:
                raise TooMany(f"{self._in_flight_max} requests are on their way already", hint="try again in a moment")
            await bodies.read(request, body)
            wanted = openai.read_wanted(body.data)
            service, outcome = await self._serve(request, wanted.model, body)
            code = outcome.code
            if outcome.first_at:
                metering.first_token(service, outcome.first_at - began)
            prompt, completion = openai.read_usage(outcome.tail)
            if prompt or completion:
                metering.count_tokens(service, prompt, completion)
            return outcome.response
        except HerderError as error:
            code = error.code
            service = error.details.get("service", service)
            return openai.error_response(error)
        except ClientGone:
            code = "client_gone"
            return web.Response(status=CLIENT_GONE)
        except asyncio.CancelledError:
            code = "client_gone"
            raise
        except Exception as error:  # the border: what nobody expected is logged, and the client gets our form
            failure = as_herder_error(error, request)
            if request.writer.output_size > 0:
                raise failure from error  # the answer has begun: the middleware cuts the connection
            return openai.error_response(failure)
        finally:
            body.drop()
            metering.in_flight -= 1
            metering.disconnects += code == "client_gone"
            metering.count(service, request.path, code, loop.time() - began)

    async def models(self, request: web.Request) -> web.Response:
        """The models that answer now."""
        try:
            self._door.identify(request).require(ROLE)
            await self._driver.durable()
        except HerderError as error:
            return openai.error_response(error)
        state = self._driver.state
        names = {replica.model or replica.service for replica in state.replicas.values() if is_serving(state, replica)}
        listing = {"object": "list", "data": [_model(state, name) for name in sorted(names)]}
        return web.Response(body=_encode(listing), content_type="application/json")

    async def model(self, request: web.Request) -> web.Response:
        """One model, by its name or by the name of a service that runs it."""
        name = request.match_info["name"]
        try:
            self._door.identify(request).require(ROLE)
            await self._driver.durable()
            state = self._driver.state
            if not self._lookup.routes(state, name, asyncio.get_running_loop().time()):
                raise absent(state, name)
        except HerderError as error:
            return openai.error_response(error)
        return web.Response(body=_encode(_model(state, name)), content_type="application/json")

    async def nothing(self, request: web.Request) -> web.Response:
        """Whatever else is asked for below /v1."""
        try:
            self._door.identify(request).require(ROLE)
        except HerderError as error:
            return openai.error_response(error)
        if request.path in PATHS or request.path.startswith("/v1/models"):
            return openai.error_response(MethodNotAllowed(f"{request.method} is not possible here"))
        return openai.error_response(
            NotFound(f"there is nothing at {request.path[:200]}", hint=f"there are /v1/models, {', '.join(PATHS)}")
        )

    # the way of a request

    async def _serve(self, request: web.Request, name: str, body: Body) -> tuple[str, Outcome]:
        """The answer of a replica. Raises: HerderError with the service in its details; ClientGone."""
        tried: set[str] = set()
        while True:
            route = await self._choose(name, tried)
            loads = self._loads
            loads.begin(route.replica)
            try:
                outcome = await self._proxy.forward(request, route, name, body, request.get(REQUEST_ID, ""))
            except Unreachable:
                self._set_aside(route, tried)
                continue
            except UpstreamFailed as error:
                if not drains.is_routed(self._driver.state, route):
                    failure = drains.stopped(route.replica)
                    failure.details["service"] = route.service
                    raise failure from None
                self._prober.doubt(route)
                error.details["service"] = route.service
                raise
            except HerderError as error:
                error.details["service"] = route.service
                raise
            finally:
                loads.end(route.replica)
                if self._drains.waiting:
                    self._drains.ended(route.replica)
            self._note_used(route.replica)
            return route.service, outcome

    async def _choose(self, name: str, tried: set[str]) -> Route:
        """The replica to try next. Raises: ModelNotFound, NoReplicaReady, UpstreamFailed."""
        loop = asyncio.get_running_loop()
        while True:
            state = self._driver.state
            found = self._lookup.routes(state, name, loop.time())
            if not found and not tried:
                raise absent(state, name)
            candidates, wants_probe = eligible(found, tried=tried, is_good=self._is_good)
            if not candidates or len(tried) >= TRIES:
                raise UpstreamFailed(
                    f"{len(tried)} replicas of {name[:200]!r} were tried and none accepts requests",
                    hint="`herder services` shows them",
                )
            route = self._policy.choose(candidates, self._loads)
            if not wants_probe:
                return route
            is_healthy = await self._prober.is_healthy(route)
            if not drains.is_routed(self._driver.state, route):
                continue  # it was told to stop meanwhile
            if is_healthy:
                return route
            tried.add(route.replica)

    def _is_good(self, route: Route) -> bool:
        """Whether nothing speaks against the replica: its node has a session, it took its last connection."""
        live = self._driver.state.live.get(route.node)
        failed = self._loads.failed_until
        return (
            live is not None
            and bool(live.session_id)
            and (not failed or not self._loads.is_failing(route.replica, asyncio.get_running_loop().time()))
        )

    def _set_aside(self, route: Route, tried: set[str]) -> None:
        tried.add(route.replica)
        self._loads.failed(route.replica, asyncio.get_running_loop().time())
        self._prober.failed(route)

    def _note_used(self, replica: str) -> None:
        self._used[replica] += 1
        if self._used_timer is None:
            self._used_timer = asyncio.get_running_loop().call_later(USED_S, self._tell_used)

    def _tell_used(self) -> None:
        self._used_timer = None
        used, self._used = self._used, Counter()
        self._driver.post(ModelsUsed(dict(used)))


def absent(state: State, name: str) -> HerderError:
    """Why nothing answers to this name: it is unknown, or none of its engines is ready."""
    services = sorted(service.name for service in state.services.values() if name in (service.model, service.name))
    if name not in state.models and not services:
        known = [*state.models, *state.services]
        return ModelNotFound(
            f"there is no model {name[:200]!r}",
            hint=near(name[: limits.MODEL_NAME_CHARS], known, "GET /v1/models lists what answers"),
            param="model",
        )
    states = {service: service_state(state, service) for service in services}
    is_coming = any(word in ("pending", "starting") for word in states.values())
    said = "; ".join(f"service {service} is {word}{_reason(state, service)}" for service, word in states.items())
    return NoReplicaReady(
        f"no engine of {name!r} is ready" + (f": {said[:1_000]}" if said else ": no service runs it"),
        hint=f"`herder why service {services[0]}` says more"
        if services
        else f"`herder serve {name} DEVICE` starts one",
        service=services[0] if services else NOBODY,
        param="model",
        retry_after_s=RETRY_STARTING_S if is_coming else RETRY_ABSENT_S,
    )


def _reason(state: State, service: str) -> str:
    held = state.services[service]
    said = held.reason or (held.error.message if held.error is not None else "")
    return f" ({said[:200]})" if said else ""


def _model(state: State, name: str) -> dict[str, object]:
    model = state.models.get(name)
    created_ms = model.created_ms if model is not None else state.started_ms
    return {"id": name, "object": "model", "created": created_ms // 1000, "owned_by": "herder"}


async def _expect_later(_request: web.Request) -> None:
    """`Expect: 100-continue` is answered when the body is about to be read: after the door, within the limit."""
