"""What `herder benchmarks` does with results: compares them, writes them to files, prints their logs."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herder.cli import benchmarks_view as view
from herder.cli import output, text
from herder.cli.command import Globals, HerderCommand, pass_globals
from herder.cli.table import clean
from herder.decoding import UNREADABLE
from herder.errors import HerderApiError, HerderError

if TYPE_CHECKING:
    from common.bench.compare import Result
    from herder.client_benchmarks import ReportFormat
    from herder.client_sync import Client

WHOLE: tuple[ReportFormat, ...] = ("json", "csv", "html")
OF_A_POINT: tuple[ReportFormat, ...] = ("json", "csv", "vllm", "genai-bench")
SUFFIX = {"json": "json", "csv": "csv", "html": "html", "vllm": "vllm.json", "genai-bench": "genai-bench.json"}
MAX_REPORT_BYTES = 1 << 30


@click.command(
    "compare",
    cls=HerderCommand,
    examples=(
        "herder benchmarks compare bench-3f9a1c7e20b4 bench-51c07d2a9e66",
        "herder benchmarks compare before.json after.json -o json",
    ),
)
@click.argument("results", metavar="BENCHMARK|FILE...", nargs=-1, required=True)
@click.option("--anyway", is_flag=True, help="Also results of different loads.")
@pass_globals
def compare(options: Globals, results: tuple[str, ...], anyway: bool) -> None:
    """Put results beside each other: how far apart, and whether that is more than the noise of repetitions.

    Each is a benchmark's id or a report file (JSON, of `herder benchmarks export` or `herder bench --save`). The others
    are compared with the first. What was not the same (model, engine flags, hardware) is said; results of different
    loads are refused without --anyway.
    """
    from common.bench import compare as comparing

    if len(results) < 2:
        raise click.UsageError("give two results or more")
    if twice := next((name for name in results if results.count(name) > 1), ""):
        raise click.UsageError(f"{twice} is given twice: it does not differ from itself")
    with _Head(options) as head:
        found = comparing.compare([_result(head, name) for name in results])
    if found.is_serious and not anyway:
        told = "; ".join(
            f"{name}: {value}"
            for difference in found.differences
            if difference.is_serious
            for name, value in zip(found.names, difference.values, strict=True)
        )
        raise HerderError(
            "not_comparable", f"these results answer different questions: {told}", hint="--anyway compares them still"
        )
    output.emit(options, found, view.compared(options, found), quiet="")


class _Head:
    """A client that is connected when it is first needed: files are compared without a head."""

    def __init__(self, options: Globals) -> None:
        self._options = options
        self._context: Any = None
        self._client: Client | None = None

    def __enter__(self) -> _Head:
        return self

    def __exit__(self, *said: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*said)

    @property
    def client(self) -> Client:
        """The client."""
        if self._client is None:
            self._context = self._options.connect()
            self._client = self._context.__enter__()
        return self._client


def _result(head: _Head, name: str) -> Result:
    import msgspec

    from common.bench.compare import Result, result_of

    path = Path(name)
    if not (path.is_file() or "/" in name or name.endswith(".json")):
        return Result(name, msgspec.to_builtins(head.client.benchmark(name)))
    try:
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise HerderError("invalid_value", f"{name} is larger than a report may be")
        document = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise click.UsageError(f"{name}: {error.strerror}") from None
    except UNREADABLE as error:
        raise HerderError("invalid_value", f"{name} is no JSON: {error}") from None
    try:
        return result_of(document, path.name)
    except ValueError as error:
        raise HerderError("invalid_value", str(error)) from None


@click.command(
    "export",
    cls=HerderCommand,
    examples=(
        "herder benchmarks export bench-3f9a1c7e20b4 --format html --save report.html",
        "herder benchmarks export bench-3f9a1c7e20b4 --format vllm --point 3 --save vllm.json",
        "herder benchmarks export bench-3f9a1c7e20b4 --format all --save results/",
    ),
)
@click.argument("benchmark_id", metavar="BENCHMARK")
@click.option(
    "--format",
    "format_",
    type=click.Choice((*SUFFIX, "all")),
    default="json",
    show_default=True,
    help="vllm and genai-bench: of one point; all: every format and every kept file, into a folder.",
)
@click.option("--point", type=click.IntRange(0), help="Of this point only.")
@click.option("--save", "path", type=click.Path(path_type=Path), help="The file or folder; default standard output.")
@pass_globals
def export(options: Globals, benchmark_id: str, format_: Any, point: int | None, path: Path | None) -> None:
    """Write a result in our formats or those of others."""
    with options.connect() as client:
        if format_ == "all":
            if path is None:
                raise click.UsageError("--format all needs --save FOLDER")
            _refuse_another(path, benchmark_id)
            written = _export_all(options, client, benchmark_id, path)
            total = sum(file.stat().st_size for file in written)
            said = f"{text.plural(len(written), 'file')}, {text.size(total)}, in {path}"
            output.emit(options, [str(file) for file in written], said, quiet=str(path))
            return
        if point is None and format_ not in WHOLE:
            point = _only_point(client, benchmark_id, format_)
        content = client.benchmark_report(benchmark_id, point=point, format=format_)
    if path is None:
        if format_ == "html" and sys.stdout.isatty():
            raise click.UsageError("a terminal does not show HTML; give --save FILE")
        click.echo(content, nl=False)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    output.emit(
        options, {"path": str(path), "bytes": len(content)}, f"{path}: {text.size(len(content))}", quiet=str(path)
    )


def _only_point(client: Client, benchmark_id: str, format_: str) -> int:
    points = [point.number for point in client.benchmark(benchmark_id).points if point.status == "completed"]
    if len(points) == 1:
        return points[0]
    told = f"{len(points)} points" if points else "no point that was measured"
    raise click.UsageError(f"{format_} is of one point and {benchmark_id} has {told}; say which with --point")


def _export_all(options: Globals, client: Client, benchmark_id: str, folder: Path) -> list[Path]:
    """Every format of the whole and of each point, and the kept files as they are; the paths."""
    view_of = client.benchmark(benchmark_id)
    wanted: list[tuple[int | None, ReportFormat, Path]] = [
        (None, format_, folder / f"report.{SUFFIX[format_]}") for format_ in WHOLE
    ]
    for point in view_of.points:
        if point.status == "completed":
            wanted += [
                (point.number, format_, folder / "points" / f"{point.number}.{SUFFIX[format_]}")
                for format_ in OF_A_POINT
            ]
    written = []
    for number, format_, path in wanted:
        try:
            content = client.benchmark_report(benchmark_id, point=number, format=format_)
        except HerderApiError as error:
            if error.status != 404:
                raise
            output.note(options, f"{path.name} is left out: {error.message}")  # not written yet, or never
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written.append(path)
    for file in client.benchmark_files(benchmark_id):
        path = _inside(folder / "files", file.name)
        client.download_benchmark_file(benchmark_id, file.name, path)
        written.append(path)
    return written


def _refuse_another(folder: Path, benchmark_id: str) -> None:
    """A folder that another benchmark was exported into would hold points of both. Raises: click.UsageError."""
    import msgspec

    try:
        found = msgspec.json.decode((folder / "report.json").read_bytes())["benchmark"]["id"]
    except (OSError, KeyError, TypeError, *UNREADABLE):
        return
    if found != benchmark_id:
        raise click.UsageError(f"{folder} holds the export of {found}; give another folder")


def _inside(folder: Path, name: str) -> Path:
    """The place of a kept file below the folder. Raises: HerderError for a name that would leave it."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise HerderError("invalid_name", f"the head names a file that cannot be kept: {name!r}")
    return folder.joinpath(*parts)


