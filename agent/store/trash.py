"""Deleting: a rename that takes no time, then a thread that gives the bytes back slowly.

Whatever is to go is renamed into trash/ first, so it is gone for everyone at once and a crash forgets nothing: what
stands in trash/ at start is simply freed. Files are freed by `fsio.free_file`, which shortens large ones in steps
and never shortens a file that an engine has open or that has another name.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from agent.store.layout import Layout
from common import fsio


class Trash:
    """The trash of one store and the thread that empties it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._is_stopping = False
        self._pending: dict[Path, int] = {}  # entry -> bytes it will give back
        self._thread = threading.Thread(target=self._run, name="trash", daemon=True)

    def start(self) -> None:
        """Begins, with what an earlier mover of this name left over."""
        for entry in self._layout.trash.iterdir():
            if self._layout.is_mine(entry.name):
                self._add(entry)
        self._thread.start()

    def stop(self) -> None:
        """Ends after the file in hand; the rest is freed by the next mover."""
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def discard(self, path: Path) -> Path | None:
        """Moves a file or directory into the trash; None when it is not there."""
        entry = self._layout.new_trash()
        try:
            path.rename(entry)
        except FileNotFoundError:
            return None
        fsio.sync_directory(path.parent)
        self._add(entry)
        return entry

    def drop_links(self, path: Path) -> None:
        """Removes the names in the trash that share `path`'s inode, so that its link count tells who uses it."""
        try:
            inode = path.stat().st_ino
        except FileNotFoundError:
            return
        with self._lock:
            entries = list(self._pending)
        for entry in entries:
            for candidate in _files(entry):
                try:
                    if candidate.lstat().st_ino == inode:
                        candidate.unlink()
                except FileNotFoundError:
                    continue

    def reclaiming_bytes(self) -> int:
        """Bytes that will be free once the trash is empty."""
        with self._lock:
            return sum(self._pending.values())

    def is_empty(self) -> bool:
        """Whether everything thrown away has been freed."""
        with self._lock:
            return not self._pending

    def _add(self, entry: Path) -> None:
        size = sum(_own_bytes(path) for path in _files(entry))
        with self._lock:
            self._pending[entry] = size
        self._wake.set()

    def _run(self) -> None:
        while not self._is_stopping:
            with self._lock:
                entry = next(iter(self._pending), None)
                if entry is None:
                    self._wake.clear()
            if entry is None:
                self._wake.wait()
                continue
            self._free(entry)
            if not self._is_stopping:
                with self._lock:
                    self._pending.pop(entry, None)

    def _free(self, entry: Path) -> None:
        for path in _files(entry):
            if self._is_stopping:
                return
            try:
                fsio.free_file(path)
            except OSError:
                continue  # left where it is; the next start tries again
        for directory, _, _ in os.walk(entry, topdown=False):
            try:
                os.rmdir(directory)
            except OSError:
                return


def _files(entry: Path) -> list[Path]:
    if not entry.is_dir() or entry.is_symlink():
        return [entry]
    return [Path(directory) / name for directory, _, names in os.walk(entry) for name in names]


def _own_bytes(path: Path) -> int:
    """Bytes that unlinking gives back: none while another name exists."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    return status.st_blocks * 512 if status.st_nlink == 1 else 0
