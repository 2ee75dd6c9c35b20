"""The audit log: order, mode, rotation, and what happens when the disk refuses."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from common import limits
from head.api.audit import AuditLine, AuditLog


def line(number: int) -> AuditLine:
    """A line."""
    return AuditLine(
        number, "a(key-1)", "admin", "127.0.0.1", "POST", "/api/v1/models", 201, f"req-{number}", "model:m"
    )


def stamps(path: Path) -> list[int]:
    """Times of the lines of a file."""
    return [json.loads(text)["at_ms"] for text in path.read_text().splitlines()]


def test_lines_come_in_order_and_are_private(tmp_path: Path) -> None:
    """What is written before close is in the file, in order; the file is 0600."""
    path = tmp_path / "audit.log"
    audit = AuditLog(path)
    for number in range(5):
        audit.write(line(number))
    audit.start()
    for number in range(5, 10):
        audit.write(line(number))
    audit.close()
    assert stamps(path) == list(range(10))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_files_are_rotated_by_size_and_the_oldest_go(tmp_path: Path) -> None:
    """Each file stays under its bound, so many are kept, and together they hold the newest lines without a gap."""
    path = tmp_path / "audit.log"
    audit = AuditLog(path, file_bytes=600, files_kept=2)
    audit.start()
    for number in range(40):
        audit.write(line(number))
    audit.close()
    files = [tmp_path / "audit.log.2", tmp_path / "audit.log.1", path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(file.stat().st_size <= 600 for file in files)
    kept = [number for file in files for number in stamps(file)]
    assert kept == list(range(40 - len(kept), 40))


def test_a_refusing_disk_is_counted_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that could not be written are counted; the next one that can be says how many were lost."""
    real = os.write
    refused = iter([True, True, False])

    def write(descriptor: int, data: bytes) -> int:
        if next(refused, False):
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr("head.api.audit.os.write", write)
    audit = AuditLog(tmp_path / "audit.log")
    audit.start()
    for number in range(3):
        audit.write(line(number))
    audit.close()
    first, second = (json.loads(text) for text in (tmp_path / "audit.log").read_text().splitlines())
    assert first == {"lost": 2}
    assert second["at_ms"] == 2
    assert audit.lost == 2


def test_a_torn_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes half a line leaves no half line."""
    real = os.write
    torn = iter([False, True, False])

    def write(descriptor: int, data: bytes) -> int:
        return real(descriptor, data[:10] if next(torn, False) else data)

    monkeypatch.setattr("head.api.audit.os.write", write)
    audit = AuditLog(tmp_path / "audit.log")
    audit.start()
    for number in range(3):
        audit.write(line(number))
    audit.close()
    lines: list[dict[str, Any]] = [json.loads(text) for text in (tmp_path / "audit.log").read_text().splitlines()]
    assert [entry.get("at_ms", entry.get("lost")) for entry in lines] == [0, 1, 2]


def test_a_full_queue_never_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When nothing is taken from the queue, writing goes on and counts what it lost."""
    monkeypatch.setattr(limits, "AUDIT_QUEUE", 4)
    audit = AuditLog(tmp_path / "audit.log")
    for number in range(10):
        audit.write(line(number))
    assert audit.lost == 6


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """A symbolic link in the log's place does not make us write elsewhere."""
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "audit.log").symlink_to(tmp_path / "elsewhere")
    audit = AuditLog(tmp_path / "audit.log")
    audit.start()
    audit.write(line(1))
    audit.close()
    assert (tmp_path / "elsewhere").read_text() == ""
    assert audit.lost == 1
