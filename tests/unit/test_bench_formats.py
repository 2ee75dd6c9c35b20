"""Reports in the files of others: their figures are all of the same requests, those of the window."""

from __future__ import annotations

from typing import Any

from common.bench import formats, report
from tests.doubles.bench_parts import asked_of, parts_of


def run_with_warmup() -> tuple[Any, Any]:
    """100 requests in 10 s, of which 5 s are warm-up, some of them failed."""
    asked = asked_of(100, rate=10.0, warmup_s=5.0)
    outcome = parts_of(asked, 1, failing=0.2)[0]
    return report.build(asked, outcome), outcome.records


def test_vllm_has_the_requests_of_the_window() -> None:
    """Counts, lists and sums of tokens leave out the warm-up, as duration does."""
    made, records = run_with_warmup()
    value = formats.to_vllm(made, records)
    assert value["num_prompts"] == made.counts["in_window"] == value["completed"] + value["failed"]
    assert made.counts["in_window"] < made.counts["sent"]
    for name in ("input_lens", "output_lens", "ttfts", "latencies", "start_times", "errors"):
        assert len(value[name]) == value["num_prompts"], name
    good = [tokens for tokens, error in zip(value["output_lens"], value["errors"], strict=True) if not error]
    assert value["total_output_tokens"] == sum(good) > 0
    assert value["total_input_tokens"] > 0


def test_genai_bench_has_the_requests_of_the_window() -> None:
    """Requests, errors and distributions are of one population."""
    made, records = run_with_warmup()
    value = formats.to_genai_bench(made, records)
    figures = value["aggregated_metrics"]
    assert figures["num_requests"] == len(value["individual_request_metrics"]) == made.counts["in_window"]
    assert figures["num_error_requests"] == made.counts["failed"]
    assert figures["num_completed_requests"] == made.counts["good"]
