"""What runs send to the head: over a real socket, onto a real disk, from agents that behave and others."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common import limits
from head.bench import store as store_module
from head.bench import uploads as uploads_module
from head.core.objects import ApiKey, Benchmark, Run
from tests.doubles.api_head import Answer, ApiHead, api_head, node, real_step, run, until

RUN = "bench-1.0.0"
DATA = bytes(range(256)) * 20_000  # 5 MB: several pieces


async def prepared(head: ApiHead, *, nodes: int = 1, **changes: Any) -> None:
    """A running benchmark with a load run on n1, which its agent confirmed."""
    made = Benchmark("bench-1", "b", {"name": "b", "server": {"urls": ["http://h:1"]}, "load": {}}, "", "me",
                     "finishing", 1, 1, "c")  # fmt: skip
    values: dict[str, Any] = {"desired": "fired", "state": "uploading"} | changes
    await head.put(*(node(f"n{number + 1}") for number in range(nodes)))
    await head.put(made)
    await head.put(Run(RUN, "bench-1", "n1", "load", 7, cause="c", created_ms=1, point=0, **values))


@contextlib.asynccontextmanager
async def running(tmp_path: Path, **changes: Any) -> AsyncIterator[ApiHead]:
    """A head with that run."""
    async with api_head(tmp_path, step=real_step) as head:
        await prepared(head, **changes)
        yield head


async def send(
    head: ApiHead, data: Any = DATA, *, name: str = "load.bin", run_id: str = RUN, role: str = "agent", **headers: str
) -> Answer:
    """One upload; headers are right unless given."""
    body = data if isinstance(data, bytes) else DATA
    sent = {"X-Content-SHA256": hashlib.sha256(body).hexdigest(), "Content-Type": "application/octet-stream"}
    path = f"/agent/runs/{run_id}/artifacts/{name}"
    raw = io.BytesIO(data) if isinstance(data, bytes) else data
    return await head.call("PUT", path, raw=raw, role=role, headers=sent | headers)


def folder(tmp_path: Path) -> Path:
    """Where the run's files are."""
    return tmp_path / "benchmarks" / "bench-1" / "runs" / RUN


def names(tmp_path: Path) -> list[str]:
    """What is there, parts of files included."""
    return sorted(path.name for path in folder(tmp_path).iterdir()) if folder(tmp_path).is_dir() else []


def everything(tmp_path: Path) -> set[str]:
    """Every path below the state directory but the audit log, which names who was refused."""
    return {str(path) for path in tmp_path.rglob("*")} - {str(tmp_path / "audit.log")}


def test_an_artifact_is_stored_noted_and_answered(tmp_path: Path) -> None:
    """Larger than a control-plane body: on the disk as it was sent, in the run's artifacts, and repeatable."""

    async def test() -> None:
        async with running(tmp_path) as head:
            assert len(DATA) > limits.BODY_BYTES
            for _ in range(2):
                answer = await send(head)
                assert (answer.status, answer.json["bytes"]) == (200, len(DATA))
            assert (folder(tmp_path) / "load.bin").read_bytes() == DATA
            assert head.state.runs[RUN].artifacts == ("load.bin",)
            assert names(tmp_path) == ["load.bin"]

    run(test)


def test_an_empty_artifact_is_one(tmp_path: Path) -> None:
    """A log without a line."""

    async def test() -> None:
        async with running(tmp_path) as head:
            assert (await send(head, b"", name="generator.log")).status == 200
            assert (folder(tmp_path) / "generator.log").read_bytes() == b""

    run(test)


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"X-Content-SHA256": "0" * 64}, 502, "digest_mismatch"),
        ({"X-Content-SHA256": "nonsense"}, 400, "invalid_request"),
        ({"X-Content-SHA256": ""}, 400, "invalid_request"),
    ],
)
def test_what_is_not_as_announced_is_not_kept(tmp_path: Path, headers: dict[str, str], status: int, code: str) -> None:
    """A wrong or missing digest: refused, and nothing is left."""

    async def test() -> None:
        async with running(tmp_path) as head:
            answer = await send(head, **headers)
            assert (answer.status, answer.code) == (status, code)
            assert names(tmp_path) == []
            assert head.state.runs[RUN].artifacts == ()

    run(test)


