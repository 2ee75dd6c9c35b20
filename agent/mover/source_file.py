"""file:// sources: a file or a directory of this node, below one of the configured roots.

Confinement is checked on what was opened, not on what was named: after open(2) the kernel says (through
/proc/self/fd) where the file really is, so no symbolic link, however it changes meanwhile, leads outside. Links
that stay inside are followed, because that is how Hugging Face caches look. Names that begin with a dot are left out.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from agent.mover.sources import Listing, RemoteFile, SourceChanged, checked, split
from common import limits
from common.errors import Forbidden, InvalidSource, SourceFailed, SourceNotFound

DIRECTORY_DEPTH = 8


class FileStream:
    """A range of a local file."""

    def __init__(self, fd: int, file: RemoteFile, offset: int, length: int) -> None:
        status = os.fstat(fd)
        self.offset, self.total, self.validator = offset, status.st_size, _validator(status)
        self._fd, self._file, self._at = fd, file, offset
        self._end = offset + length if length >= 0 else status.st_size

    def readinto(self, view: memoryview) -> int:
        """Some bytes; 0 at the end. Raises: SourceFailed."""
        wanted = min(len(view), self._end - self._at)
        if wanted <= 0:
            if _validator(os.fstat(self._fd)) != self._file.validator:
                raise SourceChanged(f"{self._file.path}: changed while it was read")
            return 0
        try:
            count = os.preadv(self._fd, [view[:wanted]], self._at)
        except OSError as error:
            raise SourceFailed(f"{self._file.path}: {error.strerror}") from None
        if count == 0:
            raise SourceChanged(f"{self._file.path}: became shorter while it was read")
        self._at += count
        return count

    def close(self) -> None:
        """Nothing: the descriptor belongs to the connection."""


class FileConnection:
    """Keeps the file in hand open."""

    def __init__(self, roots: list[Path]) -> None:
        self._roots = roots
        self._open: tuple[str, int] | None = None

    def open(self, file: RemoteFile, offset: int, length: int) -> FileStream:
        """A range of the file. Raises: SourceChanged when it is not the listed one any more."""
        if self._open is None or self._open[0] != file.url:
            self.close()
            self._open = (file.url, open_confined(Path(file.url), self._roots))
        if _validator(os.fstat(self._open[1])) != file.validator:
            raise SourceChanged(f"{file.path}: changed after it was listed")
        return FileStream(self._open[1], file, offset, length)

    def descriptor(self, file: RemoteFile) -> int:
        """The file, opened; for a reflink."""
        self.open(file, 0, 0)
        assert self._open is not None
        return self._open[1]

    def interrupt(self) -> None:
        """Local reads end by themselves."""

    def close(self) -> None:
        """Closes the file in hand."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None


class FileOrigin:
    """One path."""

    is_peer = False

    def __init__(self, url: str, roots: list[Path], connections: int) -> None:
        host, _, path = split(url)
        if host not in ("", "localhost") or not path.startswith("/") or "\0" in path:
            raise InvalidSource(f"{url[:80]!r}: not file:///ABSOLUTE/PATH")
        if not roots:
            raise Forbidden(
                "file:// sources are off on this node", hint="name the allowed directories in the agent's file_roots"
            )
        self.name, self.connections = url, connections
        self._path = Path(path)
        self._roots = [root.resolve() for root in roots]

    def connect(self) -> FileConnection:
        """A reader."""
        return FileConnection(self._roots)

    def leaves(self, blob: str, size: int, chunk_bytes: int) -> bytes:
        """Plain directories have none."""
        raise SourceNotFound(f"{self.name} knows no chunk lists")

    def listing(self) -> Listing:
        """The file, or every file below the directory."""
        confine(self._path, self._roots)
        if not self._path.exists():
            raise SourceNotFound(f"{self.name}: it is not there")
        if not self._path.is_dir():
            return Listing(checked([self._describe(self._path.name, self._path)]))
        found: list[RemoteFile] = []
        self._walk(self._path, "", 0, found)
        return Listing(checked(found))

    def refresh(self, file: RemoteFile) -> RemoteFile:
        """Size and validator as they are now."""
        return self._describe(file.path, Path(file.url))

    def _walk(self, directory: Path, prefix: str, depth: int, found: list[RemoteFile]) -> None:
        if depth > DIRECTORY_DEPTH:
            raise InvalidSource(f"{self.name}: more than {DIRECTORY_DEPTH} directories deep")
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                self._walk(Path(entry.path), f"{prefix}{entry.name}/", depth + 1, found)
            elif entry.is_file():
                found.append(self._describe(f"{prefix}{entry.name}", Path(entry.path)))
            if len(found) > limits.MANIFEST_FILES:
                raise InvalidSource(f"{self.name}: more than {limits.MANIFEST_FILES} files")

    def _describe(self, path: str, place: Path) -> RemoteFile:
        fd = open_confined(place, self._roots)
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        return RemoteFile(path, status.st_size, str(place), validator=_validator(status))


def confine(path: Path, roots: list[Path]) -> Path:
    """The real path, if it lies below a root. Raises: Forbidden."""
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in roots):
        raise Forbidden(f"{path}: outside the directories that this node may read", hint="see file_roots of the agent")
    return real


def open_confined(path: Path, roots: list[Path]) -> int:
    """A regular file below a root, opened. Raises: Forbidden, SourceNotFound, SourceRefused via OSError text."""
    confine(path, roots)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise SourceNotFound(f"{path}: it is not there") from None
    except OSError as error:
        raise Forbidden(f"{path}: {error.strerror}") from None
    try:
        confine(Path(os.readlink(f"/proc/self/fd/{fd}")), roots)
        if not os.path.isfile(f"/proc/self/fd/{fd}"):
            raise InvalidSource(f"{path}: not a regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _validator(status: os.stat_result) -> str:
    return msgspec.json.encode([status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]).decode()
