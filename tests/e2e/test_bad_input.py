"""What must never get in, against real daemons: each is refused with its own code, and everything else goes on."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from common import limits, wire
from tests.doubles.head_shell import hello
from tests.e2e.cluster import Cluster, code_of
from tests.e2e.processes import until

GIB = 1 << 30


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and the agent n1."""
    with Cluster(tmp_path_factory.mktemp("input") / "cluster") as made:
        made.add_agent("n1")
        made.make_model("good", 20_000)
        yield made


@pytest.fixture(autouse=True)
def _all_goes_on(cluster: Cluster) -> Iterator[None]:
    """Whatever was sent: the node stays online, and no daemon wrote a traceback."""
    yield
    assert cluster.wait_node("n1").state == "online"
    for daemon in (cluster.head, *cluster.agents.values()):
        assert "Traceback" not in daemon.log()


@pytest.mark.parametrize(
    "name", ["../up", "a/../../etc/passwd", "..", "a/..", "/etc/passwd", "a//b", "a\\b", "a\x00b", "a/b/c", "-rf", " "]
)
def test_model_names_that_leave_their_folder(cluster: Cluster, name: str) -> None:
    """A name with '..' or the like is refused as such wherever it is given, and no file of that name comes to be."""
    before = sorted(path.name for path in cluster.folder.rglob("*") if "passwd" in path.name or path.name == "up")
    status, answer = cluster.head.call("POST", "/api/v1/models", {"name": name, "source_url": "file:///x"})
    assert (status, answer["error"]["code"]) == (422, "invalid_name")
    body: dict[str, Any] = {"model_name": name, "target_device": "n1:disk"}
    status, answer = cluster.head.call("POST", "/api/v1/download", body)
    assert status in (404, 422)
    assert answer["error"]["code"] in ("invalid_name", "model_not_found")
    after = sorted(path.name for path in cluster.folder.rglob("*") if "passwd" in path.name or path.name == "up")
    assert after == before


def test_a_manifest_path_that_leaves_its_folder(cluster: Cluster, tmp_path: Path) -> None:
    """A file:// source outside the agent's roots, also by a symbolic link or '..', is refused and never read."""
    secret = tmp_path / "secret.gguf"
    secret.write_bytes(b"secret")
    (cluster.models / "link.gguf").symlink_to(secret)
    places = {"out": secret, "dots": Path(f"{cluster.models}/../../secret.gguf"), "link": cluster.models / "link.gguf"}
    for name, place in places.items():
        code = code_of(lambda name=name, place=place: cluster.client.register_model(name, source=f"file://{place}"))  # type: ignore[misc]
        if code:
            assert code == "invalid_source"
            continue
        job = cluster.client.download(name, "n1:disk", wait_s=20)
        assert job.status == "failed", (name, job)
        assert job.steps[0].error is not None
        assert job.steps[0].error.code in ("forbidden", "source_refused", "invalid_source", "invalid_path")
        assert not cluster.agents["n1"].published(name).exists()


def test_job_with_a_cycle(cluster: Cluster) -> None:
    """Steps that wait for each other are refused at the door, by API and by command, and no job comes to be."""
    jobs = len(cluster.client.jobs().all())
    step = {"action_type": "download", "model_name": "good", "devices": ["n1:disk"]}
    actions = [
        {**step, "action_id": "a", "dependencies": ["b"]},
        {**step, "action_id": "b", "dependencies": ["c"]},
        {**step, "action_id": "c", "dependencies": ["a"]},
    ]
    status, answer = cluster.head.call("POST", "/api/v1/jobs", {"name": "round", "actions": actions})
    assert (status, answer["error"]["code"]) == (422, "job_cycle")
    file = cluster.folder / "cycle.json"
    file.write_text(json.dumps({"name": "round", "actions": actions}))
    done = cluster.cli("job", str(file))
    assert done.returncode == 1
    assert "error[job_cycle]" in done.stderr
    actions[0]["dependencies"] = ["nobody"]
    status, answer = cluster.head.call("POST", "/api/v1/jobs", {"name": "round", "actions": actions[:1]})
    assert (status, answer["error"]["code"]) == (422, "invalid_job")
    assert len(cluster.client.jobs().all()) == jobs


