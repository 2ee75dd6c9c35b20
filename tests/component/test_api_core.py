"""The API on the real core: orders are judged at the door, and the tests' scripted jobs keep the core's contract."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from head.pipeline import Step
from herder import types as api
from tests.doubles.api_head import ApiHead, api_head, node, real_step, run, scripted_step


async def ready(head: ApiHead) -> None:
    """A connected node and a model with a source."""
    await head.put(node("n1", gpus=1))
    head.connect("n1")
    made = await head.call("POST", "/models", {"name": "org/m", "source_url": "hf://org/m"})
    assert made.status == 201


@pytest.mark.parametrize("step", [real_step, scripted_step], ids=["real", "scripted"])
def test_jobs_keep_one_contract(tmp_path: Path, step: Step) -> None:
    """Made, repeated, refused, listed, cancelled: alike on the real core and on the tests' scripted jobs."""

    async def body() -> None:
        async with api_head(tmp_path, step=step) as head:
            await ready(head)
            sent = {"model_name": "org/m", "target_device": "n1:disk"}
            key = {"Idempotency-Key": "once"}
            first = await head.call("POST", "/download", sent, headers=key)
            job = msgspec.json.decode(first.body, type=api.JobView)
            assert (first.status, job.ended_ms, job.actor) == (202, None, "admin(key-admin)")
            assert [(step.action, step.model, step.devices) for step in job.steps] == [
                ("download", "org/m", ("n1:disk",))
            ]
            again = await head.call("POST", "/download", sent, headers=key)
            assert again.json["id"] == job.id
            other = await head.call("POST", "/download", {**sent, "target_device": "n1:dram"}, headers=key)
            assert (other.status, other.code) == (409, "idempotency_mismatch")
            assert [item["id"] for item in (await head.call("GET", "/jobs")).json["items"]] == [job.id]
            await head.call("POST", f"/jobs/{job.id}/cancel")
            shown = (await head.call("GET", f"/jobs/{job.id}")).json
            assert shown["status"] in ("cancelled", "running")
            story = (await head.call("GET", f"/story/{job.id}")).json["items"]
            assert story[0]["cause"] == first.headers["X-Request-Id"]

    run(body)


def _graph(*edges: tuple[str, str]) -> dict[str, Any]:
    ids = sorted({name for edge in edges for name in edge})
    return {
        "name": "j",
        "actions": [
            {
                "action_id": name,
                "action_type": "download",
                "model_name": "org/m",
                "devices": ["n1:disk"],
                "dependencies": [before for before, after in edges if after == name],
            }
            for name in ids
        ],
    }


REFUSED: list[tuple[str, Any, int, str]] = [
    ("/download", {"model_name": "org/x", "target_device": "n1:disk"}, 404, "model_not_found"),
    ("/download", {"model_name": "org/m", "target_device": "n2:disk"}, 404, "node_not_found"),
    ("/download", {"model_name": "org/m", "target_device": "n1:tape"}, 422, "invalid_device"),
    ("/download", {"model_name": "org/m", "target_device": "nonexistent:banana9"}, 422, "invalid_device"),
    ("/serve", {"model_name": "org/m", "device": "n1:gpu7"}, 404, "device_not_found"),
    ("/stop", {"model_name": "org/m", "device": "n1:gpu0"}, 404, "service_not_found"),
    ("/stop/org/m/n1:gpu:0", None, 404, "service_not_found"),
    ("/jobs", _graph(("a", "b"), ("b", "a")), 422, "job_cycle"),
    ("/jobs", {"name": "j", "actions": [{"action": "copy", "model": "org/m", "action_id": "x"}]}, 422, "invalid_job"),
    ("/services", {"name": "Not A Name", "model": "org/m"}, 422, "invalid_name"),
    ("/services", {"name": "s", "model": "org/x"}, 404, "model_not_found"),
    ("/services", {"name": "s", "model": "org/m", "recipe": "none"}, 404, "recipe_not_found"),
    ("/pin", {"model_name": "org/m", "device": "n1:dram"}, 404, "copy_not_found"),
]


def test_orders_that_make_no_sense_are_refused_at_once(tmp_path: Path) -> None:
    """Each with its own code, and nothing of them is kept."""

    async def body() -> None:
        async with api_head(tmp_path, step=real_step) as head:
            await ready(head)
            revision = head.state.revision
            for path, sent, status, code in REFUSED:
                answer = await head.call("POST", path, sent)
                assert (answer.status, answer.code) == (status, code), (path, sent, answer.body)
            assert head.state.revision == revision

    run(body)


def test_missing_names_in_orders_get_near_matches(tmp_path: Path) -> None:
    """Also where the name stands in a body."""

    async def body() -> None:
        async with api_head(tmp_path, step=real_step) as head:
            await ready(head)
            for sent, near in (
                ({"model_name": "org/n", "target_device": "n1:disk"}, "'org/m'"),
                ({"model_name": "org/m", "target_device": "n2:disk"}, "'n1'"),
            ):
                answer = await head.call("POST", "/download", sent)
                assert near in answer.json["error"]["hint"], answer.body

    run(body)


def test_why_is_answered_for_every_kind(tmp_path: Path) -> None:
    """Service, job, copy, node and model say why they are as they are; keys with '/', '@' and '|' pass the path."""

    async def body() -> None:
        async with api_head(tmp_path, step=real_step) as head:
            await ready(head)
            job = (await head.call("POST", "/download", {"model_name": "org/m", "target_device": "n1:disk"})).json["id"]
            assert (await head.call("POST", "/services", {"name": "s", "model": "org/m"})).status == 202
            for kind, key in (
                ("service", "s"),
                ("job", job),
                ("node", "n1"),
                ("model", "org/m"),
                ("model", "org%2Fm"),
                ("copy", "org/m@main%7Cn1:disk"),
            ):
                answer = await head.call("GET", f"/why/{kind}/{key}", role="viewer")
                assert answer.status == 200, answer.body
                why = msgspec.json.decode(answer.body, type=api.Why)
                assert why.kind == kind
                assert why.reason
            assert (await head.call("GET", "/why/service/none")).status == 404

    run(body)


def test_many_changes_at_once_each_get_their_own_answer(tmp_path: Path) -> None:
    """Concurrent registrations are all durable and none gets another's answer; of equal ones exactly one wins."""

    async def body() -> None:
        async with api_head(tmp_path, step=real_step) as head:
            names = [f"m{number // 2}" for number in range(60)]
            answers = await asyncio.gather(*(head.call("POST", "/models", {"name": name}) for name in names))
            made = [answer.json["name"] for answer in answers if answer.status == 201]
            assert sorted(made) == sorted(set(names))
            assert all(answer.code == "already_exists" for answer in answers if answer.status != 201)
            assert all(
                answer.json["name"] == name for answer, name in zip(answers, names, strict=True) if answer.status == 201
            )

    run(body)
