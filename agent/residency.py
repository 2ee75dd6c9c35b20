"""Pages of files in RAM: mapped, populated, locked and counted, by the calls that Python holds its lock for or lacks.

ctypes releases the interpreter lock during each call, so populating 64 MiB does not stop the other threads. A window
is mapped with MADV_HUGEPAGE over a reserved, aligned address range and populated by one call: the kernel reads it in
folios of 2 MiB where the file system has them, straight into the page cache, and one entry of the page table and one
lock then stand for 512 pages. That costs a sixth of the CPU of MAP_POPULATE alone; later faults of engines gain too.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.errors import Cancelled, HerderError, NotFound, SourceFailed

WINDOW_BYTES = 64 << 20
THREADS = 4  # each keeps a few MiB in flight; measured best, eight gain nothing
PAGE_BYTES = mmap.PAGESIZE
HUGE_BYTES = 2 << 20

_PROT_NONE, _PROT_READ = 0, 1
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_MAP_NORESERVE, _MAP_POPULATE = 0x4000, 0x8000
_MADV_HUGEPAGE, _MADV_POPULATE_READ = 14, 22
_CACHESTAT = 451  # the same number on every architecture
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_int64)
for _name in ("munmap", "mlock", "munlock"):
    getattr(_libc, _name).argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def pages_bytes(size: int) -> int:
    """Bytes of RAM that a file of this size takes."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


class _CachestatRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


def is_cached(fd: int, offset: int, length: int) -> bool:
    """Whether a range of a file is wholly in the page cache. `offset` is a multiple of the page size.

    By cachestat(2) (a microsecond for 4 MiB), before Linux 6.5 by mincore. True where the kernel does not tell.
    """
    pages = pages_bytes(length) // PAGE_BYTES
    if pages == 0:
        return True
    counts = (ctypes.c_uint64 * 5)()
    wanted = _CachestatRange(offset, length)
    if _libc.syscall(ctypes.c_long(_CACHESTAT), fd, ctypes.byref(wanted), counts, 0) == 0:
        return int(counts[0]) >= pages
    try:
        address = _map(0, length, _PROT_READ, _MAP_SHARED, fd, offset)
    except OSError:
        return True
    vector = ctypes.create_string_buffer(pages)
    told = _libc.mincore(address, length, vector) == 0
    _libc.munmap(address, length)
    return not told or vector.raw[:pages].translate(_LOW_BIT).count(1) == pages


class MappedFile:
    """One file mapped for reading over one address range. Never dereferenced here, so a cut file cannot kill us."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFound(f"{path}: {error.strerror}") from None
        self.size = os.fstat(self._fd).st_size
        self.length = pages_bytes(self.size)
        self._address = self._reserved = 0
        self.is_locked = False
        if self.length:
            flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
            self._reserved = _map(0, self.length + HUGE_BYTES, _PROT_NONE, flags, -1, 0)
            self._address = -(-self._reserved // HUGE_BYTES) * HUGE_BYTES  # so that huge pages fit

    def populate(self, offset: int, *, locks: bool) -> int:
        """Makes one window resident, and locks it if asked; returns its bytes. Raises: SourceFailed, OSError."""
        length = min(WINDOW_BYTES, self.length - offset)
        at = self._address + offset
        _map(at, length, _PROT_READ, _MAP_SHARED | _MAP_FIXED, self._fd, offset)
        _libc.madvise(at, length, _MADV_HUGEPAGE)  # a wish; the kernel may not have it
        if _libc.madvise(at, length, _MADV_POPULATE_READ) != 0:
            number = ctypes.get_errno()
            if number == errno.EINVAL:  # before Linux 5.14
                _map(at, length, _PROT_READ, _MAP_SHARED | _MAP_FIXED | _MAP_POPULATE, self._fd, offset)
            elif number not in (errno.EAGAIN, errno.ENOMEM):
                raise SourceFailed(f"{self.path}: {os.strerror(number)}")
        if locks and _libc.mlock(at, length) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return min(length, self.size - offset)

    def resident_bytes(self) -> int:
        """Bytes in RAM now, by mincore."""
        total = 0
        vector = ctypes.create_string_buffer(WINDOW_BYTES // PAGE_BYTES)
        for offset in range(0, self.length, WINDOW_BYTES):
            length = min(WINDOW_BYTES, self.length - offset)
            if _libc.mincore(self._address + offset, length, vector) != 0:
                continue  # a window that is not mapped yet
            pages = length // PAGE_BYTES
            total += PAGE_BYTES * vector.raw[:pages].translate(_LOW_BIT).count(1)
        return min(total, self.size)

    def close(self) -> None:
        """Unlocks and unmaps; the pages stay as cache until the kernel wants them."""
        if self._address:
            _libc.munmap(self._reserved, self.length + HUGE_BYTES)
            self._address = self._reserved = 0
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class MappedSet:
    """The files of one holding."""

    def __init__(self, paths: list[Path]) -> None:
        self._files: list[MappedFile] = []
        try:
            for path in paths:
                self._files.append(MappedFile(path))
        except HerderError:
            self.close()
            raise
        self.bytes = sum(file.size for file in self._files)
        self.page_bytes = sum(file.length for file in self._files)
        self.is_locked = False

    def populate(self, cancelled: threading.Event, progress: Callable[[int], None], *, locks: bool) -> None:
        """Reads everything in, in windows; locks as far as the kernel allows. Raises: Cancelled, SourceFailed."""
        refused = threading.Event()

        def one(file: MappedFile, offset: int) -> None:
            if cancelled.is_set():
                raise Cancelled("stopped on request")
            try:
                done = file.populate(offset, locks=locks and not refused.is_set())
            except OSError as error:
                if error.errno not in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
                    raise SourceFailed(f"{file.path}: {error.strerror}") from None
                refused.set()  # not allowed to lock so much: resident without a lock
                done = file.populate(offset, locks=False)
            progress(done)

        windows = [(file, offset) for file in self._files for offset in range(0, file.length, WINDOW_BYTES)]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="populate") as pool:
            for future in [pool.submit(one, *window) for window in windows]:
                future.result()
        self.is_locked = locks and not refused.is_set()

    def resident_bytes(self) -> int:
        """Bytes of all files in RAM now."""
        return sum(file.resident_bytes() for file in self._files)

    def close(self) -> None:
        """Lets go of all of it."""
        for file in self._files:
            file.close()


def why_not_lock() -> str:
    """Why this process cannot lock memory freely; empty when it can."""
    import resource

    capabilities = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            capabilities = int(line.split()[1], 16)
    if capabilities & 1 << 14:  # CAP_IPC_LOCK
        return ""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return ""
    return f"RLIMIT_MEMLOCK is {hard} bytes and CAP_IPC_LOCK is missing"


def _map(address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    found = _libc.mmap(address or None, length, prot, flags, fd, offset)
    if found == _FAILED or found is None:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(found)


_LOW_BIT = bytes(value & 1 for value in range(256))
