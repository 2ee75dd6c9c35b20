"""`herder logs`: what engines, load generators, daemons and Slurm's jobs write."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from herder.cli import output
from herder.cli.command import Globals, pass_globals, verb

if TYPE_CHECKING:
    from herder.types import LogEntry, LogsWanted

COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")
FILES_MAX = 200  # that one call writes
STAMP_CHARS = 24
EXAMPLES = (
    "herder logs chat-0",
    "herder logs smollm2 -f --tail 20",
    "herder logs chat --previous",
    "herder logs chat --since 10m --grep error -i",
    "herder logs --node n1 --source head -f",
    "herder logs bench-3f9a1c7e20b4 --to logs/",
    "herder logs slurm:n1/4711",
)


@verb("logs", examples=EXAMPLES)
@click.argument("target", required=False, default="")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on.")
@click.option(
    "--tail",
    type=click.IntRange(-1, 10_000),
    help="The last lines to begin with; -1: all that is kept. Default 100; all with --since or --until.",
)
@click.option("--since", default="", metavar="TIME", help="From then on: 10m, 2h (ago) or 2026-01-31T12:00:00Z.")
@click.option("--until", default="", metavar="TIME", help="Up to then.")
@click.option("--grep", "search", default="", metavar="TEXT", help="Only lines that hold this text.")
@click.option("--regex", is_flag=True, help="The text of --grep is a regular expression.")
@click.option("-i", "--ignore-case", is_flag=True, help="Search without regard to upper and lower case.")
@click.option("--previous", is_flag=True, help="Only of the run before, as after a crash.")
@click.option("--service", default="", metavar="NAME", help="All engines of a service.")
@click.option("--replica", default="", metavar="ID", help="One engine.")
@click.option("--run", "run_id", default="", metavar="ID", help="A load generator or monitor of a benchmark.")
@click.option("--benchmark", default="", metavar="ID", help="All that a benchmark ran.")
@click.option("--job", default="", metavar="ID", help="The engines that a job was about.")
@click.option("--node", default="", metavar="NODE", help="All of a node; with a replica: what is kept of it there.")
@click.option("--source", default="", metavar="SOURCE", help="head, agent:NODE, slurm:NODE/JOBID, replica:ID, run:ID.")
@click.option("--timestamps", is_flag=True, help="Begin each line with the time at which it came.")
@click.option("--to", "target_path", metavar="PATH", default="", help="Write a file, or one for each log in a FOLDER/.")
@pass_globals
def command(
    options: Globals,
    target: str,
    follow: bool,
    tail: int | None,
    since: str,
    until: str,
    search: str,
    regex: bool,
    ignore_case: bool,
    previous: bool,
    service: str,
    replica: str,
    run_id: str,
    benchmark: str,
    job: str,
    node: str,
    source: str,
    timestamps: bool,
    target_path: str,
) -> None:
    """Print logs: lines of several together by time, each with its source.

    TARGET: a replica, service, served model, benchmark, run, job or node by its name, or head, agent:NODE,
    slurm:NODE/JOBID. With -o json one object per line.
    """
    wanted: LogsWanted = {
        "target": target,
        "service": service,
        "replica": replica,
        "run": run_id,
        "benchmark": benchmark,
        "job": job,
        "node": node,
        "source": source,
    }
    if not any(wanted.values()):
        raise click.UsageError("say whose log: a TARGET, or one of --service, --replica, --run, --node ...")
    if regex and not search:
        raise click.UsageError("--regex needs --grep with the expression")
    wanted |= {
        "follow": follow,
        "tail": tail,
        "since": since,
        "until": until,
        "search": search,
        "regex": regex,
        "ignore_case": ignore_case,
        "back": 1 if previous else None,
    }
    name = next(str(value) for value in wanted.values() if value)
    with ExitStack() as stack:
        printer = _printer(options, stack, target_path, has_times=timestamps, is_many=_is_many(wanted))
        client = stack.enter_context(options.connect())
        with output.interruptible(f"{name} goes on; only the reading of its log has ended."):
            for batch in client.log_batches(**wanted):
                printer.show(batch)
        printer.close()
        if isinstance(printer, _Files):
            output.note(options, printer.summary())
        elif follow:
            output.note(options, f"the log of {name} ended")


def _is_many(wanted: LogsWanted) -> bool:
    """Whether lines of several logs are asked for by name."""
    chosen = [key for key in ("target", "service", "replica", "run", "benchmark", "job", "source") if wanted.get(key)]
    is_one = chosen in (["replica"], ["run"], ["source"])
    return not is_one and chosen != ["target"]


def _printer(options: Globals, stack: ExitStack, path: str, *, has_times: bool, is_many: bool) -> _Printer | _Files:
    is_json = options.output == "json"
    if options.output == "yaml":
        raise click.UsageError("logs are printed as text or as JSON lines, not as YAML")
    if path:
        is_folder = path.endswith("/") or Path(path).is_dir()
        return _Files(stack, Path(path), is_folder=is_folder, is_json=is_json, has_times=has_times)
    is_terminal = sys.stdout.isatty()
    return _Printer(
        sys.stdout,
        is_json=is_json,
        has_times=has_times,
        is_many=is_many,
        has_colour=output.has_colour(options),
        is_terminal=is_terminal,
        notes=options,
    )


class _Printer:
    """Entries as text or JSON lines on a stream. Once a second source speaks, lines say whose they are."""

    def __init__(
        self,
        stream: IO[str],
        *,
        is_json: bool,
        has_times: bool,
        is_many: bool = False,
        has_colour: bool = False,
        is_terminal: bool = False,
        notes: Globals | None = None,
    ) -> None:
        self.lines = 0
        self._stream = stream
        self._is_json = is_json
        self._has_times = has_times
        self._is_many = is_many
        self._has_colour = has_colour
        self._is_terminal = is_terminal
        self._notes = notes
        self._colours: dict[str, str] = {}
        self._is_open = False  # the last line has no newline yet

    def show(self, entries: Iterable[LogEntry]) -> None:
        """Prints them."""
        sources = {f"{entry.source}@{entry.node}" for entry in entries if entry.source}
        for source in sorted(sources - self._colours.keys()):
            self._colours[source] = COLOURS[len(self._colours) % len(COLOURS)]
        self._is_many = self._is_many or len(self._colours) > 1
        parts: list[str] = []
        for entry in entries:
            if entry.line is None and not entry.note:
                continue
            if self._is_json:
                parts.append(_json(entry, is_terminal=self._is_terminal))
            elif entry.note:
                self._write(parts)
                parts = []
                self._note(entry)
            elif entry.line is not None:
                parts.append(self._line(entry))
            self.lines += entry.line is not None and not entry.is_partial
        self._write(parts)

    def close(self) -> None:
        """Ends the last line."""
        if self._is_open:
            self._write(["\n"])
            self._is_open = False

    def _write(self, parts: list[str]) -> None:
        text = "".join(parts)
        if text:
            self._stream.write(text)
            self._stream.flush()

    def _line(self, entry: LogEntry) -> str:
        from herder.cli.table import safe

        text = safe(entry.line or "") if self._is_terminal else entry.line or ""
        begin = "" if self._is_open and not self._is_many else self._begin(entry)
        self._is_open = entry.is_partial and not self._is_many
        return f"{begin}{text}{'' if self._is_open else chr(10)}"

    def _begin(self, entry: LogEntry) -> str:
        text = f"{_stamp(entry.time_ms)} " if self._has_times else ""
        if self._is_many:
            name = f"{entry.source}@{entry.node}" if entry.node and entry.node not in entry.source else entry.source
            colour = self._colours.get(f"{entry.source}@{entry.node}", "")
            name = name.removeprefix("replica:")
            text += f"{click.style(name, fg=colour) if self._has_colour else name} | "
        return text

    def _note(self, entry: LogEntry) -> None:
        self.close()
        words = f"{entry.source}: {entry.note}" if entry.source else entry.note
        if self._notes is not None:
            output.note(self._notes, f"-- {words}")
        else:
            self._write([f"-- {words}\n"])


class _Files:
    """Entries in a file, or in a file for each source below a folder."""

    def __init__(self, stack: ExitStack, path: Path, *, is_folder: bool, is_json: bool, has_times: bool) -> None:
        self._stack = stack
        self._path = path
        self._is_json = is_json
        self._has_times = has_times
        self._is_folder = is_folder
        self._printers: dict[str, _Printer] = {}
        if self._is_folder:
            path.mkdir(parents=True, exist_ok=True)
        else:
            self._printers[""] = self._open(path, is_many=False)

    def show(self, entries: Iterable[LogEntry]) -> None:
        """Writes them."""
        if not self._is_folder:
            self._printers[""].show(list(entries))
            return
        for entry in entries:
            if entry.line is None and not entry.note:
                continue
            name = f"{entry.source}@{entry.node}" if entry.node else entry.source or "head"
            if name not in self._printers:
                if len(self._printers) >= FILES_MAX:
                    raise click.ClickException(f"more than {FILES_MAX} logs; ask for fewer")
                suffix = "jsonl" if self._is_json else "log"
                file = re.sub(r"[^A-Za-z0-9._@-]", "-", name)[:200]
                self._printers[name] = self._open(self._path / f"{file}.{suffix}", is_many=False)
            self._printers[name].show([entry])

    def close(self) -> None:
        """Ends the last lines."""
        for printer in self._printers.values():
            printer.close()

    def summary(self) -> str:
        """What was written."""
        lines = sum(printer.lines for printer in self._printers.values())
        many = f"{len(self._printers)} files in " if self._is_folder else ""
        return f"{lines} lines written to {many}{self._path}"

    def _open(self, path: Path, *, is_many: bool) -> _Printer:
        stream = self._stack.enter_context(path.open("w", encoding="utf-8", errors="replace"))
        return _Printer(stream, is_json=self._is_json, has_times=self._has_times, is_many=is_many)


def _json(entry: LogEntry, *, is_terminal: bool) -> str:
    import msgspec

    text = msgspec.json.encode(entry).decode()
    return (output.escaped(text) if is_terminal else text) + "\n"


def _stamp(time_ms: int | None) -> str:
    from datetime import UTC, datetime

    if time_ms is None:
        return "-".ljust(STAMP_CHARS)
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{time_ms % 1000:03d}Z"
