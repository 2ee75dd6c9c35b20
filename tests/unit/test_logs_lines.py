"""Lines of logs: cut from segments as the shim writes them, with the times of their arrival, however reading is cut."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import shim
from common import limits
from common.logs.files import end_of, segments, tail_start
from common.logs.index import ENTRY, STARTS_LINE, Index, stamp_of
from common.logs.lines import Line, LineReader, offset_since

PIECES = st.lists(st.text("ab\nä", max_size=40).map(str.encode), max_size=60)


class Clock:
    """The shim's clocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms = 1_000_000
        monkeypatch.setattr("agent.shim.time.monotonic_ns", lambda: self.now_ms * 1_000_000)
        monkeypatch.setattr("agent.shim.time.time_ns", lambda: (self.now_ms + 5_000_000) * 1_000_000)

    @property
    def wall_ms(self) -> int:
        """What the index says now."""
        return self.now_ms + 5_000_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Clocks that stand still."""
    return Clock(monkeypatch)


def log_of(folder: Path, log_bytes: int = 65_536, segment_bytes: int = 0) -> shim.Log:
    """The shim's log, with smaller segments than it would make."""
    log = shim.Log(str(folder), log_bytes)
    if segment_bytes:
        log.segment_bytes = segment_bytes
    return log


def all_of(reader: LineReader) -> list[Line]:
    """Everything up to the present end."""
    lines: list[Line] = []
    while True:
        unread = reader.unread_bytes
        more = reader.read()
        lines += more
        if not more and reader.unread_bytes == unread:
            return lines


def test_each_line_has_the_time_of_its_arrival(tmp_path: Path, clock: Clock) -> None:
    """Output that comes within 50 ms shares an entry; a line's time is when its first byte came."""
    log = log_of(tmp_path)
    expected = []
    for number, gap_ms in enumerate((0, 10, 200, 49, 50, 5_000)):
        clock.now_ms += gap_ms
        expected.append(clock.wall_ms)
        log.write(f"line {number} begins".encode())
        log.write(b", ends\n")
    lines = all_of(LineReader(tmp_path))
    assert [line.text for line in lines] == [f"line {number} begins, ends" for number in range(6)]
    assert all(0 <= want - line.at_ms < 100 for want, line in zip(expected, lines, strict=True))
    assert lines[2].at_ms == expected[2]
    assert lines[5].at_ms == expected[5]


class FullDisk:
    """Makes the shim's writes fail, its log's and its index's alike."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        real = os.write

        def write(descriptor: int, data: bytes) -> int:
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(descriptor, data)

        monkeypatch.setattr("agent.shim.os.write", write)


def test_a_full_disk_loses_new_output_only(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the disk is full: what was kept stays, new output is told as lost, and with room the log goes on."""
    disk, log = FullDisk(monkeypatch), log_of(tmp_path)
    for number in range(500):
        log.write(b"before %d\n" % number)
    disk.is_full = True
    for number in range(2_000):
        clock.now_ms += 100
        log.write(b"while full %d\n" % number)
        assert len(segments(tmp_path)) <= 2
    disk.is_full = False
    clock.now_ms += 2_000
    for number in range(10):
        log.write(b"after %d\n" % number)
    clock.now_ms += 100
    reader = LineReader(tmp_path)
    texts = [line.text for line in all_of(reader)]
    assert texts == [f"before {number}" for number in range(500)] + [f"after {number}" for number in range(10)]
    assert reader.lost_bytes == sum(len(b"while full %d\n" % number) for number in range(2_000))
    assert end_of(tmp_path) == log.offset
    # the last lines are counted over the gap
    offset, found = tail_start(tmp_path, 15)
    assert found == 15
    assert [line.text for line in all_of(LineReader(tmp_path, offset))] == texts[-15:]
    assert all(path.stat().st_size for _, path in segments(tmp_path))


