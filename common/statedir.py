"""The directory that a daemon owns: made 0700, on a local file system, locked by exactly one process.

SQLite's WAL and flock cannot be trusted over a network file system, where two daemons could both believe that they
are the owner; such a place is refused unless the operator insists.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from pathlib import Path

from common.errors import InvalidConfig, StateLocked

OWNER_FILE = "owner"
# f_type of statfs(2), from linux/magic.h and the file systems' own sources
NETWORK_FILE_SYSTEMS = {
    0x6969: "nfs",
    0x517B: "smb",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x65735546: "fuse",
    0x00C36400: "ceph",
    0x01021997: "9p",
    0x5346414F: "afs",
    0x6B414653: "afs",
    0x73757245: "coda",
    0x7461636F: "ocfs2",
    0x01161970: "gfs2",
    0x19830326: "beegfs",
    0xAAD7AAEA: "panfs",
    0x20030528: "orangefs",
}


def file_system_magic(path: Path) -> int:
    """f_type of the file system below a path. Raises: OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(512)  # struct statfs is 120 bytes; its first word is f_type
    if libc.statfs(os.fsencode(path), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    word = ctypes.sizeof(ctypes.c_long)
    return int.from_bytes(buffer.raw[:word], sys.byteorder) & 0xFFFFFFFF


def network_file_system(path: Path) -> str:
    """The name of the network file system that a path lies on, or "" when it is a local one."""
    return NETWORK_FILE_SYSTEMS.get(file_system_magic(path), "")


class StateDir:
    """An owned state directory; `close` gives it up."""

    def __init__(self, path: Path, owner_fd: int) -> None:
        self.path = path
        self._owner_fd = owner_fd

    @classmethod
    def open(cls, path: Path, *, daemon: str, allow_network_fs: bool = False) -> StateDir:
        """Makes the directory where needed and becomes its owner.

        Raises: StateLocked when another process owns it, InvalidConfig when the place is not usable.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            network = network_file_system(path)
        except OSError as error:
            raise InvalidConfig(
                f"state_dir: {path}: {error.strerror}", hint="set state_dir to a local folder that this user may write"
            ) from None
        if network and not allow_network_fs:
            raise InvalidConfig(
                f"state_dir: {path} lies on {network}, a network file system",
                hint="use a local disk; allow_network_fs: true overrides this and risks the state",
            )
        return cls(path, _lock(path / OWNER_FILE, daemon))

    def close(self) -> None:
        """Gives the directory up."""
        if self._owner_fd >= 0:
            os.close(self._owner_fd)  # ends the lock
            self._owner_fd = -1


def write_secret(path: Path, text: str) -> None:
    """Writes a 0600 file of one line, whole or not at all, and makes it durable."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(descriptor)
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path, daemon: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InvalidConfig(f"state_dir: {path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise StateLocked(
            f"{path.parent} is owned by a running {daemon} ({owner or 'unknown process'})",
            hint="stop it first, or give this one another state_dir",
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {os.getpid()}\n".encode(), 0)
    return descriptor
