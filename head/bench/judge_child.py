"""The process that judges: one question on stdin, one answer on stdout, within the memory it is given, then the end.

    python -P -m head.bench.judge_child MEMORY_BYTES

What a load node sent is decoded here and not in the head: a file that is too large or makes no sense costs this process
and its point, nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from common.errors import HerderError, Internal, InvalidRecipe, InvalidValue, MemoryFull, NotFound
from common.fsio import make_directories
from head.bench.questions import Answered, AnyQuestion, Check, Export, Judge, Judged, Write
from head.bench.store import LOAD_FILE, REPORT_FILE, told, write_kept
from head.bench.summary import summary_csv

PR_SET_PDEATHSIG = 1
ERRORS_TOLD = 2  # kinds of failed requests that are told with the reasons
SERIES_BYTES = 268_435_456  # of monitors' files in a page, all together; what is beyond is in the files only


def main() -> int:
    """Answers the question on stdin."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a head that is killed takes its judges along
    os.nice(10)
    with contextlib.suppress(OSError):  # where memory ends, this ends and not the head
        Path("/proc/self/oom_score_adj").write_text("1000")
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=AnyQuestion)
    try:
        answered = Answered(answer(question))
    except HerderError as error:
        answered = Answered(error=error.info())
    except MemoryError:
        answered = Answered(error=MemoryFull(f"judging needs more than {limit >> 20} MiB of memory").info())
    except OSError as error:
        answered = Answered(error=Internal(f"judging failed: {os.strerror(error.errno or 0)}").info())
    sys.stdout.buffer.write(msgspec.json.encode(answered))
    return 0


def answer(question: AnyQuestion) -> Any:
    """What was asked. Raises: HerderError, MemoryError, OSError."""
    match question:
        case Judge():
            return judge(question)
        case Export():
            return export(question)
        case Write():
            return write(question)
        case Check():
            return check(question)


def judge(question: Judge) -> Judged:
    """Merges, writes the merged run and its report. Raises: NotFound when no part came; DiskFull."""
    from common.bench.outcome import encode
    from head.bench import judging

    merged = judging.merge(question.parts, _read)
    plain, figures = judging.judge(
        merged,
        parts=len(question.parts),
        skew_ms=question.skew_ms,
        scenario=question.mlperf,
        about=question.about,
    )
    folder = Path(question.folder)
    with told():
        make_directories(folder, mode=0o700)
        write_kept(folder / LOAD_FILE, encode(merged.asked, merged.outcome))
        write_kept(folder / REPORT_FILE, msgspec.json.encode(plain))
    reasons = tuple(dict.fromkeys(reason["code"] for reason in plain["reasons"]))
    return Judged(plain["is_valid"], reasons, figures, _in_words(plain))


def _in_words(plain: Mapping[str, Any]) -> tuple[str, ...]:
    """The reasons, and what servers answered to requests that failed: the commonest kinds, with their first words."""
    errors = plain.get("errors") or {}
    samples = plain.get("error_samples") or {}
    kinds = sorted(errors, key=lambda kind: -errors[kind])[:ERRORS_TOLD]
    failed = [": ".join((f"{errors[kind]:,} x {kind}", *samples.get(kind, ())[:1])) for kind in kinds]
    return (*(reason["said"] for reason in plain["reasons"]), *failed)


def export(question: Export) -> int:
    """Writes a point in a format of others; returns its bytes. Raises: NotFound, InvalidValue, DiskFull."""
    from common.bench import formats
    from common.bench.report import Report

    try:
        report = msgspec.json.decode(Path(question.report).read_bytes(), type=Report)
        if question.format == "csv":
            made = formats.to_csv(report).encode()
        else:
            _, outcome = _read(question.source)
            write_as = {"vllm": formats.to_vllm, "genai-bench": formats.to_genai_bench}[question.format]
            made = msgspec.json.encode(write_as(report, outcome.records))
    except FileNotFoundError:
        raise NotFound("this point has no report") from None
    except ValueError as error:
        raise InvalidValue(f"this point cannot be written as {question.format}: {error}") from None
    with told():
        write_kept(Path(question.target), made)
    return len(made)


def write(question: Write) -> list[str]:
    """Writes summary.csv and report.html; returns the names of what was written. Raises: DiskFull."""
    folder, written = Path(question.folder), ["summary.csv"]
    with told():
        write_kept(folder / "summary.csv", summary_csv(question.benchmark).encode())
    page = _page(folder, question.benchmark)
    if page:
        with told():
            write_kept(folder / "report.html", page.encode())
        written.append("report.html")
    return written


def check(question: Check) -> dict[str, Any]:
    """The recipe as plain data with its times as numbers. Raises: InvalidRecipe."""
    from common.bench.recipe import convert

    try:
        made: dict[str, Any] = msgspec.to_builtins(convert(question.document))
    except (RecursionError, OverflowError, ArithmeticError) as error:
        raise InvalidRecipe(f"benchmark: {error}") from None
    return made


def _page(folder: Path, benchmark: dict[str, Any]) -> str:
    """report.html; without the samples where they do not fit into memory, and empty when it cannot be made at all.

    Everything that was measured is in the other files: a page that cannot be drawn fails no night of measurements.
    """
    try:
        try:
            return _drawn(folder, benchmark, _series(folder, f"{benchmark['id']}.monitor."))
        except MemoryError:
            return _drawn(folder, benchmark, {})
    except Exception:  # noqa: BLE001 - the border to the page; the head's log has what went wrong
        traceback.print_exc()
        return ""


def _drawn(folder: Path, benchmark: dict[str, Any], series: dict[str, Any]) -> str:
    from common.bench import html

    reports = []
    for point in benchmark.get("points") or []:
        path = folder / "points" / str(point["number"]) / REPORT_FILE
        if path.is_file():
            reports.append(msgspec.json.decode(path.read_bytes()) | {"point": point})
    return html.render(benchmark, reports, series)


def _series(folder: Path, prefix: str) -> dict[str, Any]:
    """What the monitors sent, by node and by engine."""
    from common.bench import series

    texts: dict[str, dict[str, str]] = {"monitor.csv": {}, "engine.csv": {}}
    left = SERIES_BYTES
    for run in sorted((folder / "runs").glob(f"{prefix}*")):
        for name, found in texts.items():
            path = run / name
            if path.is_file() and path.stat().st_size <= left:
                left -= path.stat().st_size
                found[run.name.removeprefix(prefix)] = path.read_text(errors="replace")
    return series.series_of(texts["monitor.csv"], texts["engine.csv"])


def _read(path: str) -> Any:
    from common.bench.outcome import decode

    return decode(Path(path).read_bytes())


if __name__ == "__main__":
    sys.exit(main())
