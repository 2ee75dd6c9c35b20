"""Vector search: against a real PostgreSQL with pgvector, and against a stub of Qdrant's documented API."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from agent.loadgen import order
from common.bench.report import Report
from common.bench.spec import LoadSpec

BIN = os.environ.get("HERDER_TEST_POSTGRES", "")
needs_postgres = pytest.mark.skipif(
    not BIN, reason="HERDER_TEST_POSTGRES names no folder of PostgreSQL programs with pgvector; scripts/test sets it"
)
SEARCH = LoadSpec(api="pgvector", collection="things", vector_dim=16, points=300, top_k=5, concurrency=3, requests=30)
ACCOUNTS = """\
local all all trust
host all open all trust
host all digest all md5
host all salted all scram-sha-256
host all plain all password
"""


@dataclass(frozen=True)
class Postgres:
    """A server of its own."""

    port: int
    run: str
    psql: str

    def url(self, user: str, more: str = "") -> str:
        """For a user."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/postgres{more}"

    def sql(self, text: str) -> str:
        """What psql prints."""
        command = [self.psql, "-h", self.run, "-p", str(self.port), "-U", "postgres", "-Atc", text]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """PostgreSQL, which does not run as root, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="herder-pg-") as folder:
        user = 65_534 if os.geteuid() == 0 else None
        programs = programs_in(Path(folder))
        data = Path(folder) / "data"
        data.mkdir(mode=0o700)
        if user is not None:
            os.chown(data, user, user)
        made = [str(programs / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, timeout=120, user=user, cwd=data)
        settings = ["fsync=off", f"unix_socket_directories='{data}'", "listen_addresses='127.0.0.1'"]
        with (data / "postgresql.conf").open("a") as file:
            file.write("".join(f"{setting}\n" for setting in settings))
        (data / "pg_hba.conf").write_text(ACCOUNTS)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        server = Postgres(port, str(data), str(programs / "psql"))
        with subprocess.Popen([programs / "postgres", "-D", data, "-p", str(port)], user=user, cwd=data,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # fmt: skip
            try:
                waits = [server.psql, "-h", str(data), "-p", str(port), "-U", "postgres", "-c", "SELECT 1"]
                while subprocess.run(waits, capture_output=True, timeout=60, check=False).returncode:
                    assert process.poll() is None
                server.sql("CREATE ROLE open LOGIN SUPERUSER")
                for name, kind in (("digest", "md5"), ("salted", "scram-sha-256"), ("plain", "scram-sha-256")):
                    server.sql(f"SET password_encryption='{kind}'; CREATE ROLE {name} LOGIN SUPERUSER PASSWORD 'pä'")
                yield server
            finally:
                process.terminate()


def programs_in(folder: Path) -> Path:
    """A copy of the programs: a wheel that was only unpacked runs nothing, and may lie where root alone can read it."""
    there = folder / "pg" / "pgserver" / "pginstall"
    shutil.copytree(Path(BIN).parent, there)
    libraries = Path(BIN).parents[2] / "pgserver.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, folder / "pg" / libraries.name)
    for path in (folder, *(there / "bin").iterdir()):
        path.chmod(0o755)
    return there / "bin"


@pytest.fixture
def secret(tmp_path: Path) -> str:
    """A file with the password."""
    (tmp_path / "password").write_text("pä\n", encoding="utf-8")
    return str(tmp_path / "password")


def search(asked_for: LoadSpec, *urls: str, **aim: object) -> Report:
    """The report of a search."""
    return order.perform(order.order_of(asked_for, order.Aim(urls, **aim)))[0]  # type: ignore[arg-type]


@needs_postgres
@pytest.mark.parametrize("user", ["open", "digest", "salted"])
def test_searches_of_postgres(postgres: Postgres, secret: str, user: str) -> None:
    """The table is made, searched on kept connections after each kind of login, and removed."""
    report = search(SEARCH, postgres.url(user), password_file=secret)
    assert (report.counts["good"], report.counts["failed"]) == (30, 0), report.error_samples
    assert report.generator.connections == 3
    assert report.latency["e2e"].count == 30
    assert report.latency["ttft"].count == 0
    assert postgres.sql("SELECT count(*) FROM pg_tables WHERE tablename = 'things'") == "0"
    assert "pä" not in json.dumps(msgspec.to_builtins(report), ensure_ascii=False)


@needs_postgres
def test_a_table_of_ones_own(postgres: Postgres, tmp_path: Path) -> None:
    """Given vectors find their neighbours in a table that is there; a setting of the session reaches it; it stays."""
    postgres.sql("CREATE EXTENSION IF NOT EXISTS vector; CREATE SCHEMA mine")
    postgres.sql("CREATE TABLE mine.own (id text, v vector(2)); INSERT INTO mine.own VALUES ('a', '[1,0]')")
    (tmp_path / "q").write_text("[1, 0.5]\n[0, 1]\n")
    asked_for = LoadSpec(api="pgvector", collection="mine.own", vector_column="v", vectors=str(tmp_path / "q"),
                         distance="l2", rate=200.0, requests=10, parameters={"statement_timeout": "7s"})  # fmt: skip
    report = search(asked_for, postgres.url("open"))
    assert report.counts["good"] == 10, report.error_samples
    failed = search(msgspec.structs.replace(asked_for, parameters={"statement_timeout": "never"}), postgres.url("open"))
    assert failed.errors == {"connect": 10}
    assert "statement_timeout" in failed.error_samples["connect"][0]
    with pytest.raises(ValueError, match="already exists"):
        search(msgspec.structs.replace(asked_for, vectors=None, vector_dim=2, points=5), postgres.url("open"))
    assert postgres.sql("SELECT count(*) FROM mine.own") == "1"


@needs_postgres
@pytest.mark.parametrize(
    ("changes", "user", "outcome", "said"),
    [
        ({"collection": "nowhere"}, "open", "connect", "nowhere"),
        ({}, "salted", "connect", "authentication failed"),
        ({}, "plain", "connect", "in the clear"),
        ({"collection": "empty"}, "open", "query_error", "no rows"),
        ({"collection": "narrow"}, "open", "query_error", "different vector dimensions"),
    ],
)
def test_failures_of_postgres(
    postgres: Postgres, tmp_path: Path, changes: dict[str, object], user: str, outcome: str, said: str
) -> None:
    """Refused logins and queries are failures by name, in the server's words; a password never goes in the clear."""
    postgres.sql("CREATE EXTENSION IF NOT EXISTS vector")
    postgres.sql("CREATE TABLE IF NOT EXISTS empty (id int, embedding vector(16))")
    postgres.sql("CREATE TABLE IF NOT EXISTS narrow (id int, embedding vector(3))")
    postgres.sql("INSERT INTO narrow VALUES (1, '[1,2,3]')")
    (tmp_path / "wrong").write_text("wrong")
    asked_for = msgspec.structs.replace(SEARCH, points=0, requests=3, **changes)
    report = search(asked_for, postgres.url(user), password_file=str(tmp_path / "wrong"))
    assert report.errors == {outcome: 3}
    assert said in " ".join(report.error_samples[outcome])


