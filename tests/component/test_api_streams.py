"""Logs, backup, metrics, discovery, the docs page and the audit log, over real sockets."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from common import wire
from common.errors import NodeUnreachable
from common.logs.own import Segments
from head.api.backup import remove_leftovers
from head.core.objects import Replica
from head.journal import Journal
from tests.doubles.api_head import ApiHead, api_head, node, run, until


def a_replica() -> Replica:
    """A replica on n1."""
    return Replica("chat-0", "chat", 0, "m", "main", "n1", "n1:gpu0", 1, "running", "ready", "req-0", 1, port=20_000)


def _chunks(head: ApiHead, *texts: str, fails: bool = False) -> None:
    """What the sessions give for any log."""

    async def open_log(replica: str, run: int, tail: int, follow: bool) -> AsyncIterator[wire.LogChunk]:
        asked.append((replica, run, tail, follow))
        for number, text in enumerate(texts):
            yield wire.LogChunk("r", number, text, is_last=number == len(texts) - 1 and not fails)
        if fails:
            raise NodeUnreachable("node n1 went away")

    asked: list[tuple[str, int, int, bool]] = []
    head.context.sessions.open_log = open_log  # type: ignore[method-assign,assignment]
    head.context.sessions.asked = asked  # type: ignore[attr-defined]


def test_logs_are_streamed_as_text(tmp_path: Path) -> None:
    """The log comes piece by piece as text, with what was asked for handed on."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            await head.put(node("n1"), a_replica())
            _chunks(head, "one\n", "", "zw\u00f6lf\n")
            answer = await head.call("GET", "/replicas/chat-0/logs?tail=7&run=1&follow=true", role="viewer")
            assert (answer.status, answer.body.decode()) == (200, "one\nzw\u00f6lf\n")
            assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
            assert head.context.sessions.asked == [("chat-0", 1, 7, True)]  # type: ignore[attr-defined]

    run(body)


def test_logs_of_the_head(tmp_path: Path) -> None:
    """The head's own log as text and JSON lines, searched, cut by time, from a cursor on; for operators."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            assert (await head.call("GET", "/logs?source=head")).code == "not_found"
            files = Segments(tmp_path / "logs", bytes_max=65_536, age_max_s=1e6)
            files.open()
            for number in range(5):
                files.write(b'{"at":"2026-03-01T10:00:00Z","message":"%d"}\n' % number)
            files.close()
            text = await head.call("GET", "/logs?source=head&tail=2")
            assert text.body == b"".join(b'{"at":"2026-03-01T10:00:00Z","message":"%d"}\n' % n for n in (3, 4))
            found = await head.call("GET", "/logs?target=head&search=%223%22&timestamps=true")
            assert re.fullmatch(rb'\d{4}-\d\d-\d\dT[\d:.]{12}Z \{"at".*"3"\}\n', found.body)
            assert (await head.call("GET", "/logs?target=head&until=1m")).body == b""
            assert (await head.call("GET", "/logs?target=head&since=1m")).body.count(b"\n") == 5
            answer = await head.call("GET", "/logs?target=head&format=jsonl")
            assert answer.headers["Content-Type"] == "application/x-ndjson"
            entries = [json.loads(line) for line in answer.body.splitlines()]
            assert entries[-1] == {"is_end": True}
            lines = [entry for entry in entries if "line" in entry]
            assert [json.loads(entry["line"])["message"] for entry in lines] == list("01234")
            asked = {"target": "head", "format": "jsonl", "cursor": lines[2]["cursor"]}
            rest = await head.call("POST", "/logs", asked, role="operator")
            assert [line for line in rest.body.splitlines() if b'"line"' in line] == [
                line for line in answer.body.splitlines() if b'"line"' in line
            ][3:]
            assert (await head.call("GET", "/logs?target=head", role="viewer")).code == "forbidden"
            assert (await head.call("GET", "/logs?target=head", role="agent")).code == "forbidden"

    run(body)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("", "invalid_value"),
        ("target=nothing", "not_found"),
        ("target=head&since=yesterday", "invalid_value"),
        ("target=head&until=1m&follow=true", "invalid_value"),
        ("target=head&since=1m&until=2m", "invalid_value"),
        ("target=head&regex=true", "invalid_value"),
        ("target=head&tail=-2", "invalid_value"),
        ("target=head&cursor=x", "invalid_value"),
        ("target=head&format=xml", "invalid_value"),
        ("target=head&what=x", "invalid_value"),
        ("replica=a&node=n9", "node_not_found"),
        ("service=nothing", "service_not_found"),
        ("run=..%2F..%2Fx", "not_found"),
        ("benchmark=..", "benchmark_not_found"),
    ],
)
def test_logs_that_are_refused(tmp_path: Path, query: str, code: str) -> None:
    """What names no log, or cannot be meant, has its code before anything is sent."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            assert (await head.call("GET", f"/logs?{query}")).code == code

    run(body)


