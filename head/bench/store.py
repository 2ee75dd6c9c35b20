"""The folder of results: `<state_dir>/benchmarks/<benchmark>/...`.

    benchmark.json  report.html  summary.csv
    points/<number>/report.json  points/<number>/load.bin
    runs/<run>/<artifact>
    logs/<replica>.log

Every name is checked against a pattern before it becomes part of a path, so nothing outside the folder can be named.
Files appear whole and synced, or not at all. All of this blocks: it is called in threads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.errors import DiskFull, HerderError, Internal, InvalidName, NotFound
from common.fsio import allocate, make_directories, sync_directory, write_atomic

FOLDER = "benchmarks"
BENCHMARK_FILE = "benchmark.json"  # written with the rest of a whole result
LOAD_FILE = "load.bin"  # a run as its load node sent it, and a point as it was merged
REPORT_FILE = "report.json"
FILES_LISTED = 100_000
RESERVE_BYTES = 536_870_912  # of the disk that results leave alone, or RESERVE_PERCENT of a small one
RESERVE_PERCENT = 5
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_ARTIFACT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_TOP = frozenset({BENCHMARK_FILE, "report.html", "summary.csv"})
_FOLDERS = {"points": 3, "runs": 3, "logs": 2}  # how many names a path below has in all
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Kept(NamedTuple):
    """One file of a result: its name below the benchmark's folder."""

    name: str
    bytes: int