@needs_postgres
def test_a_session_that_is_ended(postgres: Postgres) -> None:
    """A server that ends a session in the middle of its query is a failure of the query, in the server's words."""
    postgres.sql("CREATE EXTENSION IF NOT EXISTS vector")
    postgres.sql("CREATE VIEW slow AS SELECT 1 AS id, '[1,2]'::vector AS embedding FROM pg_sleep(60)")
    ends = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"

    def end() -> None:
        deadline = time.monotonic() + 50
        while postgres.sql(ends) == "0" and time.monotonic() < deadline:
            pass

    thread = threading.Thread(target=end)
    asked_for = LoadSpec(api="pgvector", collection="slow", vector_dim=2, concurrency=1, requests=1)
    prepared = order.order_of(asked_for, order.Aim((postgres.url("open"),)))
    report, _ = order.perform(prepared, on_start=thread.start)
    thread.join()
    assert report.errors == {"query_error": 1}
    assert "terminating connection" in report.error_samples["query_error"][0]


@contextlib.contextmanager
def tls_in_front(port: int, folder: Path) -> Iterator[int]:
    """PostgreSQL's way into TLS, ended here: the packaged server has none. The certificate is in folder/c."""
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
            "2", "-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "k"),
            "-out", str(folder / "c")]  # fmt: skip
    subprocess.run(made, check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "c", folder / "k")
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65_536):
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)

    def talk(raw: socket.socket) -> None:
        assert raw.recv(8) == bytes([0, 0, 0, 8, 4, 210, 22, 47])
        raw.sendall(b"S")
        with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as link:
            with socket.create_connection(("127.0.0.1", port)) as behind:
                thread = threading.Thread(target=pump, args=(behind, link), daemon=True)
                thread.start()
                pump(link, behind)
                thread.join(10)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


@needs_postgres
@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_postgres_over_tls(postgres: Postgres, secret: str, tmp_path: Path) -> None:
    """With sslmode the certificate is checked, and only then may a password be told in the clear."""
    with tls_in_front(postgres.port, tmp_path) as port:
        url = f"postgresql://plain@127.0.0.1:{port}/postgres?sslmode=require"
        report = search(SEARCH, url, password_file=secret, ca_file=str(tmp_path / "c"))
        assert report.counts["good"] == 30, report.error_samples
        unknown = search(msgspec.structs.replace(SEARCH, points=0), url, password_file=secret)
        assert set(unknown.errors) == {"tls"}
    without = search(msgspec.structs.replace(SEARCH, points=0), postgres.url("open", "?sslmode=require"))
    assert "no TLS" in without.error_samples["tls"][0]


