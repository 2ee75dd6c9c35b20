"""The client against a small head on a real socket: typing, retries, errors, streams."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from herder import (
    AsyncClient,
    Client,
    HerderApiError,
    HerderConnectionError,
    HerderJobError,
    HerderTimeoutError,
    following,
    types,
)
from herder.errors import HerderError
from herder.settings import Settings
from tests.doubles.api_double import JOB, NOW_MS, TOKEN, ApiDouble, job, model, step
from tests.doubles.on_a_thread import serving


@asynccontextmanager
async def connected(token: str = TOKEN, timeout_s: float = 10.0) -> AsyncIterator[tuple[ApiDouble, AsyncClient]]:
    """A double and a client of it."""
    double = await ApiDouble().start()
    try:
        async with AsyncClient(settings=Settings(url=double.url, token=token), timeout_s=timeout_s) as client:
            yield double, client
    finally:
        await double.stop()


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class TestRequests:
    """One exchange."""

    async def test_a_model_is_registered_and_shown(self) -> None:
        """What is registered comes back as its type, also under a name with a slash."""
        async with connected() as (double, client):
            made = await client.register_model("org/name", source="hf://org/name")
            shown = await client.model("org/name")
        assert made == shown
        assert isinstance(shown, types.ModelView)
        assert double.requests[-1][1] == "/api/v1/models/org%2Fname"

    async def test_a_list_is_read_to_its_end(self) -> None:
        """Iteration follows the cursor over all pages; `page` shows one with the total."""
        async with connected() as (double, client):
            double.models = {f"m{number:04}": model(f"m{number:04}") for number in range(1_203)}
            names = [found.name async for found in client.models()]
            page = await client.models().page(limit=10)
        assert names == sorted(double.models)
        assert (len(page.items), page.total, page.next) == (10, 1_203, "10")
        assert double.count("GET", "/api/v1/models") == 4

    async def test_a_list_ends_where_asked(self) -> None:
        """`all(at_most=...)` asks for no more than that."""
        async with connected() as (double, client):
            double.models = {f"m{number}": model(f"m{number}") for number in range(50)}
            assert len(await client.models().all(at_most=7)) == 7
        assert "limit=7" in double.requests[-1][1]

    async def test_dots_do_not_climb_out_of_the_path(self) -> None:
        """A name of dots reaches the head as a name."""
        async with connected() as (double, client):
            with pytest.raises(HerderApiError):
                await client.model("..")
        assert double.requests[-1][1] == "/api/v1/models/%2E%2E"


class TestErrors:
    """What goes wrong, and how it looks."""

    async def test_the_heads_error_arrives_whole(self) -> None:
        """Code, status, message and hint are the head's own."""
        async with connected() as (_, client):
            with pytest.raises(HerderApiError) as caught:
                await client.model("b")
        error = caught.value
        assert (error.code, error.status, error.hint) == ("model_not_found", 404, "did you mean 'a'?")

    async def test_a_wrong_token_is_refused_once(self) -> None:
        """401 is not repeated."""
        async with connected(token="wrong") as (double, client):
            with pytest.raises(HerderApiError) as caught:
                await client.health()
        assert (caught.value.code, caught.value.status, len(double.requests)) == ("unauthenticated", 401, 1)

    async def test_nobody_listens(self) -> None:
        """A refused connection says what to start."""
        async with AsyncClient(settings=Settings(url=f"http://127.0.0.1:{free_port()}"), attempts=2) as client:
            with pytest.raises(HerderConnectionError) as caught:
                await client.health()
        assert caught.value.code == "unreachable"
        assert "connection refused" in caught.value.message
        assert "herder up" in caught.value.hint

    async def test_silence_is_a_timeout(self) -> None:
        """A head that does not answer in time is a timeout, whose outcome is unknown: no repeat."""
        async with connected(timeout_s=0.3) as (double, client):
            double.fail_next("/api/v1/health", "hang")
            with pytest.raises(HerderTimeoutError) as caught:
                await client.health()
        assert caught.value.code == "timed_out"
        assert double.count("GET", "/api/v1/health") == 1

    async def test_something_else_answers(self) -> None:
        """An answer that is not the API's is an error with a hint, not a decoding traceback."""
        async with connected() as (_, client):
            with pytest.raises(HerderApiError) as caught:
                await client._http.request("GET", "/garbage", types.Health)
        assert caught.value.code == "unexpected_answer"


