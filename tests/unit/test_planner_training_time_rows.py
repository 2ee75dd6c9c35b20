"""Measured training rows: what ships, what must not be trusted, and how a published table becomes a question."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from head.planner.calibration.intervals import band_for, bands_of, quantile
from head.planner.calibration.training_rows import TrainingRow, document_of, named_architecture, shipped_rows
from head.planner.calibration.training_truth import Unusable, row_of, rows_of, stack_of
from head.planner.training.constants import PRIORS, groups_of, resolve, shipped
from head.planner.training.step_time import estimate, local_factor

ROWS = shipped_rows()


def raw(**changes: Any) -> dict[str, Any]:
    """A row as a table states it; `changes` go to the section named before the underscore."""
    row: dict[str, Any] = {
        "id": "x",
        "source": {"title": "Somebody's Megatron-LM runs", "url": "https://example.org"},
        "model": {
            "name": "gpt",
            "layers": 96,
            "hidden": 12288,
            "heads": 96,
            "ffn": 49152,
            "vocab": 51200,
            "tied": True,
            "gated": False,
        },
        "hardware": {"gpu": "A100-SXM-80GB", "gpus": 64, "internode": "8x200 Gb/s HDR InfiniBand per node"},
        "parallel": {"tp": 8, "pp": 8, "vp": 3, "dp": 1},
        "train": {"seq": 2048, "gbs": 64, "mbs": 1, "precision": "bf16", "recompute": "selective"},
        "expected": {"iter_time_s": 13.75},
    }
    for path, value in changes.items():
        section, _, field = path.partition("_")
        row[section] = {**row[section], field: value} if field else value
    return row


def test_rows_that_contradict_themselves_are_kept_and_not_fitted() -> None:
    """Flagged rows ship as examples of what must not be trusted: no weight, no prediction, not near anything."""
    flagged = [row for row in ROWS if row.flags or not row.is_usable]
    assert {row.id for row in flagged} >= {"bloom-prequel-L658", "bloom-prequel-L670"}
    fitted = shipped()
    assert fitted.local is not None
    for row in flagged:
        assert not row.is_fitted
        assert row.id not in fitted.local.weights
        assert row.id not in fitted.predicted
        assert all(near.id != row.id for near in _near(row))


def _near(row: TrainingRow) -> Any:
    return estimate(row.architecture, row.topology(), row.layout, row.stack).step_s.near


def test_gpu_hours_are_never_a_step_time() -> None:
    """Lifetime GPU hours contain more than steps (the Llama 3.1 card implies 14 % MFU): refused as a throughput."""
    with pytest.raises(Unusable, match="GPU hours"):
        row_of(raw(expected={"gpu_hours": 1.46e6}))
    with pytest.raises(Unusable):
        row_of(raw(expected={"oom": True}))


def test_a_table_row_becomes_the_question_it_states() -> None:
    """Degrees, batch, network, precision and recomputation come out as written; the stack from the title."""
    row = row_of(raw())
    assert (row.layout.tp, row.layout.pp, row.layout.virtual_stages, row.layout.dp) == (8, 8, 3, 1)
    assert row.layout.recompute == "selective"
    assert row.layout.schedule == "interleaved"
    assert row.nic_gbit_per_s == 200
    assert row.stack == "megatron"
    assert row.step_s == 13.75
    assert row.architecture.layers == 96
    assert row.is_fitted


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parallel": {"tp": 7}}, "do not multiply"),
        ({"hardware_gpu": "abacus"}, "abacus"),
        ({"model": {"name": "no-such-model"}}, "dimensions"),
        ({"train_seq": None}, "sequence length"),
        ({"expected": {}}, "no step time"),
    ],
)
def test_what_cannot_be_a_question_says_why(change: dict[str, Any], reason: str) -> None:
    """Missing or impossible facts give a reason and no row, and do not stop the others."""
    with pytest.raises(Unusable, match=reason):
        row_of(raw(**change))
    rows, refused = rows_of([raw(), {**raw(**change), "id": "bad"}])
    assert [row.id for row in rows] == ["x"]
    assert list(refused) == ["bad"]


def test_times_derive_from_tokens_when_only_those_are_stated() -> None:
    """tokens/s/GPU and the batch give the step time."""
    row = row_of(raw(expected={"tokens_per_s_per_gpu": 100.0}))
    assert math.isclose(row.step_s, 64 * 2048 / (100 * 64))


def test_stacks_are_told_by_title_and_release() -> None:
    """A release is part of the stack's name where a source has releases."""
    assert (
        stack_of("NVIDIA NeMo Megatron-Bridge performance summary", "26.04 NeMo Container") == "megatron-bridge@26.04"
    )
    assert stack_of("MosaicML LLM Foundry training benchmarks") == "mosaic"
    assert stack_of("a blog post") == "unknown"