def test_a_size_is_to_be_announced_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked bodies are refused, and too large ones before they are read."""

    async def test() -> None:
        async with running(tmp_path) as head:

            async def chunks() -> AsyncIterator[bytes]:
                yield b"abc"

            assert (await send(head, chunks())).code == "invalid_request"
            monkeypatch.setattr(limits, "ARTIFACT_BYTES", 1_000)
            assert (await send(head, b"x" * 1_001)).code == "body_too_large"
            assert names(tmp_path) == []

    run(test)


def test_a_connection_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    """Half of a file is no file, and its part goes as well."""

    async def test() -> None:
        async with running(tmp_path) as head:
            reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
            request = (
                f"PUT /api/v1/agent/runs/{RUN}/artifacts/load.bin HTTP/1.1\r\nHost: h\r\n"
                f"Authorization: Bearer {head.tokens['agent']}\r\nContent-Length: {len(DATA)}\r\n"
                f"X-Content-SHA256: {hashlib.sha256(DATA).hexdigest()}\r\n\r\n"
            )
            writer.write(request.encode() + DATA[: len(DATA) // 2])
            await writer.drain()
            await until(lambda: bool(names(tmp_path)))
            writer.transport.abort()
            await until(lambda: not names(tmp_path))
            assert head.state.runs[RUN].artifacts == ()
            del reader

    run(test)


def test_a_sender_that_waits_to_be_asked(tmp_path: Path) -> None:
    """`Expect: 100-continue`: told to go on once the door is passed, refused without the body otherwise."""

    async def ask(head: ApiHead, run_id: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
        request = (
            f"PUT /api/v1/agent/runs/{run_id}/artifacts/load.bin HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n"
            f"Authorization: Bearer {head.tokens['agent']}\r\nContent-Length: 5\r\n"
            f"X-Content-SHA256: {hashlib.sha256(b'12345').hexdigest()}\r\nConnection: close\r\n\r\n"
        )
        writer.write(request.encode())
        first = await reader.readline()
        if b"100" in first:
            writer.write(b"12345")
            first += await reader.read()
        writer.close()
        return first

    async def test() -> None:
        async with running(tmp_path) as head:
            assert b" 200 " in await ask(head, RUN)
            assert b" 404 " in await ask(head, "bench-9.0.0")

    run(test)


def test_only_the_runs_node_may_send(tmp_path: Path) -> None:
    """People, keys of other nodes, and keys that the node's session did not come with."""

    async def test() -> None:
        async with running(tmp_path) as head:
            for role in ("admin", "operator", "viewer", "inference"):
                assert (await send(head, role=role)).status == 403
            key = head.state.keys["key-agent"]
            await head.put(ApiKey(key.id, key.name, "agent", key.secret_sha256, 1, node="n2"))
            assert (await send(head)).status == 403
            await head.put(ApiKey(key.id, key.name, "agent", key.secret_sha256, 1, node="n1"))
            assert (await send(head)).status == 200
            head.context.sessions.key_of = lambda node: "key-other"  # type: ignore[method-assign]
            assert (await send(head)).status == 403

    run(test)


def test_only_runs_that_are_wanted(tmp_path: Path) -> None:
    """An unknown run is not found; one that shall be forgotten is a conflict, and both leave nothing."""

    async def test() -> None:
        async with running(tmp_path, desired="absent") as head:
            assert (await send(head)).status == 409
            assert (await send(head, run_id="bench-1.0.9")).status == 404
            assert names(tmp_path) == []

    run(test)


@pytest.mark.parametrize("name", ["..", "%2e%2e%2fx", "..%2f..%2fetc", ".hidden", "UPPER", "a%00b", "x" * 65])
def test_names_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    """What is no name of an artifact is refused; nothing appears anywhere."""

    async def test() -> None:
        async with running(tmp_path) as head:
            before = everything(tmp_path)
            assert (await send(head, b"x", name=name)).status in (404, 422)
            assert everything(tmp_path) == before

    run(test)


def test_there_are_only_so_many_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused; one that is there already may be sent again."""
    monkeypatch.setattr(limits, "ARTIFACTS_PER_RUN", 2)

    async def test() -> None:
        async with running(tmp_path) as head:
            assert (await send(head, b"1", name="a.bin")).status == 200
            assert (await send(head, b"2", name="b.bin")).status == 200
            assert (await send(head, b"3", name="c.bin")).code == "invalid_value"
            assert (await send(head, b"4", name="b.bin")).status == 200

    run(test)


def test_uploads_of_one_name_do_not_mix(tmp_path: Path) -> None:
    """Twelve at once with different content: each is answered, and what stays is one of them, whole."""

    async def test() -> None:
        async with running(tmp_path) as head:
            contents = [bytes([number]) * 700_000 for number in range(12)]
            answers = await asyncio.gather(*(send(head, content) for content in contents))
            assert {answer.status for answer in answers} == {200}
            assert (folder(tmp_path) / "load.bin").read_bytes() in contents
            assert names(tmp_path) == ["load.bin"]

    run(test)


def test_the_crowd_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While all places are taken one waits; more than may wait are told to come again, and do not touch the disk."""
    monkeypatch.setattr(uploads_module, "WAITING", 1)
    monkeypatch.setattr(uploads_module, "WRITTEN_AT_ONCE", 1)

    async def test() -> None:
        async with running(tmp_path) as head:
            gate = asyncio.Event()

            async def slow() -> AsyncIterator[bytes]:
                yield DATA[:1_000]
                await gate.wait()
                yield DATA[1_000:]

            first = asyncio.create_task(send(head, slow(), **{"Content-Length": str(len(DATA))}))
            await until(lambda: bool(names(tmp_path)))
            second = asyncio.create_task(send(head, b"2", name="b.bin"))
            performer = head.context.benchmarks
            assert performer is not None
            await until(lambda: performer.uploads.waiting == 1)
            third = await send(head, b"3", name="c.bin")
            assert (third.status, third.code) == (429, "too_many")
            gate.set()
            assert [(await task).status for task in (first, second)] == [200, 200]
            assert names(tmp_path) == ["b.bin", "load.bin"]

    run(test)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`disk_full` before the first byte, and when it fills on the way; nothing is left of it."""

    def no_room(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    async def test() -> None:
        async with running(tmp_path) as head:
            with monkeypatch.context() as patched:
                patched.setattr(store_module, "allocate", no_room)
                answer = await send(head)
                assert (answer.status, answer.code) == (507, "disk_full")
            with monkeypatch.context() as patched:
                patched.setattr(store_module.Incoming, "write", no_room)
                assert (await send(head)).code == "disk_full"
            assert names(tmp_path) == []
            assert (await send(head)).status == 200

    run(test)
