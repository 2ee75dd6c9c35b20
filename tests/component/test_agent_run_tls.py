"""Load of benchmarks through a gateway over TLS, whose authority only the agent's configuration names."""

from __future__ import annotations

import contextlib
import http.server
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import procs
from agent.tls import TlsConfig
from common import wire
from common.bench.records import OUTCOME
from common.clock import boottime_ns
from tests.doubles.certificates import Authority
from tests.doubles.run_rig import RUN, Door, rig

SOON_NS = 300_000_000


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> object:
    """Whatever a test left running is killed."""
    yield
    for directory in tmp_path.glob("**/runs/*"):
        procs.kill_all(0, str(directory), within_s=5)


@contextlib.contextmanager
def gateway_over_tls(folder: Path) -> Iterator[tuple[str, TlsConfig, list[str]]]:
    """A server of a private authority that wants a client's certificate: (url, how to reach it, tokens that came)."""
    authority, tokens = Authority(folder, "ca"), []
    certificate, key = authority.sign("gateway")
    own = authority.sign("agent")

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers.get("Authorization", ""))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(authority.certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        tls = TlsConfig(str(authority.certificate), *map(str, own))
        yield f"https://127.0.0.1:{server.server_port}/", tls, tokens
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("token", ["hdr_inference_x_y", ""])
async def test_the_gateway_of_a_private_authority(tmp_path: Path, token: str) -> None:
    """A load with the gateway's token is sent as the agent itself reaches its head; strangers get no certificate."""
    with Door() as door, gateway_over_tls(tmp_path) as (url, tls, tokens):
        async with rig(tmp_path / "agent", door, tls=tls) as agent:
            await agent.armed(urls=(url,), token=token)
            agent.command(wire.FireRun(RUN, boottime_ns() + SOON_NS))
            result = await agent.result()
            assert result.outcome == "ok", result.error
            records = door.measured()[1].records
    if token:
        assert set(records.column("outcome")) == {OUTCOME["ok"]}
        assert set(tokens) == {f"Bearer {token}"}
    else:
        assert set(records.column("outcome")) == {OUTCOME["tls"]}
        assert tokens == []