def test_a_disk_that_is_full_now_and_then_leaves_few_segments(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short segments are bounded by number, long ones by size; the newest output is always there."""
    disk, log = FullDisk(monkeypatch), log_of(tmp_path, segment_bytes=4_096)
    for number in range(300):
        disk.is_full = number % 2 == 1
        clock.now_ms += 5_000
        log.write(b"%04d %s\n" % (number, b"x" * (number % 7) * 300))
    found = segments(tmp_path)
    assert len(found) <= shim.SHORT_SEGMENTS
    assert sum(path.stat().st_size for _, path in found) <= shim.SEGMENTS * 4_096
    assert all_of(LineReader(tmp_path))[-1].text.startswith("0298")


def test_empty_segments_hide_nothing(tmp_path: Path) -> None:
    """As an older shim left them on a full disk: reading from any place goes on behind them."""
    for start in (100, 200, 300):
        (tmp_path / f"log.{start:015d}").touch()
    (tmp_path / "log.000000000000000").write_bytes(b"one\ntwo\n")
    (tmp_path / "log.000000000000350").write_bytes(b"cut\nthree\n")
    (tmp_path / "log.000000000000400").touch()
    assert [line.text for line in all_of(LineReader(tmp_path))] == ["one", "two", "three"]
    assert [line.text for line in all_of(LineReader(tmp_path, 8))] == ["three"]
    assert [line.text for line in all_of(LineReader(tmp_path, 250))] == ["three"]
    assert tail_start(tmp_path, 3) == (4, 3)
    assert tail_start(tmp_path, 100) == (0, 4)


def test_a_torn_entry_is_no_entry(tmp_path: Path, clock: Clock) -> None:
    """What a crash left of an entry is ignored, and read once it is whole."""
    log = log_of(tmp_path)
    log.write(b"one\n")
    clock.now_ms += 1_000
    log.write(b"two\n")
    path = tmp_path / "log.000000000000000.at"
    whole = path.read_bytes()
    assert len(whole) == 2 * ENTRY.size
    index = Index(path.with_name("log.000000000000000"))
    path.write_bytes(whole[:-7])
    index.refresh()
    assert (index.offsets, index.at(4)) == ([0], clock.wall_ms - 1_000)
    path.write_bytes(whole)
    index.refresh()
    assert (index.offsets, index.at(3), index.at(4)) == ([0, 4], clock.wall_ms - 1_000, clock.wall_ms)


def test_logs_without_an_index_still_read(tmp_path: Path) -> None:
    """Segments of older versions: times are what lines say, else that of the line before, else unknown."""
    (tmp_path / "log.000000000000000").write_bytes(b"none\n2026-03-01T10:00:00.250Z one\nafter it\n")
    lines = all_of(LineReader(tmp_path))
    assert [(line.text.split()[-1], line.at_ms) for line in lines] == [
        ("none", 0),
        ("one", 1_772_359_200_250),
        ("it", 1_772_359_200_250),
    ]


@pytest.mark.parametrize(
    ("text", "at_ms"),
    [
        ("2026-03-01T10:00:00Z x", 1_772_359_200_000),
        ("2026-03-01 10:00:00,123+00:00 x", 1_772_359_200_123),
        ("[2026-03-01T12:00:00.5+0200] x", 1_772_359_200_500),
        ('{"at":"2026-03-01T10:00:00.001Z","level":"info"}', 1_772_359_200_001),
        ("2026-13-41T10:00:00Z x", 0),
        ("0000-00-00T99:99:99Z", 0),
        ("x 2026-03-01T10:00:00Z", 0),
        ("", 0),
    ],
)
def test_stamps(text: str, at_ms: int) -> None:
    """A line that begins with a time tells it; what only looks like one tells none."""
    assert stamp_of(text) == at_ms


@given(pieces=PIECES, stops=st.lists(st.integers(0, 3), max_size=60))
@settings(max_examples=120, deadline=None)
def test_no_line_is_lost_or_doubled_over_resumes(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], stops: list[int]
) -> None:
    """However output is cut and whenever a reader begins anew at its position, the lines are the output's."""
    folder = tmp_path_factory.mktemp("log")
    log = log_of(folder, segment_bytes=64)
    shim_segments, shim.SEGMENTS = shim.SEGMENTS, 1_000
    try:
        read: list[str] = []
        reader = LineReader(folder)
        for number, piece in enumerate(pieces):
            log.write(piece)
            stop = stops[number] if number < len(stops) else 0
            if stop:
                read += [line.text for line in all_of(reader)]
            if stop == 2:
                reader = LineReader(folder, reader.position, is_resumed=True)
        read += [line.text for line in all_of(reader)]
        rest = reader.rest(is_whole=True)
    finally:
        shim.SEGMENTS = shim_segments
    expected = b"".join(pieces).decode().split("\n")
    assert [*read, rest.text if rest else ""] == expected
    assert reader.lost_bytes == 0


@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=80), read_until=st.integers(0, 80))
@settings(max_examples=120, deadline=None)
def test_rotation_is_counted_to_the_byte(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], read_until: int
) -> None:
    """What a resumed reader gets and what it calls lost is together what was written; what it gets is whole lines."""
    folder = tmp_path_factory.mktemp("log")
    log = log_of(folder, segment_bytes=100)
    written = [f"{number}:{'x' * length}" for number, length in enumerate(lengths)]
    before = LineReader(folder, 0, is_resumed=True)
    got: list[str] = []
    for number, text in enumerate(written):
        if number == read_until:
            got = [line.text for line in all_of(before)]
        log.write(text.encode() + b"\n")
    reader = LineReader(folder, before.position, is_resumed=True)
    got += [line.text for line in all_of(reader)]
    assert [text for text in written if text in got] == got
    read_bytes = sum(len(text) + 1 for text in got)
    assert read_bytes + before.lost_bytes + reader.lost_bytes == log.offset
    assert got[-1:] == written[-1:]


