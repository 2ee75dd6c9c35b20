"""The memory model against what was published."""

from __future__ import annotations

import importlib.util

import pytest

from head.planner.calibration import memory_fit
from head.planner.calibration.memory_analytic import analytic, sharded_bytes_per_param
from head.planner.calibration.memory_near import explained_memory, nearest_rows
from head.planner.calibration.memory_rows import answer, decode_rows, encode_rows, shipped_rows
from head.planner.calibration.memory_truth import Unusable, known_models, row_of
from head.planner.hardware.topology import topology_of_preset
from head.planner.training.layout import TrainingLayout
from head.planner.training.memory import constants
from head.planner.training.memory_layers import copies_per_layer
from head.planner.training.memory_stack import STACKS

ROWS = shipped_rows()
needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="the extra planner is not installed")


def test_shipped_rows_have_sources_and_read_back() -> None:
    """Each row names its source, and the shipped form is what encoding makes of it."""
    assert len(ROWS) > 100
    assert all(row.source and row.id and (row.is_oom or row.peak_bytes > 0) for row in ROWS)
    assert decode_rows(encode_rows(ROWS)) == ROWS


def test_published_peaks_are_met() -> None:
    """Mean error under 8 %, median under 6 %, and little bias, with the shipped constants."""
    found = memory_fit.errors("shipped", [(row, constants()) for row in ROWS], constants().sigma_unseen)
    assert found.mape < 0.08
    assert found.median < 0.06
    assert abs(found.bias) < 0.04
    assert found.covered > 0.8


def test_runs_out_of_memory_are_caught_and_measured_runs_are_possible() -> None:
    """No run that ended out of memory is called a fit; no run that ended well is called impossible."""
    for row in ROWS:
        verdict = answer(row).verdict
        assert verdict != ("fits" if row.is_oom else "does_not_fit"), row.id


@needs_scipy
def test_errors_hold_for_rows_that_the_fit_has_not_seen() -> None:
    """Folds stay under 8 %; whole sources left out stay under 15 %."""
    sigma = constants().sigma_unseen
    seen = memory_fit.errors("folds", memory_fit.by_folds(ROWS), sigma)
    unseen = memory_fit.errors("sources", memory_fit.by_sources(ROWS), sigma)
    assert seen.mape < 0.08
    assert seen.oom_missed == 0
    assert seen.called_impossible == 0
    assert unseen.mape < 0.15
    assert unseen.called_impossible == 0


@needs_scipy
def test_shipped_constants_are_what_the_rows_give() -> None:
    """Fitting the shipped rows again gives the shipped constants."""
    again = memory_fit.fit(ROWS)
    for name in memory_fit.PRIORS:
        assert getattr(again, name) == pytest.approx(getattr(constants(), name), abs=2e-3)


@needs_scipy
def test_constants_stay_near_their_priors() -> None:
    """The fit moves a multiplier by at most three spreads of its prior: physics explains the rows."""
    for name, (prior, spread) in memory_fit.PRIORS.items():
        assert abs(getattr(constants(), name) - prior) <= 3 * spread


