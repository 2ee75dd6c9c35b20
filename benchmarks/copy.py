"""Node-to-node copy of one file over loopback, durable and verified, beside the tools people use for it.

    python -m benchmarks.copy [--gib 4] [--rounds 3] [--dir DIR] [--state hot,cold] [--no-tools]

Every round runs, in turn: the disk's own O_DIRECT write limit, its read limit, and both at once (a plain copy by
threads: no network, no hash); then, with the source in the page cache ("hot") and evicted from it ("cold"), our two
movers (peer copy with ticket and manifest: BLAKE3 per chunk, fsync, published); and once per state curl + sync +
sha256sum, rsync over its daemon + sync, scp + sync. CPU seconds are user and system of both ends, as the kernel
accounts them. With a cold source one disk reads and writes at the same time, as two nodes with a disk each would not:
its limit is the plain copy of the same file, the hot one's the smaller of write and read. While the movers copy, a
uvloop process that stands for the agent measures how late its 5 ms heartbeats are, and before that the same idle.
Bars: at least 0.75 of the limit, at most 0.65 CPU s/GB, heartbeat lateness grown by at most 5 ms at p99. GB = 1e9
bytes. Tools that are not installed are left out.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from agent.mover import protocol
from benchmarks import disk
from benchmarks.disk import BLOCK, process_cpu_s
from benchmarks.ticker import Ticker, quantile
from common.wire import Source
from tests.doubles.mover_client import MoverClient, ticket

PORT = 18_490  # below the ports that the kernel gives to movers
KEY = bytes(32)
BAR_RATE, BAR_CPU, BAR_LATE_MS = 0.75, 0.65, 5.0
IDLE_S = 5.0
PREPARE = {"hot": disk.warm, "cold": disk.evict}
WRITE_SETTINGS = ((2, BLOCK), (4, BLOCK))  # threads, bytes
BOTH_SETTINGS = ((4, BLOCK), (8, BLOCK), (8, 1 << 20))


def cpu_s() -> float:
    """CPU seconds of this process and its ended children."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


class Bench:
    """Two stores and a scratch directory on one disk; at most two files of the size at a time."""

    def __init__(self, place: Path, size: int) -> None:
        self.place, self.size = place, size
        source = place / "source"
        source.mkdir()
        disk.make(source / "m.bin", size)
        self.sender = MoverClient(place / "one", file_roots=(str(place),))
        done = self.sender.fetch("m", f"file://{source}", timeout_s=900)
        assert done.manifest is not None, done.error
        shutil.rmtree(source)
        self.manifest = done.manifest
        self.sender.configure("n1", KEY)
        self.file = place / "one" / "models" / "m@r1" / "m.bin"
        self.late_ms: list[float] = []
        self.ticker = Ticker()

    def ours(self, state: str) -> tuple[float, float]:
        """(seconds, CPU seconds of both movers)."""
        receiver = MoverClient(self.place / "two")
        PREPARE[state](self.file)
        pids = (self.sender.process.pid, receiver.process.pid)
        before = sum(process_cpu_s(pid) for pid in pids)
        source = Source(self.sender.url, ticket=ticket(KEY, "n1", self.manifest.digest))
        self.ticker.lap()
        began = time.monotonic()
        done = receiver.fetch("m", source, manifest=self.manifest, timeout_s=900)
        elapsed = time.monotonic() - began
        self.late_ms += self.ticker.lap()
        spent = sum(process_cpu_s(pid) for pid in pids) - before
        assert done.error is None, done.error
        receiver.ask(lambda token: protocol.Drop(token, "m", "r1"))
        receiver.close()
        shutil.rmtree(self.place / "two")
        return elapsed, spent

    def tool(self, state: str, serve: list[str] | None, *commands: list[str]) -> tuple[float, float]:
        """(seconds, CPU seconds) of a server that is started first and commands that run in turn."""
        PREPARE[state](self.file)
        target = self.place / "target"
        target.mkdir()
        before = cpu_s()
        server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) if serve else None
        try:
            if server is not None:
                wait_for_port(PORT)
            began = time.monotonic()
            for command in commands:
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            elapsed = time.monotonic() - began
        finally:
            if server is not None:
                server.terminate()
                server.wait()
            shutil.rmtree(target)
        return elapsed, cpu_s() - before


