"""Disk to RAM: a cold file made resident and locked by a holder process, beside the disk's own read limit.

    python -m benchmarks.warm [--gib 4] [--rounds 3] [--dir DIR]

Each round, on the same file, evicted before each step (and checked to be), in random order: it is read with O_DIRECT
in several ways, by threads and by fio where that is installed; it is held by a real holder (mincore says how much is
resident, and it is locked); it is copied to /dev/shm with cp. The limit is the way with the best median. Bars: at
least 0.85 of the limit and at most 0.05 CPU s/GB. GB = 1e9 bytes.
"""

from __future__ import annotations

import argparse
import os
import random
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

from agent import holder_protocol as protocol
from benchmarks import disk
from benchmarks.disk import BLOCK, evict, process_cpu_s

ROOT = Path(__file__).resolve().parents[1]
BAR_RATE, BAR_CPU = 0.85, 0.05


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
    parser.add_argument("--seed", type=int, default=1, help="of the random order")
    options = parser.parse_args()
    size = max(BLOCK, int(options.gib * (1 << 30)) // BLOCK * BLOCK)
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        directory = Path(scratch) / "model"
        directory.mkdir()
        path = directory / "m.bin"
        disk.make(path, size)
        ways = disk.read_ways(path, size)
        limits: dict[str, list[float]] = {name: [] for name in ways}
        held: list[tuple[float, float, float, bool]] = []
        copied: list[tuple[float, float]] = []

        def reading(name: str) -> Callable[[], None]:
            return lambda: limits[name].append(ways[name]())

        steps = [reading(name) for name in ways]
        steps.append(lambda: held.append(hold(Path(scratch), directory, size)))
        if shutil.disk_usage("/dev/shm").free > size:
            steps.append(lambda: copied.append(copy_to_shm(path)))
        order = random.Random(options.seed)
        evict(path)
        disk.read_s(path, size, 2, BLOCK)  # not counted: below a virtual machine's disk the host may have a cache
        for _ in range(options.rounds):
            for step in order.sample(steps, len(steps)):
                evict(path)
                step()
    show(size, limits, held, copied)


def show(
    size: int,
    limits: dict[str, list[float]],
    held: list[tuple[float, float, float, bool]],
    copied: list[tuple[float, float]],
) -> None:
    """The table: medians and best."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{size / 1e9:.2f} GB, {os.cpu_count()} CPUs, load {load}, medians (and best) of {len(held)} rounds")
    medians = {name: size / 1e6 / statistics.median(seconds) for name, seconds in limits.items()}
    limit = max(medians.values())
    for name, rate in sorted(medians.items(), key=lambda row: -row[1]):
        print(f"  {'O_DIRECT read, ' + name:36} {rate:6.0f} MB/s ({size / 1e6 / min(limits[name]):.0f})")
    rates = [size / 1e6 / row[0] for row in held]
    spent = [row[1] / (size / 1e9) for row in held]
    print(
        f"  {'holder':36} {statistics.median(rates):6.0f} MB/s ({max(rates):.0f})  {statistics.median(spent):.3f} CPU"
        f" s/GB ({min(spent):.3f})  {statistics.median(rates) / limit:.2f} of the limit, resident"
        f" {min(row[2] for row in held):.3f}, {'locked' if all(row[3] for row in held) else 'not locked'}"
    )
    if copied:
        rates = [size / 1e6 / elapsed for elapsed, _ in copied]
        spent = [cpu / (size / 1e9) for _, cpu in copied]
        print(
            f"  {'cp to /dev/shm':36} {statistics.median(rates):6.0f} MB/s ({max(rates):.0f})"
            f"  {statistics.median(spent):.3f} CPU s/GB ({min(spent):.3f})"
        )
    print(f"bars: at least {BAR_RATE} of the limit, at most {BAR_CPU} CPU s/GB")


if __name__ == "__main__":
    main()
