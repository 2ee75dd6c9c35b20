"""`herder plan accuracy` as a table, `herder plan calibrate`, and the file in which a calibration is kept."""

from __future__ import annotations

import datetime
import getpass
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from common.errors import HerderError
from herder.cli import output
from herder.cli.command import Globals, HerderCommand, pass_globals
from herder.cli.table import Column, safe
from herder.decoding import UNREADABLE
from herder.errors import HerderApiError
from herder.settings import config_path

if TYPE_CHECKING:
    from head.planner.calibration.active import Active

FILE_NAME = "planner-calibration.json"
SHIPPED = "none"  # what --calibration says for the shipped calibration alone
FILE_BYTES = 8 << 20
_COLUMNS = (
    Column("WHAT", shrinks_to=16),
    Column("TESTED ON", shrinks_to=24),
    Column("ROWS", is_number=True),
    Column("MAPE", is_number=True),
    Column("MEDIAN", is_number=True),
    Column("INSIDE", is_number=True, rank=2),
    Column("BAR", shrinks_to=12, rank=1),
    Column("MET"),
)


def default_path() -> Path:
    """~/.config/herder/planner-calibration.json, beside the file of contexts."""
    return config_path().parent / FILE_NAME


def own_calibration(given: str | None) -> Active | None:
    """The calibration that answers take: the file that is named, else the default one where it is.

    Raises: HerderApiError for a file that is none.
    """
    if given == SHIPPED:
        return None
    path = Path(given) if given else default_path()
    if not given and not path.exists():
        return None
    from head.planner.calibration.own import read

    try:
        return read(_content(path))
    except HerderError as error:
        hint = error.hint or f"--calibration {SHIPPED} answers without it"
        raise HerderApiError(error.code, f"{path}: {error.message}", hint=hint, status=error.status) from None


