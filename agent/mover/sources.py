"""Where bytes come from: what every kind of source offers, and which kind a URL is.

An `Origin` is one source of one model. It lists files and gives connections; a connection is used by one thread and
opens byte ranges as `Stream`s. What fails is said by error type: `SourceFailed` may be tried again (`retry_after_s`
in its details when the source said when), `SourceChanged` means that other bytes stand there now, and
`SourceNotFound`, `SourceRefused`, `SizeMismatch`, `ExtraMissing`, `InvalidSource` are final for this source.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import msgspec

from agent.mover.config import MoverConfig
from agent.store import digests
from common.errors import InvalidSource, SourceFailed
from common.manifest import Manifest
from common.wire import Source

URL_CHARS = 2_048


class SourceChanged(SourceFailed):
    """The file at the source is not the one that was begun."""


class RemoteFile(msgspec.Struct, frozen=True):
    """One file at a source. size -1: not known; `validator` changes when the bytes do (empty: unknown)."""

    path: str
    size: int
    url: str
    sha256: str = ""
    validator: str = ""


class Listing(msgspec.Struct, frozen=True):
    """What a source has. Peers know a whole manifest."""

    files: tuple[RemoteFile, ...]
    manifest: Manifest | None = None


class Stream(Protocol):
    """One answer. `offset` is where it begins in the file: 0 when the source ignored the range that was asked."""

    offset: int
    total: int  # size of the whole file by this answer; -1: not said
    validator: str

    def readinto(self, view: memoryview) -> int:
        """Some bytes; 0 at the end. Raises: SourceFailed."""
        ...

    def close(self) -> None:
        """Ends the answer, whether read to its end or not."""
        ...


class Connection(Protocol):
    """Used by one thread, except `interrupt`."""

    def open(self, file: RemoteFile, offset: int, length: int) -> Stream:
        """The bytes [offset, offset + length) of a file; length -1: all from there."""
        ...

    def interrupt(self) -> None:
        """From another thread: makes a blocked read fail soon."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class Origin(Protocol):
    """One source of one model."""

    name: str  # for people: the URL, without secrets
    is_peer: bool
    connections: int

    def listing(self) -> Listing:
        """The files, with sizes. Raises: SourceFailed and the final errors."""
        ...

    def connect(self) -> Connection:
        """A connection; opened lazily."""
        ...

    def leaves(self, blob: str, size: int, chunk_bytes: int) -> bytes:
        """Peers only: the chunk digests of a blob, checked against its id."""
        ...

    def refresh(self, file: RemoteFile) -> RemoteFile:
        """Asks again about a file that has changed. Raises: as `listing`."""
        ...


def origin_for(source: Source, config: MoverConfig, is_cancelled: Callable[[], bool]) -> Origin:
    """The origin behind a URL. Raises: InvalidSource, Forbidden, ExtraMissing."""
    url = source.url
    if len(url) > URL_CHARS or any(ord(char) <= 32 or ord(char) == 127 for char in url):
        raise InvalidSource(f"{url[:80]!r} is not a source URL")
    scheme = url.partition(":")[0].lower()
    if scheme == "file":
        from agent.mover.source_file import FileOrigin

        return FileOrigin(url, [Path(root) for root in config.file_roots], config.connections_per_source)
    if scheme in ("http", "https"):
        from agent.mover.source_http import HttpOrigin

        return HttpOrigin(url, config)
    if scheme == "hf":
        from agent.mover.source_hf import HubOrigin

        return HubOrigin(url, config)
    if scheme == "ssh":
        from agent.mover.source_ssh import SshOrigin

        return SshOrigin(url, config, is_cancelled)
    if scheme == "peer":
        from agent.mover.source_peer import PeerOrigin

        return PeerOrigin(url, source.ticket, config)
    raise InvalidSource(f"{url[:80]!r}: unknown kind of source", hint="file, http, https, hf or ssh")


def split(url: str) -> tuple[str, int | None, str]:
    """(host, port, decoded path) of a URL. Raises: InvalidSource, also for a password in it."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidSource(f"{url[:80]!r}: {error}") from None
    if parts.password is not None:
        raise InvalidSource("a source URL must not carry a password", hint="use a token file or an ssh key")
    return parts.hostname or "", port, unquote(parts.path)


def checked(files: list[RemoteFile]) -> tuple[RemoteFile, ...]:
    """The list, if its paths are safe, distinct and not too many. Raises: InvalidPath, InvalidValue."""
    digests.check_paths([file.path for file in files])
    return tuple(files)
