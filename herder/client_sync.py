"""`Client`: the same methods for programs without a loop of their own.

One private thread runs an event loop with an AsyncClient; each method hands its call over and waits. Signatures and
documentation are those of AsyncClient, derived, so that the two cannot differ. A Client may be used from several
threads. Ctrl-C while waiting ends the call at the client only; what the head has begun goes on.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from herder import types
from herder.client import AsyncClient, succeeded
from herder.listing import Listing, ListingSync

P = ParamSpec("P")
R = TypeVar("R")
CLOSE_TIMEOUT_S = 5.0
CLOSE_TRIES = 200


def _like(
    constructor: Callable[Concatenate[AsyncClient, P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Client, P], None]]:
    """A constructor with the same arguments, for type checkers and `help` as well."""

    def made(same: Callable[..., None]) -> Callable[Concatenate[Client, P], None]:
        same.__signature__ = inspect.signature(constructor)  # type: ignore[attr-defined]
        return same

    return made


def _call(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Client, P], R]:
    @wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run(method(self._async, *args, **kwargs))

    return call


def _list(
    method: Callable[Concatenate[AsyncClient, P], Listing[R]],
) -> Callable[Concatenate[Client, P], ListingSync[R]]:
    @wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> ListingSync[R]:
        return ListingSync(method(self._async, *args, **kwargs), self._run)

    return call


def _iterate(
    method: Callable[Concatenate[AsyncClient, P], AsyncGenerator[R, None]],
) -> Callable[Concatenate[Client, P], Iterator[R]]:
    @wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        source = method(self._async, *args, **kwargs)
        try:
            while True:
                try:
                    item = self._run(_next(source))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if not self._loop.is_closed():
                self._run(_close(source))

    return call


async def _next(source: AsyncGenerator[R, None]) -> R:
    return await source.__anext__()


async def _close(source: AsyncGenerator[Any, None]) -> None:
    # After Ctrl-C the item that was being waited for is still being cancelled; the generator is closed once it is.
    for _ in range(CLOSE_TRIES):
        try:
            await source.aclose()
            return
        except RuntimeError:
            await asyncio.sleep(0.01)


class Client:
    """A head's API. Use it in `with`, or call `close` at the end."""

    @_like(AsyncClient.__init__)
    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        """See AsyncClient. Raises: HerderConfigError."""
        self._async = AsyncClient(*args, **kwargs)
        self.settings = self._async.settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="herder-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections and ends the thread. May be called again."""
        if self._loop.is_closed():
            return
        try:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(CLOSE_TIMEOUT_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_TIMEOUT_S)
            if not self._thread.is_alive():
                self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._async.aclose()
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()

    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("this Client is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: nobody waits any more
            raise

    health = _call(AsyncClient.health)
    openapi = _call(AsyncClient.openapi)
    prometheus_targets = _call(AsyncClient.prometheus_targets)
    backup = _call(AsyncClient.backup)

    models = _list(AsyncClient.models)
    model = _call(AsyncClient.model)
    register_model = _call(AsyncClient.register_model)
    update_model = _call(AsyncClient.update_model)
    delete_model = _call(AsyncClient.delete_model)
    model_locations = _list(AsyncClient.model_locations)
    model_manifest = _call(AsyncClient.model_manifest)

    download = _call(AsyncClient.download)
    move = _call(AsyncClient.move)
    copy = _call(AsyncClient.copy)
    serve = _call(AsyncClient.serve)
    stop = _call(AsyncClient.stop)
    delete_copy = _call(AsyncClient.delete_copy)
    health_check = _call(AsyncClient.health_check)
    pin = _call(AsyncClient.pin)
    unpin = _call(AsyncClient.unpin)
    copies = _list(AsyncClient.copies)

    nodes = _list(AsyncClient.nodes)
    node = _call(AsyncClient.node)
    label_node = _call(AsyncClient.label_node)
    remove_node = _call(AsyncClient.remove_node)
    reset_node_identity = _call(AsyncClient.reset_node_identity)
    cordon = _call(AsyncClient.cordon)
    uncordon = _call(AsyncClient.uncordon)
    drain = _call(AsyncClient.drain)
    devices = _list(AsyncClient.devices)

    services = _list(AsyncClient.services)
    service = _call(AsyncClient.service)
    create_service = _call(AsyncClient.create_service)
    delete_service = _call(AsyncClient.delete_service)
    wait_service = _call(AsyncClient.wait_service)
    replicas = _list(AsyncClient.replicas)
    logs = _iterate(AsyncClient.logs)
    log_batches = _iterate(AsyncClient.log_batches)
    log_entries = _iterate(AsyncClient.log_entries)

    jobs = _list(AsyncClient.jobs)
    job = _call(AsyncClient.job)
    create_job = _call(AsyncClient.create_job)
    create_job_from_text = _call(AsyncClient.create_job_from_text)
    cancel_job = _call(AsyncClient.cancel_job)
    watch_job = _iterate(AsyncClient.watch_job)

    def wait_job(
        self,
        job: str | types.JobView,
        *,
        timeout_s: float | None = None,
        progress: Callable[[types.JobView], None] | None = None,
    ) -> types.JobView:
        """Waits for a job's success. progress: called, in the caller's thread, with each view that differs.

        Raises: HerderJobError when it failed or was cancelled; HerderTimeoutError.
        """
        last = job if isinstance(job, types.JobView) else None
        for last in self.watch_job(job if isinstance(job, str) else job.id, timeout_s=timeout_s):
            if progress:
                progress(last)
        assert last is not None
        return succeeded(last)

    benchmarks = _list(AsyncClient.benchmarks)
    benchmark = _call(AsyncClient.benchmark)
    create_benchmark = _call(AsyncClient.create_benchmark)
    cancel_benchmark = _call(AsyncClient.cancel_benchmark)
    delete_benchmark = _call(AsyncClient.delete_benchmark)
    watch_benchmark = _iterate(AsyncClient.watch_benchmark)
    live_benchmark = _iterate(AsyncClient.live_benchmark)
    benchmark_report = _call(AsyncClient.benchmark_report)
    benchmark_files = _call(AsyncClient.benchmark_files)
    download_benchmark_file = _call(AsyncClient.download_benchmark_file)
    benchmark_recipes = _list(AsyncClient.benchmark_recipes)
    benchmark_recipe = _call(AsyncClient.benchmark_recipe)

    events = _iterate(AsyncClient.events)
    story = _list(AsyncClient.story)
    why = _call(AsyncClient.why)
    plan = _call(AsyncClient.plan)

    keys = _list(AsyncClient.keys)
    create_key = _call(AsyncClient.create_key)
    revoke_key = _call(AsyncClient.revoke_key)
    recipes = _list(AsyncClient.recipes)

    gateway_models = _call(AsyncClient.gateway_models)
    chat = _iterate(AsyncClient.chat)