def _content(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise click.UsageError(f"{path} is no plain file")
            data = file.read(FILE_BYTES + 1)
    except OSError as error:
        raise click.UsageError(f"{path}: {error.strerror}") from None
    if len(data) > FILE_BYTES:
        raise click.UsageError(f"{path} is larger than {FILE_BYTES >> 20} MiB")
    return data


# accuracy
def accuracy_view(answer: Mapping[str, Any], options: Globals) -> str:
    """The table, what was refused, and how many bars are met."""
    cells = []
    before = ""
    for line in answer["lines"]:
        met = {True: "yes", False: "NO", None: ""}[line.get("is_met")]
        errors = [_percent(line.get(name)) for name in ("mape", "median", "inside")]
        scheme = "; ".join(part for part in (line["scheme"], line.get("figure", "")) if part)
        what = line["what"] if line["what"] != before else ""
        before = line["what"]
        cells.append([what, scheme, str(line["rows"] or ""), *errors, line.get("bar", ""), met])
    width = output.line_width() or 140
    table = output.render_table(options, list(_COLUMNS), cells, width=width)
    said = [f"{answer['bars_met']} of {answer['bars']} bars are met; {answer['date']}, {answer['row_set']}"]
    said += [f"refused: {row['rows']} of {row['what']}: {row['reason']}" for row in answer["refused"]]
    return "\n".join([table, "", *(safe(line) for line in said)])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


# calibrate
@click.command(
    "calibrate",
    cls=HerderCommand,
    examples=["herder plan calibrate results.json --machine rack-3", "herder plan calibrate a.csv b.csv --dry-run"],
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@click.option("--who", default="", help="Who measured; else the user's name.")
@click.option("--machine", default="", help="Where it was measured; else this machine's name.")
@click.option("--when", default="", help="When it was measured; else today.")
@click.option("--save", "target", metavar="FILE", default="", help="Where to write; else the default file.")
@click.option("--dry-run", is_flag=True, help="Check the rows and show the errors; write nothing.")
@click.option("--cluster", is_flag=True, help="Ask the head: models of the cluster may be named.")
@pass_globals
def calibrate(
    options: Globals, /, files: tuple[str, ...], who: str, machine: str, when: str, target: str, dry_run: bool,
    cluster: bool,
) -> None:  # fmt: skip
    """Calibrate the planner by results that were measured here.

    Rows are JSON (a list, or an object with rows) or CSV with the same names. Of training: model, gpu, gpus, tp, pp,
    seq_length, batch_size, stack, ... and step_s or tokens_per_s. Of serving: model, gpu, engine, version, tp, isl,
    osl, concurrency, ttft_ms, tpot_ms. Every row is checked; one that is absurd is set aside; the correction of the
    shipped constants is bounded, and the table shows each row as the others predict it.

    The file is used by later questions on this machine. A head takes it from its state directory, or as its setting
    planner.calibration says.
    """
    rows, places = _rows_of(files)
    question = {
        "rows": rows,
        "who": who or getpass.getuser(),
        "machine": machine or socket.gethostname(),
        "when": when or datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    }
    answer = _asked(options, question, places, is_cluster=cluster)
    path = Path(target) if target else default_path()
    if not dry_run:
        _write(path, msgspec.json.encode(answer["document"]))
    shown = {name: value for name, value in answer.items() if name != "document"}
    output.emit(options, shown | {"file": "" if dry_run else str(path)}, _view(shown, options, path, dry_run))


def _rows_of(files: tuple[str, ...]) -> tuple[list[Any], list[str]]:
    """All rows, and where each stands. Raises: click.UsageError for a file that cannot be read or holds none."""
    from head.planner.endpoints.measured import rows_of_csv

    rows: list[Any] = []
    places: list[str] = []
    for name in files:
        data = _content(Path(name))
        try:
            if name.lower().endswith(".csv"):
                found: Any = rows_of_csv(data.decode("utf-8-sig"))
            else:
                found = msgspec.json.decode(data)
                found = found.get("rows") if isinstance(found, dict) else found
        except HerderError as error:
            raise click.UsageError(f"{name}: {error.message}") from None
        except UNREADABLE as error:
            raise click.UsageError(f"{name}: {error}") from None
        if not isinstance(found, list):
            raise click.UsageError(f"{name}: neither a list of rows nor an object with rows")
        rows += found
        places += [f"{name} row {number}" for number in range(1, len(found) + 1)]
    return rows, places


def _asked(options: Globals, question: dict[str, Any], places: list[str], *, is_cluster: bool) -> dict[str, Any]:
    """The answer of the head or of this process; errors name the files' rows."""
    from head.planner.endpoints.base import ask
    from head.planner.endpoints.questions import Desk
    from head.planner.endpoints.table import BY_VERB

    endpoint = BY_VERB["calibrate"]
    try:
        if is_cluster:
            with options.connect() as client:
                return dict(client.plan(endpoint.path, question, method=endpoint.method))
        answer: dict[str, Any] = msgspec.to_builtins(ask(endpoint, question, Desk()))
    except (HerderError, HerderApiError) as error:
        wrong = error.details.get("rows")
        message = error.message
        if isinstance(wrong, list) and wrong:
            lines = [f"{places[row['row'] - 1]}: {row['message']}" for row in wrong if row["row"] <= len(places)]
            message = f"{len(wrong)} rows cannot be used:\n  " + "\n  ".join(lines)
        raise HerderApiError(error.code, message, hint=error.hint, details=error.details, status=error.status) from None
    return answer


def _write(path: Path, data: bytes) -> None:
    """The file, whole or not at all, for its owner's eyes."""
    from common.fsio import make_directories, write_atomic

    make_directories(path.parent, mode=0o700)
    write_atomic(path, data, mode=0o600)


def _view(answer: Mapping[str, Any], options: Globals, path: Path, is_dry: bool) -> str:
    """Errors before and after, rows that were set aside, notes, and where the file is."""
    columns = [Column("WHAT"), Column("ROWS", is_number=True), Column("SET ASIDE", is_number=True)]
    columns += [Column(name, is_number=True) for name in ("MAPE BEFORE", "MEDIAN BEFORE", "MAPE AFTER", "MEDIAN AFTER")]
    fields = ("mape_before", "median_before", "mape_after", "median_after")
    cells = [
        [line["what"], str(line["rows"]), str(line["set_aside"]), *(_percent(line[name]) for name in fields)]
        for line in answer["errors"]
    ]
    aside = [row for row in answer["rows"] if not row["is_used"]]
    lines = [output.render_table(options, columns, cells, width=output.line_width() or 120), ""]
    lines += [f"set aside: {row['id'].removeprefix('own:')}, {row['what']}: {row['reason']}" for row in aside[:20]]
    lines += [f"note: {note}" for note in answer["notes"]]
    lines.append("nothing was written" if is_dry else f"written: {path}")
    return "\n".join(safe(line) for line in lines)
