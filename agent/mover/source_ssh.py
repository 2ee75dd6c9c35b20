"""ssh://USER@HOST[:PORT]/PATH sources: a file or a directory over SFTP, with asyncssh.

asyncssh is asyncio, the mover is threads: each source has one thread with a loop of its own, and blocking calls hand
coroutines to it, each with a timeout. Host keys are always checked: without a known_hosts file nothing is fetched.
The user's ssh configuration is not read, so that a node does what its own settings say.
"""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
import stat
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from agent.mover.config import MoverConfig
from agent.mover.sources import Listing, RemoteFile, SourceChanged, checked, split
from common import limits
from common.errors import ExtraMissing, HerderError, InvalidSource, SourceFailed, SourceNotFound, SourceRefused

T = TypeVar("T")
PIECE_BYTES = 1 << 20
DIRECTORY_DEPTH = 8


class SshStream:
    """A range of a remote file."""

    def __init__(self, origin: SshOrigin, handle: Any, file: RemoteFile, offset: int, length: int) -> None:
        self.offset, self.total, self.validator = offset, file.size, file.validator
        self._origin, self._handle, self._path = origin, handle, file.path
        self._at, self._end = offset, offset + (length if length >= 0 else file.size - offset)

    def readinto(self, view: memoryview) -> int:
        """Some bytes; 0 at the end. Raises: SourceFailed."""
        wanted = min(len(view), self._end - self._at, PIECE_BYTES)
        if wanted <= 0:
            return 0
        data: bytes = self._origin.call(self._handle.read(wanted, self._at))
        if not data:
            raise SourceChanged(f"{self._path}: became shorter while it was read")
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Closes the remote handle."""
        with contextlib.suppress(HerderError):
            self._origin.call(self._handle.close())


class SshConnection:
    """A view of the source's one SSH connection."""

    def __init__(self, origin: SshOrigin) -> None:
        self._origin = origin

    def open(self, file: RemoteFile, offset: int, length: int) -> SshStream:
        """A range of the file. Raises: SourceChanged when it is not the listed one any more."""
        now = self._origin.describe(file.path, file.url)
        if now.validator != file.validator:
            raise SourceChanged(f"{file.path}: changed after it was listed")
        handle = self._origin.call(self._origin.open_remote(file.url))
        return SshStream(self._origin, handle, file, offset, length)

    def interrupt(self) -> None:
        """Drops the SSH connection, which ends every read on it."""
        self._origin.drop()

    def close(self) -> None:
        """Nothing: the SSH connection is shared and ends with the source."""


