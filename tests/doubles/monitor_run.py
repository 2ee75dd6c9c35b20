"""A monitor as a process of its own on a machine that a test describes, and engines that answer or do not."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

from tests.doubles import fake_nvml

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 30.0
T = TypeVar("T")


def until(look: Callable[[], T], what: str) -> T:
    """Waits for something true."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {WAIT_S:g} s")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """One monitor process; what it says is in its log."""

    def __init__(self, folder: Path, *argv: str, library: Path | None = None, facts: str = "", **environ: str) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.machine = folder / "machine"
        self.machine.write_text(facts)
        env = {name: value for name, value in os.environ.items() if name not in ("LD_LIBRARY_PATH", "SLURM_JOB_ID")}
        env |= {"PYTHONPATH": str(ROOT), **environ}
        if library is not None:
            env |= fake_nvml.environment(library, self.machine)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", *argv], cwd=folder, env=env, stdout=output, stderr=output
            )

    def describe(self, facts: str) -> None:
        """The machine is another from now on."""
        new = self.machine.with_suffix(".new")
        new.write_text(facts)
        new.rename(self.machine)

    def end(self, number: int = 15) -> int:
        """Signals it and returns its exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Waits for its own end."""
        try:
            return self.process.wait(WAIT_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    def said(self) -> str:
        """What it wrote."""
        return self.log.read_text()

    def rows(self, name: str = "monitor.csv") -> list[dict[str, str]]:
        """The rows of a CSV that it writes; whole lines only, as its reader would see them."""
        path = self.folder / name
        if not path.exists():
            return []
        text = path.read_text()
        assert text == "" or text.endswith("\n"), f"half a line in {name}"
        return list(csv.DictReader(text.splitlines()))


@contextmanager
def run_order(
    folder: Path, order: dict[str, Any], *, library: Path | None = None, facts: str = ""
) -> Iterator[Process]:
    """`python -m agent.monitor --run FOLDER`."""
    (folder / "order.json").write_text(json.dumps(order))
    process = Process(folder, "-m", "agent.monitor", "--run", str(folder), library=library, facts=facts)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.end(9)


class Engine:
    """An HTTP server with a metrics page; `page` None hangs, a number is a status."""

    def __init__(self) -> None:
        self.page: bytes | int | None = b""
        self.asked: list[dict[str, str]] = []
        self.drips = False
        engine = self
        self._is_closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self.do_GET()

            def do_DELETE(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                engine.asked.append(
                    {"path": self.path, **{name.lower(): value for name, value in self.headers.items()}}
                )
                while engine.page is None and not engine._is_closing.wait(0.02):
                    pass
                if engine.drips:
                    self._drip()
                    return
                status = engine.page if isinstance(engine.page, int) else 200
                body = engine.page if isinstance(engine.page, bytes) else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _drip(self) -> None:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
                while not engine._is_closing.wait(0.05):
                    self.wfile.write(b"x")

            def log_message(self, format: str, *arguments: object) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:
                    pass  # it gave up waiting, as it should

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stops it, hung answers too."""
        self._is_closing.set()
        self._server.shutdown()
        self._server.server_close()
