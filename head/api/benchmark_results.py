"""/benchmarks/{id}/report, files and live: what a benchmark measured, and what it does now."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import msgspec
from aiohttp import web
from msgspec import Meta

from common import limits
from common.errors import InvalidValue, NotFound
from head.api import render_benchmarks
from head.api.benchmarks import TAG, find, performer_of
from head.api.call import Call
from head.api.routes import PREFIX, REST, ListOf, Media, Query, Route
from head.bench.questions import Export
from head.bench.store import LOAD_FILE, REPORT_FILE
from head.bench.summary import summary_csv
from head.core.benchmark_facts import is_ended, points_of
from head.core.objects import Benchmark
from herder import types as api

CHUNK_BYTES = 1_048_576
_TYPES = {".json": "application/json", ".csv": "text/csv", ".html": "text/html", ".log": "text/plain"}
_encoder = msgspec.json.Encoder()


class ReportQuery(Query, frozen=True, kw_only=True):
    """Which report."""

    point: Annotated[int, Meta(ge=0, description="One point; left out: the whole benchmark.")] | None = None
    format: Annotated[
        Literal["json", "csv", "vllm", "genai-bench", "html"],
        Meta(description="vllm and genai-bench are of one point, html of the whole."),
    ] = "json"


async def report(call: Call) -> web.StreamResponse:
    query = call.query(ReportQuery)
    benchmark = find(await call.read(), call.path("id"))
    if query.point is not None:
        return await _point_report(call, benchmark, query.point, query.format)
    if query.format == "html":
        return await _file(call, benchmark.id, "report.html")
    if query.format == "csv":
        view = msgspec.to_builtins(render_benchmarks.benchmark_view(call.state, benchmark))
        return web.Response(body=summary_csv(view).encode(), headers={"Content-Type": "text/csv; charset=utf-8"})
    if query.format == "json":
        return await _whole(call, benchmark)
    raise InvalidValue(f"format: {query.format} is of one point", hint="say which with `point`")


async def _point_report(call: Call, benchmark: Benchmark, number: int, wanted: str) -> web.StreamResponse:
    if wanted == "html":
        raise InvalidValue("format: html is of the whole benchmark", hint="leave `point` out")
    name = f"points/{number}/{REPORT_FILE}"
    if wanted == "json":
        return await _file(call, benchmark.id, name)
    performer = performer_of(call)
    folder = performer.store.point(benchmark.id, number)
    if not await asyncio.to_thread((folder / REPORT_FILE).is_file):
        raise NotFound(f"point {number} of {benchmark.id} has no report")
    target = folder / f".export-{secrets.token_hex(6)}"
    try:
        question = Export(str(folder / LOAD_FILE), str(folder / REPORT_FILE), str(target), wanted)
        await performer.clerks.ask(question, int)
        file = await asyncio.to_thread(target.open, "rb")
    finally:
        await asyncio.to_thread(_unlink, target)
    kind = "text/csv; charset=utf-8" if wanted == "csv" else "application/json"
    extension = "csv" if wanted == "csv" else "json"
    return await _send(call, file, kind, f"{benchmark.id}-{number}-{wanted}.{extension}")


async def _whole(call: Call, benchmark: Benchmark) -> web.StreamResponse:
    """`{"benchmark": {...}, "points": [reports...]}`, the reports as they are kept."""
    view = render_benchmarks.benchmark_view(call.state, benchmark)
    numbers = [point.number for point in points_of(call.state, benchmark.id)]
    store = performer_of(call).store
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(call.request)

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield b'{"benchmark":' + _encoder.encode(view) + b',"points":['
        is_first = True
        for number in numbers:
            try:
                file, _ = await asyncio.to_thread(store.open, benchmark.id, f"points/{number}/{REPORT_FILE}")
            except NotFound:
                continue
            if not is_first:
                yield b","
            is_first = False
            async with aclosing(_pieces(file)) as parts:
                async for piece in parts:
                    yield piece
        yield b"]}"

    await _write_all(call, response, pieces())
    return response


async def files(call: Call) -> web.StreamResponse:
    benchmark = find(await call.read(), call.path("id"))
    kept = await asyncio.to_thread(performer_of(call).store.files, benchmark.id)
    return call.answer([api.BenchmarkFile(name, size) for name, size in kept])


async def file(call: Call) -> web.StreamResponse:
    benchmark = find(await call.read(), call.path("id"))
    return await _file(call, benchmark.id, call.path("path"))


async def live(call: Call) -> web.StreamResponse:
    """Server-sent events: one per second of the running point, `event: end` once the benchmark has ended."""
    benchmark = find(await call.read(), call.path("id"))
    reader = performer_of(call).live.watch(benchmark.id)
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )
    try:
        await response.prepare(call.request)
        await _in_time(response.write(b": watching\n\n"))
        while not reader.is_over:
            tick = await reader.next(limits.KEEP_ALIVE_S)
            if not call.is_welcome:  # revoked or expired since
                return response
            if tick is not None:
                await _in_time(response.write(b"event: second\ndata: %s\n\n" % _encoder.encode(tick)))
            elif not reader.is_over:
                await _in_time(response.write(b": still here\n\n"))
        known = call.state.benchmarks.get(benchmark.id)
        status = known.state if known is not None else "deleted"
        if known is None or is_ended(known):  # else the head stops, and the reader comes back to the next one
            await _in_time(response.write(b"event: end\ndata: %s\n\n" % _encoder.encode({"status": status})))
    except (ConnectionError, TimeoutError):
        call.cut()  # the reader is gone or takes nothing
    finally:
        reader.close()
    return response


async def _file(call: Call, benchmark_id: str, name: str) -> web.StreamResponse:
    store = performer_of(call).store
    opened, size = await asyncio.to_thread(store.open, benchmark_id, name)
    plain = name.rpartition("/")[2]
    kind = _TYPES.get(Path(plain).suffix, "application/octet-stream")
    return await _send(call, opened, kind, f"{benchmark_id}-{plain}", size)


async def _send(call: Call, opened: BinaryIO, kind: str, name: str, size: int | None = None) -> web.StreamResponse:
    """Streams a file. It is offered as a download: what came from nodes is never shown as a page of ours."""
    headers = {"Content-Type": kind, "Content-Disposition": f'attachment; filename="{name}"'}
    headers["Content-Security-Policy"] = "sandbox"
    if size is not None:
        headers["Content-Length"] = str(size)
    response = web.StreamResponse(headers=headers)
    try:
        await response.prepare(call.request)
    except BaseException:
        opened.close()
        raise
    await _write_all(call, response, _pieces(opened, size))
    return response


async def _pieces(opened: BinaryIO, size: int | None = None) -> AsyncGenerator[bytes, None]:
    """The file's bytes; of one that grows meanwhile as many as were announced."""
    left = size
    try:
        while left is None or left > 0:
            piece = await asyncio.to_thread(opened.read, CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
            if not piece:
                return
            left = None if left is None else left - len(piece)
            yield piece
    finally:
        opened.close()


async def _write_all(call: Call, response: web.StreamResponse, pieces: AsyncGenerator[bytes, None]) -> None:
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                await _in_time(response.write(piece))
    except (ConnectionError, TimeoutError):
        call.cut()  # the reader is gone or takes nothing


async def _in_time(sending: Awaitable[None]) -> None:
    async with asyncio.timeout(limits.STREAM_WRITE_S):
        await sending


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


_BY_ID = f"{PREFIX}/benchmarks/{{id}}"
ROUTES = (
    Route(
        "GET",
        f"{_BY_ID}/report",
        report,
        "viewer",
        TAG,
        "Read a report",
        Media("application/json", "The report; its media type is that of the format.", is_binary=True),
        query=ReportQuery,
        codes=("benchmark_not_found", "not_found", "timed_out", "memory_full", "disk_full"),
        description="Without `point`: `{benchmark, points}` as JSON, a table of the points as CSV, or the whole page "
        "as HTML once the benchmark has ended. With it: that point's report, also in the files of `vllm bench serve` "
        "and genai-bench, made of the merged rows of all load nodes.",
    ),
    Route(
        "GET",
        f"{_BY_ID}/files",
        files,
        "viewer",
        TAG,
        "List the files kept with a benchmark",
        ListOf(api.BenchmarkFile),
        codes=("benchmark_not_found",),
    ),
    Route(
        "GET",
        f"{_BY_ID}/files/{{path:{REST}}}",
        file,
        "viewer",
        TAG,
        "Download a file kept with a benchmark",
        Media("application/octet-stream", "The file.", is_binary=True),
        codes=("benchmark_not_found", "not_found"),
    ),
    Route(
        "GET",
        f"{_BY_ID}/live",
        live,
        "viewer",
        TAG,
        "Watch a benchmark (server-sent events)",
        Media(
            "text/event-stream",
            "One `BenchmarkTick` per second as `event: second`; `event: end` with the state at the end.",
            is_stream=True,
        ),
        codes=("benchmark_not_found", "too_many"),
    ),
)