class SshOrigin:
    """One path on one host."""

    is_peer = False

    def __init__(self, url: str, config: MoverConfig, is_cancelled: Callable[[], bool]) -> None:
        host, port, path = split(url)
        user = urlsplit(url).username
        if not host or not path.startswith("/") or "\0" in path:
            raise InvalidSource(f"{url[:80]!r}: not ssh://USER@HOST[:PORT]/PATH")
        try:
            import asyncssh
        except ImportError:
            raise ExtraMissing("ssh:// sources need asyncssh", hint="pip install 'herder[ssh]'") from None
        self._asyncssh = asyncssh
        self.name, self.connections = url, config.connections_per_source
        self._host, self._port, self._user, self._path = host, port or 22, user, path
        self._settings, self._timeout_s = config.ssh, config.read_timeout_s
        self._is_cancelled = is_cancelled
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: Any = None
        self._sftp: Any = None

    def connect(self) -> SshConnection:
        """A view of the shared connection."""
        return SshConnection(self)

    def leaves(self, blob: str, size: int, chunk_bytes: int) -> bytes:
        """Plain hosts have none."""
        raise SourceNotFound(f"{self.name} knows no chunk lists")

    def listing(self) -> Listing:
        """The file, or every file below the directory."""
        attributes = self.call(self._stat(self._path))
        if not stat.S_ISDIR(attributes.permissions or 0):
            return Listing(checked([self.describe(posixpath.basename(self._path), self._path)]))
        found: list[RemoteFile] = []
        self._walk(self._path.rstrip("/"), "", 0, found)
        return Listing(checked(found))

    def refresh(self, file: RemoteFile) -> RemoteFile:
        """Size and validator as they are now."""
        return self.describe(file.path, file.url)

    def describe(self, path: str, place: str) -> RemoteFile:
        """One remote file."""
        attributes = self.call(self._stat(place))
        if not stat.S_ISREG(attributes.permissions or 0) or attributes.size is None:
            raise InvalidSource(f"{place[:200]}: not a regular file")
        return RemoteFile(path, attributes.size, place, validator=f"{attributes.size}-{attributes.mtime}")

    def _walk(self, directory: str, prefix: str, depth: int, found: list[RemoteFile]) -> None:
        if depth > DIRECTORY_DEPTH:
            raise InvalidSource(f"{self.name}: more than {DIRECTORY_DEPTH} directories deep")
        for name, is_directory in self.call(self._entries(directory)):
            if is_directory:
                self._walk(f"{directory}/{name}", f"{prefix}{name}/", depth + 1, found)
                continue
            with contextlib.suppress(InvalidSource):  # sockets and links to directories are no model files
                found.append(self.describe(prefix + name, f"{directory}/{name}"))
            if len(found) > limits.MANIFEST_FILES:
                raise InvalidSource(f"{self.name}: more than {limits.MANIFEST_FILES} files")

    # on the loop
    async def _stat(self, place: str) -> Any:
        return await (await self._client()).stat(place)

    async def open_remote(self, place: str) -> Any:
        """The remote file, opened for reading."""
        return await (await self._client()).open(place, "rb")

    async def _entries(self, directory: str) -> list[tuple[str, bool]]:
        rows = []
        for entry in await (await self._client()).readdir(directory):
            name = str(entry.filename)
            if not name.startswith(".") and "/" not in name:
                rows.append((name, stat.S_ISDIR(entry.attrs.permissions or 0)))
        return sorted(rows)

    async def _client(self) -> Any:
        if self._sftp is None:
            known_hosts = self._known_hosts()
            options: dict[str, Any] = (
                {"client_keys": list(self._settings.key_files)} if self._settings.key_files else {}
            )
            if self._user:
                options["username"] = self._user
            self._connection = await self._asyncssh.connect(
                self._host,
                self._port,
                known_hosts=str(known_hosts),
                config=None,
                connect_timeout=self._settings.connect_timeout_s,
                login_timeout=self._settings.connect_timeout_s,
                keepalive_interval=15,
                **options,
            )
            self._sftp = await self._connection.start_sftp_client()
        return self._sftp

    def _known_hosts(self) -> Path:
        path = Path(self._settings.known_hosts or "~/.ssh/known_hosts").expanduser()
        if not path.is_file():
            raise SourceRefused(
                f"{self.name}: host keys cannot be checked, {path} is missing",
                hint="put the host's key there, for example with ssh-keyscan, and compare it",
            )
        return path

    # from threads
    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the source's loop. Raises: SourceFailed and the final errors."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name=f"ssh-{self._host}", daemon=True).start()
            loop = self._loop
        future = asyncio.run_coroutine_threadsafe(self._serial(work), loop)
        try:
            return future.result(timeout=self._timeout_s)
        except TimeoutError:
            future.cancel()
            self.drop()
            raise SourceFailed(f"{self.name}: no answer in {self._timeout_s:.0f} s") from None
        except HerderError:
            raise
        except OSError as error:
            self.drop()
            raise SourceFailed(f"{self.name}: {error}") from None
        except self._asyncssh.Error as error:
            raise self._translated(error) from None

    async def _serial(self, work: Coroutine[Any, Any, T]) -> T:
        """Connects under a lock of the loop, so that threads that come together make one connection."""
        if not hasattr(self, "_connecting"):
            self._connecting = asyncio.Lock()
        if self._sftp is None:
            async with self._connecting:
                await self._client()
        return await work

    def _translated(self, error: Exception) -> HerderError:
        ssh = self._asyncssh
        text = f"{self.name}: {str(error)[:200] or type(error).__name__}"
        if isinstance(error, ssh.SFTPNoSuchFile | ssh.SFTPNoSuchPath):
            return SourceNotFound(text)
        if isinstance(error, ssh.HostKeyNotVerifiable):
            return SourceRefused(text, hint="the host's key is not in known_hosts, or is another one")
        if isinstance(error, ssh.PermissionDenied | ssh.SFTPPermissionDenied):
            return SourceRefused(text, hint="the key is not accepted, or the file not readable there")
        self.drop()
        return SourceFailed(text)

    def drop(self) -> None:
        """Aborts the SSH connection; the next call opens a new one."""
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        connection, self._connection, self._sftp = self._connection, None, None
        if connection is not None:
            connection.abort()

    def close(self) -> None:
        """Ends the connection and the loop's thread."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(self._abort)
            loop.call_soon_threadsafe(loop.call_soon, loop.stop)
