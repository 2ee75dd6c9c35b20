"""The main story with a real model and a real engine, told by the `herder` command as a person would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from herder import Client
from herder.cli import daemons
from herder.types import ReplicaView
from tests.e2e.cluster import CLI, LLAMA_RECIPE, stream_of, wait_dead
from tests.e2e.processes import ROOT, clean_environ, end_all, is_alive, processes_of, until

ENGINE = os.environ.get("HERDER_TEST_LLAMA_SERVER", "")
GGUF = os.environ.get("HERDER_TEST_GGUF", "")
WORDS = 120  # of a stream that outlives the head
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not (ENGINE and GGUF), reason="HERDER_TEST_LLAMA_SERVER and HERDER_TEST_GGUF are not set"),
]


class Site:
    """What `herder up --detach` made, and the command on it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        recipes = base.parent / "recipes"
        recipes.mkdir()
        for source in (ROOT / "recipes" / "inference").glob("*.yaml"):
            (recipes / source.name).write_text(source.read_text())
        (recipes / "quick-llama.yaml").write_text(LLAMA_RECIPE)
        self.environ = {
            **clean_environ(),
            "HERDER_STATE_DIR": str(base),
            "HERDER_CONFIG": str(base / "none"),
            "HERDER_HEAD_RECIPES_DIR": str(recipes),
            "COLUMNS": "200",
        }

    def herder(self, *args: str, code: int = 0, timeout_s: float = 100.0) -> str:
        """Runs a command that is to end with `code`; what it printed."""
        argv = [sys.executable, "-P", "-c", CLI, *args]
        done = subprocess.run(
            argv, env=self.environ, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=self.base.parent
        )
        assert done.returncode == code, f"herder {' '.join(args)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    def up(self) -> None:
        """`herder up --detach`."""
        port = self.environ.get("HERDER_URL", ":0").rpartition(":")[2]
        self.environ.pop("HERDER_URL", None)
        words = ("--node-id", "n1", "--file-root", str(Path(GGUF).parent), "--llama-server", ENGINE)
        url = self.herder("up", "--detach", "-q", "--port", port, "--agent-port", "0", *words)
        self.environ["HERDER_URL"] = url.strip()

    def client(self) -> Client:
        """A client with the admin's token."""
        return Client(self.environ["HERDER_URL"], token_file=self.base / "head" / "admin.token")

    def replica(self, state: str = "ready") -> ReplicaView:
        """The one engine, once it is in a state."""
        with self.client() as client:
            return until(
                lambda: next((view for view in client.replicas() if view.state == state), None),
                f"an engine {state}",
                60,
            )

    def record(self) -> daemons.Record:
        """The daemons that run."""
        found = daemons.read_record(self.base)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A fresh machine on which a model was registered, downloaded, brought to RAM and served."""
    folder = tmp_path_factory.mktemp("story")
    made = Site(folder / "state")
    try:
        made.up()
        made.herder("models", "add", MODEL, "--type", "llm", "--source", f"file://{GGUF}")
        made.herder("download", MODEL, "n1:disk")
        made.herder("copy", MODEL, "n1:dram")
        made.herder("serve", MODEL, "n1:dram", "--recipe", "quick-llama", "--name", "smollm2")
        yield made
    finally:
        end_all(folder)


def test_from_a_file_to_a_streamed_answer(site: Site) -> None:
    """What the commands brought to a node answers through the gateway; the tables and /metrics tell all of it."""
    answer = site.herder("chat", MODEL, "What does a shepherd do?", "--max-tokens", "24")
    assert len(answer.split()) >= 5, answer
    size = Path(GGUF).stat().st_size
    copies = {copy["device"]: copy for copy in json.loads(site.herder("models", "locations", MODEL, "-o", "json"))}
    assert {device: copy["state"] for device, copy in copies.items()} == {"n1:disk": "ready", "n1:dram": "ready"}
    assert {copy["bytes_total"] for copy in copies.values()} == {size}
    assert copies["n1:dram"]["is_locked"] or os.geteuid() != 0
    shown = site.herder("models", "show", MODEL)
    assert "llama" in shown
    assert "ready" in site.herder("services")
    assert "n1:dram" in site.herder("models", "locations", MODEL)
    metrics = _read(site, "/metrics")
    assert 'herder_nodes{state="online"} 1.0' in metrics
    assert "herder_gateway_requests_total{" in metrics


def _read(site: Site, path: str) -> str:
    import urllib.request

    token = (site.base / "head" / "admin.token").read_text().strip()
    request = urllib.request.Request(site.environ["HERDER_URL"] + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        text: str = answer.read().decode()
        return text


def test_a_stream_of_the_gateway(site: Site) -> None:
    """The gateway passes a real engine's stream on piece by piece, under the model's own name."""
    token = (site.base / "head" / "admin.token").read_text().strip()
    with stream_of(site.environ["HERDER_URL"], MODEL, 24, token=token) as pieces:
        assert len(list(pieces)) >= 5


def test_head_is_killed_under_a_real_stream(site: Site) -> None:
    """kill -9 of the head does not touch a stream of the real engine, and its agent comes back."""
    before = site.replica()
    keys = [path.read_text().strip() for path in site.base.rglob("api_key")]
    with stream_of(before.endpoint, MODEL, WORDS, token="".join(keys[:1])) as pieces:
        first = [next(pieces) for _ in range(3)]
        site.record().head.signal(signal.SIGKILL)
        rest = list(pieces)
    site.herder("down")
    site.up()
    after = site.replica()
    assert len(first + rest) > WORDS // 2  # a token may be no whole letter, and gives no text then
    assert (after.pid, after.restarts) == (before.pid, before.restarts)
    assert site.herder("chat", MODEL, "Hello", "--max-tokens", "4")


def test_agent_is_killed_beside_a_real_engine(site: Site) -> None:
    """kill -9 of the agent leaves the real engine; the next agent finds it by its files."""
    before = site.replica()
    site.record().agent.signal(signal.SIGKILL)
    wait_dead(site.record().agent.pid)
    assert is_alive(before.pid)
    site.herder("down")
    site.up()
    after = site.replica()
    assert (after.pid, after.restarts) == (before.pid, before.restarts)
    assert site.herder("chat", MODEL, "Hello", "--max-tokens", "4")


def test_a_real_engine_that_hangs(site: Site) -> None:
    """A llama-server under SIGSTOP is taken out, ended and started anew; its last log can be read."""
    before = site.replica()
    os.kill(before.pid, signal.SIGSTOP)
    with site.client() as client:
        until(lambda: any(view.state != "ready" for view in client.replicas()), "an engine that is out", 30)
    after = site.replica()
    assert after.pid != before.pid
    assert after.restarts == before.restarts + 1
    assert not is_alive(before.pid)
    assert site.herder("chat", MODEL, "Hello", "--max-tokens", "4")
    assert "llama" in site.herder("logs", "smollm2", "--previous", "--tail", "10000").lower()


def test_down_stops_all(site: Site) -> None:
    """`herder down --stop-engines` leaves no process: no daemon, engine, shim, or holder of the RAM tier."""
    engine = site.replica().pid
    site.herder("down", "--stop-engines")
    assert not is_alive(engine)
    assert [line for _, line in processes_of(site.base.parent)] == []