class TestRepeats:
    """Capped retries."""

    async def test_a_read_survives_a_short_outage(self) -> None:
        """Reads are repeated after 503 and after a cut connection."""
        async with connected() as (double, client):
            double.fail_next("/api/v1/health", 503, "cut")
            assert (await client.health()).status == "healthy"
        assert double.count("GET", "/api/v1/health") == 3

    async def test_repeats_have_an_end(self) -> None:
        """After the last attempt the error is the caller's."""
        async with connected() as (double, client):
            double.fail_next("/api/v1/health", *[503] * 20)
            with pytest.raises(HerderApiError) as caught:
                await client.health()
        assert caught.value.status == 503
        assert double.count("GET", "/api/v1/health") == 4

    async def test_a_lost_answer_changes_once(self) -> None:
        """A change whose answer was lost is repeated under the same key, and happens once."""
        async with connected() as (double, client):
            double.fail_next("/api/v1/models", "lost")
            made = await client.register_model("a")
        assert made.name == "a"
        keys = [headers["Idempotency-Key"] for method, _, headers in double.requests if method == "POST"]
        assert len(keys) == 2
        assert len(set(keys)) == 1

    async def test_each_change_has_its_own_key(self) -> None:
        """Two calls are two changes; a key that the caller gives is used."""
        async with connected() as (double, client):
            await client.download("a", "n1:disk")
            await client.download("a", "n1:disk")
            await client.download("a", "n1:disk", idempotency_key="mine")
        keys = [headers["Idempotency-Key"] for _, _, headers in double.requests]
        assert len(set(keys)) == 3
        assert keys[-1] == "mine"

    async def test_a_decision_is_not_repeated(self) -> None:
        """500 and 409 come back at once."""
        async with connected() as (double, client):
            double.fail_next("/api/v1/models", 500)
            with pytest.raises(HerderApiError):
                await client.register_model("a")
        assert len(double.requests) == 1


class TestJobs:
    """Waiting for jobs."""

    async def test_progress_is_told_until_the_end(self) -> None:
        """Each view that differs is shown once, the last is returned."""
        views = [
            job("running", step(bytes_done=0, bytes_total=100)),
            job("running", step(bytes_done=50, bytes_total=100)),
            job("completed", step("completed", bytes_done=100, bytes_total=100)),
        ]
        seen: list[int] = []
        async with connected() as (double, client):
            double.scripts[JOB] = deque(views)
            last = await client.wait_job(JOB, progress=lambda view: seen.append(view.steps[0].bytes_done))
        assert last == views[-1]
        assert seen == [0, 50, 100]

    async def test_an_event_ends_the_wait_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The change feed wakes the waiter long before the next periodic look."""
        monkeypatch.setattr("herder.following.PROGRESS_PERIOD_S", 600.0)
        async with connected() as (double, client):
            double.scripts[JOB] = deque([job("running")])
            waiting = asyncio.create_task(client.wait_job(JOB))
            await double.until(lambda: double.count("GET", "/api/v1/events") == 1)
            double.scripts[JOB] = deque([job("completed")])
            while not waiting.done():
                double.publish(types.Event(len(double.events) + 1, NOW_MS, "job_completed", "job", JOB, ""))
                await asyncio.sleep(0.02)
            assert (await waiting).status == "completed"

    async def test_a_failed_job_is_an_error_with_its_cause(self) -> None:
        """The first failed step's code and hint are the error's."""
        broken = step("failed", error=types.ErrorDetail("digest_mismatch", "the bytes are wrong", "look at the source"))
        async with connected() as (double, client):
            double.scripts[JOB] = deque([job("failed", broken)])
            with pytest.raises(HerderJobError) as caught:
                await client.wait_job(JOB)
        assert (caught.value.code, caught.value.hint) == ("digest_mismatch", "look at the source")
        assert caught.value.job.id == JOB

    async def test_waiting_has_a_limit(self) -> None:
        """At the limit the error says that the job runs on, and how to cancel it."""
        async with connected() as (double, client):
            double.scripts[JOB] = deque([job("running")])
            with pytest.raises(HerderTimeoutError) as caught:
                await client.wait_job(JOB, timeout_s=0.1)
        assert f"jobs cancel {JOB}" in caught.value.hint

    async def test_a_head_that_restarts_is_waited_for(self) -> None:
        """An outage longer than one request's repeats does not end the wait."""
        async with connected() as (double, client):
            double.scripts[JOB] = deque([job("running"), job("completed")])
            async for view in client.watch_job(JOB):
                if view.status == "running":
                    double.fail_next(f"/api/v1/jobs/{JOB}", *[503] * 5)
            assert view.status == "completed"
        assert double.count("GET", f"/api/v1/jobs/{JOB}") == 7


