"""Logs read through the client and by `herder logs`: connections that break, colours, files, what is said on errors."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from herder import AsyncClient, following, log_reading
from herder.cli import logs as logs_module
from herder.cli.command import Globals
from herder.cli.main import run
from herder.errors import HerderApiError, HerderConnectionError
from herder.types import LogEntry
from tests.doubles.api_double import NOW_MS, TOKEN, ApiDouble
from tests.doubles.on_a_thread import commanded


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ApiDouble]:
    """A double on a thread of its own, which the environment names."""
    double = ApiDouble()
    double.log_entries = [
        LogEntry(source=f"replica:chat-{number % 2}", node="n1", time_ms=NOW_MS + number, line=f"line {number}")
        for number in range(40)
    ]
    with commanded(double, monkeypatch, tmp_path):
        yield double


def herder(*args: str) -> int:
    """Runs one command in this process."""
    return run(list(args), Globals())


async def read(head: ApiDouble) -> list[str | None]:
    """Every line that a client gets."""
    async with AsyncClient(head.url, token=TOKEN) as client:
        return [entry.line async for entry in client.log_entries(service="chat", follow=True)]


@pytest.mark.parametrize("query_chars", [log_reading.QUERY_CHARS, 10])
def test_breaks_lose_nothing(head: ApiDouble, monkeypatch: pytest.MonkeyPatch, query_chars: int) -> None:
    """A connection that breaks in the middle of an entry, again and again, costs no line and gives none twice."""
    monkeypatch.setattr(log_reading, "RECONNECT_BASE_S", 0.001)
    monkeypatch.setattr(log_reading, "QUERY_CHARS", query_chars)
    head.log_breaks = [0, 1, 7, 0, 13]
    assert asyncio.run(read(head)) == [f"line {number}" for number in range(40)]
    methods = [method for method, path, _ in head.requests if path.startswith("/api/v1/logs")]
    assert len(methods) == 6
    assert methods[-1] == ("GET" if query_chars > 10 else "POST")


def test_a_head_that_stays_away(head: ApiDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the break nobody answers for long: the error says so; before the first entry it says so at once."""
    monkeypatch.setattr(log_reading, "UNREACHABLE_S", 0.0)
    monkeypatch.setattr(log_reading, "RECONNECT_BASE_S", 0.001)
    head.log_breaks = [3, 0, 0, 0, 0]
    with pytest.raises(HerderConnectionError):
        asyncio.run(read(head))
    head.log_breaks = []
    head.fail_next("/api/v1/logs", 503)
    with pytest.raises(HerderApiError):
        asyncio.run(read(head))
    assert following.UNREACHABLE_S > 60


def test_lines_of_several_logs(head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line says whose it is; nothing is coloured when nobody looks; a note goes to stderr."""
    head.log_entries.insert(2, LogEntry(source="replica:chat-0", node="n1", note="5 bytes are gone", lost_bytes=5))
    assert herder("logs", "chat") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[:3] == ["chat-0@n1 | line 0", "chat-1@n1 | line 1", "chat-0@n1 | line 2"]
    assert err == "-- replica:chat-0: 5 bytes are gone\n"
    assert "\x1b" not in out


def test_one_log_is_as_it_was_written(head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
    """A single log has no prefix; a line that came in two pieces is one line; times are shown where asked for."""
    head.log_entries = [
        LogEntry(source="replica:chat-0", node="n1", time_ms=NOW_MS, line="load", is_partial=True),
        LogEntry(source="replica:chat-0", node="n1", time_ms=NOW_MS, line="ing"),
        LogEntry(source="replica:chat-0", node="n1", line="done", is_partial=True),
    ]
    assert herder("logs", "chat-0") == 0
    assert capsys.readouterr().out == "loading\ndone\n"
    assert herder("logs", "chat-0", "--timestamps", "-f") == 0
    out, err = capsys.readouterr()
    assert out == "2026-09-21T14:13:20.000Z loading\n-                        done\n"
    assert "the log of chat-0 ended" in err


def test_what_is_asked(head: ApiDouble) -> None:
    """Options become parameters of the request, and only those that were given."""
    span, search = ("--since", "10m", "--until", "5m"), ("--grep", "x+", "--regex", "-i")
    assert herder("logs", "chat", *span, *search, "--tail", "7", "--previous", "--node", "n1") == 0
    (path,) = [path for _, path, _ in head.requests if path.startswith("/api/v1/logs")]
    expected = (
        "target=chat&node=n1&follow=false&tail=7&since=10m&until=5m&search=x%2B&regex=true&ignore_case=true"
        "&back=1&format=jsonl"
    )
    assert path == f"/api/v1/logs?{expected}"


def test_json_lines(head: ApiDouble, capsys: pytest.CaptureFixture[str]) -> None:
    """-o json prints one object a line, with its cursor."""
    assert herder("logs", "chat", "-o", "json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["line"] for line in lines] == [f"line {number}" for number in range(40)]
    assert lines[3]["cursor"] == "replica:chat-1@n1/0/2"


def test_files(head: ApiDouble, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--to writes one file, or one for each log in a folder, under names that lead nowhere else."""
    head.log_entries.append(LogEntry(source="slurm:n1/../../etc", node="n1", line="evil"))
    assert herder("logs", "chat", "--to", f"{tmp_path}/all.log") == 0
    assert (tmp_path / "all.log").read_text().splitlines()[1] == "replica:chat-1@n1 | line 1".replace("replica:", "")
    assert herder("logs", "chat", "--to", f"{tmp_path}/each/") == 0
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == [
        "replica-chat-0@n1.log",
        "replica-chat-1@n1.log",
        "slurm-n1-..-..-etc@n1.log",
    ]
    assert (tmp_path / "each" / "replica-chat-1@n1.log").read_text().startswith("line 1\nline 3\n")
    assert "41 lines written to 3 files" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [(), ("--regex", "chat"), ("chat", "-o", "yaml"), ("chat", "--tail", "-2"), ("chat", "--nonsense")]
)
def test_wrong_usage(head: ApiDouble, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be meant is refused before anybody is asked."""
    assert herder("logs", *words) == 2
    assert not head.requests
    assert "error[usage]" in capsys.readouterr().err


def test_terminals_are_safe() -> None:
    """On a terminal an engine's line cannot drive it, and every log has its own colour."""
    printer = logs_module._Printer(
        io.StringIO(), is_json=False, has_times=False, is_many=True, has_colour=True, is_terminal=True
    )
    entry = LogEntry(source="replica:a-0", node="n1", line="\x1b]0;evil\x07text\x9b31m")
    printer.show([entry, LogEntry(source="replica:b-0", node="n1", line="x")])
    text = printer._line(entry)
    assert "\x1b]" not in text
    assert "\x9b" not in text
    assert text.startswith("\x1b[36ma-0@n1\x1b[0m | ")
    assert printer._line(LogEntry(source="replica:b-0", node="n1", line="x")).startswith("\x1b[32m")