@pytest.mark.parametrize(
    ("sharding", "dp", "stated"),
    [("none", 1, 16), ("zero1", 64, 4 + 12 / 64), ("zero2", 64, 2 + 14 / 64), ("zero3", 64, 16 / 64)],
)
def test_zero_table_is_exact(sharding: str, dp: int, stated: float) -> None:
    """ZeRO paper, table 1: bytes of model states per parameter with fp16 gradients."""
    layout = TrainingLayout(dp=dp, global_batch=dp, sharding=sharding, grad_bytes=2, precision="fp16")  # type: ignore[arg-type]
    assert sharded_bytes_per_param(layout, STACKS["megatron"]) == pytest.approx(stated)


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "micro", "pp", "virtual", "recompute", "stated_gib"),
    [
        (48, 6144, 64, 4, 1, None, "none", 59.25),
        (48, 6144, 64, 4, 1, None, "selective+sp", 9.5625),
        (96, 12288, 96, 1, 8, 3, "none", 66.84375),
        (96, 12288, 96, 1, 8, 3, "selective+sp", 12.3515625),
        (128, 25600, 160, 1, 64, None, "none", 131.25),
        (128, 25600, 160, 1, 64, None, "selective+sp", 26.5625),
    ],
)
def test_activations_of_the_korthikanti_figure_are_exact(
    layers: int, hidden: int, heads: int, micro: int, pp: int, virtual: int | None, recompute: str, stated_gib: float
) -> None:
    """Figure 1 of "Reducing activation recomputation in large transformer models", tp 8, sequences of 2048."""
    conditions = {
        "layers": layers, "hidden": hidden, "heads": heads, "seq": 2048, "mbs": micro, "tp": 8, "pp": pp,
        "interleave": virtual, "recompute": recompute,
    }  # fmt: skip
    row = {"id": "x", "kind": "activation_memory", "conditions": conditions, "expected": {"activation_gib": stated_gib}}
    (figure,) = analytic(row)
    assert abs(figure.error) < 1e-6


@pytest.mark.parametrize(
    ("dtypes", "whole", "distributed"),
    [
        ("fp16 param, fp16 grads", 20, "4+16/d"),
        ("bf16 param, fp32 grads", 18, "6+12/d"),
        ("fp32 param, fp32 grads", 16, "8+8/d"),
    ],
)
def test_bytes_per_parameter_of_the_distributed_optimizer(dtypes: str, whole: int, distributed: str) -> None:
    """Megatron-LM README: theoretical bytes per parameter with and without the distributed optimizer."""
    expected = {"non_distributed": whole, "distributed": distributed}
    row = {"id": "x", "kind": "bytes_per_param", "conditions": {"dtypes": dtypes}, "expected": expected}
    assert all(abs(figure.error) < 1e-9 for figure in analytic(row))


@pytest.mark.parametrize(
    ("name", "copies"),
    [("HuggingFaceTB/SmolLM2-360M", 24), ("mistralai/Mistral-7B-Instruct-v0.3", 28), ("Qwen/Qwen3-4B", 38)],
)
def test_copies_of_an_eager_layer(name: str, copies: float) -> None:
    """What one HF layer was measured to allocate, in copies of the hidden state, within 4 %."""
    arch = known_models()[name]
    assert copies_per_layer(arch, arch.groups[0]) == pytest.approx(copies, rel=0.04)


def test_a_row_that_is_no_question_says_why() -> None:
    """Rows of other kinds, and rows that contradict themselves, are refused with the reason."""
    with pytest.raises(Unusable, match="no measured peak"):
        row_of({"id": "x", "kind": "layer_time_ms", "conditions": {}, "expected": {}})
    with pytest.raises(Unusable, match="contradicts"):
        row_of({"id": "x", "kind": "peak_training_memory", "usable": False, "conditions": {}, "expected": {}})


def test_a_measured_run_is_its_own_nearest_row() -> None:
    """Asking about a row's configuration gives rows of the same program and model, the nearest at distance 0."""
    row = next(row for row in ROWS if row.stack == "fsdp" and row.layout.pp > 1)
    near = nearest_rows(row.architecture, row.layout, row.stack, 3)
    assert len(near) == 3
    assert near[0].distance == 0
    assert [one.distance for one in near] == sorted(one.distance for one in near)
    assert near[0].measured > 0
    assert near[0].predicted == pytest.approx(near[0].measured, rel=0.3)


def test_an_answer_carries_its_calibration_and_near_rows() -> None:
    """A total names the rows it was fitted to, its convention, and the nearest of them."""
    row = ROWS[0]
    topology = topology_of_preset(row.accelerator, row.layout.gpus)
    found = explained_memory(row.architecture, topology, row.layout, stack=row.stack)
    assert found.total.near
    assert "published training peaks" in found.total.calibration
    assert found.total.convention