class TestStreams:
    """Events, logs, chat, backup."""

    async def test_events_go_on_after_a_cut(self) -> None:
        """A broken stream resumes after the last id: nothing twice, nothing missing."""
        events = [types.Event(number, NOW_MS, "copy_ready", "copy", f"c{number}", "") for number in (1, 2, 4, 5)]
        async with connected() as (double, client):
            double.events = [*events[:2], types.Event(3, NOW_MS, "cut_here", "copy", "", ""), *events[2:]]
            seen = []
            async for event in client.events(after=0):
                seen.append(event.id)
                if event.id == 5:
                    break
        assert seen == [1, 2, 4, 5]
        assert any("after=2" in path for _, path, _ in double.requests)

    async def test_a_log_is_never_cut_inside_a_character(self) -> None:
        """Pieces that split a character come out whole."""
        text = "größe 🙂\n".encode()
        async with connected() as (double, client):
            double.log_pieces = [text[:3], text[3:9], text[9:]]
            found = [piece async for piece in client.logs("r-0")]
        assert "".join(found) == text.decode()
        assert "�" not in "".join(found)

    async def test_a_chat_streams(self) -> None:
        """Text comes in pieces, the last with the reason and the usage."""
        async with connected() as (double, client):
            double.chat_lines = [
                '{"choices":[{"delta":{"role":"assistant","content":null}}]}',
                '{"choices":[{"delta":{"content":"Hel"}}]}',
                '{"choices":[{"delta":{"content":"lo"},"finish_reason":"stop"}]}',
                '{"choices":[],"usage":{"completion_tokens":2}}',
                "[DONE]",
            ]
            chunks = [chunk async for chunk in client.chat("a", "hi", max_tokens=5)]
        assert "".join(chunk.text for chunk in chunks) == "Hello"
        assert chunks[-1].usage == {"completion_tokens": 2}
        assert b'"max_tokens":5' in double.bodies[-1]
        assert b'"stream":true' in double.bodies[-1]

    async def test_a_chat_is_read_to_its_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The connection is left when the answer has ended, so that the head does not count a client that gave up."""
        monkeypatch.setattr(following, "READ_OUT_S", 30.0)
        async with connected() as (double, client):
            double.chat_lines = ['{"choices":[{"delta":{"content":"Hi"}}]}', "[DONE]"]
            double.chat_hold = asyncio.Event()
            answer = client.chat("a", "hi")
            assert (await anext(answer)).text == "Hi"
            rest = asyncio.create_task(anext(answer, None))
            await asyncio.wait({rest}, timeout=0.2)
            double.chat_hold.set()
            assert await rest is None
        assert not double.was_chat_left

    async def test_a_chat_whose_end_does_not_come(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What has said that it is done is not waited for any longer than a moment."""
        monkeypatch.setattr(following, "READ_OUT_S", 0.01)
        async with connected() as (double, client):
            double.chat_lines = ['{"choices":[{"delta":{"content":"Hi"}}]}', "[DONE]"]
            double.chat_hold = asyncio.Event()
            assert [chunk.text async for chunk in client.chat("a", "hi")] == ["Hi"]
            double.chat_hold.set()

    async def test_a_chat_that_breaks_off_says_so(self) -> None:
        """A stream without its end is an error, not a short answer."""
        async with connected() as (double, client):
            double.chat_lines = ['{"choices":[{"delta":{"content":"Hel"}}]}']
            with pytest.raises(HerderConnectionError) as caught:
                [chunk async for chunk in client.chat("a", "hi")]
        assert caught.value.code == "cut_off"

    async def test_a_head_that_hangs_up_may_speak_tls(self) -> None:
        """Asked at http://, it closes without a word: the hint says what to try."""
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, AsyncClient(settings=Settings(url=url, token=TOKEN), timeout_s=5) as client:
            with pytest.raises(HerderConnectionError) as caught:
                await client.nodes().all()
        assert (caught.value.code, "https://" in caught.value.hint) == ("cut_off", True)

    async def test_a_missing_certificate_is_named(self, tmp_path: Path) -> None:
        """Which of the files cannot be read stands in the error."""
        settings = Settings(url="https://127.0.0.1:1", token=TOKEN, ca_file=str(tmp_path / "ca.pem"))
        with pytest.raises(HerderError, match=r"ca\.pem"):
            async with AsyncClient(settings=settings) as client:
                await client.nodes().all()

    async def test_an_error_inside_a_chat_is_raised(self) -> None:
        """An engine that fails halfway is an error with its code."""
        async with connected() as (double, client):
            double.chat_lines = ['{"error":{"message":"out of memory","code":"engine_failed"}}']
            with pytest.raises(HerderApiError) as caught:
                [chunk async for chunk in client.chat("a", "hi")]
        assert (caught.value.code, caught.value.message) == ("engine_failed", "out of memory")

    async def test_a_backup_appears_whole_and_private(self, tmp_path: Path) -> None:
        """The file has all bytes, mode 0600, and no part of it is left beside it."""
        async with connected() as (_, client):
            count = await client.backup(tmp_path / "b.sqlite")
        assert count == (tmp_path / "b.sqlite").stat().st_size == 100_016
        assert (tmp_path / "b.sqlite").stat().st_mode & 0o777 == 0o600
        assert os.listdir(tmp_path) == ["b.sqlite"]

    async def test_a_backup_that_does_not_fit_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before its first byte is written, with both numbers; nothing is left behind."""
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3))
        async with connected() as (_, client):
            with pytest.raises(HerderError, match="3 free") as caught:
                await client.backup(tmp_path / "b.sqlite")
        assert caught.value.code == "disk_full"
        assert os.listdir(tmp_path) == []

    async def test_a_failed_backup_leaves_the_old_one(self, tmp_path: Path) -> None:
        """A backup that fails leaves what was there, and no part."""
        (tmp_path / "b.sqlite").write_text("old")
        async with connected() as (double, client):
            double.fail_next("/api/v1/backup", "cut", "cut")  # aiohttp itself repeats a GET once
            with pytest.raises(HerderConnectionError):
                await client.backup(tmp_path / "b.sqlite")
        assert (tmp_path / "b.sqlite").read_text() == "old"
        assert os.listdir(tmp_path) == ["b.sqlite"]


class TestSync:
    """The same without a loop."""

    def test_calls_lists_and_streams(self) -> None:
        """Calls, iteration over a list, a stream and a wait work from a plain thread."""
        double = ApiDouble()
        double.scripts[JOB] = deque([job("running"), job("completed")])
        double.models = {f"m{number}": model(f"m{number}") for number in range(3)}
        seen: list[str] = []
        threads: set[str] = set()

        def progress(view: types.JobView) -> None:
            seen.append(view.status)
            threads.add(threading.current_thread().name)

        with serving(double) as url, Client(settings=Settings(url=url, token=TOKEN)) as client:
            assert client.health().status == "healthy"
            assert [found.name for found in client.models()] == ["m0", "m1", "m2"]
            assert "".join(client.logs("r-0")) == "one\ntwo\n"
            assert client.wait_job(client.download("m0", "n1:disk"), progress=progress).status == "completed"
        assert seen[-1] == "completed"
        assert threads == {threading.current_thread().name}

    def test_a_stream_may_be_left(self) -> None:
        """Breaking out of an endless stream closes it, and the client goes on working."""
        double = ApiDouble()
        with serving(double) as url, Client(settings=Settings(url=url, token=TOKEN)) as client:
            double.events = [types.Event(1, NOW_MS, "copy_ready", "copy", "c", "")]
            for event in client.events(after=0):
                assert event.id == 1
                break
            assert client.health().status == "healthy"

    def test_closing_ends_the_thread(self) -> None:
        """After close no thread is left; a second close is harmless; a call says that it is closed."""
        client = Client(settings=Settings(url="http://127.0.0.1:1", token=""))
        client.close()
        client.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "herder-client"]
        with pytest.raises(RuntimeError, match="closed"):
            client.health()
