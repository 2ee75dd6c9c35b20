"""Starting and measuring daemons for benchmarks: real processes, the kernel's own accounting."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass
class Usage:
    """CPU seconds spent so far and resident bytes now, of one process."""

    cpu_s: float
    rss_bytes: int
    at: float


def usage(pid: int) -> Usage:
    """The kernel's figures for a process (all its threads, not its children)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{pid}/status").read_text()
    rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return Usage((int(fields[11]) + int(fields[12])) / TICKS_PER_S, rss * 1024, time.monotonic())


def share_of_a_core(before: Usage, after: Usage) -> float:
    """CPU use between two readings, 1.0 = one core."""
    return (after.cpu_s - before.cpu_s) / (after.at - before.at)


@dataclass
class Head:
    """A head process of a benchmark."""

    process: subprocess.Popen[bytes]
    url: str
    state_dir: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def token(self, name: str = "admin") -> str:
        """A token that the head wrote at its first start."""
        return (self.state_dir / f"{name}.token").read_text().strip()

    def request(self, method: str, path: str, body: object = None, timeout_s: float = 30.0) -> Any:
        """One API call; the decoded answer."""
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.token()}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.loads(answer.read() or b"null")

    def metrics(self) -> dict[str, float]:
        """What /metrics says now, by series."""
        request = urllib.request.Request(self.url + "/metrics", headers={"Authorization": f"Bearer {self.token()}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to outgoing connections."""
    while True:
        port = random.randrange(18_000, 30_000)
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def start_head(state_dir: Path, port: int, *, cpu: int | None = None, log: IO[bytes] | None = None) -> Head:
    """Starts a head and waits until it answers. Raises: RuntimeError when it ends or is silent for 60 s."""
    environ = {
        **os.environ,
        "HERDER_HEAD_STATE_DIR": str(state_dir),
        "HERDER_HEAD_PORT": str(port),
        "HERDER_HEAD_LOG_LEVEL": "warning",
        "PYTHONSAFEPATH": "1",
    }
    argv = [sys.executable, "-m", "head"]
    if cpu is not None and cpu in os.sched_getaffinity(0):
        argv = ["taskset", "-c", str(cpu), *argv]
    process = subprocess.Popen(argv, cwd=ROOT, env={**environ, "PYTHONPATH": str(ROOT)}, stderr=log, stdout=log)
    head = Head(process, f"http://127.0.0.1:{port}", state_dir)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the head ended with {process.returncode}")
        try:
            with urllib.request.urlopen(head.url + "/healthz", timeout=1):
                return head
        except (urllib.error.URLError, OSError):
            time.sleep(0.01)
    raise RuntimeError("the head did not answer within 60 s")


@contextmanager
def running_head(state_dir: Path, port: int, *, cpu: int | None = None) -> Iterator[Head]:
    """A head for the length of a block."""
    head = start_head(state_dir, port, cpu=cpu)
    try:
        yield head
    finally:
        if head.process.poll() is None:
            head.process.send_signal(signal.SIGTERM)
            try:
                head.process.wait(30)
            except subprocess.TimeoutExpired:
                head.kill()


class Swarm:
    """Simulated agents in processes of their own (benchmarks.swarm)."""

    def __init__(self, head: Head, count: int, *, processes: int = 1, cpu: int | None = None) -> None:
        share = count // processes
        self._members = []
        for index in range(processes):
            argv = [sys.executable, "-m", "benchmarks.swarm", "--url", head.url + "/api/v1/agent"]
            argv += ["--token-file", str(head.state_dir / "join.token"), "--count", str(share)]
            argv += ["--first", str(index * share)]
            if cpu is not None and cpu in os.sched_getaffinity(0):
                argv = ["taskset", "-c", str(cpu), *argv]
            self._members.append(
                subprocess.Popen(
                    argv,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def tallies(self) -> list[dict[str, Any]]:
        """What each process counted so far."""
        found = []
        for member in self._members:
            assert member.stdin is not None
            assert member.stdout is not None
            member.stdin.write("tally\n")
            member.stdin.flush()
            found.append(json.loads(member.stdout.readline()))
        return found

    def connected(self) -> int:
        """Agents with an open session."""
        return sum(int(tally["connected"]) for tally in self.tallies())

    def wait_connected(self, count: int, timeout_s: float = 120.0) -> float:
        """Waits until so many are connected; seconds that it took."""
        begun = time.monotonic()
        while self.connected() < count:
            if time.monotonic() - begun > timeout_s:
                raise RuntimeError(f"only {self.connected()} of {count} agents are connected after {timeout_s} s")
            time.sleep(0.2)
        return time.monotonic() - begun

    def close(self) -> None:
        """Ends the processes."""
        for member in self._members:
            if member.poll() is None and member.stdin is not None:
                try:
                    member.stdin.write("quit\n")
                    member.stdin.close()
                    member.wait(20)
                except (BrokenPipeError, subprocess.TimeoutExpired):
                    member.kill()


def table(title: str, rows: list[tuple[str, str, str]]) -> None:
    """Prints rows of (what, measured, bar)."""
    widths = [max(len(row[column]) for row in [("what", "measured", "bar"), *rows]) for column in range(3)]
    print(f"\n{title}")
    for row in [("what", "measured", "bar"), *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
