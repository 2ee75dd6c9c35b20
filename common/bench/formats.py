"""A report in the files of others: CSV, vLLM's `bench serve` JSON, genai-bench's run JSON.

Field names and units are theirs; values follow their formulas as far as ours hold the same facts. What we do not have
(texts, prices) is left out. Percentiles there carry no bounds.
Sources: vllm/benchmarks/serve.py; genai_bench/metrics.
"""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime
from typing import Any

from common.bench.metrics import MS, NS, Window
from common.bench.records import OUTCOMES, Records
from common.bench.report import MAX_DETAIL, Report

FORMATS = ("json", "csv", "vllm", "genai-bench")
_SHARES = {"p50": "50", "p90": "90", "p95": "95", "p99": "99"}


def to_csv(report: Report) -> str:
    """One line per metric: its distribution in milliseconds; then the rates."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["metric", "unit", "count", "mean", "stddev", "min", "p50", "p90", "p95", "p99", "p999", "max"])
    for name, summary in report.latency.items():
        shares = [_text(summary.percentiles.get(share)) for share in ("p50", "p90", "p95", "p99", "p999")]
        writer.writerow(
            [name, "ms", summary.count, _text(summary.mean), _text(summary.stddev), _text(summary.min), *shares,
             _text(summary.max)]
        )  # fmt: skip
    rates = report.throughput
    for name, value in (
        ("req_s", rates.req_s),
        ("output_tok_s", rates.output_tok_s),
        ("input_tok_s", rates.input_tok_s),
        ("error_rate", report.error_rate),
        ("goodput_req_s", report.goodput.goodput_req_s if report.goodput else None),
    ):
        writer.writerow([name, "1/s" if name.endswith("_s") else "share", "", _text(value), *[""] * 8])
    return out.getvalue()


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def to_vllm(report: Report, records: Records) -> dict[str, Any]:
    """As `vllm bench serve --save-result --save-detailed` writes it."""
    plan, latency = report.plan, report.latency
    seconds = report.window["end_s"] - report.window["begin_s"]
    made: dict[str, Any] = {
        "date": datetime.fromtimestamp(report.created, UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": f"openai-{plan.get('api')}",
        "backend": f"openai-{plan.get('api')}",
        "label": "herder",
        "model_id": plan.get("model"),
        "num_prompts": report.counts["in_window"],
        "request_rate": plan.get("rate") if plan.get("loop") == "open" else "inf",
        "burstiness": plan.get("burstiness"),
        "max_concurrency": plan.get("concurrency"),
        "duration": seconds,
        "completed": report.counts["good"],
        "failed": report.counts["failed"],
        "total_input_tokens": 0,
        "total_output_tokens": 0,
        "request_throughput": report.throughput.req_s,
        "request_goodput": report.goodput.goodput_req_s if report.goodput else None,
        "output_throughput": report.throughput.output_tok_s,
        "total_token_throughput": report.throughput.output_tok_s + report.throughput.input_tok_s,
        "max_output_tokens_per_s": report.throughput.peak_output_tok_s,
        "max_concurrent_requests": max((second.in_flight for second in report.series), default=0),
    }
    # Their ITL is the gap between pieces: our ICL.
    for theirs, ours in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "icl"), ("e2el", "e2e")):
        summary = latency[ours]
        made[f"mean_{theirs}_ms"] = summary.mean
        made[f"median_{theirs}_ms"] = summary.percentiles.get("p50")
        made[f"std_{theirs}_ms"] = summary.stddev
        for name, share in _SHARES.items():
            made[f"p{share}_{theirs}_ms"] = summary.percentiles.get(name)
    rows = _measured(report, records, "sent", "first", "last", "counted_input", "input", "output", "outcome")
    good = [row for row in rows if row[-1] == 0]
    made["total_input_tokens"] = sum(there if there >= 0 else here for _, _, _, here, there, _, _ in good)
    made["total_output_tokens"] = sum(max(output, 0) for *_, output, _ in good)
    made["input_lens"] = [there if there >= 0 else here for _, _, _, here, there, _, _ in rows]
    made["output_lens"] = [max(output, 0) for *_, output, _ in rows]
    made["ttfts"] = [(first - sent) / (1000 * MS) if first >= 0 else 0.0 for sent, first, *_ in rows]
    made["latencies"] = [(last - sent) / (1000 * MS) if outcome == 0 else 0.0 for sent, _, last, *_, outcome in rows]
    made["start_times"] = [sent / (1000 * MS) for sent, *_ in rows]
    made["errors"] = ["" if outcome == 0 else OUTCOMES[outcome] for *_, outcome in rows]
    return made


def _measured(report: Report, records: Records, *names: str) -> list[tuple[int, ...]]:
    """Columns of the requests of the window: those that all other figures of the file are of."""
    window = Window(round(report.window["begin_s"] * NS), round(report.window["end_s"] * NS))
    rows = records.columns("scheduled", *names)
    return [row[1:] for row in rows if window.holds(row[0])]


def to_genai_bench(report: Report, records: Records) -> dict[str, Any]:
    """As genai-bench writes a run; times in seconds. Raises: ValueError for too many requests."""
    if len(records) > MAX_DETAIL:
        raise ValueError(f"{len(records):,} requests; this format holds each, at most {MAX_DETAIL:,}")
    plan, rates = report.plan, report.throughput
    seconds = report.window["end_s"] - report.window["begin_s"]
    good: list[dict[str, Any]] = []
    for sent, first, last, here, there, output, outcome, status in _measured(
        report, records, "sent", "first", "last", "counted_input", "input", "output", "outcome", "status"
    ):
        if outcome:
            good.append({"error_code": status or 500, "error_message": OUTCOMES[outcome]})
            continue
        good.append(_genai_request(sent, first, last, there if there >= 0 else here, output))
    names = (
        "ttft", "tpot", "e2e_latency", "output_latency", "output_inference_speed", "num_input_tokens",
        "num_output_tokens", "total_tokens", "input_throughput", "output_throughput",
    )  # fmt: skip
    stats = {}
    for name in names:
        values = [request[name] for request in good if request.get(name) is not None]
        stats[name] = _genai_stats(values)
    codes: dict[str, int] = {}
    for request in good:
        if "error_code" in request:
            codes[str(request["error_code"])] = codes.get(str(request["error_code"]), 0) + 1
    total = report.counts["in_window"]
    errors = sum(codes.values())
    return {
        "aggregated_metrics": {
            "scenario": ", ".join(plan.get("scenarios") or ()) or "dataset",
            "num_concurrency": plan.get("concurrency") or 0,
            "batch_size": plan.get("batch", 1),
            "iteration_type": "num_concurrency",
            "run_duration": seconds,
            "mean_output_throughput_tokens_per_s": rates.output_tok_s,
            "mean_input_throughput_tokens_per_s": rates.input_tok_s,
            "mean_total_tokens_throughput_tokens_per_s": rates.output_tok_s + rates.input_tok_s,
            "requests_per_second": rates.req_s,
            "error_codes_frequency": codes,
            "error_rate": errors / total if total else 0.0,
            "num_error_requests": errors,
            "num_completed_requests": total - errors,
            "num_requests": total,
            "stats": stats,
        },
        "individual_request_metrics": good,
        "_time_unit": "s",
    }


def _genai_request(sent: int, first: int, last: int, inputs: int, output: int) -> dict[str, Any]:
    whole = (last - sent) / (1000 * MS)
    ttft = (first - sent) / (1000 * MS) if first >= 0 else None
    behind = whole - ttft if ttft is not None else None
    made: dict[str, Any] = {
        "error_code": None, "ttft": ttft, "e2e_latency": whole, "output_latency": behind, "num_input_tokens": inputs,
        "num_output_tokens": max(output, 0), "total_tokens": inputs + max(output, 0),
        "input_throughput": inputs / ttft if ttft else None, "tpot": None, "output_inference_speed": None,
        "output_throughput": None,
    }  # fmt: skip
    if behind and output > 1:
        made["tpot"] = behind / (output - 1)
        made["output_inference_speed"] = made["output_throughput"] = (output - 1) / behind
    return {key: value for key, value in made.items() if key != "error_code"}


def _genai_stats(values: list[float]) -> dict[str, float | None]:
    import statistics

    ranked = sorted(values)
    if not ranked:
        return dict.fromkeys(("min", "max", "mean", "stddev", "sum", "p25", "p50", "p75", "p90", "p95", "p99"))
    found: dict[str, float | None] = {
        "min": ranked[0], "max": ranked[-1], "mean": statistics.fmean(ranked), "stddev": statistics.pstdev(ranked),
        "sum": sum(ranked),
    }  # fmt: skip
    for share in (25, 50, 75, 90, 95, 99):
        at = (len(ranked) - 1) * share / 100
        low = int(at)
        high = min(low + 1, len(ranked) - 1)
        found[f"p{share}"] = ranked[low] + (ranked[high] - ranked[low]) * (at - low)
    return found
