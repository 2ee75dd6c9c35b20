"""The planner behind the API: its own process, the cluster's inventory, errors with their codes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from common.errors import Internal, TimedOut, TooMany
from common.manifest import Manifest, ManifestFile
from common.wire import Gpu, Nic
from head import planner_process
from head.core.objects import Model, ModelManifest
from head.planner.endpoints.questions import Desk
from head.planner.endpoints.table import ENDPOINTS
from head.planner_process import PlannerProcess
from tests.doubles.api_head import api_head, node, run, until

GIB = 1 << 30


def gpus(count: int, name: str = "NVIDIA H100 80GB HBM3") -> tuple[Gpu, ...]:
    """GPUs of one machine, all linked by NVLink."""
    every = range(count)
    return tuple(
        Gpu(index, f"GPU-{index}", name, 80 * GIB, nvlink_peers=tuple(i for i in every if i != index))
        for index in every
    )


def test_the_inventory_is_the_topology(tmp_path: Path) -> None:
    """Without a named accelerator the agents' GPUs are taken, and the answer says so."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            assumed = (await head.call("GET", "/plan/topology")).json["topology"]
            assert assumed["source"] == "preset"
            assert "assumed" in assumed["notes"][-1]
            for name in ("n1", "n2"):
                plain = node(name)
                inventory = msgspec.structs.replace(
                    plain.inventory, gpus=gpus(4), nics=(Nic("ib0", (), 400_000),), memory_bytes=512 * GIB
                )
                await head.put(msgspec.structs.replace(plain, inventory=inventory))
            found = (await head.call("GET", "/plan/topology")).json["topology"]
            assert (found["source"], found["num_gpus"], found["num_nodes"]) == ("registered", 8, 2)
            assert found["node_ids"] == ["n1", "n2"]
            assert found["nic_gb_per_s_per_gpu"] == pytest.approx(12.5)
            named = (await head.call("GET", "/plan/topology?gpu=b200&gpus=16")).json["topology"]
            assert (named["source"], named["num_gpus"]) == ("preset", 16)

    run(body)


EXAMPLES: dict[str, Mapping[str, Any]] = {endpoint.path: dict(endpoint.example) for endpoint in ENDPOINTS}


def test_every_endpoint_answers(tmp_path: Path) -> None:
    """Each route answers its documented example with JSON of its own type; misspelt fields are refused."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            for endpoint in ENDPOINTS:
                path = f"/plan/{endpoint.path}" if endpoint.path else "/plan"
                sent = EXAMPLES[endpoint.path]
                if endpoint.method == "GET":
                    answer = await head.call("GET", path)
                else:
                    answer = await head.call("POST", path, dict(sent))
                assert answer.status == 200, (path, answer.body[:500])
                msgspec.json.decode(answer.body, type=endpoint.answer_type)
                if endpoint.method == "POST":
                    wrong = await head.call("POST", path, {**sent, "nonsense": 1})
                    assert (wrong.status, wrong.code) == (422, "invalid_value"), path

    run(body, timeout_s=110)


def test_errors_keep_their_codes(tmp_path: Path) -> None:
    """Unknown names are 404 with near ones, bad values 422, from the planner's process as from the head itself."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            unknown = await head.call("POST", "/plan/analyze", {"model": "llama-3.1-8c"})
            assert (unknown.status, unknown.code) == (404, "model_not_found")
            assert "lama-3.1-8B" in unknown.body.decode()
            nothing = await head.call("POST", "/plan/analyze", {})
            assert (nothing.status, nothing.code) == (422, "invalid_value")
            negative = await head.call("POST", "/plan/analyze", {"model": "llama-3.1-8b", "batch_size": -1})
            assert (negative.status, negative.code) == (422, "invalid_value")
            bomb = {"hidden_size": 10**30, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 10}
            absurd = await head.call("POST", "/plan/analyze", {"config": bomb})
            assert (absurd.status, absurd.code) == (422, "invalid_value")

    run(body)


def test_a_registered_model_is_what_its_files_say(tmp_path: Path) -> None:
    """A model of the cluster is planned for by what a node read of its files, whatever name it has."""
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1_000,
    }  # fmt: skip
    files = (ManifestFile("model.safetensors", 1, "b3:1", 1),)

    async def body() -> None:
        async with api_head(tmp_path) as head:
            await head.put(Model("ours/small", "llm", "main", 0, 0))
            unread = await head.call("POST", "/plan/analyze", {"model": "ours/small"})
            assert (unread.status, unread.code) == (404, "model_not_found")
            read = Manifest("ours/small", "main", files, "b3:0", "safetensors", {"config": config})
            await head.put(ModelManifest(read, "n1", 0))
            answer = await head.call("POST", "/plan/analyze", {"model": "ours/small"})
            assert answer.status == 200, answer.body
            given = await head.call("POST", "/plan/analyze", {"config": config})
            differing = {key for key, value in answer.json.items() if given.json[key] != value}
            assert differing == {"model", "architecture"}  # its name, and where its dimensions come from

    run(body)


def child_of(process: PlannerProcess) -> int:
    """The worker's process id."""
    assert process._process is not None
    return process._process.pid


def test_a_killed_process_costs_one_answer() -> None:
    """A question whose process dies is an error; the next one starts another."""

    async def body() -> None:
        process = PlannerProcess()
        try:
            await process.ask("health", b"{}", Desk())
            os.kill(child_of(process), signal.SIGSTOP)
            asked = asyncio.ensure_future(process.ask("health", b"{}", Desk()))
            await asyncio.sleep(0)
            os.kill(child_of(process), signal.SIGKILL)
            with pytest.raises(Internal):
                await asked
            assert b"healthy" in await process.ask("health", b"{}", Desk())
        finally:
            await process.close()

    run(body)


def test_a_hanging_process_is_ended() -> None:
    """No answer in time is timed_out, and the process that hung is gone."""

    async def body() -> None:
        process = PlannerProcess(answer_s=60.0)
        try:
            await process.ask("health", b"{}", Desk())
            pid = child_of(process)
            os.kill(pid, signal.SIGSTOP)
            process._answer_s = 0.2
            with pytest.raises(TimedOut):
                await process.ask("health", b"{}", Desk())
            assert not psutil.pid_exists(pid)
        finally:
            await process.close()

    run(body)


def test_too_many_questions_are_refused() -> None:
    """A full queue is 429, and those that wait are answered."""

    async def body() -> None:
        process = PlannerProcess()
        try:
            asked = [
                asyncio.ensure_future(process.ask("health", b"{}", Desk())) for _ in range(planner_process.WAITING)
            ]
            await asyncio.sleep(0)
            with pytest.raises(TooMany):
                await process.ask("health", b"{}", Desk())
            assert all(b"healthy" in answer for answer in await asyncio.gather(*asked))
        finally:
            await process.close()

    run(body)


def test_an_idle_process_ends() -> None:
    """Its memory is given back when nobody asks."""

    async def body() -> None:
        process = PlannerProcess(idle_s=0.05)
        try:
            await process.ask("health", b"{}", Desk())
            pid = child_of(process)
            await until(lambda: not psutil.pid_exists(pid))
            assert b"healthy" in await process.ask("health", b"{}", Desk())
        finally:
            await process.close()

    run(body)
