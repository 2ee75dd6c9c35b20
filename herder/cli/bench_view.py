"""What `herder bench` shows: one block that is drawn anew while it runs, and the tables at the end, 80 columns wide."""

from __future__ import annotations

import statistics
import sys
from typing import TYPE_CHECKING, Any

import click

from herder.cli import output
from herder.cli.command import Globals
from herder.cli.table import Column, clean
from herder.cli.table import render as render_table
from herder.cli.text import duration, size

if TYPE_CHECKING:
    from agent.loadgen.engine import Tick
    from agent.loadgen.order import Order
    from common.bench.report import Report

WIDTH = 80
MAX_PARTS = 50
ROWS = ("ttft", "ttft_sched", "tpot", "itl", "icl", "stall", "e2e", "e2e_sched", "send_lag", "connect")


class Live:
    """Progress on stderr: a block on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, options: Globals, order: Order) -> None:
        self._options, self._order = options, order
        self._is_terminal = sys.stderr.isatty() and not options.is_quiet
        self._latest: dict[int, Tick] = {}
        self._sent = self._done = self._failed = 0
        self._drawn = 0
        self._line_at = 0.0
        self._second = -1

    def begin(self) -> None:
        """The run has been started."""
        plan = self._order.asked.plan
        output.note(self._options, f"{plan['schedule']} to {_target(dict(plan))}, {plan['workers']} worker(s)")

    def take(self, worker: int, tick: Tick) -> None:
        """What a worker did in its last second."""
        self._latest[worker] = tick
        self._sent += tick.sent
        self._done += tick.done
        self._failed += tick.failed
        if self._options.is_quiet or (len(self._latest) < self._order.spec.workers and tick.at_s < 2):
            return
        if self._is_terminal:
            self._draw(self._lines(tick.at_s))
        elif tick.at_s - self._line_at >= 10:
            self._line_at = tick.at_s
            output.note(self._options, ", ".join(self._lines(tick.at_s)))

    def _lines(self, at_s: float) -> list[str]:
        ticks = list(self._latest.values())
        ttft = [value for tick in ticks for value in tick.ttft_ns]
        total = self._order.total_s
        return [
            duration(at_s) + (f" of {duration(total)}" if total is not None else ""),
            f"sent {self._sent}, done {self._done}, failed {self._failed}, in flight {sum(t.in_flight for t in ticks)}",
            f"last second: {sum(t.done for t in ticks)} requests, {sum(t.tokens for t in ticks)} pieces"
            + (f", TTFT p50 {statistics.median(ttft) / 1e6:.1f} ms" if ttft else ""),
        ]

    def _draw(self, lines: list[str]) -> None:
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        click.echo(up + "".join(f"\r\x1b[2K{clean(line)[: WIDTH - 1]}\n" for line in lines), nl=False, err=True)
        self._drawn = len(lines)

    def end(self) -> None:
        """The block is taken away: the tables follow."""
        if self._drawn:
            click.echo(f"\x1b[{self._drawn}A\x1b[J", nl=False, err=True)
            self._drawn = 0


def render(report: Report) -> str:
    """The tables of a report."""
    parts = [_head(report), _latencies(report), _formulas(report), _parts("CLASS", report.classes),
             _parts("SERVER", report.endpoints), _generator(report), _judgement(report)]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _head(report: Report) -> str:
    plan, rates, counts, window = report.plan, report.throughput, report.counts, report.window
    has_tokens = bool(report.output_tokens or report.input_tokens)
    pairs = [
        ("target", _target(plan)),
        ("model", f"{plan['model']}, API {plan['api']}" if plan.get("model") else f"API {plan['api']}"),
        ("load", ("open loop: " if plan["loop"] == "open" else "") + f"{plan['schedule']}, seed {plan['seed']}"),
        ("sizes", ", ".join(plan["scenarios"])),
        ("window", f"{window['begin_s']:.2f} s to {window['end_s']:.2f} s, {window['rule']}"),
        ("requests", f"{counts['sent']} sent, {counts['in_window']} of the window: {counts['good']} good, "
         f"{counts['failed']} failed"),
        ("rates", f"{rates.req_s:.2f} requests/s"
         + (f", {rates.output_tok_s:.1f} tokens/s out, {rates.input_tok_s:.1f} in" if has_tokens else "")),
        ("tokens", f"{report.output_tokens} out, counted by {report.token_source}; {report.input_tokens} in"
         if has_tokens else ""),
    ]  # fmt: skip
    if report.goodput is not None:
        limits = ", ".join(f"{name} <= {ms:g} ms" for name, ms in report.goodput.limits_ms.items())
        share = report.goodput.slo_attainment
        met = f", {share:.1%} of the window" if share is not None else ""
        pairs.append(("goodput", f"{report.goodput.goodput_req_s:.2f} requests/s with {limits}{met}"))
    if report.errors:
        pairs.append(("errors", ", ".join(f"{name} {number}" for name, number in report.errors.items())))
    return "\n".join(_wrapped(name, text) for name, text in pairs if text)


def _wrapped(name: str, text: str) -> str:
    import textwrap

    return textwrap.fill(
        clean(text), WIDTH, initial_indent=name.ljust(11), subsequent_indent=" " * 11, break_on_hyphens=False
    )


def _latencies(report: Report) -> str:
    columns = [Column("MS"), *(Column(title, is_number=True) for title in ("N", "MEAN", "P50", "P90", "P99", "MAX"))]
    rows = []
    for name in ROWS:
        summary = report.latency[name]
        if not summary.count:
            continue
        shares = [summary.percentiles.get(share) for share in ("p50", "p90", "p99")]
        figures = [_ms(value) for value in (summary.mean, *shares, summary.max)]
        # Below its floor a percentile is an estimate without a bound.
        if not summary.is_histogram and summary.upper_99.get("p99") is None:
            figures[3] = "~" + figures[3]
        rows.append([name, str(summary.count), *figures])
    if not rows:
        return ""
    table = render_table(columns, rows, width=WIDTH)
    has_estimates = any(row[5].startswith("~") for row in rows)
    return table + ("\n~: fewer than 662 samples, so no 99 % bound on p99" if has_estimates else "")


def _parts(title: str, parts: dict[str, dict[str, Any]]) -> str:
    """What each class of requests or each server did, where there are several."""
    if not parts:
        return ""
    columns = [Column(title)]
    columns += [Column(name, is_number=True) for name in ("SENT", "FAILED", "TTFT P50", "P99", "E2E P50", "P99")]
    rows = []
    for name, made in list(parts.items())[:MAX_PARTS]:
        shares = [made[metric]["percentiles"].get(share) for metric in ("ttft", "e2e") for share in ("p50", "p99")]
        rows.append([name, str(made["sent"]), str(made["failed"]), *(_ms(value) for value in shares)])
    more = f"\nand {len(parts) - MAX_PARTS} more" if len(parts) > MAX_PARTS else ""
    return render_table(columns, rows, width=WIDTH) + more


def _target(plan: dict[str, Any]) -> str:
    urls = plan.get("urls") or [plan["url"]]
    return str(urls[0]) + (f" and {len(urls) - 1} more, {plan['spread']}" if len(urls) > 1 else "")


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 100 else f"{value:.1f}" if value < 100_000 else f"{value:.0f}"


def _formulas(report: Report) -> str:
    shown = [name for name in ROWS if report.latency[name].count]
    return "\n".join(_wrapped(name, report.formulas[name]) for name in shown)


def _generator(report: Report) -> str:
    made = report.generator
    cpu = ", ".join(f"{worker['cpu_s'] / worker['wall_s']:.0%}" for worker in made.workers if worker["wall_s"])
    memory = max((worker["rss_bytes"] for worker in made.workers), default=0)
    lag = made.client_lag.percentiles
    facts = [f"CPU {cpu or '-'} of a core, {size(memory)}, {made.connections} connections, {made.reads} reads"]
    if lag:
        facts.append(f"client_lag p50 {_ms(lag['p50'])} ms, p99 {_ms(lag['p99'])} ms")
    if made.cpu_us_per_token is not None:
        facts.append(f"{made.cpu_us_per_token:.1f} us of CPU per token")
    facts.append("load average " + " ".join(f"{value:.1f}" for value in report.machine["load_average"]))
    return _wrapped("generator", "; ".join(facts))


def _judgement(report: Report) -> str:
    lines = [_wrapped("warning", f"{finding.code}: {finding.said}") for finding in report.warnings]
    lines += [_wrapped("INVALID", f"{finding.code}: {finding.said}") for finding in report.reasons]
    for outcome, messages in report.error_samples.items():
        lines += [_wrapped("error", f"{outcome}: {message}") for message in messages[:2]]
    if report.is_valid:
        lines.append("valid")
    return "\n".join(lines)


__all__: list[Any] = ["Live", "render"]
