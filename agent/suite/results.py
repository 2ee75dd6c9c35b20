"""What a suite leaves behind: one JSON file per run, the summary, CSV, an HTML page, and how long logs are kept."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from common.bench import outcome as outcome_file
from common.bench import report
from common.bench.outcome import Asked, Outcome

KIND = "herder-suite-experiment"
MARK = "experiment.json"
ENGINE = ".engine.csv"
ROW = (
    *("name", "repetition", "total_requests", "total_errors", "throughput_rps", "avg_latency", "p50_latency"),
    *("p90_latency", "p99_latency", "output_tokens_per_second", "elapsed_seconds", "clients", "coverage", "is_valid"),
)


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(value, indent=2, default=str) + "\n")
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def write_csv(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """One line per run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(ROW)
        for run in runs:
            writer.writerow([_cells(run).get(name, "") for name in ROW])


def merged_report(files: Sequence[bytes]) -> dict[str, Any] | None:
    """The report of a run's parts put together, from every request of theirs; None where none can be read.

    Each executor's times count from its own start; how far those were apart is the run's start_skew_seconds.
    """
    whole: tuple[Asked, Outcome] | None = None
    for data in files:
        try:
            asked, outcome = outcome_file.decode(data)
        except ValueError:
            continue
        if whole is None:
            whole = asked, outcome
        else:
            whole[1].merge(outcome)
            if asked.endpoints != whole[0].endpoints:
                # Numbers of endpoints count each client's own: told apart they would be told wrongly.
                whole = replace(whole[0], endpoints=()), whole[1]
    if whole is None:
        return None
    built: dict[str, Any] = msgspec.to_builtins(report.build(*whole))
    return built


def write_html(
    path: Path, name: str, runs: Sequence[Mapping[str, Any]], samples: Sequence[Path], *, is_drawn: bool
) -> bool:
    """The page of all runs that have a report, with what was sampled beside them; False where none has.

    is_drawn: with graphs; without, a table alone, which every run can give.
    """
    from common.bench import html, series

    if not is_drawn:
        path.write_text(_table_page(name, runs))
        return True
    points: list[dict[str, Any]] = []
    reports: list[dict[str, Any]] = []
    for run in runs:
        made = run.get("report")
        if made is None:
            continue
        aggregated = run["client_metrics"]["aggregated"]
        skew = aggregated.get("start_skew_seconds") or 0.0
        point = {
            "number": len(points),
            "changes": {"name": run["benchmark_name"]} | dict(run["overrides"]),
            "repetition": run["repetition"] - 1,
            "status": "completed",
            "is_valid": bool(made.get("is_valid")) and not aggregated.get("is_degraded"),
            "reasons": ["degraded"] if aggregated.get("is_degraded") else [],
            "coverage": aggregated.get("coverage_share", 1.0),
            "skew_ms": skew * 1000,
            "figures": {},
        }
        points.append(point)
        reports.append(dict(made) | {"point": point})
    if not reports:
        return False
    beside = series.series_of(
        {one.stem: one.read_text() for one in samples if not one.name.endswith(ENGINE)},
        {one.name: one.read_text() for one in samples if one.name.endswith(ENGINE)},
    )
    path.write_text(html.render({"name": name, "status": "completed", "points": points}, reports, beside))
    return True


def _table_page(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """The figures of write_csv as a page without graphs."""
    from html import escape

    def row(cells: Sequence[Any], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(str(cell))}</{kind}>" for cell in cells) + "</tr>\n"

    lines = [row([_cells(run).get(column, "") for column in ROW], "td") for run in runs]
    style = "body{font-family:sans-serif}td,th{padding:.2em .6em;text-align:right;border-bottom:1px solid #ccc}"
    return (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{escape(name)}</title><style>{style}</style>\n"
        f"<h1>{escape(name)}</h1>\n<table>\n{row(ROW, 'th')}{''.join(lines)}</table>\n</html>\n"
    )


def _cells(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's figures by name."""
    found: dict[str, Any] = {"name": run["benchmark_name"], "repetition": run["repetition"]}
    found.update(run["client_metrics"]["aggregated"])
    return found


def samples_of(folder: Path, own: Path | None) -> list[Path]:
    """Files of monitors: the orchestrator's own, and those that a job's monitors write into its folder."""
    found = sorted((folder / "monitoring").glob("*.csv")) if (folder / "monitoring").is_dir() else []
    return found + ([own] if own is not None and own.exists() and own.resolve() not in map(Path.resolve, found) else [])


def utilization(path: Path) -> dict[str, dict[str, float]]:
    """Mean and greatest of every column of a monitor's CSV file that has numbers."""
    sums: dict[str, list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                try:
                    value = float(text)
                except (TypeError, ValueError):
                    continue
                if value == value:
                    kept = sums.setdefault(str(name), [0.0, 0.0, value])
                    kept[0] += value
                    kept[1] += 1
                    kept[2] = max(kept[2], value)
    return {name: {"mean": total / count, "max": most} for name, (total, count, most) in sums.items() if count}


def mark(folder: Path, recipe: Any, logs: Sequence[Path], samples: Sequence[Path]) -> None:
    """Notes what may be removed later, and when: logs and samples by their `retention`, never results."""
    from agent.suite import times

    def inside(paths: Sequence[Path]) -> list[str]:
        found = []
        for path in paths:
            try:
                found.append(str(path.resolve().relative_to(folder.resolve())))
            except ValueError:
                continue
        return found

    write_json(
        folder / MARK,
        {
            "kind": KIND,
            "created": time.time(),
            "logs": {"keep_s": times.seconds(recipe.logging.retention), "files": inside(logs)},
            "monitoring": {"keep_s": times.seconds(recipe.monitoring.retention), "files": inside(samples)},
        },
    )


def prune(root: Path, *, now: float | None = None) -> list[Path]:
    """Removes logs and samples of experiments right below a folder whose time is over; what it removed."""
    now = time.time() if now is None else now
    gone: list[Path] = []
    for marked in sorted(root.glob(f"*/{MARK}")):
        try:
            # What somebody else left in a folder that is open to all says nothing about our files.
            if marked.lstat().st_uid != os.geteuid() or marked.parent.is_symlink():
                continue
            found = json.loads(marked.read_text())
            if not isinstance(found, dict) or found.get("kind") != KIND:
                continue
            gone += _prune_one(marked.parent, found, now)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            continue
    return gone


def _prune_one(folder: Path, found: dict[str, Any], now: float) -> list[Path]:
    gone: list[Path] = []
    for part in ("logs", "monitoring"):
        kept = found.get(part) or {}
        if now - float(found.get("created") or now) <= float(kept.get("keep_s") or 0):
            continue
        for name in kept.get("files") or ():
            path = (folder / str(name)).resolve()
            if path.is_relative_to(folder.resolve()) and path.is_file():
                path.unlink()
                gone.append(path)
    return gone