def test_a_segment_that_begins_with_a_line_loses_none_of_it(tmp_path: Path) -> None:
    """The index says whether a segment begins with a whole line: the first kept one is not taken for half a line."""
    log = log_of(tmp_path, segment_bytes=10)
    for number in range(8):
        log.write(f"line {number:04d}\n".encode())
    first = segments(tmp_path)[0][0]
    assert first > 0
    at = struct.unpack("<QQ", (tmp_path / f"log.{first:015d}.at").read_bytes()[:16])[1]
    assert at & STARTS_LINE
    assert [line.text for line in all_of(LineReader(tmp_path))] == [f"line {number:04d}" for number in range(4, 8)]


def test_long_lines_come_in_pieces(tmp_path: Path) -> None:
    """A line beyond the limit comes in pieces that say so, at character borders, and together are the line."""
    text = "ä" * limits.LOG_LINE_BYTES
    (tmp_path / "log.000000000000000").write_text(f"{text}\nshort\n")
    lines = all_of(LineReader(tmp_path))
    assert [line.is_whole for line in lines] == [False, True, True]
    assert lines[0].text + lines[1].text == text
    assert max(len(line.text.encode()) for line in lines) <= limits.LOG_LINE_BYTES


def test_a_log_that_was_begun_anew(tmp_path: Path) -> None:
    """A file that is shorter than what was read of it is read from its beginning, and what was missed is not hidden."""
    path = tmp_path / "slurm-1.out"
    path.write_text("one\ntwo\nthree\n")
    reader = LineReader(path)
    assert len(all_of(reader)) == 3
    path.write_text("new\n")
    assert all_of(reader) == []
    assert reader.lost_bytes == -1
    assert [line.text for line in all_of(reader)] == ["new"]


def test_offset_since(tmp_path: Path, clock: Clock) -> None:
    """Reading for a time begins at the first batch of it, in whichever segment; for none it begins at the end."""
    log = log_of(tmp_path, segment_bytes=20)
    for _ in range(6):
        clock.now_ms += 1_000
        log.write(b"0123456\n")
    first_kept = segments(tmp_path)[0][0]
    assert offset_since(tmp_path, 0) == first_kept
    assert offset_since(tmp_path, clock.wall_ms - 1_000) == 32
    assert offset_since(tmp_path, clock.wall_ms - 1) == 40
    assert offset_since(tmp_path, clock.wall_ms + 1) == end_of(tmp_path) == 48


def test_the_index_stays_small(tmp_path: Path, clock: Clock) -> None:
    """One byte now and then would need more index than log: a segment ends early, and every line keeps its time."""
    log = log_of(tmp_path, 16_384)
    for _ in range(3_000):
        clock.now_ms += 100
        log.write(b"\n")
    for _, path in segments(tmp_path):
        assert path.with_name(path.name + ".at").stat().st_size <= 4_096
    assert len(os.listdir(tmp_path)) <= 2 * shim.SEGMENTS
    lines = all_of(LineReader(tmp_path))
    assert lines[-1].at_ms == clock.wall_ms
    assert len({line.at_ms for line in lines}) == len(lines)


@given(counts=st.integers(0, 30), wanted=st.integers(0, 35), is_ended=st.booleans())
@settings(max_examples=60, deadline=None)
def test_tail_start(tmp_path_factory: pytest.TempPathFactory, counts: int, wanted: int, is_ended: bool) -> None:
    """The last lines begin where they do, also when the last has no newline yet, and their number is told."""
    place = tmp_path_factory.mktemp("log")
    lines = [f"line {number}" for number in range(counts)]
    text = "\n".join(lines) + ("\n" if is_ended and lines else "")
    (place / "log.000000000000000").write_text(text)
    offset, found = tail_start(place, wanted)
    assert found == min(counts, wanted)
    assert text[offset:].splitlines() == lines[counts - found :]


def test_what_lies_in_an_indexs_place_is_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    """Beside a Slurm file its owner may put a pipe, a folder or a link: such a log has no index."""
    entry = ENTRY.pack(0, 1_000 | STARTS_LINE)
    (tmp_path / "elsewhere").write_bytes(entry)
    for name in ("pipe", "link", "folder", "file"):
        (tmp_path / name).write_text("hello\n")
    os.mkfifo(tmp_path / "pipe.at")
    (tmp_path / "link.at").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder.at").mkdir()
    (tmp_path / "file.at").write_bytes(entry)
    found = {}
    for name in ("pipe", "link", "folder", "file"):
        index = Index(tmp_path / name)
        index.refresh()
        found[name] = index.times_ms
    assert found == {"pipe": [], "link": [], "folder": [], "file": [1_000]}