@pytest.mark.parametrize(
    ("device", "codes"),
    [
        ("n1:gpu7", {"device_not_found"}),
        ("n9:disk", {"node_not_found", "device_not_found"}),
        ("n1:tape", {"invalid_device"}),
        ("no-kind", {"invalid_device"}),
    ],
)
def test_unknown_devices(cluster: Cluster, device: str, codes: set[str]) -> None:
    """A device that is not there is refused at the door, whatever is asked of it."""
    assert code_of(lambda: cluster.client.download("good", device)) in codes
    assert code_of(lambda: cluster.client.serve("good", device)) in codes


def test_duplicate_registration(cluster: Cluster) -> None:
    """A second registration is a conflict; the same call with its idempotency key is the same answer; another, 409."""
    first = cluster.client.register_model("twice", source="file:///one", idempotency_key="k1")
    again = cluster.client.register_model("twice", source="file:///one", idempotency_key="k1")
    assert again == first
    code = code_of(lambda: cluster.client.register_model("twice", source="file:///two", idempotency_key="k1"))
    assert code == "idempotency_mismatch"
    status, answer = cluster.head.call("POST", "/api/v1/models", {"name": "twice"})
    assert (status, answer["error"]["code"]) == (409, "already_exists")
    assert cluster.client.model("twice").sources == ("file:///one",)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_of_1_gb(cluster: Cluster, is_chunked: bool) -> None:
    """A body of 1 GB is answered 413 long before it is all sent, and the head's memory does not grow with it."""
    before = cluster.head.rss_bytes()
    piece = b'"' + b"x" * (1 << 20)
    with socket.create_connection(("127.0.0.1", cluster.head.port), timeout=20) as sender:
        length = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % GIB
        sender.sendall(
            b"POST /api/v1/models HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer " + cluster.head.token().encode() + b"\r\n" + length + b"\r\n\r\n"
        )
        sent, growth = 0, 0
        while sent < GIB and not select.select([sender], [], [], 0)[0]:
            sender.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if is_chunked else piece)
            sent += len(piece)
            growth = max(growth, cluster.head.rss_bytes() - before)
        assert sender.recv(65_536).startswith(b"HTTP/1.1 413")
    assert sent < 64 << 20
    assert growth < 32 << 20


