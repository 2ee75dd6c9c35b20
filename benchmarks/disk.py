"""What a disk can do, measured on the very file of a benchmark: O_DIRECT reads, writes, and both at once."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from agent.residency import is_cached
from common import fsio

BLOCK = 4 << 20
READ_SETTINGS = ((1, 4 << 20), (2, 4 << 20), (4, 1 << 20), (2, 16 << 20))  # threads, bytes
FIO_SETTINGS = (("psync", 2, "4m", 1), ("io_uring", 1, "1m", 16))  # engine, jobs, block, depth


def make(path: Path, size: int) -> None:
    """A synced file of bytes that no layer can compress."""
    block = os.urandom(BLOCK)
    with path.open("wb") as file:
        for index in range(size // BLOCK):
            file.write(index.to_bytes(8, "little") + block[8:])
        file.flush()
        os.fsync(file.fileno())


def evict(path: Path) -> None:
    """Takes a file out of the page cache, and makes sure that it is."""
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(file.fileno()).st_size
        kept = sum(is_cached(file.fileno(), offset, BLOCK) for offset in range(0, size // BLOCK * BLOCK, BLOCK))
    if kept:
        raise RuntimeError(f"{kept} of {size // BLOCK} blocks of {path.name} stay in the page cache")


def warm(path: Path) -> None:
    """Reads a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def _share(size: int, threads: int, block: int, do: Callable[[memoryview, int], None]) -> float:
    """Seconds for all blocks of a file, taken in order by some threads with a buffer each."""
    offsets = itertools.count(0, block)

    def run() -> None:
        view = memoryview(fsio.aligned_buffer(block))
        while (offset := next(offsets)) < size:
            do(view, offset)

    began = time.monotonic()
    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return time.monotonic() - began


def read_s(path: Path, size: int, threads: int, block: int) -> float:
    """Seconds to read a file with O_DIRECT."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return _share(size, threads, block, lambda view, offset: _ignore(os.preadv(fd, [view], offset)))
    finally:
        os.close(fd)


def write_s(path: Path, size: int, threads: int, block: int, source: Path | None = None) -> float:
    """Seconds to write a file with O_DIRECT and fsync it; with a source, to read that one with O_DIRECT meanwhile."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    source_fd = os.open(source, os.O_RDONLY | os.O_DIRECT) if source is not None else -1

    def do(view: memoryview, offset: int) -> None:
        count = os.preadv(source_fd, [view], offset) if source_fd >= 0 else len(view)
        os.pwrite(fd, view[:count], offset)

    try:
        fsio.allocate(fd, size)
        began = time.monotonic()
        _share(size, threads, block, do)
        os.fsync(fd)
        return time.monotonic() - began
    finally:
        os.close(fd)
        if source_fd >= 0:
            os.close(source_fd)


def read_ways(path: Path, size: int) -> dict[str, Callable[[], float]]:
    """Ways to read a file past the page cache, each answering with its seconds; with fio too where it is there.

    The limit of a disk is the way with the best median over rounds in random order: the best single reading of a
    noisy disk would be compared with the typical one of something else.
    """

    def threads_way(threads: int, block: int) -> Callable[[], float]:
        return lambda: read_s(path, size, threads, block)

    def fio_way(engine: str, jobs: int, block: str, depth: int) -> Callable[[], float]:
        return lambda: _fio_read_s(path, size, engine, jobs, block, depth)

    ways = {f"{threads} threads x {block >> 20} MiB": threads_way(threads, block) for threads, block in READ_SETTINGS}
    if shutil.which("fio"):
        for engine, jobs, block_text, depth in FIO_SETTINGS:
            ways[f"fio {engine} {block_text} x{jobs} qd{depth}"] = fio_way(engine, jobs, block_text, depth)
    return ways


def read_limit_s(path: Path, size: int) -> tuple[float, str]:
    """(seconds, how) of the fastest of one reading in each way, the file evicted before each."""
    found = []
    for name, read in read_ways(path, size).items():
        evict(path)
        found.append((read(), name))
    return min(found)


def _fio_read_s(path: Path, size: int, engine: str, jobs: int, block: str, depth: int) -> float:
    share = size // jobs
    command = ["fio", "--name=read", f"--filename={path}", "--rw=read", "--readonly", "--direct=1", "--thread"]
    command += [f"--ioengine={engine}", f"--bs={block}", f"--iodepth={depth}", f"--numjobs={jobs}", f"--size={share}"]
    command += [f"--offset_increment={share}", "--group_reporting", "--output-format=json"]
    answer = subprocess.run(command, check=True, capture_output=True, timeout=600)
    return float(size / json.loads(answer.stdout)["jobs"][0]["read"]["bw_bytes"])


def _ignore(_: int) -> None:
    pass


def process_cpu_s(pid: int) -> float:
    """CPU seconds of a live process, all threads, in the kernel's ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
