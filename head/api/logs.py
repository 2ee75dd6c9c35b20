"""/logs: of engines, load generators, daemons, Slurm: merged, searched, followed; /replicas/{id}/logs: plain text."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated, Literal, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from common import limits
from common.errors import HerderError, InvalidValue, Unavailable
from common.logs import own
from head.api.call import Call
from head.api.routes import PREFIX, Media, Query, Route
from head.api.services import find_replica
from head.auth import RANK
from head.bench.store import FOLDER
from head.log_choice import Log, Wish, choose, kept_of
from head.log_text import LogText
from head.log_views import OPENED, LogView, ViewQuery, parse_cursors
from herder.types import LogEntry

TAG = "services"
CURSOR_CHARS = 65_536
JSON_TYPES = ("application/jsonl", "application/x-ndjson", "application/json")
_BENCHMARK = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,127}")
_AGO = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)(s|m|h|d)")
_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
T = TypeVar("T")
_encoder = msgspec.json.Encoder()

Name = Annotated[str, Meta(max_length=256)]
Moment = Annotated[str, Meta(max_length=40)]


class LogsQuery(Query, frozen=True, kw_only=True):
    """Which part of an engine's log."""

    follow: Annotated[bool, Meta(description="Go on with what is written from now on.")] = False
    tail: Annotated[int, Meta(ge=0, le=100_000, description="The last lines to begin with.")] = 100
    run: Annotated[
        int, Meta(ge=0, lt=limits.LOG_RUNS_KEPT, description="0: the present run; 1: the one before; and so on.")
    ] = 0


class ViewLogsQuery(Query, frozen=True, kw_only=True):
    """Which logs, and which part of them."""

    target: Annotated[Name, Meta(description="Any of the below by its name alone.")] = ""
    service: Annotated[Name, Meta(description="All engines of this service.")] = ""
    replica: Annotated[Name, Meta(description="This engine; with node, what that node has of it.")] = ""
    run: Annotated[Name, Meta(description="A load generator or monitor of a benchmark.")] = ""
    benchmark: Annotated[Name, Meta(description="Its load generators, monitors and engines while it lasted.")] = ""
    job: Annotated[Name, Meta(description="The engines that its steps are about, while it lasted.")] = ""
    node: Annotated[Name, Meta(description="All engines and runs there, and for operators its agent.")] = ""
    source: Annotated[
        Name, Meta(description="replica:ID, run:ID; for operators also agent:NODE, slurm:NODE/JOBID and head.")
    ] = ""
    since: Annotated[Moment, Meta(description="From then on: ISO 8601, milliseconds, or 90s, 10m, 2h, 7d ago.")] = ""
    until: Annotated[Moment, Meta(description="Up to then; as since.")] = ""
    search: Annotated[str, Meta(max_length=limits.LOG_PATTERN_CHARS, description="Only lines that hold this text.")] = (
        ""
    )
    regex: Annotated[bool, Meta(description="`search` is a regular expression.")] = False
    ignore_case: Annotated[bool, Meta(description="Search without regard to upper and lower case.")] = False
    tail: (
        Annotated[
            int,
            Meta(
                ge=-1,
                le=limits.LOG_TAIL_LINES,
                description="The last lines to begin with; -1: all that is kept. Default: 100; all with a time.",
            ),
        ]
        | None
    ) = None
    follow: Annotated[bool, Meta(description="Go on with what is written from now on.")] = False
    back: (
        Annotated[
            int,
            Meta(ge=0, le=limits.LOG_RUNS_KEPT, description="Only the present run (0), or the one before (1)."),
        ]
        | None
    ) = None
    format: Annotated[Literal["text", "jsonl"] | None, Meta(description="Default: as Accept says, else text.")] = None
    timestamps: Annotated[bool, Meta(description="As text: begin each line with its time.")] = False
    cursor: Annotated[
        str, Meta(max_length=CURSOR_CHARS, description="The latest `cursor` of each source, by commas: go on there.")
    ] = ""


# text of one engine, as it comes
async def replica_logs(call: Call) -> web.StreamResponse:
    query = call.query(LogsQuery)
    replica = find_replica(await call.read(), call.path("id"))
    chunks = call.context.sessions.open_log(replica.id, query.run, query.tail, query.follow)
    pieces = _each(chunks, lambda chunk: chunk.data.encode())
    return await _stream(call, pieces, "text/plain; charset=utf-8", _text_end)


# views
async def logs(call: Call) -> web.StreamResponse:
    return await _answer(call, call.query(ViewLogsQuery))


async def logs_by_body(call: Call) -> web.StreamResponse:
    return await _answer(call, call.body(ViewLogsQuery))


async def _answer(call: Call, asked: ViewLogsQuery) -> web.StreamResponse:
    state = await call.read()
    wish = Wish(**{name: getattr(asked, name) for name in Wish._fields})
    home = call.context.config.state_path
    benchmark = wish.benchmark_id
    folder = home / FOLDER / benchmark
    kept = await asyncio.to_thread(kept_of, folder) if _BENCHMARK.fullmatch(benchmark) else {}
    is_operator = RANK.get(call.principal.role, 0) >= RANK["operator"]

    def chosen() -> list[Log]:
        return choose(state, wish, is_operator=is_operator, own=home / own.FOLDER, kept=kept)

    is_many = len(chosen()) > 1
    view = LogView(call.context.sessions.logs, chosen, _query(asked), revision=lambda: state.revision)
    entries = view.entries()
    if _is_json(call, asked):
        return await _stream(call, _each(entries, _json_lines), "application/x-ndjson", _json_end)
    text = LogText(is_many=is_many or (asked.follow and bool(asked.service)), has_times=asked.timestamps)
    return await _stream(
        call,
        _each(entries, text.render),
        "text/plain; charset=utf-8",
        _text_end,
    )