def test_the_document_reads_back_what_was_written() -> None:
    """Writing rows and reading them loses nothing but digits of the time past the sixth."""
    chosen = ROWS[::40]
    text = document_of(chosen, {}, {}, {})
    assert all(row.id.encode() in text for row in chosen)
    assert len({row.id for row in ROWS}) == len(ROWS)
    assert named_architecture("LLAMA3_70B") == named_architecture("Llama-3-70B")


def test_every_row_names_its_source_and_where_to_find_it() -> None:
    """Shipped facts carry the title and address of what they were read from."""
    assert all(row.source and row.url.startswith("http") for row in ROWS)
    assert all(math.isfinite(row.step_s) and row.step_s > 0 for row in ROWS)


def test_no_constant_knows_a_model_or_a_source() -> None:
    """Deviations belong to hardware, precision and software only, and every constant has a meaning and a prior."""
    fitted = shipped()
    names = (
        {row.model.lower() for row in ROWS} | {row.id.lower() for row in ROWS} | {row.source.lower() for row in ROWS}
    )
    assert set(fitted.constants) == set(PRIORS)
    for name, levels in fitted.constants.items():
        assert PRIORS[name].meaning
        for groups in levels.groups.values():
            assert not {group.lower() for group in groups} & names


def test_an_unknown_group_gets_its_parents_constants() -> None:
    """A stack without rows is the global value; a release without rows is its stack."""
    fitted = shipped()
    row = ROWS[0]
    device = row.topology().accelerator
    bare = resolve(fitted, groups_of(row.architecture, device, "bf16", "never-heard-of"))
    fresh = resolve(fitted, groups_of(row.architecture, device, "bf16", "megatron@99.12"))
    stack = resolve(fitted, groups_of(row.architecture, device, "bf16", "megatron"))
    assert fresh == stack
    assert bare != stack
    assert local_factor(row.architecture, row.topology(), row.layout, "never-heard-of", fitted) == 1.0


def test_predictions_of_rows_left_out_meet_the_bar() -> None:
    """The shipped predictions (each by a fit without its row) are within 8 % in the mean and 5 % at the median."""
    fitted = shipped()
    errors = [abs(fitted.predicted[row.id] / row.step_s - 1) for row in ROWS if row.is_fitted]
    assert statistics.fmean(errors) <= 0.08
    assert statistics.median(errors) <= 0.05


def test_quantiles_and_bands_cover_what_they_were_made_from() -> None:
    """A band holds its share of residuals, never narrows with distance, and unseen generations widen it."""
    residuals = [(0.5, -0.1 + 0.002 * number) for number in range(100)]
    residuals += [(4.0, -0.3 + 0.006 * number) for number in range(100)]
    found = bands_of(residuals, (1.0, 5.0), 0.8)
    for band, distance in zip(found, (0.5, 4.0), strict=True):
        inside = [band.low <= value <= band.high for at, value in residuals if at == distance]
        assert 0.78 <= statistics.fmean(inside) <= 0.84
    assert found[1].low <= found[0].low
    assert found[1].high >= found[0].high
    assert band_for(found, 99.0) == found[1]
    assert band_for(found, 0.1, is_generation_known=False).high > found[1].high
    assert band_for(found, 0.1, site_spread=0.9).low == -0.9
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert band_for((), 1.0).high > 0.3
