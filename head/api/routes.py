"""The routes as data: what the API takes and answers is said once, here and in the resource modules.

Registration, authentication, strict decoding, the OpenAPI document and the docs page are all driven by the same
`Route` objects, so no path can be undocumented or unprotected. A path is written as aiohttp wants it
(`{name:regex}`); `Route.openapi_path` drops the expressions.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from common import limits

if TYPE_CHECKING:
    from head.api.call import Call

Handler = Callable[["Call"], Awaitable[web.StreamResponse]]

PREFIX = "/api/v1"
OPEN = "open"  # no token; the other values are roles
MODEL = "[^/]+(?:/[^/]+)?"  # a model's name: at most one '/', plain or as %2F
REST = ".+"
_EXPRESSION = re.compile(r"\{(\w+):(?:[^{}]|\{[^{}]*\})*\}")


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Root of query strings; a parameter that the route does not have is refused."""


class NoQuery(Query, frozen=True):
    """The route takes no parameters."""


class ListQuery(Query, frozen=True, kw_only=True):
    """Which page of a list."""

    limit: Annotated[int, Meta(ge=1, le=limits.PAGE_ITEMS, description="Items on a page.")] = limits.PAGE_ITEMS_DEFAULT
    cursor: Annotated[str, Meta(max_length=2_048, description="`next` of the page before.")] = ""


class WaitQuery(Query, frozen=True, kw_only=True):
    """Whether to wait for the outcome."""

    wait: Annotated[
        float,
        Meta(ge=0, le=limits.WAIT_S, description="Seconds to wait for the outcome before answering; 0: do not wait."),
    ] = 0.0


@dataclass(frozen=True, slots=True)
class PageOf:
    """The answer is a page of these."""

    item: type[msgspec.Struct]


@dataclass(frozen=True, slots=True)
class ListOf:
    """The answer is a plain array of these."""

    item: type[msgspec.Struct]


@dataclass(frozen=True, slots=True)
class Media:
    """The answer is not one JSON object: its media type and what it holds."""

    type: str
    description: str
    is_binary: bool = False
    is_stream: bool = False  # goes on for as long as somebody listens


AnswerType = type[msgspec.Struct] | PageOf | ListOf | Media


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path.

    role: the least role, or OPEN. codes: error codes beyond those that any route may answer.
    body: the request's type; None: the route takes no body.
    """

    method: str
    path: str
    handler: Handler
    role: str
    tag: str
    summary: str
    answer: AnswerType
    body: type[msgspec.Struct] | None = None
    is_body_optional: bool = False
    query: type[Query] = NoQuery
    status: int = 200
    codes: tuple[str, ...] = ()
    takes_yaml: bool = False
    streams_body: str = ""  # what the body holds, of a route that reads it itself, as it comes
    is_reading: bool = False  # a POST that changes nothing: its body is only too rich for a query
    description: str = ""

    @property
    def openapi_path(self) -> str:
        """The path with `{name}` only."""
        return _EXPRESSION.sub(r"{\1}", self.path)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parts of the path that vary."""
        return tuple(re.findall(r"\{(\w+)\}", self.openapi_path))

    @property
    def changes(self) -> bool:
        """Whether calls may change something."""
        return self.method not in ("GET", "HEAD") and not self.is_reading

    @property
    def audited(self) -> bool:
        """Whether calls are written to the audit log: whatever may change something, and the backup of everything."""
        return self.changes or self.role == "admin"