def test_a_body_over_the_limit_is_named(cluster: Cluster) -> None:
    """One byte over the limit is body_too_large."""
    status, answer = cluster.head.call("POST", "/api/v1/models", {"name": "x" * limits.BODY_BYTES})
    assert (status, answer["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("token", ["-", "hdr_admin_key-1_wrong", "x" * 5_000])
@pytest.mark.parametrize("path", ["/api/v1/models", "/v1/models", "/metrics", "/api/v1/backup", "/api/v1/agent"])
def test_wrong_tokens(cluster: Cluster, token: str, path: str) -> None:
    """With a wrong token nothing is answered but 401, on any door."""
    status, answer = cluster.head.call("GET", path, token=token)
    assert (status, answer["error"]["code"]) == (401, "unauthenticated")


def test_no_token(cluster: Cluster) -> None:
    """Without a token as well."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(cluster.head.url + "/api/v1/models", timeout=10)
    assert refused.value.code == 401
    refused.value.close()


def test_tokens_of_other_roles(cluster: Cluster) -> None:
    """A viewer changes nothing, an agent's token reads nothing, an inference token reaches /v1 only."""
    viewer = cluster.client.create_key("viewer", "test").token
    inference = cluster.client.create_key("inference", "test").token
    status, answer = cluster.head.call("POST", "/api/v1/models", {"name": "viewed"}, token=viewer)
    assert (status, answer["error"]["code"]) == (403, "forbidden")
    for token in (cluster.head.token("join"), inference):
        status, answer = cluster.head.call("GET", "/api/v1/models", token=token)
        assert (status, answer["error"]["code"]) == (403, "forbidden")
    assert cluster.head.call("GET", "/v1/models", token=inference)[0] == 200


def test_an_agent_with_a_wrong_token(cluster: Cluster) -> None:
    """It does not get in, keeps trying slowly, and says why in its log."""
    stranger = cluster.add_agent("stranger", is_started=False, token="hdr_agent_key-1_wrong")
    stranger.begin()
    until(lambda: "401" in stranger.log() or "unauthenticated" in stranger.log(), "the reason in its log")
    assert "stranger" not in {node.node_id for node in cluster.client.nodes()}
    assert stranger.is_running
    stranger.stop()


async def _meet(cluster: Cluster, said: bytes, token: str) -> tuple[wire.Message | None, int]:
    """Says one first frame as an agent; the head's first answer, and the code with which it closed."""
    async with (
        aiohttp.ClientSession() as client,
        client.ws_connect(f"{cluster.head.url}/api/v1/agent", headers={"Authorization": f"Bearer {token}"}) as ws,
    ):
        await ws.send_bytes(said)
        async with asyncio.timeout(15):
            frame = await ws.receive()
            heard = None
            if frame.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                data = frame.data if isinstance(frame.data, bytes) else frame.data.encode()
                heard = wire.decode(data)
                frame = await ws.receive()
            return heard, ws.close_code or 0


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"proto_min": 90, "proto_max": 91}, "protocol_unsupported"),
        ({"cluster_id": "cluster-of-others"}, "wrong_cluster"),
        ({"max_head_epoch": 1_000_000}, "stale_head"),
        ({"node_id": "../n1"}, "invalid_name"),
    ],
)
async def test_agents_that_do_not_belong(cluster: Cluster, changes: dict[str, Any], code: str) -> None:
    """An agent of a newer protocol, another cluster, a later head or an impossible name hears why, and is not known."""
    said = wire.encode(msgspec.structs.replace(hello("odd"), **changes))
    heard, _ = await _meet(cluster, said, cluster.head.token("join"))
    assert isinstance(heard, wire.Refused), heard
    assert heard.error.code == code
    nodes = await asyncio.to_thread(lambda: {node.node_id for node in cluster.client.nodes()})
    assert nodes == {"n1"}


async def test_noise_instead_of_hello(cluster: Cluster) -> None:
    """What is no hello ends the session."""
    for said in (b"\xff\x00", b"[]", b'{"kind": "hello", "body": 5}', b"{" * 10_000):
        heard, closed = await _meet(cluster, said, cluster.head.token("join"))
        assert closed or isinstance(heard, wire.Refused)


def test_two_heads_on_one_state(cluster: Cluster) -> None:
    """The second says who has it and ends with 3; the first does not notice."""
    second = cluster.head.run_to_end("--port", "0")
    assert second.returncode == 3
    assert f"(pid {cluster.head.pid})" in second.stderr
    assert cluster.client.health().head_epoch == 1


def test_two_agents_on_one_state(cluster: Cluster) -> None:
    """The second agent on a state folder ends at once and names the first."""
    n1 = cluster.agents["n1"]
    second = n1.run_to_end(n1.write("second.yaml", http={"port": 0}))
    assert second.returncode == 2
    assert "state_locked" in second.stderr
    assert f"pid {n1.pid}" in second.stderr


def test_an_agent_that_belongs_to_another_cluster(cluster: Cluster, tmp_path: Path) -> None:
    """An agent that has served one head is refused by another and says so, also with a right token."""
    with Cluster(tmp_path / "other") as other:
        agent = other.add_agent("n7")
        agent.stop()
        secret = agent.folder / "token"
        secret.write_text(cluster.head.token("join"))
        agent.settings["head_url"] = cluster.head.url
        agent.begin()
        agent.wait_logged('no session with the head reason="refused: the agent belongs to another cluster')
        assert "n7" not in {node.node_id for node in cluster.client.nodes()}