def test_a_log_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    """Before the first byte it is an error answer; after it, the text ends with the reason."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            missing = await head.call("GET", "/replicas/chat-1/logs")
            assert (missing.status, missing.code) == (404, "not_found")
            await head.put(node("n1"), a_replica())
            away = await head.call("GET", "/replicas/chat-0/logs")
            assert (away.status, away.code) == (503, "node_unreachable")
            _chunks(head, "one\n", fails=True)
            broken = await head.call("GET", "/replicas/chat-0/logs")
            assert broken.status == 200
            assert broken.body == b"one\n\n[herder: the log ends here: node n1 went away]\n"

    run(body)


def test_backup_is_a_whole_journal_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """What was streamed opens as a journal with everything in it; the temporary file is gone."""

    async def body() -> None:
        async with api_head(tmp_path / "state") as head:
            await head.call("POST", "/models", {"name": "kept"})
            answer = await head.call("GET", "/backup")
            assert answer.status == 200
            assert answer.headers["Content-Disposition"].startswith('attachment; filename="herder-')
            copy = tmp_path / "copy.sqlite"
            copy.write_bytes(answer.body)
            with closing(sqlite3.connect(copy)) as connection:
                assert connection.execute("PRAGMA quick_check").fetchone() == ("ok",)
            await until(lambda: not list((tmp_path / "state").glob("*backup*")))
            restored = Journal.open(copy)
            try:
                assert "kept" in restored.load().models
            finally:
                restored.close()

    (tmp_path / "state").mkdir()
    run(body)


def test_leftover_backups_are_removed_at_start(tmp_path: Path) -> None:
    """A backup that a crash left is deleted; nothing else is."""
    for name in ("backup-req-1.sqlite", ".backup-req-1.sqlite.part", "backup-mine.sqlite", "journal.sqlite"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup-mine.sqlite", "journal.sqlite"]


def test_metrics_need_a_token_unless_opened(tmp_path: Path) -> None:
    """/metrics is Prometheus text for viewers; `metrics_open` opens it, in the document too."""

    async def body() -> None:
        async with api_head(tmp_path / "a") as head:
            assert (await head.call("GET", "/metrics", role=None)).status == 401
            assert (await head.call("GET", "/metrics", role="agent")).status == 403
            await head.call("GET", "/models/none")
            text = (await head.call("GET", "/metrics", role="viewer")).body.decode()
            counted = re.search(r"herder_http_request_seconds_count\{([^}]*)\}", text)
            assert counted is not None
            assert 'route="/api/v1/models/{name}"' in text
            assert "models/none" not in text
        async with api_head(tmp_path / "b", metrics_open=True) as head:
            assert (await head.call("GET", "/metrics", role=None)).status == 200
            document = (await head.call("GET", "/api/v1/openapi.json", role=None)).json
            assert document["paths"]["/metrics"]["get"]["security"] == []

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    run(body)


def test_prometheus_targets(tmp_path: Path) -> None:
    """Agents that said where their metrics are, as http_sd wants it; IPv6 in brackets, those that left not at all."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            await head.put(
                node("n1"), node("n2", advertise="fd00::2"), node("n3", http_port=0), node("n4", status="left")
            )
            assert (await head.call("GET", "/prometheus/targets", role="viewer")).json == [
                {"targets": ["10.0.0.1:8471"], "labels": {"node": "n1", "__metrics_path__": "/metrics"}},
                {"targets": ["[fd00::2]:8471"], "labels": {"node": "n2", "__metrics_path__": "/metrics"}},
            ]

    run(body)