@click.command(
    "logs",
    cls=HerderCommand,
    examples=("herder benchmarks logs bench-3f9a1c7e20b4", "herder benchmarks logs bench-3f9a1c7e20b4 --search error"),
)
@click.argument("benchmark_id", metavar="BENCHMARK")
@click.option("--search", default="", metavar="TEXT", help="Only lines that hold this, in whatever case.")
@click.option("--tail", type=click.IntRange(1, 1_000_000), help="Only the last so many lines of each.")
@pass_globals
def logs(options: Globals, benchmark_id: str, search: str, tail: int | None) -> None:
    """Print the logs that are kept with a result: engines and load generators, one after the other."""
    with options.connect() as client, tempfile.TemporaryDirectory(prefix="herder-logs-") as folder:
        names = [file.name for file in client.benchmark_files(benchmark_id) if file.name.endswith(".log")]
        found: dict[str, list[str]] = {}
        for place, name in enumerate(names):
            path = Path(folder) / str(place)
            client.download_benchmark_file(benchmark_id, name, path)
            lines = path.read_text(errors="replace").splitlines()
            if search:
                lines = [line for line in lines if search.lower() in line.lower()]
            found[name] = lines[-tail:] if tail else lines
    if options.output != "table":
        output.emit(options, found)
        return
    if not names:
        output.note(options, f"no logs are kept with {benchmark_id}")
    for name, lines in found.items():
        if not options.is_quiet and (lines or not search):
            click.echo(f"==> {clean(name)} <==")
        for line in lines:
            output.stream(f"{line}\n")
