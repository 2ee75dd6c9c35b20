"""Disk to RAM: a cold file made resident and locked by a holder process, beside the disk's own read limit.

    python -m benchmarks.warm [--gib 4] [--rounds 3] [--dir DIR]

Each round: the file is evicted and read with O_DIRECT (the limit), evicted and held by a real holder (mincore says
how much is resident), evicted and copied to /dev/shm with cp. Bars: at least 0.85 of the limit and at most 0.05 CPU
s/GB. GB = 1e9 bytes.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agent import holder_protocol as protocol
from common import fsio

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 4 << 20
BAR_RATE, BAR_CPU = 0.85, 0.05


def evict(path: Path) -> None:
    """Takes a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def read_direct(path: Path, size: int) -> float:
    """Seconds to read the file with O_DIRECT by two threads."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def share(begin: int, end: int) -> None:
        buffer = fsio.aligned_buffer(BLOCK)
        for offset in range(begin, end, BLOCK):
            os.preadv(fd, [buffer], offset)

    half = size // BLOCK // 2 * BLOCK
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(share, 0, half), pool.submit(share, half, size)]:
            future.result()
    elapsed = time.monotonic() - began
    os.close(fd)
    return elapsed


def hold(scratch: Path, directory: Path, size: int) -> tuple[float, float, float, bool]:
    """(seconds, CPU seconds, resident share, locked) of one hold by a fresh holder."""
    path = scratch / "run" / "holder.sock"
    command = [sys.executable, "-P", "-m", "agent.holder", "--socket", str(path), "--budget", str(2 * size)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    channel = connect(path)
    stream = channel.makefile("rb")

    def read() -> protocol.AnyAnswer:
        answer: protocol.AnyAnswer = protocol.answers.decode(stream.read(protocol.LENGTH.unpack(stream.read(4))[0]))
        return answer

    def ask(request: protocol.Request) -> protocol.Done:
        channel.sendall(protocol.frame(request))
        while not isinstance(answer := read(), protocol.Done):
            pass
        return answer

    read()
    before = process_cpu_s(process.pid)
    began = time.monotonic()
    done = ask(protocol.Hold("1", "m", str(directory)))
    elapsed = time.monotonic() - began
    spent = process_cpu_s(process.pid) - before
    assert done.error is None, done.error
    holding = done.holdings[0]
    ask(protocol.Stop("2"))
    stream.close()
    channel.close()
    process.wait(timeout=60)
    return elapsed, spent, holding.resident / holding.bytes, holding.is_locked


def connect(path: Path) -> socket.socket:
    """A connection to a holder that is starting."""
    deadline = time.monotonic() + 10
    while True:
        channel = socket.socket(socket.AF_UNIX)
        try:
            channel.connect(str(path))
        except OSError:
            channel.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return channel


def process_cpu_s(pid: int) -> float:
    """CPU seconds of a live process, in clock ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def copy_to_shm(path: Path) -> tuple[float, float]:
    """(seconds, CPU seconds) of cp into /dev/shm."""
    target = Path("/dev/shm") / f"herder-warm-{os.getpid()}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    try:
        subprocess.run(["cp", str(path), str(target)], check=True)
    finally:
        target.unlink(missing_ok=True)
    elapsed = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Runs the rounds and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="on the disk to measure; default: the temporary directory")
    options = parser.parse_args()
    size = max(BLOCK, int(options.gib * (1 << 30)) // BLOCK * BLOCK)
    limits, held, copied = [], [], []
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        directory = Path(scratch) / "model"
        directory.mkdir()
        path = directory / "m.bin"
        block = os.urandom(BLOCK)
        with path.open("wb") as file:
            for _ in range(size // BLOCK):
                file.write(block)
        evict(path)
        read_direct(path, size)  # not counted: below a virtual machine's disk the host may have a cache of its own
        has_room = shutil.disk_usage("/dev/shm").free > size
        for _ in range(options.rounds):
            evict(path)
            limits.append(read_direct(path, size))
            evict(path)
            held.append(hold(Path(scratch), directory, size))
            if has_room:
                evict(path)
                copied.append(copy_to_shm(path))
    show(size, limits, held, copied)


def show(
    size: int, limits: list[float], held: list[tuple[float, float, float, bool]], copied: list[tuple[float, float]]
) -> None:
    """The table."""
    limit = statistics.median(size / 1e6 / elapsed for elapsed in limits)
    rate = statistics.median(size / 1e6 / row[0] for row in held)
    spent = statistics.median(row[1] for row in held) / (size / 1e9)
    locked = all(row[3] for row in held)
    print(f"{size / 1e9:.2f} GB, medians of {len(limits)} rounds")
    print(f"  {'O_DIRECT read (the limit)':28} {limit:8.0f} MB/s")
    print(
        f"  {'holder':28} {rate:8.0f} MB/s  {spent:.3f} CPU s/GB  {rate / limit:.2f} of the limit, resident"
        f" {min(row[2] for row in held):.3f}, {'locked' if locked else 'not locked'}"
    )
    if copied:
        rate = statistics.median(size / 1e6 / elapsed for elapsed, _ in copied)
        spent = statistics.median(cpu for _, cpu in copied) / (size / 1e9)
        print(f"  {'cp to /dev/shm':28} {rate:8.0f} MB/s  {spent:.3f} CPU s/GB  {rate / limit:.2f} of the limit")
    print(f"bars: at least {BAR_RATE} of the limit, at most {BAR_CPU} CPU s/GB")


if __name__ == "__main__":
    main()