def test_the_docs_page_is_locked_down(tmp_path: Path) -> None:
    """The page allows only its own script and style, by hash; every answer carries the security headers."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            for path in ("/docs", "/api/v1/docs"):
                answer = await head.call("GET", path, role=None)
                assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
                policy = answer.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy
                assert "unsafe" not in policy
                assert policy.count("'sha256-") == 2
                assert "frame-ancestors 'none'" in policy
            for path in ("/docs", "/models", "/nope", "/healthz"):
                headers = (await head.call("GET", path)).headers
                assert headers["X-Content-Type-Options"] == "nosniff", path
                assert headers["X-Frame-Options"] == "DENY"
                assert headers["X-Request-Id"].startswith("req-")
                assert "Server" not in headers

    run(body)


def test_request_ids_differ_and_cannot_be_chosen(tmp_path: Path) -> None:
    """The head draws the id of each request: it is the cause in stories, so nobody may forge one."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            ids = {
                (await head.call("GET", "/health", headers={"X-Request-Id": "mine"})).headers["X-Request-Id"]
                for _ in range(3)
            }
            assert len(ids) == 3
            assert "mine" not in ids

    run(body)


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_changes_are_audited_without_secrets(tmp_path: Path) -> None:
    """Who, what, from where and how it ended; tokens, bodies and query strings never."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            await head.call("GET", "/models")
            await head.call("POST", "/models?wait=1", {"name": "a"})
            made = await head.call("POST", "/models", {"name": "m", "metadata": {"word": "in-the-body"}})
            key = (await head.call("POST", "/keys", {"role": "viewer", "name": "x"})).json
            await head.call("DELETE", "/models/none", role="operator")
            await head.call("POST", "/models", {"name": "m2"}, role="viewer")
            await head.call("POST", "/models", {"name": "m3"}, role=None)
            await head.call("GET", "/backup")
            await head.call("GET", "/models", role=None)
            path = tmp_path / "audit.log"
            await until(lambda: len(_lines(path)) == 8)
            lines = _lines(path)
            assert [(line["method"], line["path"], line["status"], line["code"], line["role"]) for line in lines] == [
                ("POST", "/api/v1/models", 422, "invalid_value", "admin"),
                ("POST", "/api/v1/models", 201, "", "admin"),
                ("POST", "/api/v1/keys", 201, "", "admin"),
                ("DELETE", "/api/v1/models/none", 404, "model_not_found", "operator"),
                ("POST", "/api/v1/models", 403, "forbidden", "viewer"),
                ("POST", "/api/v1/models", 401, "unauthenticated", ""),
                ("GET", "/api/v1/backup", 200, "", "admin"),
                ("GET", "/api/v1/models", 401, "unauthenticated", ""),
            ]
            registered = lines[1]
            assert registered["actor"] == "admin(key-admin)"
            assert registered["address"] == "127.0.0.1"
            assert registered["changed"] == "model:m"
            assert registered["request_id"] == made.headers["X-Request-Id"]
            assert lines[2]["changed"] == f"key:{key['id']}"
            text = path.read_text()
            for secret in (key["token"].rpartition("_")[2], head.tokens["admin"], "in-the-body", "wait=1"):
                assert secret not in text
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600

    run(body)


def test_a_lossy_audit_log_is_an_alarm(tmp_path: Path) -> None:
    """Changes that could not be written down show in /health; they are not refused."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            (tmp_path / "audit.log").mkdir()
            assert (await head.call("POST", "/models", {"name": "m"})).status == 201
            await until(lambda: head.audit.lost == 1)
            health = (await head.call("GET", "/health")).json
            assert health["status"] == "degraded"
            assert "audit_log" in health["alarms"][0]

    run(body)


@pytest.mark.parametrize("path", ["/replicas/chat-0/logs", "/events", "/backup", "/agent"])
def test_streams_are_behind_the_door_too(tmp_path: Path, path: str) -> None:
    """No stream opens without a token."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            answer = await head.call("GET", path, role=None)
            assert (answer.status, answer.code) == (401, "unauthenticated")

    run(body)


def test_an_agent_reaches_its_websocket(tmp_path: Path) -> None:
    """GET /agent hands an agent to the sessions; a plain GET by one is an error in our form."""

    async def body() -> None:
        async with api_head(tmp_path) as head:
            plain = await head.call("GET", "/agent", role="agent")
            assert plain.status == 400
            headers = {"Authorization": f"Bearer {head.tokens['agent']}"}
            async with head.http.ws_connect(f"{head.url}/api/v1/agent", headers=headers) as ws:
                inventory = wire.Inventory(hostname="n1")
                hello = wire.Hello(1, 1, "n1", "boot", "agent", "1", inventory)
                await ws.send_str(wire.encode(hello).decode())
                welcome = wire.decode((await ws.receive(timeout=10)).data)
                assert isinstance(welcome, wire.Welcome)
                shown = await head.call("GET", "/nodes/n1", role="viewer")
                assert shown.json["state"] == "online"

    run(body)


def test_answers_decode_after_a_restart(tmp_path: Path) -> None:
    """What was answered before a restart of the head is answered after it."""

    async def first() -> None:
        async with api_head(tmp_path) as head:
            await head.call("POST", "/models", {"name": "org/m", "metadata": {"a": [1, None]}})

    async def second() -> None:
        async with api_head(tmp_path) as head:
            shown = await head.call("GET", "/models/org/m")
            assert shown.json["metadata"] == {"a": [1, None]}
            assert msgspec.json.decode((await head.call("GET", "/story/org/m")).body)["items"]

    run(first)
    run(second)
