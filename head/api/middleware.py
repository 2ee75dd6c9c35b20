"""What surrounds every request: an id, who asks, the errors' form, security headers, and the audit log.

`around` is the outermost layer of the whole application: whatever happens inside, the answer is in our form, has an
X-Request-Id and holds no traceback. `Door` decides who may pass. A refused request whose body has not been read
costs next to nothing: the answer goes out at once, a little of the body is thrown away so that the answer survives
on its way, and the connection ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from common import limits
from common.errors import (
    Forbidden,
    HerderError,
    Internal,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    TooMany,
    Unauthenticated,
    Unavailable,
)
from head import auth
from head.addresses import network
from head.api.audit import AuditLine, AuditLog
from head.api.call import NOBODY, Call, error_body
from head.auth import Principal
from head.context import HeadContext

log = logging.getLogger(__name__)

REQUEST_ID = web.RequestKey("request_id", str)
CALL = web.RequestKey("call", Call)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_LINGER_PAUSE_S = 0.05  # between two pieces thrown away: at most about 5 MB of a refused body is taken in


class Throttle:
    """Counts failed authentications per address, in windows of a minute, for a bounded number of addresses.

    A valid token is never throttled: agents, Prometheus and people may share an address with a program that holds
    an old token. What is limited is what guesses and broken scripts cost.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def failed(self, address: str | None) -> int:
        """Notes a failure. Returns seconds to wait when the address has used up its minute, else 0."""
        now, place = self._clock(), network(address)
        since, count = self._seen.get(place, (now, 0))
        if now - since >= 60:
            since, count = now, 0
        self._seen[place] = (since, count + 1)
        self._seen.move_to_end(place)
        if len(self._seen) > limits.AUTH_ADDRESSES:
            self._seen.popitem(last=False)
        return max(1, round(60 - (now - since))) if count >= limits.AUTH_FAILURES_PER_MINUTE else 0


class Door:
    """Who stands at the door."""

    def __init__(self, context: HeadContext) -> None:
        self._context = context
        self._throttle = Throttle()

    def identify(self, request: web.Request) -> Principal:
        """Who asks. Raises: Unauthenticated; TooMany when an address has failed too often."""
        headers = request.headers.getall("Authorization", [])
        header = headers[0] if len(headers) == 1 else None
        try:
            return auth.authenticate(self._context.driver.state, header, self._context.clock.now_ms())
        except Unauthenticated:
            wait_s = self._throttle.failed(request.remote)
            if wait_s:
                raise TooMany("too many failed attempts from this address", retry_after_s=wait_s) from None
            raise


def around(context: HeadContext, audit: AuditLog) -> Middleware:
    """The outermost middleware of the application."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[REQUEST_ID] = context.ids.fresh("req")
        code = ""
        try:
            response = await handler(request)
        except Exception as error:  # noqa: BLE001 - the border: whatever escaped becomes an answer in our form
            failure = as_herder_error(error, request)
            code = failure.code
            if request.writer.output_size > 0:  # a stream broke halfway: nothing can be said any more
                _audit(context, audit, request, failure.status, code)
                if request.transport is not None:
                    request.transport.abort()
                raise ConnectionResetError("the answer could not be completed") from None
            response = error_response(failure, error)
        _audit(context, audit, request, response.status, code)
        if response.status >= 400 and _has_unread_body(request):
            await _answer_and_close(request, response)
        return response

    return middleware


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Puts the request's id and the security headers on every answer, streams included."""
    request_id = request.get(REQUEST_ID)
    if request_id:
        response.headers["X-Request-Id"] = request_id
    for name, value in SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers.pop("Server", None)


def as_herder_error(error: Exception, request: web.Request) -> HerderError:
    """Anything raised, as one of our errors; what nobody expected is logged and says nothing of itself."""
    if isinstance(error, HerderError):
        if error.status >= 500 and isinstance(error, Internal):
            log.error("internal error of %s: %s", request.get(REQUEST_ID), error.message)
        return error
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(f"{request.method} is not possible here", hint=f"possible: {allowed}", allowed=allowed)
    if isinstance(error, web.HTTPNotFound):
        return NotFound(f"there is nothing at {request.path[:200]}", hint="/docs lists every path")
    if isinstance(error, web.HTTPException) and error.status < 500:
        return InvalidRequest(f"the request cannot be handled: {error.reason}")
    log.error("request %s failed", request.get(REQUEST_ID), exc_info=error)
    return Internal("the head failed to handle this request", hint="its log has the details under this request's id")


def error_response(failure: HerderError, cause: Exception | None = None) -> web.Response:
    """The answer for an error, with the headers that its status asks for."""
    response = web.Response(body=error_body(failure), status=failure.status, content_type="application/json")
    if isinstance(failure, Unauthenticated):
        response.headers["WWW-Authenticate"] = 'Bearer realm="herder"'
    elif isinstance(failure, Forbidden):
        response.headers["WWW-Authenticate"] = 'Bearer realm="herder", error="insufficient_scope"'
    elif isinstance(failure, TooMany | Unavailable):
        response.headers["Retry-After"] = str(failure.details.get("retry_after_s", 1))
    if isinstance(cause, web.HTTPMethodNotAllowed):
        response.headers["Allow"] = ", ".join(sorted(cause.allowed_methods))
    return response


def _audit(context: HeadContext, audit: AuditLog, request: web.Request, status: int, code: str) -> None:
    """A line for whatever changed something, wanted to, or was turned away at the door."""
    call = request.get(CALL)
    if call is None and status < 400:
        return  # not ours: the gateway keeps its own account
    if (call is None or not call.route.audited) and status not in (401, 403):
        return
    principal = call.principal if call is not None else NOBODY
    audit.write(
        AuditLine(
            at_ms=context.clock.now_ms(),
            actor=principal.actor if principal.key_id else "",
            role=principal.role,
            address=request.remote or "",
            method=request.method,
            path=request.rel_url.raw_path[:1_000],
            status=status,
            request_id=request[REQUEST_ID],
            changed=call.changed if call is not None else "",
            code=code,
        )
    )


def _has_unread_body(request: web.Request) -> bool:
    """Whether more of the body is coming than is worth reading for the sake of the connection."""
    if request.content.is_eof() or not request.body_exists:
        return False
    length = request.content_length
    return length is None or length > limits.BODY_BYTES // 16 or "Expect" in request.headers


async def _answer_and_close(request: web.Request, response: web.StreamResponse) -> None:
    """Sends the answer, takes in a little more of the body, slowly, and ends the connection.

    Closing at once, with unread bytes in the socket, would reset the connection and the answer could be lost.
    """
    response.force_close()
    await response.prepare(request)
    await response.write_eof()
    loop = asyncio.get_running_loop()
    end = loop.time() + limits.LINGER_S
    try:
        async with asyncio.timeout_at(end):
            while await request.content.readany():  # noqa: ASYNC110 - a pace, not a wait for a state
                await asyncio.sleep(_LINGER_PAUSE_S)
    except (TimeoutError, OSError, web.RequestPayloadError):
        pass  # the peer went away, or goes on sending: either way the connection ends now
    request.protocol.force_close()
