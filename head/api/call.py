"""A call: one request to one route, after authentication and decoding, and what handlers do with it.

Handlers take from the call what the route promised (body, query, path) and answer through it, so that ids,
idempotency, waiting and encoding are the same everywhere.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from aiohttp import web

from common import limits
from common.errors import HerderError, InvalidValue, NotFound
from head import auth
from head.api import pages
from head.api.audit import AuditLog
from head.api.kinds import Kinds
from head.api.routes import ListQuery, Route
from head.api.waiting import Waiters
from head.auth import Principal
from head.context import HeadContext
from head.core.effects import Reply
from head.core.events import RequestEvent
from head.core.state import State
from head.planner_process import PlannerProcess

if TYPE_CHECKING:
    from head.api.docs import Documents

S = TypeVar("S", bound=msgspec.Struct)
NOBODY = Principal("", "", "")
PAGE_PARTS = 5_000  # rows inside the rows of a page: some 25 ms of rendering
NEAR_LENGTH = 4  # names that differ more in length are hardly misspelt
NEAR_CANDIDATES = 1_000  # comparing so many takes some milliseconds
_encoder = msgspec.json.Encoder()


class Shared:
    """What all calls of one application share."""

    def __init__(self, context: HeadContext, audit: AuditLog) -> None:
        driver = context.driver
        self.context = context
        self.audit = audit
        self.waiters = Waiters(context)
        self.backup_gate = asyncio.Lock()
        self.planner = PlannerProcess(calibration=context.config.calibration_path)
        self.kinds = Kinds()
        self.documents: Documents | None = None  # the OpenAPI document and its page, made with the application
        self.lists: dict[str, pages.Ordered[Any]] = {  # the ordered keys of each table, kept between requests
            "model": pages.Ordered(lambda: driver.state.models),
            "node": pages.Ordered(lambda: driver.state.nodes),
            "copy": pages.Ordered(lambda: driver.state.copies),
            "service": pages.Ordered(lambda: driver.state.services),
            "replica": pages.Ordered(lambda: driver.state.replicas),
            "key": pages.Ordered(lambda: driver.state.keys),
            "benchmark": pages.Ordered(lambda: driver.state.benchmarks, rank=lambda made: -made.created_ms),
            "job": pages.Ordered(lambda: driver.state.jobs.facts, rank=lambda facts: -facts.created_ms),
        }


class Call:
    """One request in the hands of its route's handler."""

    __slots__ = (
        "_body",
        "_query",
        "changed",
        "context",
        "lists",
        "principal",
        "raw_body",
        "request",
        "request_id",
        "route",
        "shared",
        "waiters",
    )

    def __init__(self, request: web.Request, route: Route, shared: Shared, request_id: str) -> None:
        self.request = request
        self.route = route
        self.shared = shared
        self.context = shared.context
        self.lists = shared.lists
        self.waiters = shared.waiters
        self.request_id = request_id
        self.principal = NOBODY
        self.raw_body = b""
        self.changed = ""  # "kind:key" of what the call changed, for the audit log
        self._body: msgspec.Struct | None = None
        self._query: msgspec.Struct | None = None

    # what was asked
    @property
    def state(self) -> State:
        """The head's state."""
        return self.context.driver.state

    @property
    def now_ms(self) -> int:
        """Herder time."""
        return self.context.clock.now_ms()

    def path(self, name: str) -> str:
        """A part of the path, decoded."""
        return self.request.match_info[name]

    def set_input(self, *, query: msgspec.Struct, body: msgspec.Struct | None, raw_body: bytes) -> None:
        """Keeps what was decoded."""
        self._query, self._body, self.raw_body = query, body, raw_body

    def body(self, cls: type[S]) -> S:
        """The decoded body, of the route's type."""
        assert isinstance(self._body, cls)
        return self._body

    def query(self, cls: type[S]) -> S:
        """The decoded query string, of the route's type."""
        assert isinstance(self._query, cls)
        return self._query

    # reading
    async def read(self) -> State:
        """The state, once everything in it is on the disk: an answer never shows what a crash could take back.

        Raises: TimedOut when the journal hangs.
        """
        await self.context.driver.durable()
        return self.state

    # changing
    async def submit(self, event: type[RequestEvent], *, fresh: str = "", **fields: Any) -> Reply:
        """Sends a change through the core; returns once it is on the disk.

        fresh: prefix of the id for what the event makes. Raises: what the core refuses with; TimedOut.
        """
        key = self._idempotency_key()
        made = event(
            request_id=self.request_id,
            actor=self.principal.actor,
            fresh_id=self.context.ids.fresh(fresh) if fresh else "",
            idempotency_key=key,
            request_sha256=self._digest() if key else "",
            **fields,
        )
        try:
            reply = await self.context.driver.submit(made)
        except NotFound as error:
            self._hint_at_near_names(error)
            raise
        self.changed = reply.reference
        await self.read()  # the answer is rendered from the state, which may hold later changes of others
        return reply

    def _hint_at_near_names(self, error: NotFound) -> None:
        """Adds the nearest known names where the core only says what is missing."""
        for kind, table in (("model", self.state.models), ("node", self.state.nodes), ("service", self.state.services)):
            name = error.details.get(kind)
            if error.code == f"{kind}_not_found" and isinstance(name, str):
                error.hint = near(name, table, error.hint)

    def _idempotency_key(self) -> str:
        key: str = self.request.headers.get("Idempotency-Key", "")
        if key and (len(key) > limits.IDEMPOTENCY_KEY_CHARS or not key.isascii() or not key.isprintable()):
            raise InvalidValue(
                "Idempotency-Key: not usable",
                hint=f"1 to {limits.IDEMPOTENCY_KEY_CHARS} printable ASCII characters, fresh for each change",
            )
        return key

    def _digest(self) -> str:
        """What a repeat must have in common: method, path and body; not the query, which only says how to wait."""
        digest = hashlib.sha256(f"{self.request.method} {self.request.rel_url.raw_path}\n".encode())
        digest.update(self.raw_body)
        return digest.hexdigest()

    # answering
    @property
    def is_welcome(self) -> bool:
        """Whether the key that asked still opens doors; streams look again before each piece."""
        return auth.is_good(self.state, self.principal.key_id, self.now_ms)

    @property
    def is_cut(self) -> bool:
        """Whether the connection is gone."""
        return self.request.transport is None or self.request.transport.is_closing()

    def cut(self) -> None:
        """Ends the connection at once: for a reader that takes nothing, whose answer could never be finished."""
        if self.request.transport is not None:
            self.request.transport.abort()

    def answer(
        self, view: msgspec.Struct | Iterable[msgspec.Struct], *, status: int | None = None, location: str = ""
    ) -> web.Response:
        """A JSON answer; status: the route's own when not given."""
        headers = {"Location": location} if location else None
        return web.Response(
            body=_encoder.encode(view),
            status=status or self.route.status,
            content_type="application/json",
            headers=headers,
        )

    async def page(
        self,
        name: str,
        query: ListQuery,
        order: Sequence[pages.OrderKey],
        row: Callable[[str], msgspec.Struct],
        *,
        wants: Callable[[str], bool] | None = None,
        weight: Callable[[str], int] | None = None,
    ) -> web.Response:
        """A page of a list: `order` gives its keys in order, `row` renders one, `wants` filters.

        All raise KeyError for a key that has gone; filtering a long list lets the loop turn. `weight` counts what
        is inside a row (steps, copies): a page ends early, with a cursor, before that holds up the loop.
        """
        after = pages.decode_cursor(name, query.cursor)
        if wants is not None:
            order = await pages.matching(list(order), wants)
            await self.read()
        part = pages.take(order, after=after, limit=query.limit)
        rows: list[msgspec.Struct] = []
        load, last, is_cut = 0, None, False
        for entry in part.entries:
            try:
                load += weight(entry[1]) if weight is not None else 0
                is_cut = bool(rows) and load > PAGE_PARTS
                if is_cut:
                    break
                rows.append(row(entry[1]))
            except KeyError:
                pass  # deleted while the list was filtered
            last = entry
        following = last if is_cut or part.has_more else None
        return self.listing(rows, pages.encode_cursor(name, following), part.total)

    def listing(
        self, rows: Sequence[msgspec.Struct | msgspec.Raw], next_cursor: str | None, total: int = 0
    ) -> web.Response:
        """The JSON of `api.Page`, its rows encoded in place."""
        body = b'{"items":%s,"next":%s,"total":%d}' % (_encoder.encode(rows), _encoder.encode(next_cursor), total)
        return web.Response(body=body, status=self.route.status, content_type="application/json")


def near(name: str, known: Iterable[str], listing: str) -> str:
    """The hint of a 404: the nearest known names, or how to list them all.

    Only names of about the same length, or that end in `/name`, are compared, and a bounded number of them.
    """
    wanted = name.lower()
    candidates = {}
    for text in known:
        if abs(len(text) - len(name)) <= NEAR_LENGTH or text.lower().endswith("/" + wanted):
            candidates[text.lower()] = text
            if len(candidates) >= NEAR_CANDIDATES:
                break
    matches = [low for low in candidates if low.endswith("/" + wanted)][:3]
    matches = matches or difflib.get_close_matches(wanted, candidates, n=3, cutoff=0.5)
    if matches:
        return "did you mean " + " or ".join(repr(candidates[match]) for match in matches) + "?"
    return listing


def error_body(error: HerderError) -> bytes:
    """The JSON of an error answer."""
    info = error.info()
    return _encoder.encode(
        {"error": {"code": info.code, "message": info.message, "hint": info.hint, "details": info.details}}
    )
