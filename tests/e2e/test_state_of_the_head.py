"""What the head knows outlives it: backups, restores, restarts, upgrades; agents come back by themselves."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from pathlib import Path

from herder import Client
from tests.e2e.cluster import Cluster, code_of
from tests.e2e.processes import ROOT, is_alive, until

GOLDEN = ROOT / "tests" / "golden"


class Writer:
    """Registers models, one after the other, until told to stop; `answered` are those that the head said yes to."""

    def __init__(self, url: str, token: str) -> None:
        self.answered: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(url, token), name="writer")
        self._thread.start()

    def _run(self, url: str, token: str) -> None:
        with Client(url, token=token) as client:
            while not self._stop.is_set():
                name = f"written-{len(self.answered)}"
                client.register_model(name, metadata={"filling": "x" * 500})
                self.answered.append(name)

    def stop(self) -> None:
        """Ends it."""
        self._stop.set()
        self._thread.join(30)


def test_backup_while_writing_and_restore(fresh: Cluster) -> None:
    """A backup taken under load holds all that was answered before it; restored, agents and engines are taken over."""
    cluster = fresh
    n1 = cluster.add_agent("n1")
    engine = cluster.serve_tiny("chat", "n1")
    writer = Writer(cluster.head.url, cluster.head.token())
    backup = cluster.folder / "backup.sqlite"
    try:
        until(lambda: len(writer.answered) > 20, "models")
        before = list(writer.answered)
        done = cluster.cli("backup", str(backup))
        assert done.returncode == 0, done.stderr
        until(lambda: len(writer.answered) > len(before) + 20, "models after the backup")
    finally:
        writer.stop()
    assert backup.stat().st_mode & 0o077 == 0
    assert sqlite3.connect(backup).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    late = cluster.client.register_model("after-the-backup").name
    cluster_id = cluster.client.health().cluster_id
    cluster.head.kill()

    # The machine of the head is lost: a fresh state folder, the backup, and the token that a person kept.
    lost, cluster.head.state = cluster.head.state, cluster.folder / "head2"
    restored = cluster.head.run_to_end("--restore", str(backup))
    assert restored.returncode == 0, restored.stderr
    for name in ("admin.token", "join.token"):
        shutil.copy(lost / name, cluster.head.state / name)
    sessions = n1.sessions()
    cluster.head.start()
    n1.wait_session(sessions + 1)
    health = cluster.client.health()
    assert health.cluster_id == cluster_id
    assert health.head_epoch > 1_000
    known = {model.name for model in cluster.client.models()}
    assert set(before) <= known
    assert late not in known
    after = cluster.wait_replica("chat", lambda view: view.state == "ready")
    assert (after.pid, after.restarts) == (engine.pid, 0)
    assert cluster.chat("chat") == "w0 w1 w2 "
    # The lost head, should it come back, is not obeyed any more.
    cluster.head.stop()
    cluster.head.state = lost
    cluster.head.start()
    n1.wait_logged("no session with the head", n1.log().count("no session with the head") + 1)
    assert is_alive(engine.pid)


def test_a_copy_that_the_backup_does_not_know_is_kept(fresh: Cluster) -> None:
    """A copy that is younger than the restored backup stays, and is taken over once its model is registered again."""
    cluster = fresh
    n1 = cluster.add_agent("n1")
    backup = cluster.folder / "early.sqlite"
    cluster.client.backup(backup)
    origin = cluster.make_model("young", 300_000)
    cluster.download("young", "n1")
    cluster.head.kill()
    restored = cluster.head.run_to_end("--restore", str(backup), "--force")
    assert restored.returncode == 0, restored.stderr
    sessions = n1.sessions()
    cluster.head.start()
    n1.wait_session(sessions + 1)
    cluster.make_model("other", 10_000)
    cluster.download("other", "n1")  # orders go through, so the report has been dealt with
    assert n1.published("young").is_dir()
    origin.unlink()
    cluster.client.register_model("young", source=f"file://{origin}")
    assert cluster.client.wait_job(cluster.client.download("young", "n1:disk"), timeout_s=30).status == "completed"


def test_a_journal_of_the_first_release(tmp_path: Path) -> None:
    """A head of today starts on the state of the first schema, keeps its objects, and takes an agent and work."""
    cluster = Cluster(tmp_path / "cluster")
    cluster.head.state.mkdir(mode=0o700)
    shutil.copy(GOLDEN / "journal_v1.sqlite", cluster.head.state / "journal.sqlite")
    with cluster:
        assert cluster.head.is_running
        token = cluster.head.state / "admin.token"
        if not token.exists():  # the golden head has an admin's key of its own, which nobody has
            cluster.head.stop()
            again = cluster.head.argv("--new-admin-token")
            cluster.head.spawn(again, cluster.head.environ())
            until(lambda: token.exists() and (cluster.head.state / "endpoint").exists(), "a head that serves")
        health = cluster.client.health()
        assert health.cluster_id == "cluster-1"
        assert health.head_epoch >= 8
        model = cluster.client.model("org/tiny")
        assert (model.sources, model.metadata["owner"]) == (("file:///models/tiny",), "me")
        assert cluster.client.node("n1").is_cordoned
        assert cluster.client.service("chat").replicas_wanted == 1
        assert code_of(lambda: cluster.client.model("gone")) == "model_not_found"
        cluster.add_agent("n5")
        cluster.serve_tiny("new", "n5")
        assert cluster.chat("new") == "w0 w1 w2 "
        assert cluster.head.stop() == 0
        cluster.head.start()
        assert cluster.client.health().cluster_id == "cluster-1"


def test_idempotency_outlives_a_restart(fresh: Cluster) -> None:
    """The same call with the same key, before and after kill -9, is one job."""
    cluster = fresh
    cluster.add_agent("n1")
    cluster.make_model("once", 20_000)
    first = cluster.client.download("once", "n1:disk", idempotency_key="night-1")
    cluster.head.kill()
    cluster.head.start()
    again = cluster.client.download("once", "n1:disk", idempotency_key="night-1")
    assert again.id == first.id
    cluster.client.wait_job(again, timeout_s=40)
    assert len([job for job in cluster.client.jobs() if job.name == first.name]) == 1
    assert (
        code_of(lambda: cluster.client.download("once", "n1:dram", idempotency_key="night-1")) == "idempotency_mismatch"
    )
