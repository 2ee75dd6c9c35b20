"""Node-to-node copy of one file over loopback, durable and verified, beside the tools people use for it.

    python -m benchmarks.copy [--gib 4] [--rounds 3] [--dir DIR] [--hot]

Every round runs, in turn: the disk's own O_DIRECT write and read limits, our two movers (peer copy with ticket and
manifest: BLAKE3 per chunk, fsync, published), curl + sync + sha256sum, rsync over its daemon + sync, scp + sync.
CPU seconds are user and system of both ends, as the kernel accounts them. Before each run the source is evicted
from the page cache, so one disk reads and writes at the same time; with --hot it is read into the cache instead, which
leaves the network and the landing. Bars: ours at least 0.75 of the smaller disk limit, at most 0.65 CPU s/GB.
GB = 1e9 bytes. Tools that are not installed are left out.
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
from pathlib import Path

from agent.mover import protocol
from common import fsio
from common.wire import Source
from tests.doubles.mover_client import MoverClient, ticket

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 4 << 20
PORT = 18_490  # below the ports that the kernel gives to movers
KEY = bytes(32)
BAR_RATE, BAR_CPU = 0.75, 0.65


def cpu_s() -> float:
    """CPU seconds of this process and its ended children."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def process_cpu_s(pid: int) -> float:
    """CPU seconds of a live process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def evict(path: Path) -> None:
    """Takes a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def warm(path: Path) -> None:
    """Reads a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def make(path: Path, size: int) -> None:
    """A file of bytes that no layer can compress."""
    block = os.urandom(BLOCK)
    with path.open("wb") as file:
        for index in range(size // BLOCK):
            file.write(index.to_bytes(8, "little") + block[8:])
        file.flush()
        os.fsync(file.fileno())


def direct(path: Path, size: int, *, writes: bool) -> float:
    """Seconds to write (with fsync) or read a file with O_DIRECT, two threads as measured best."""
    from concurrent.futures import ThreadPoolExecutor

    flags = os.O_RDWR | os.O_CREAT | os.O_DIRECT if writes else os.O_RDONLY | os.O_DIRECT
    fd = os.open(path, flags, 0o600)
    if writes:
        fsio.allocate(fd, size)

    def share(begin: int, end: int) -> None:
        buffer = fsio.aligned_buffer(BLOCK)
        for offset in range(begin, end, BLOCK):
            if writes:
                os.pwrite(fd, buffer, offset)
            else:
                os.preadv(fd, [buffer], offset)

    half = size // BLOCK // 2 * BLOCK
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(share, 0, half), pool.submit(share, half, size)]:
            future.result()
    if writes:
        os.fsync(fd)
    elapsed = time.monotonic() - began
    os.close(fd)
    return elapsed


class Bench:
    """Two stores and a scratch directory on one disk."""

    def __init__(self, place: Path, size: int, *, hot: bool = False) -> None:
        self.place, self.size = place, size
        self.prepare = warm if hot else evict
        self.file = place / "source" / "m.bin"
        self.file.parent.mkdir()
        make(self.file, size)
        self.sender = MoverClient(place / "one", file_roots=(str(place),))
        done = self.sender.fetch("m", f"file://{self.file.parent}", timeout_s=600)
        assert done.manifest is not None, done.error
        self.manifest = done.manifest
        self.sender.configure("n1", KEY)
        self.blob = next((place / "one" / "blobs").glob("??/*"))

    def ours(self) -> tuple[float, float]:
        """(seconds, CPU seconds of both movers)."""
        self.prepare(self.blob)
        receiver = MoverClient(self.place / "two")
        pids = (self.sender.process.pid, receiver.process.pid)
        before = sum(process_cpu_s(pid) for pid in pids)
        source = Source(self.sender.url, ticket=ticket(KEY, "n1", self.manifest.digest))
        began = time.monotonic()
        done = receiver.fetch("m", source, manifest=self.manifest, timeout_s=900)
        elapsed = time.monotonic() - began
        spent = sum(process_cpu_s(pid) for pid in pids) - before
        assert done.error is None, done.error
        receiver.ask(lambda token: protocol.Drop(token, "m", "r1"))
        receiver.close()
        shutil.rmtree(self.place / "two")
        return elapsed, spent

    def tool(self, serve: list[str] | None, *commands: list[str]) -> tuple[float, float]:
        """(seconds, CPU seconds) of a server that is started first and commands that run in turn."""
        self.prepare(self.file)
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


def tools(bench: Bench) -> dict[str, Callable[[], tuple[float, float]]]:
    """The others, as far as they are installed."""
    source, target = bench.file, bench.place / "target"
    found: dict[str, Callable[[], tuple[float, float]]] = {}
    copied = str(target / "m.bin")
    if shutil.which("curl"):
        http = [sys.executable, "-m", "http.server", str(PORT), "--bind", "127.0.0.1", "-d", str(source.parent)]
        if shutil.which("nginx"):
            conf = bench.place / "nginx.conf"
            user = "user root; " if os.geteuid() == 0 else ""
            conf.write_text(
                f"{user}daemon off; pid {bench.place}/nginx.pid; error_log stderr; events {{}}\n"
                f"http {{ access_log off; sendfile on; server {{ listen 127.0.0.1:{PORT}; root {source.parent}; }} }}\n"
            )
            http = ["nginx", "-c", str(conf)]
        fetch = ["curl", "--noproxy", "*", "-sf", "-o", copied, f"http://127.0.0.1:{PORT}/m.bin"]
        found["curl + sync + sha256sum"] = lambda: bench.tool(http, fetch, ["sync", copied], ["sha256sum", copied])
    if shutil.which("rsync"):
        conf = bench.place / "rsyncd.conf"
        conf.write_text(f"use chroot = no\nuid = {os.getuid()}\ngid = {os.getgid()}\n[m]\npath = {source.parent}\n")
        daemon = ["rsync", "--daemon", "--no-detach", f"--port={PORT}", "--address=127.0.0.1", f"--config={conf}"]
        pull = ["rsync", "-W", f"rsync://127.0.0.1:{PORT}/m/m.bin", copied]
        found["rsync -W (unverified) + sync"] = lambda: bench.tool(daemon, pull, ["sync", copied])
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    if Path(sshd).exists() and shutil.which("scp"):
        daemon, options = sshd_at(bench.place / "ssh", sshd)
        pull = ["scp", *options, "-P", str(PORT), f"127.0.0.1:{source}", copied]
        found["scp (unverified) + sync"] = lambda: bench.tool(daemon, pull, ["sync", copied])
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


def main() -> None:
    """Runs the rounds and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="on the disk to measure; default: the temporary directory")
    parser.add_argument("--hot", action="store_true", help="the source is in the page cache")
    options = parser.parse_args()
    size = max(BLOCK, int(options.gib * (1 << 30)) // BLOCK * BLOCK)
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        bench = Bench(Path(scratch), size, hot=options.hot)
        runs: dict[str, Callable[[], tuple[float, float]]] = {"herder movers": bench.ours, **tools(bench)}
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        limits: dict[str, list[float]] = {"write": [], "read": []}
        for _ in range(options.rounds):
            probe = Path(scratch) / "probe"
            limits["write"].append(size / 1e6 / direct(probe, size, writes=True))
            limits["read"].append(size / 1e6 / direct(probe, size, writes=False))
            probe.unlink()
            for name, run in runs.items():
                rows[name].append(run())
        bench.sender.close()
    show(size, limits, rows)


def show(size: int, limits: dict[str, list[float]], rows: dict[str, list[tuple[float, float]]]) -> None:
    """The table."""
    limit = min(statistics.median(limits["write"]), statistics.median(limits["read"]))
    print(f"{size / 1e9:.2f} GB over loopback, {os.cpu_count()} CPUs, medians of {len(limits['write'])} rounds")
    for name, values in limits.items():
        print(f"  {'O_DIRECT ' + name:32} {statistics.median(values):8.0f} MB/s  (best {max(values):.0f})")
    for name, pairs in rows.items():
        rate = size / 1e6 / statistics.median(elapsed for elapsed, _ in pairs)
        best = size / 1e6 / min(elapsed for elapsed, _ in pairs)
        spent = statistics.median(cpu for _, cpu in pairs) / (size / 1e9)
        print(f"  {name:32} {rate:8.0f} MB/s  (best {best:.0f})  {spent:.2f} CPU s/GB  {rate / limit:.2f} of the limit")
    print(f"bars: at least {BAR_RATE} of the disk's limit, at most {BAR_CPU} CPU s/GB")


if __name__ == "__main__":
    main()