class Qdrant(ThreadingHTTPServer):
    """A stub of Qdrant's REST API: collections of points, exact search."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), QdrantHandler)
        self.collections: dict[str, dict[int, list[float]]] = {}
        self.seen: list[str] = []
        self.keeps = False
        self.lock = threading.Lock()


class QdrantHandler(BaseHTTPRequestHandler):
    """Answers as the reference says."""

    protocol_version = "HTTP/1.1"
    server: Qdrant

    def answer(self) -> None:
        """Any request."""
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"null")
        path, _, _ = self.path.partition("?")
        _, _, name, *rest = path.split("/")
        with self.server.lock:
            self.server.seen.append(f"{self.command} {path} {self.headers.get('api-key')}")
            status, result = self.result(name, "/".join(rest), body)
        data = json.dumps({"time": 0.001, "status": "ok" if status == 200 else {"error": result}, "result": result})
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def result(self, name: str, rest: str, body: dict[str, object]) -> tuple[int, object]:
        """(status, result)."""
        held = self.server.collections
        match (self.command, rest):
            case ("PUT", ""):
                assert body == {"vectors": {"size": 4, "distance": "Cosine"}}
                held[name] = {}
                return 200, True
            case _ if name not in held:
                return 404, f"Not found: Collection `{name}` doesn't exist!"
            case ("GET", ""):
                return 200, {"status": "green", "points_count": len(held[name])}
            case ("DELETE", "") if self.server.keeps:
                return 403, "Forbidden"
            case ("DELETE", ""):
                del held[name]
                return 200, True
            case ("PUT", "points"):
                points = body["points"]
                assert isinstance(points, list)
                held[name] |= {point["id"]: point["vector"] for point in points}
                return 200, {"operation_id": 0, "status": "completed"}
            case ("POST", "points/query"):
                assert isinstance(body["query"], list)
                assert len(body["query"]) == 4
                assert (body["limit"], body["params"]) == (5, {"hnsw_ef": 64})
                found = sorted(held[name])[:5]
                return 200, {"points": [{"id": number, "version": 0, "score": 0.5} for number in found]}
        return 404, "Not found"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def qdrant() -> Iterator[Qdrant]:
    """The stub, while it is entered."""
    with Qdrant() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)


def test_searches_of_qdrant() -> None:
    """The collection is made and filled, searched with the body's parameters and the key, and removed."""
    asked_for = LoadSpec(api="qdrant", collection="c-1", vector_dim=4, points=70_000, top_k=5, concurrency=2,
                         requests=20, parameters={"params": {"hnsw_ef": 64}})  # fmt: skip
    with qdrant() as server:
        aim = order.Aim((f"http://127.0.0.1:{server.server_port}",), headers=("api-key: k",))
        report, _ = order.perform(order.order_of(asked_for, aim))
        assert report.counts["good"] == 20, report.error_samples
        assert server.collections == {}
        assert [line for line in server.seen if "query" not in line] == [
            "GET /collections/c-1 k", "PUT /collections/c-1 k", "PUT /collections/c-1/points k",
            "PUT /collections/c-1/points k", "GET /collections/c-1 k", "DELETE /collections/c-1 k",
        ]  # fmt: skip


def test_what_cannot_be_removed_is_said() -> None:
    """A server that refuses to remove: what was measured is there, and so is word of what was left behind."""
    asked_for = LoadSpec(api="qdrant", collection="c", vector_dim=4, points=3, top_k=5, concurrency=1, requests=2,
                         parameters={"params": {"hnsw_ef": 64}})  # fmt: skip
    with qdrant() as server:
        server.keeps = True
        aim = order.Aim((f"http://127.0.0.1:{server.server_port}",))
        report, outcome = order.perform(order.order_of(asked_for, aim))
    assert report.counts["good"] == 2
    assert any("c was not removed" in words and "403" in words for words in outcome.said)


def test_a_collection_that_is_there_is_not_touched() -> None:
    """It is searched as it is, and refused where points were to be put in; an empty or missing one fails by name."""
    asked_for = LoadSpec(api="qdrant", collection="c", vector_dim=4, top_k=5, concurrency=1, requests=2,
                         parameters={"params": {"hnsw_ef": 64}})  # fmt: skip
    with qdrant() as server:
        aim = order.Aim((f"http://127.0.0.1:{server.server_port}",))
        server.collections = {"c": {1: [1.0] * 4}, "empty": {}}
        assert order.perform(order.order_of(asked_for, aim))[0].counts["good"] == 2
        with pytest.raises(ValueError, match="exists"):
            order.perform(order.order_of(msgspec.structs.replace(asked_for, points=5), aim))
        assert server.collections == {"c": {1: [1.0] * 4}, "empty": {}}
        errors = {}
        for name in ("empty", "missing"):
            report, _ = order.perform(order.order_of(msgspec.structs.replace(asked_for, collection=name), aim))
            errors[name] = report.errors
        assert errors == {"empty": {"stream_error": 2}, "missing": {"http_4xx": 2}}