class Incoming:
    """A file on its way in: it takes its place with `commit`, or never."""

    def __init__(self, partial: Path, target: Path, size: int) -> None:
        self._partial, self._target = partial, target
        self._fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            allocate(self._fd, size)  # no room is known before the first byte
        except BaseException:
            self.discard()
            raise

    def write(self, data: bytes | bytearray) -> None:
        """Adds bytes. Raises: OSError."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def commit(self) -> None:
        """Syncs, gives it its name, syncs that. Raises: OSError."""
        os.fsync(self._fd)
        self._close()
        self._partial.rename(self._target)
        sync_directory(self._target.parent)

    def discard(self) -> None:
        """Nothing of it stays. May be called at any time, also after `commit`."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Store:
    """The results of all benchmarks."""

    def __init__(self, state_path: Path) -> None:
        self.root = state_path / FOLDER

    def folder(self, benchmark: str) -> Path:
        """A benchmark's folder, whether it is there or not. Raises: InvalidName."""
        return self.root / _checked(benchmark, _NAME)

    def point(self, benchmark: str, number: int) -> Path:
        """The folder of a point."""
        return self.folder(benchmark) / "points" / str(int(number))

    def run(self, benchmark: str, run: str) -> Path:
        """The folder of what a run sent. Raises: InvalidName."""
        return self.folder(benchmark) / "runs" / _checked(run, _NAME)

    def log(self, benchmark: str, replica: str) -> Path:
        """The log of a replica. Raises: InvalidName."""
        return self.folder(benchmark) / "logs" / f"{_checked(replica, _NAME)}.log"

    def find(self, benchmark: str, name: str) -> Path:
        """The path of a kept file by its name in `files`. Raises: NotFound, for whatever could not be one, too."""
        parts = name.split("/")
        is_known = name in _TOP or _FOLDERS.get(parts[0]) == len(parts)
        if not is_known or not all(_NAME.fullmatch(part) for part in parts):
            raise NotFound(f"no file {name[:200]!r} is kept with {benchmark}", hint="the list of files has the names")
        return self.folder(benchmark).joinpath(*parts)

    def open(self, benchmark: str, name: str) -> tuple[BinaryIO, int]:
        """An open kept file and its bytes. Raises: NotFound."""
        path = self.find(benchmark, name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            raise NotFound(f"no file {name[:200]!r} is kept with {benchmark}") from None
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            os.close(fd)
            raise NotFound(f"no file {name[:200]!r} is kept with {benchmark}")
        return os.fdopen(fd, "rb"), about.st_size

    def files(self, benchmark: str) -> list[Kept]:
        """What is kept, by name; files on their way in are not."""
        found = []
        for path, size in _walk(self.folder(benchmark)):
            found.append(Kept(path, size))
            if len(found) >= FILES_LISTED:
                break
        return sorted(found)

    def write(self, path: Path, data: bytes) -> None:
        """Writes a whole file in its folder. Raises: DiskFull."""
        with told():
            make_directories(path.parent, mode=0o700)
            write_kept(path, data)

    def incoming(self, benchmark: str, run: str, name: str, size: int) -> Incoming:
        """Makes room for an artifact of a run. Raises: DiskFull, InvalidName."""
        folder, name = self.run(benchmark, run), _checked(name, _ARTIFACT)
        with told():
            make_directories(folder, mode=0o700)
            check_room(folder, size)
            return Incoming(folder / f".{name}.{secrets.token_hex(6)}.part", folder / name, size)

    def artifacts(self, benchmark: str, run: str) -> dict[str, int]:
        """What a run has sent so far: names and bytes."""
        try:
            entries = list(os.scandir(self.run(benchmark, run)))
        except FileNotFoundError:
            return {}
        return {entry.name: entry.stat().st_size for entry in entries if not entry.name.startswith(".")}

    def remove(self, benchmark: str) -> None:
        """Deletes a benchmark's files. After a crash in the middle the next start goes on with it."""
        self._remove(self.folder(benchmark))

    def remove_leftovers(self, known: Collection[str]) -> tuple[int, list[str]]:
        """At the start: deletes parts of files, and what is left of benchmarks that the journal does not know.

        A whole result that it does not know stays where it is: a restored backup is older than the nights since, and
        nobody asked for those to go. Returns how many folders went, and the names of those whole results.
        """
        gone, strange = 0, []
        for entry in list(os.scandir(self.root)) if self.root.is_dir() else ():
            path = Path(entry.path)
            if entry.name not in known:
                if (path / BENCHMARK_FILE).is_file() and not entry.name.startswith("."):
                    strange.append(entry.name)
                    continue
                self._remove(path)
                gone += 1
            elif entry.is_dir(follow_symlinks=False):
                for part in path.rglob(".*"):
                    part.unlink(missing_ok=True)
        return gone, sorted(strange)

    def _remove(self, path: Path) -> None:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        doomed = path if path.name.startswith(".removed-") else self.root / f".removed-{secrets.token_hex(6)}"
        with contextlib.suppress(FileNotFoundError):
            if doomed != path:
                path.rename(doomed)  # gone under its name at once, however long the rest takes
            shutil.rmtree(doomed, ignore_errors=True)


def write_kept(path: Path, data: bytes) -> None:
    """Writes a whole file of a result where there is room for one. Raises: OSError."""
    check_room(path.parent, len(data))
    write_atomic(path, data)


def check_room(folder: Path, size: int) -> None:
    """That results leave the journal, which may lie on the same disk, room to write. Raises: OSError ENOSPC."""
    found = os.statvfs(folder)
    reserve = min(RESERVE_BYTES, found.f_blocks * found.f_frsize * RESERVE_PERCENT // 100)
    if found.f_bavail * found.f_frsize - size < reserve:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turns what the disk says into our errors. Raises: DiskFull, Internal."""
    try:
        yield
    except OSError as error:
        raise as_error(error) from None


def as_error(error: OSError) -> HerderError:
    """An error of the disk as ours; paths stay out of it."""
    if error.errno in _NO_ROOM:
        return DiskFull(
            "the head's disk is full", hint="make room at the head; `herder benchmarks delete` removes old results"
        )
    return Internal(f"the head cannot write results: {os.strerror(error.errno or 0)}")


def check_artifact(name: str) -> str:
    """The name of an artifact. Raises: InvalidName."""
    return _checked(name, _ARTIFACT)


def _checked(text: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(text) or ".." in text:
        raise InvalidName(f"{text[:80]!r} is not a name here", hint="letters, digits, '.', '_' and '-'")
    return text


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Files below a folder that have a name in `find`, without following links."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(folder).relative_to(root)
        for name in names:
            relative = str(inside / name)
            parts = relative.split("/")
            if name.startswith(".") or not (relative in _TOP or _FOLDERS.get(parts[0]) == len(parts)):
                continue
            with contextlib.suppress(OSError):
                about = os.lstat(os.path.join(folder, name))
                if stat.S_ISREG(about.st_mode):
                    yield relative, about.st_size
