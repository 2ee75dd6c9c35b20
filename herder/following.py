"""Following what changes: server-sent events with resume, jobs to their end, logs, streamed chat answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec

from herder.decoding import UNREADABLE
from herder.errors import HerderApiError, HerderConnectionError, HerderError, HerderTimeoutError
from herder.transport import PREFIX, RETRIED_STATUSES, Transport, segment
from herder.types import BenchmarkTick, BenchmarkView, Event, JobView, ServiceView

LINE_BYTES = 4_194_304
RECONNECT_BASE_S = 0.25
RECONNECT_CAP_S = 5.0
PROGRESS_PERIOD_S = 0.5  # between two looks at the bytes of a running job
READ_OUT_S = 1.0  # for the end of a chat answer after its last message
UNREACHABLE_S = 120.0  # how long a follower rides out a head that does not answer
T = TypeVar("T")
SETTLED = ("ready", "failed", "stopped")
ENDED = ("completed", "failed", "cancelled")


class ChatChunk(msgspec.Struct, frozen=True):
    """A piece of a streamed answer. `usage` comes with the last one, where the engine gives it."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    usage: dict[str, Any] | None = None
    error: Any = None


async def lines(pieces: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """Lines of a byte stream, whatever the pieces are cut like. Raises: HerderConnectionError for an endless line."""
    rest = b""
    async for piece in pieces:
        rest += piece
        *whole, rest = rest.split(b"\n")
        if len(rest) > LINE_BYTES:
            raise HerderConnectionError("cut_off", f"a line of the stream is longer than {LINE_BYTES} bytes")
        for line in whole:
            yield line.decode(errors="replace").rstrip("\r")
    if rest:
        yield rest.decode(errors="replace")


async def messages(pieces: AsyncIterator[bytes]) -> AsyncGenerator[tuple[str, str], None]:
    """(event, data) of each server-sent message. Source: WHATWG HTML, section 9.2.6, without `id` and `retry`."""
    name = ""
    data: list[str] = []
    async for line in lines(pieces):
        if not line:
            if data:
                yield name, "\n".join(data)
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            name = value


async def events(
    transport: Transport, *, after: int | None, kind: str, key: str, is_resuming: bool = True
) -> AsyncGenerator[Event, None]:
    """The change feed; a broken connection is taken up again after the last id seen.

    A gap that the head can no longer fill comes as an Event of kind "" with `what` = "reset".
    With an id of None nothing is resumed before the first event. Raises: HerderApiError when refused;
    HerderConnectionError when the head stays away for UNREACHABLE_S.
    """
    rng, failures, since = random.Random(), 0, 0.0
    loop = asyncio.get_running_loop()
    while True:
        query = {"after": after, "kind": kind, "key": key}
        try:
            async with transport.stream("GET", f"{PREFIX}/events", query=query) as pieces:
                async for name, data in messages(pieces):
                    failures = 0
                    event = _event(name, data, after)
                    after = event.id
                    yield event
        except HerderError as error:
            since = since if failures else loop.time()
            if not is_resuming or not is_passing(error) or loop.time() - since > UNREACHABLE_S:
                raise
        if not is_resuming:
            return
        failures += 1
        await asyncio.sleep(rng.uniform(0.05, min(RECONNECT_CAP_S, RECONNECT_BASE_S * 2 ** min(failures, 8))))


def is_passing(error: HerderError) -> bool:
    """Whether a head that restarts would look like this."""
    if isinstance(error, HerderApiError):
        return error.status in RETRIED_STATUSES
    return isinstance(error, HerderConnectionError | HerderTimeoutError) and error.code != "tls_failed"


def _event(name: str, data: str, after: int | None) -> Event:
    if name == "reset":
        return Event(id=after or 0, at_ms=0, what="reset", kind="", key="", cause="")
    try:
        return msgspec.json.decode(data, type=Event)
    except UNREADABLE as error:
        raise HerderApiError("unexpected_answer", f"an event cannot be read: {error}") from None


def watch_job(transport: Transport, job_id: str, *, timeout_s: float | None) -> AsyncGenerator[JobView, None]:
    """The job's view now and whenever it differs, until it has ended; the last one is the end. See `_watch`."""
    return _watch(
        transport,
        f"/jobs/{segment(job_id)}",
        JobView,
        news=("job", job_id),
        is_done=lambda job: job.status in ENDED,
        late=lambda job: HerderTimeoutError(
            "timed_out",
            f"{job_id} is still {job.status} after {timeout_s:g} s; it runs on",
            hint=f"`herder jobs wait {job_id}` looks again, `herder jobs cancel {job_id}` stops it",
        ),
        timeout_s=timeout_s,
    )


def watch_service(transport: Transport, name: str, *, timeout_s: float | None) -> AsyncGenerator[ServiceView, None]:
    """The service's view now and whenever it differs, until it is ready, failed or stopped. See `_watch`."""
    return _watch(
        transport,
        f"/services/{segment(name)}",
        ServiceView,
        news=("service,replica", ""),
        is_done=lambda service: service.state in SETTLED,
        late=lambda service: HerderTimeoutError(
            "timed_out",
            f"{name} is still {service.state} after {timeout_s:g} s" + (service.reason and f": {service.reason}"),
            hint=f"`herder why {name}` says what it waits for",
        ),
        timeout_s=timeout_s,
    )


def watch_benchmark(
    transport: Transport,
    benchmark_id: str,
    *,
    timeout_s: float | None,
    on_lost: Callable[[bool], None] | None = None,
) -> AsyncGenerator[BenchmarkView, None]:
    """The benchmark's view now and whenever it differs, until it has ended. See `_watch`."""
    return _watch(
        transport,
        f"/benchmarks/{segment(benchmark_id)}",
        BenchmarkView,
        news=("benchmark", benchmark_id),
        is_done=lambda benchmark: benchmark.status in ENDED,
        late=lambda benchmark: HerderTimeoutError(
            "timed_out",
            f"{benchmark_id} is still {benchmark.status} after {timeout_s:g} s; it runs on",
            hint=f"`herder benchmarks show {benchmark_id}` looks again",
        ),
        timeout_s=timeout_s,
        on_lost=on_lost,
    )


async def live_benchmark(transport: Transport, benchmark_id: str) -> AsyncGenerator[BenchmarkTick, None]:
    """Seconds of a benchmark until it has ended; a broken connection is taken up again, what was in between is lost.

    Raises: HerderApiError when refused; HerderConnectionError when the head stays away for UNREACHABLE_S.
    """
    rng, failures, since = random.Random(), 0, 0.0
    loop = asyncio.get_running_loop()
    path = f"{PREFIX}/benchmarks/{segment(benchmark_id)}/live"
    while True:
        try:
            async with transport.stream("GET", path) as pieces:
                async for name, data in messages(pieces):
                    failures = 0
                    if name == "end":
                        return
                    yield _tick(data)
        except HerderError as error:
            since = since if failures else loop.time()
            if not is_passing(error) or loop.time() - since > UNREACHABLE_S:
                raise
        failures += 1
        await asyncio.sleep(rng.uniform(0.05, min(RECONNECT_CAP_S, RECONNECT_BASE_S * 2 ** min(failures, 8))))


def _tick(data: str) -> BenchmarkTick:
    try:
        return msgspec.json.decode(data, type=BenchmarkTick)
    except UNREADABLE as error:
        raise HerderApiError("unexpected_answer", f"a second of a benchmark cannot be read: {error}") from None


async def _watch(
    transport: Transport,
    path: str,
    type_: type[T],
    *,
    news: tuple[str, str],
    is_done: Callable[[T], bool],
    late: Callable[[T], HerderError],
    timeout_s: float | None,
    on_lost: Callable[[bool], None] | None = None,
) -> AsyncGenerator[T, None]:
    """Views of one object until one is the last.

    The change feed (kinds and key in `news`) wakes us at once; in between we look every PROGRESS_PERIOD_S, because
    bytes are not events. A head that restarts is waited for; on_lost hears when it does not answer, and when it does
    again. Raises: what `late` makes, after timeout_s.
    """
    loop = asyncio.get_running_loop()
    end = None if timeout_s is None else loop.time() + timeout_s
    wake = asyncio.Event()
    listener = asyncio.create_task(_wake_on_events(transport, news, wake), name=f"events of {path}")
    last: T | None = None
    lost_since: float | None = None
    try:
        while True:
            wake.clear()
            try:
                view = await transport.request("GET", path, type_)
                if lost_since is not None and on_lost is not None:
                    on_lost(False)
                lost_since = None
            except HerderError as error:
                is_new, lost_since = lost_since is None, lost_since or loop.time()
                # A head that never answered is not a head that restarts.
                if not is_passing(error) or last is None or loop.time() - lost_since > UNREACHABLE_S:
                    raise
                if is_new and on_lost is not None:
                    on_lost(True)
                view = last
            if view != last:
                last = view
                yield view
            if is_done(view):
                return
            if end is not None and loop.time() >= end:
                raise late(view)
            pause = PROGRESS_PERIOD_S if end is None else max(0.0, min(PROGRESS_PERIOD_S, end - loop.time()))
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await wake.wait()
    finally:
        listener.cancel()
        with suppress(asyncio.CancelledError):
            await listener


async def _wake_on_events(transport: Transport, news: tuple[str, str], wake: asyncio.Event) -> None:
    kind, key = news
    try:
        async with aclosing(events(transport, after=None, kind=kind, key=key)) as feed:
            async for _ in feed:
                wake.set()
    except HerderError:
        return  # the periodic look goes on without it


async def log_text(
    transport: Transport, replica: str, *, follow: bool, tail: int, run: int
) -> AsyncGenerator[str, None]:
    """An engine's log as text, in the pieces in which it comes; a character is never cut in two."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    path = f"{PREFIX}/replicas/{segment(replica)}/logs"
    query = {"follow": follow, "tail": tail, "run": run}
    # A quiet engine may say nothing for hours: following has no idle limit, reading has.
    idle_s = None if follow else transport.timeout_s
    async with transport.stream("GET", path, query=query, idle_timeout_s=idle_s) as pieces:
        async for piece in pieces:
            if text := decoder.decode(piece):
                yield text
    if text := decoder.decode(b"", final=True):
        yield text


async def chat(transport: Transport, body: dict[str, Any], *, idle_timeout_s: float) -> AsyncGenerator[ChatChunk, None]:
    """A streamed chat answer through the gateway. Raises: HerderApiError, also for an error inside the stream."""
    asked = {**body, "stream": True}
    async with transport.stream("POST", "/v1/chat/completions", body=asked, idle_timeout_s=idle_timeout_s) as pieces:
        async for _, data in messages(pieces):
            if data.strip() == "[DONE]":
                await _read_out(pieces)
                return
            try:
                part = msgspec.json.decode(data, type=_Completion)
            except UNREADABLE as error:
                raise HerderApiError("unexpected_answer", f"the engine's stream cannot be read: {error}") from None
            if part.error is not None:
                raise _stream_error(part.error)
            choice = part.choices[0] if part.choices else _Choice()
            yield ChatChunk(
                text=choice.delta.content or "",
                reasoning=choice.delta.reasoning_content or "",
                finish_reason=choice.finish_reason,
                usage=part.usage,
            )
    raise HerderConnectionError("cut_off", "the answer broke off before its end", hint="ask again")


async def _read_out(pieces: AsyncIterator[bytes]) -> None:
    """Waits for the end of an answer that has said it is done: closing before it looks like a client that gave up."""
    with suppress(TimeoutError, HerderError):
        async with asyncio.timeout(READ_OUT_S):
            async for _ in pieces:
                pass


def _stream_error(error: Any) -> HerderApiError:
    found = error if isinstance(error, dict) else {"message": str(error)}
    return HerderApiError(
        str(found.get("code") or "engine_failed"),
        str(found.get("message") or "the engine failed in the middle of its answer")[:500],
        hint=str(found.get("hint") or ""),
    )
