"""FLOPs: published rates follow from each source's own convention, and the conventions keep their order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from common.errors import InvalidValue
from head.planner.model.flops import (
    DESCRIPTIONS,
    Convention,
    decode_flops,
    hardware_flops_per_token,
    prefill_flops,
    training_flops_per_token,
)
from head.planner.model.presets import architecture_of, lookup

_ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "golden" / "planner_flops.json").read_bytes())


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: str(row["id"]))
def test_published_rates_follow_from_their_convention(row: dict[str, Any]) -> None:
    """Tokens per second times FLOPs per token is the published rate, within 2 %."""
    architecture = lookup(row["model"]) if "model" in row else architecture_of(row["config"])
    flops = training_flops_per_token(architecture, row["seq"], row["convention"], has_mtp=row.get("mtp", False))
    assert flops * row["tokens_per_s"] / 1e12 == pytest.approx(row["tflops"], rel=0.02)


def test_each_convention_is_described() -> None:
    """Every convention says in words what it counts."""
    assert set(DESCRIPTIONS) == set(get_args(Convention))


def test_conventions_keep_their_order() -> None:
    """Whole attention costs more than halved, and counting recomputation more than not."""
    llama = lookup("llama-3.1-8b")
    halved, whole = (training_flops_per_token(llama, 8192, name) for name in ("causal", "full_attention"))
    model, hardware = (training_flops_per_token(llama, 8192, name) for name in ("megatron_model", "megatron_hardware"))
    assert training_flops_per_token(llama, 8192, "6n") < whole
    assert halved < whole
    assert hardware / model == pytest.approx(4 / 3, rel=0.02)


def test_recomputation_adds_a_forward_pass() -> None:
    """Full recomputation is 4/3 of the model's operations, selective lies between."""
    llama = lookup("llama-3.1-8b")
    none, selective, full = (
        hardware_flops_per_token(llama, 4096, recompute, "model") for recompute in ("none", "selective", "full")
    )
    assert none < selective < full == pytest.approx(none * 4 / 3)


def test_the_model_convention_agrees_with_the_closed_form() -> None:
    """Counting the products one by one gives 6 N + 6 L a d s but for the norms."""
    llama = lookup("llama-3.1-70b")
    assert training_flops_per_token(llama, 8192, "model") == pytest.approx(
        training_flops_per_token(llama, 8192, "causal"), rel=0.001
    )


def test_windows_bound_attention() -> None:
    """Attention of a local layer stops growing with the context; a global one's does not."""
    gemma = lookup("google/gemma-3-27b-it")
    llama = lookup("llama-3.1-8b")
    growth = [decode_flops(model, 32_768).attention / decode_flops(model, 8_192).attention for model in (gemma, llama)]
    assert growth[0] < growth[1] == pytest.approx(4.0)


def test_prefill_is_the_mean_over_positions() -> None:
    """Causal prefill attends to half of the sequence on average; an encoder to all of it."""
    llama = lookup("llama-3.1-8b")
    encoder = msgspec.structs.replace(llama, is_causal=False)
    assert prefill_flops(encoder, 1000).attention == pytest.approx(2 * prefill_flops(llama, 1000).attention)


def test_an_unknown_convention_is_refused() -> None:
    """A convention that does not exist is a bad value that lists the ones that do."""
    with pytest.raises(InvalidValue) as caught:
        training_flops_per_token(lookup("llama-7b"), 2048, "guess")  # type: ignore[arg-type]
    assert caught.value.details["field"] == "convention"