def wait_for_port(port: int) -> None:
    """Until something listens."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise TimeoutError(f"nothing listens on port {port}")


def tools(bench: Bench) -> dict[str, Callable[[str], tuple[float, float]]]:
    """The others, as far as they are installed."""
    source, target = bench.file, bench.place / "target"
    found: dict[str, Callable[[str], tuple[float, float]]] = {}
    copied = str(target / "m.bin")
    if shutil.which("curl"):
        http = [sys.executable, "-m", "http.server", str(PORT), "--bind", "127.0.0.1", "-d", str(source.parent)]
        if shutil.which("nginx"):
            conf = bench.place / "nginx.conf"
            user = "user root; " if os.geteuid() == 0 else ""
            conf.write_text(
                f"{user}daemon off; pid {bench.place}/nginx.pid; error_log stderr; events {{}}\n"
                f"http {{ access_log off; sendfile on; send_timeout 600s;"
                f" server {{ listen 127.0.0.1:{PORT}; root {source.parent}; }} }}\n"
            )
            http = ["nginx", "-c", str(conf)]
        fetch = ["curl", "--noproxy", "*", "-sf", "-o", copied, f"http://127.0.0.1:{PORT}/m.bin"]
        found["curl + sync + sha256sum"] = lambda state: bench.tool(
            state, http, fetch, ["sync", copied], ["sha256sum", copied]
        )
    if shutil.which("rsync"):
        conf = bench.place / "rsyncd.conf"
        conf.write_text(f"use chroot = no\nuid = {os.getuid()}\ngid = {os.getgid()}\n[m]\npath = {source.parent}\n")
        daemon = ["rsync", "--daemon", "--no-detach", f"--port={PORT}", "--address=127.0.0.1", f"--config={conf}"]
        pull = ["rsync", "-W", f"rsync://127.0.0.1:{PORT}/m/m.bin", copied]
        found["rsync -W (unverified) + sync"] = lambda state: bench.tool(state, daemon, pull, ["sync", copied])
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    if Path(sshd).exists() and shutil.which("scp"):
        daemon, options = sshd_at(bench.place / "ssh", sshd)
        pull = ["scp", *options, "-P", str(PORT), f"127.0.0.1:{source}", copied]
        found["scp (unverified) + sync"] = lambda state: bench.tool(state, daemon, pull, ["sync", copied])
    return found


def sshd_at(place: Path, sshd: str) -> tuple[list[str], list[str]]:
    """(command of a private sshd, options of its client)."""
    place.mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("hostkey", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)], check=True)
    key = " ".join((place / "hostkey.pub").read_text().split()[:2])
    (place / "known_hosts").write_text(f"[127.0.0.1]:{PORT} {key}\n")
    (place / "config").write_text(
        f"Port {PORT}\nListenAddress 127.0.0.1\nHostKey {place}/hostkey\nPidFile {place}/pid\n"
        f"AuthorizedKeysFile {place}/id.pub\nStrictModes no\nUsePAM no\nSubsystem sftp internal-sftp\n"
    )
    options = ["-q", "-i", f"{place}/id", "-o", f"UserKnownHostsFile={place}/known_hosts", "-o", "BatchMode=yes"]
    return [sshd, "-D", "-f", f"{place}/config", "-E", f"{place}/log"], options


@dataclass
class Figures:
    """What the rounds gave, in seconds and CPU seconds."""

    limits: dict[str, list[float]] = field(default_factory=lambda: {"write": [], "read": [], "copy": []})
    rows: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)
    idle_ms: list[float] = field(default_factory=list)


def measure(bench: Bench, states: list[str], rounds: int, *, has_tools: bool) -> Figures:
    """Runs everything, one at a time."""
    figures = Figures()
    others = tools(bench) if has_tools else {}
    probe = bench.place / "probe"
    for number in range(rounds):
        bench.ticker.lap()
        time.sleep(IDLE_S)
        figures.idle_ms += bench.ticker.lap()
        writes = [disk.write_s(probe, bench.size, *setting) for setting in WRITE_SETTINGS]
        probe.unlink()
        figures.limits["write"].append(min(writes))
        figures.limits["read"].append(disk.read_limit_s(bench.file, bench.size)[0])
        both = []
        for setting in BOTH_SETTINGS if "cold" in states else ():
            disk.evict(bench.file)
            both.append(disk.write_s(probe, bench.size, *setting, source=bench.file))
            probe.unlink()
        figures.limits["copy"] += [min(both)] if both else []
        for state in states:
            figures.rows.setdefault(("our movers", state), []).append(bench.ours(state))
            for name, run in others.items() if number == 0 else ():
                figures.rows.setdefault((name, state), []).append(run(state))
    return figures


def main() -> None:
    """Runs the rounds and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="on the disk to measure; default: the temporary directory")
    parser.add_argument("--state", default="hot,cold", help="of the source in the page cache: hot, cold or both")
    parser.add_argument("--no-tools", action="store_true", help="only the limits and our movers")
    options = parser.parse_args()
    size = max(BLOCK, int(options.gib * (1 << 30)) // BLOCK * BLOCK)
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        bench = Bench(Path(scratch), size)
        try:
            figures = measure(bench, options.state.split(","), options.rounds, has_tools=not options.no_tools)
        finally:
            bench.ticker.close()
            bench.sender.close()
    show(size, figures, bench.late_ms)


def show(size: int, figures: Figures, late_ms: list[float]) -> None:
    """The table. Rates: median and best; CPU: median and least; shares: of the median limit."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{size / 1e9:.2f} GB over loopback, {os.cpu_count()} CPUs, load {load}, medians (and best)")
    rates = {name: [size / 1e6 / seconds for seconds in values] for name, values in figures.limits.items() if values}
    for name, values in rates.items():
        print(f"  {'O_DIRECT ' + name:36} {statistics.median(values):6.0f} MB/s ({max(values):.0f})")
    alone = min(statistics.median(rates["write"]), statistics.median(rates["read"]))
    for (name, state), pairs in figures.rows.items():
        limit = alone if state == "hot" else statistics.median(rates["copy"])
        rate = size / 1e6 / statistics.median(elapsed for elapsed, _ in pairs)
        best = size / 1e6 / min(elapsed for elapsed, _ in pairs)
        spent = [cpu / (size / 1e9) for _, cpu in pairs]
        print(
            f"  {name + ', ' + state:36} {rate:6.0f} MB/s ({best:.0f})  {statistics.median(spent):.2f} CPU s/GB"
            f" ({min(spent):.2f})  {rate / limit:.2f} of the limit ({best / limit:.2f})"
            + (f", {rate / alone:.2f} of the idle disk's" if state == "cold" else "")
        )
    idle, busy = quantile(figures.idle_ms, 0.99), quantile(late_ms, 0.99)
    print(
        f"  heartbeat lateness p50/p99/max: idle {quantile(figures.idle_ms, 0.5):.1f}/{idle:.1f}/"
        f"{max(figures.idle_ms):.1f} ms, while copying {quantile(late_ms, 0.5):.1f}/{busy:.1f}/{max(late_ms):.1f} ms:"
        f" p99 grows by {busy - idle:.1f} ms"
    )
    print(f"bars: {BAR_RATE} of the limit, at most {BAR_CPU} CPU s/GB, p99 grown by at most {BAR_LATE_MS:.0f} ms")


if __name__ == "__main__":
    main()
