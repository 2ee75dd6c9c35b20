"""File I/O that survives a power cut, and the Linux calls that Python does not wrap.

Everything here blocks; it is called from threads (or at start and end), never from an event loop that has leases
to keep. `Files` is the seam through which the store touches the disk where the order of writes and syncs is
what makes it crash-safe: tests put a disk that loses unsynced writes behind it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import secrets
from pathlib import Path

ALIGN_BYTES = 4096  # what O_DIRECT asks of offsets, lengths and addresses on every file system we know
HUGE_BYTES = 2 << 20
TRUNCATE_STEP_BYTES = 256 << 20  # one unlink of 4 GiB holds the journal of ext4 for seconds; steps do not

_FICLONE = 0x40049409
_SYNC_FILE_RANGE_WAIT_BEFORE, _SYNC_FILE_RANGE_WRITE, _SYNC_FILE_RANGE_WAIT_AFTER = 1, 2, 4
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.EXDEV, errno.EPERM}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

FILESYSTEM_NAMES = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x2FC12FC1: "zfs",
    0x01021994: "tmpfs",
    0x794C7630: "overlayfs",
    0x65735546: "fuse",
    0x6969: "nfs",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0x00C36400: "ceph",
    0xFF534D42: "cifs",
}
SHARED_FILESYSTEMS = frozenset({"nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs"})


class Files:
    """The calls whose order makes the store crash-safe. Tests subclass it; production uses it as it is."""

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        """Writes all of `data` at `offset`."""
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written

    def sync_data(self, fd: int) -> None:
        """Makes the file's data (and its size) durable."""
        os.fdatasync(fd)

    def sync(self, fd: int) -> None:
        """Makes the file's data and attributes durable."""
        os.fsync(fd)

    def sync_directory(self, path: Path) -> None:
        """Makes the names in a directory durable."""
        sync_directory(path)

    def link(self, source: Path, target: Path) -> None:
        """A hard link; FileExistsError when someone else was first."""
        os.link(source, target, follow_symlinks=False)

    def rename(self, source: Path, target: Path) -> None:
        """rename(2)."""
        source.rename(target)


def sync_directory(path: Path) -> None:
    """fsync of a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """The file has either its old or the new content, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        try:
            os.fchmod(fd, mode)
            Files().pwrite(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def make_directories(path: Path, *, mode: int = 0o755) -> None:
    """`mkdir -p` whose new names are durable."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode)
        sync_directory(directory.parent)


def align_up(size: int) -> int:
    """`size` rounded up to what O_DIRECT can write."""
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


def aligned_buffer(size: int) -> mmap.mmap:
    """Page-aligned anonymous memory of at least `size` bytes, for O_DIRECT; freed with its last view.

    In huge pages where the kernel gives them: one page to pin per 2 MiB instead of 512, and fewer misses in hashing.
    """
    buffer = mmap.mmap(-1, max(align_up(size), ALIGN_BYTES))
    if len(buffer) >= HUGE_BYTES:
        with contextlib.suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def allocate(fd: int, size: int) -> bool:
    """fallocate(2): True when the bytes are reserved, False when the file system cannot (ZFS, some NFS).

    Not posix_fallocate: glibc emulates it by writing, which costs what the download itself costs.
    Raises: OSError ENOSPC (or EDQUOT) when there is no room.
    """
    if size <= 0:
        return True
    while _libc.fallocate(fd, 0, 0, size) != 0:
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number in _NOT_SUPPORTED:
            return False
        raise OSError(number, os.strerror(number))
    return True


def start_writeback(fd: int, offset: int, length: int, *, wait: bool = False) -> None:
    """sync_file_range(2): starts (or waits for) writing dirty pages; a hint, so errors mean nothing."""
    flags = _SYNC_FILE_RANGE_WRITE
    if wait:
        flags |= _SYNC_FILE_RANGE_WAIT_BEFORE | _SYNC_FILE_RANGE_WAIT_AFTER
    _libc.sync_file_range(fd, offset, length, flags)


def clone(source_fd: int, target_fd: int) -> bool:
    """Reflink: the target shares the source's blocks. False where the file system cannot."""
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return False
        raise
    return True


def filesystem_magic(path: Path) -> int:
    """statfs(2) f_type; 0 when it cannot be read."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        return 0
    return int.from_bytes(buffer.raw[:8], "little") & 0xFFFFFFFF


def filesystem_name(path: Path) -> str:
    """The file system's name by its magic number, or the number in hex."""
    magic = filesystem_magic(path)
    return FILESYSTEM_NAMES.get(magic, hex(magic))


def supports_direct(directory: Path) -> bool:
    """Whether a file here can be written with O_DIRECT, by doing it."""
    probe = directory / f".direct.{secrets.token_hex(6)}"
    buffer = aligned_buffer(ALIGN_BYTES)
    try:
        fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        try:
            return os.pwrite(fd, buffer, 0) == ALIGN_BYTES and os.preadv(fd, [buffer], 0) == ALIGN_BYTES
        finally:
            os.close(fd)
    except OSError:
        return False
    finally:
        buffer.close()
        with contextlib.suppress(OSError):
            probe.unlink()


def free_file(path: Path) -> int:
    """Unlinks a file; returns the bytes freed. A large one is first shortened in steps, if that harms nobody.

    Shortening a file that an engine has mapped would kill the engine (SIGBUS), and shortening one that has
    another hard link would destroy a blob. So: only with one link left, and only under a write lease, which the
    kernel grants when nobody else has the file open. Else a plain unlink: the kernel frees at the last close.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    if status.st_nlink == 1 and status.st_size > TRUNCATE_STEP_BYTES and not path.is_symlink():
        _shorten(path, status.st_size)
    path.unlink(missing_ok=True)
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def _shorten(path: Path, size: int) -> None:
    try:
        path.chmod(0o600)
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        while size > 0 and os.fstat(fd).st_nlink == 1:
            size = max(0, size - TRUNCATE_STEP_BYTES)
            os.ftruncate(fd, size)
    except OSError:
        pass  # no leases here, or someone has it open: the plain unlink that follows is right in both cases
    finally:
        os.close(fd)
