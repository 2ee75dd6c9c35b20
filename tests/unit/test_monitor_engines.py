"""Engines' metrics pages: one column whatever the engine calls it, labels summed, pages of all kinds survived."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.monitor.engines import FIELDS, page_of, read_page

VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta/llama"} 3.0
vllm:num_requests_running{engine="1",model_name="meta/llama"} 4.0
vllm:num_requests_waiting{engine="0",model_name="meta/llama"} 2.0
vllm:num_requests_waiting_by_reason{reason="capacity"} 99
vllm:kv_cache_usage_perc{engine="0",model_name="meta/llama"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="meta/llama"} 0.75
vllm:prompt_tokens_total{engine="0",model_name="odd \\"name\\" with } and {"} 1e+06
vllm:generation_tokens_total{engine="0",model_name="meta/llama"} 42.0
vllm:generation_tokens_created{engine="0",model_name="meta/llama"} 1.7e+09
vllm:time_to_first_token_seconds_bucket{le="0.5",model_name="meta/llama"} 7.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="meta/llama"} 1.5
vllm:time_to_first_token_seconds_count{engine="0",model_name="meta/llama"} 8.0
vllm:request_success_total{finished_reason="stop"} 5
vllm:request_success_total{finished_reason="length"} 6
vllm:num_preemptions_total NaN
process_cpu_seconds_total 12
"""
LLAMA = b"""# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 120
llamacpp:tokens_predicted_total 340
llamacpp:requests_processing 2
llamacpp:requests_deferred 1
llamacpp:n_decode_total 77
llamacpp:n_busy_slots_per_decode 1.5
"""


def test_vllm_becomes_columns() -> None:
    """Gauges and counters are summed over engines and reasons, the cache is the fullest, buckets are no column."""
    found = read_page(VLLM)
    assert found == {
        "requests_running": 7.0,
        "requests_waiting": 2.0,
        "kv_cache_used_ratio": 0.75,
        "prompt_tokens_total": 1e6,
        "generation_tokens_total": 42.0,
        "ttft_seconds_sum": 1.5,
        "ttft_count": 8.0,
        "requests_finished_total": 11.0,
    }


def test_llama_becomes_the_same_columns() -> None:
    """llama.cpp's names lead to the same columns."""
    found = read_page(LLAMA)
    assert found["requests_running"] == 2.0
    assert found["requests_waiting"] == 1.0
    assert found["generation_tokens_total"] == 340.0
    assert found["decodes_total"] == 77.0
    assert "kv_cache_used_ratio" not in found


def test_the_newer_name_wins_over_the_older() -> None:
    """A page with both names of a series is read by the one that stands first in the table."""
    page = b"vllm:gpu_cache_usage_perc 0.1\nvllm:kv_cache_usage_perc 0.9\n"
    assert read_page(page) == {"kv_cache_used_ratio": 0.9}


@given(st.binary(max_size=300))
def test_any_page_is_survived(page: bytes) -> None:
    """Whatever an engine answers, columns are of the table and values are numbers."""
    names = {field.name for field in FIELDS}
    for name, value in read_page(page).items():
        assert name in names
        assert isinstance(value, float)


@pytest.mark.parametrize(
    ("url", "page"),
    [
        ("http://h:8000", "http://h:8000/metrics"),
        ("http://h:8000/", "http://h:8000/metrics"),
        ("http://h:8000/v1", "http://h:8000/metrics"),
        ("http://h:8000/v1/", "http://h:8000/metrics"),
        ("h:8000", "http://h:8000/metrics"),
        ("https://h/base/v1", "https://h/base/metrics"),
        ("http://h:8000/other/metrics", "http://h:8000/other/metrics"),
    ],
)
def test_the_page_of_an_engine(url: str, page: str) -> None:
    """An engine's base URL, with or without /v1, leads to its metrics page; a page stays itself."""
    assert page_of(url) == page


@pytest.mark.parametrize("url", ["ftp://h/", "http://", "file:///etc/passwd"])
def test_what_is_no_http_address_is_refused(url: str) -> None:
    """Only http and https are asked."""
    with pytest.raises(ValueError, match="no http URL"):
        page_of(url)
