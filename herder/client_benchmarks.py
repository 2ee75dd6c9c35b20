"""The benchmark methods of `AsyncClient`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from herder import following, types
from herder.files import write_whole
from herder.listing import Listing
from herder.transport import PREFIX, Transport, segment

REPORT_IDLE_S = 660.0  # a report with every request of a long run is made when it is asked for
ReportFormat = Literal["json", "csv", "vllm", "genai-bench", "html"]


class BenchmarkCalls:
    """What a head does about benchmarks, and what their results are."""

    _http: Transport

    def benchmarks(self, *, state: types.BenchmarkState | None = None, name: str = "") -> Listing[types.BenchmarkView]:
        """Benchmarks, newest first, without their points and runs."""
        return Listing(self._http, "/benchmarks", types.BenchmarkView, {"state": state, "name": name})

    async def benchmark(self, benchmark_id: str) -> types.BenchmarkView:
        """One benchmark with its points and runs. Raises: HerderApiError `benchmark_not_found`."""
        return await self._http.request("GET", f"/benchmarks/{segment(benchmark_id)}", types.BenchmarkView)

    async def create_benchmark(
        self,
        recipe: str = "",
        document: Mapping[str, Any] | None = None,
        *,
        name: str = "",
        wait_s: float = 0.0,
        idempotency_key: str | None = None,
    ) -> types.BenchmarkView:
        """Starts a benchmark: a recipe of the head, a whole recipe as `document`, or the first changed by the second.

        wait_s: until it has ended. Raises: HerderApiError `recipe_not_found`, `invalid_recipe`, `too_many`.
        """
        body = types.CreateBenchmark(recipe=recipe, document=dict(document or {}), name=name)
        return await self._http.request(
            "POST", "/benchmarks", types.BenchmarkView, body=body, wait_s=wait_s, idempotency_key=idempotency_key
        )

    async def cancel_benchmark(self, benchmark_id: str, *, wait_s: float = 0.0) -> types.BenchmarkView:
        """Stops a benchmark; what was measured is kept. wait_s: until everything of it has ended."""
        path = f"/benchmarks/{segment(benchmark_id)}/cancel"
        return await self._http.request("POST", path, types.BenchmarkView, wait_s=wait_s)

    async def delete_benchmark(self, benchmark_id: str) -> types.Deleted:
        """Removes an ended benchmark and its result. Raises: HerderApiError `in_use` while it goes on."""
        return await self._http.request("DELETE", f"/benchmarks/{segment(benchmark_id)}", types.Deleted)

    async def watch_benchmark(
        self, benchmark_id: str, *, timeout_s: float | None = None, on_lost: Callable[[bool], None] | None = None
    ) -> AsyncGenerator[types.BenchmarkView, None]:
        """The benchmark now and whenever it differs, until it has ended.

        A head that restarts meanwhile is waited for; on_lost is called when it no longer answers, and when it does
        again. Raises: HerderTimeoutError after timeout_s; it runs on.
        """
        watched = following.watch_benchmark(self._http, benchmark_id, timeout_s=timeout_s, on_lost=on_lost)
        async with aclosing(watched) as views:
            async for view in views:
                yield view

    async def live_benchmark(self, benchmark_id: str) -> AsyncGenerator[types.BenchmarkTick, None]:
        """What a running benchmark does, second by second, all load nodes together, until it has ended.

        A head that restarts meanwhile is waited for; seconds may be missing.
        """
        async with aclosing(following.live_benchmark(self._http, benchmark_id)) as ticks:
            async for tick in ticks:
                yield tick

    async def benchmark_report(
        self, benchmark_id: str, *, point: int | None = None, format: ReportFormat = "json"
    ) -> bytes:
        """The report of one point, or of the whole benchmark (json, csv, html) without `point`.

        Raises: HerderApiError `not_found` while it is not written yet.
        """
        query = {"point": point, "format": format}
        path = f"{PREFIX}/benchmarks/{segment(benchmark_id)}/report"
        async with self._http.stream("GET", path, query=query, idle_timeout_s=REPORT_IDLE_S) as pieces:
            return b"".join([piece async for piece in pieces])

    async def benchmark_files(self, benchmark_id: str) -> list[types.BenchmarkFile]:
        """The files that are kept with a benchmark: reports, what its runs sent, logs."""
        path = f"/benchmarks/{segment(benchmark_id)}/files"
        return await self._http.request("GET", path, list[types.BenchmarkFile])

    async def download_benchmark_file(
        self,
        benchmark_id: str,
        name: str,
        path: str | os.PathLike[str],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Writes one file of a benchmark's result to `path`, which appears once it is whole; returns its bytes."""
        address = f"{PREFIX}/benchmarks/{segment(benchmark_id)}/files/{quote(name, safe='/')}"
        target = Path(path)
        await asyncio.to_thread(target.parent.mkdir, parents=True, exist_ok=True)
        return await write_whole(
            target, lambda expect: self._http.stream("GET", address, expect=expect), progress=progress, mode=0o644
        )

    def benchmark_recipes(self) -> Listing[types.BenchmarkRecipeView]:
        """The benchmark recipes that the head knows, by name."""
        return Listing(self._http, "/benchmark-recipes", types.BenchmarkRecipeView, {})

    async def benchmark_recipe(self, name: str) -> types.BenchmarkRecipeView:
        """One benchmark recipe. Raises: HerderApiError `recipe_not_found`."""
        return await self._http.request("GET", f"/benchmark-recipes/{segment(name)}", types.BenchmarkRecipeView)