def _query(asked: ViewLogsQuery) -> ViewQuery:
    """Raises: InvalidValue."""
    cursors = parse_cursors(asked.cursor)
    # A reader that comes back means "10m ago" as of when it first came.
    now_ms = cursors[OPENED].offset if OPENED in cursors else time.time_ns() // 1_000_000
    since_ms, until_ms = moment("since", asked.since, now_ms), moment("until", asked.until, now_ms)
    if until_ms and (asked.follow or until_ms < since_ms):
        raise InvalidValue("until: not with follow, and not before since", hint="leave one of them out")
    if asked.regex and not asked.search:
        raise InvalidValue("regex: search is empty", hint="search= is the expression")
    tail = asked.tail if asked.tail is not None else -1 if since_ms or until_ms else limits.PAGE_ITEMS_DEFAULT
    return ViewQuery(
        tail=tail,
        follow=asked.follow,
        back=-1 if asked.back is None else asked.back,
        since_ms=since_ms,
        until_ms=until_ms,
        pattern=asked.search,
        is_regex=asked.regex,
        ignore_case=asked.ignore_case,
        cursors=cursors,
    )


def moment(name: str, text: str, now_ms: int) -> int:
    """A time as people and programs write it, in milliseconds; 0 for none. Raises: InvalidValue."""
    if not text:
        return 0
    if text.isascii() and text.isdigit() and len(text) < 16:
        return int(text)
    if ago := _AGO.fullmatch(text):
        return max(1, now_ms - round(float(ago[1]) * _UNIT_MS[ago[2]]))
    try:
        at = datetime.fromisoformat(text)
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        return max(1, round(at.timestamp() * 1000))
    except (ValueError, OverflowError):
        hint = "as 2026-01-31T12:00:00Z (UTC where no zone is given), milliseconds since 1970, or 90s, 10m, 2h, 7d ago"
        raise InvalidValue(f"{name}: {text[:40]!r} is no time", hint=hint) from None


def _is_json(call: Call, asked: ViewLogsQuery) -> bool:
    if asked.format is not None:
        return asked.format == "jsonl"
    accepted = call.request.headers.get("Accept", "")
    return any(kind in accepted for kind in JSON_TYPES) and "text/plain" not in accepted


def _json_lines(entries: Iterable[LogEntry]) -> bytes:
    return b"".join(_encoder.encode(entry) + b"\n" for entry in entries)


def _json_end(why: str) -> bytes:
    return _encoder.encode(LogEntry(note=why, is_end=True)) + b"\n"


def _text_end(why: str) -> bytes:
    return f"\n[herder: {why}]\n".encode() if why else b""


async def _each(source: AsyncIterator[T], render: Callable[[T], bytes]) -> AsyncIterator[bytes]:
    """What a source gives as bytes; it is closed with this."""
    async with aclosing(source):  # type: ignore[type-var]
        async for item in source:
            yield render(item)


async def _stream(
    call: Call, pieces: AsyncIterator[bytes], content_type: str, last_words: Callable[[str], bytes]
) -> web.StreamResponse:
    """Pieces as an answer that goes on for as long as somebody reads."""
    async with aclosing(pieces):  # type: ignore[type-var]
        # The first piece decides between an error answer and a stream, which can no longer say what went wrong.
        first = await anext(pieces, None)
        response = web.StreamResponse(headers={"Content-Type": content_type, "X-Accel-Buffering": "no"})
        await response.prepare(call.request)
        try:
            if first is not None:
                await _write(response, first)
            async for piece in pieces:
                if not call.is_welcome:
                    await _write(response, last_words("the key that asked was revoked or has expired"))
                    return response
                await _write(response, piece)
            await _write(response, last_words(""))
        except HerderError as error:
            if type(error) is Unavailable:
                call.cut()  # without an end: whoever can go on with the next head does
            else:
                await _write(response, last_words(f"the log ends here: {error.message}"))
        except (ConnectionError, TimeoutError):
            call.cut()  # the reader is gone or takes nothing
    return response


async def _write(response: web.StreamResponse, data: bytes) -> None:
    if data:
        async with asyncio.timeout(limits.STREAM_WRITE_S):
            await response.write(data)


_CODES = (
    *("not_found", "service_not_found", "node_not_found", "job_not_found", "benchmark_not_found"),
    *("node_unreachable", "timed_out", "too_many"),
)
_ANSWER = Media("text/plain", "The lines as text, or as JSON lines (`LogEntry`), as they come.", is_stream=True)
ROUTES = (
    Route(
        "GET",
        f"{PREFIX}/replicas/{{id}}/logs",
        replica_logs,
        "viewer",
        TAG,
        "Read an engine's log",
        Media("text/plain", "The log as text, as it comes.", is_stream=True),
        query=LogsQuery,
        codes=("not_found", "node_unreachable", "timed_out", "too_many"),
    ),
    Route(
        "GET",
        f"{PREFIX}/logs",
        logs,
        "viewer",
        TAG,
        "Read, search and follow logs",
        _ANSWER,
        query=ViewLogsQuery,
        codes=_CODES,
        description="Merged by the time of each line. With JSON lines every entry has the cursor of its source.",
    ),
    Route(
        "POST",
        f"{PREFIX}/logs",
        logs_by_body,
        "viewer",
        TAG,
        "Read logs, with what is asked in the body",
        _ANSWER,
        body=ViewLogsQuery,
        is_reading=True,
        codes=_CODES,
        description="As GET, for cursors of more logs than fit into a query.",
    ),
)
