"""The serving calibration: how published rows are read, what the shipped points say, and what a fit recovers."""

from __future__ import annotations

import math
import statistics
from typing import Any

import msgspec
import pytest

from head.planner.calibration import serving_near as near
from head.planner.calibration import serving_step as step
from head.planner.calibration.serving_accuracy import cross_validated, estimate_of_row
from head.planner.calibration.serving_rows import layout_of, offline_question_of, question_of, weights_of
from head.planner.hardware.topology import topology_of_preset
from head.planner.model.presets import lookup
from head.planner.serving.engine_step import ServingLayout, device_of, precision_of


def _conditions(**changes: Any) -> dict[str, Any]:
    return {
        "backend": "vllm",
        "backend_version": "0.15.1",
        "model_path": "meta-llama/Llama-3.1-70B",
        "system": "h100_sxm",
        "mode": "agg",
        "isl": 1024,
        "osl": 512,
        "precision": "fp8",
        "batch_size": 16,
        "tp_size": 4,
        "pp_size": 1,
        "moe_tp_size": 1,
        "moe_ep_size": 1,
    } | changes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tp_size": 8, "moe_tp_size": 8, "attention_dp_size": 1}, ServingLayout(tp=8)),
        ({"tp_size": 64, "moe_tp_size": 8, "moe_ep_size": 8, "attention_dp_size": 1}, ServingLayout(tp=8, ep=8)),
        ({"tp_size": 1, "moe_tp_size": 8, "moe_ep_size": 8, "attention_dp_size": 64}, ServingLayout(dp=8, ep=8)),
        ({"tp_size": 4, "moe_tp_size": 1, "moe_ep_size": 16, "attention_dp_size": 4}, ServingLayout(dp=4, ep=4)),
        ({"tp_size": 1, "moe_tp_size": 2, "moe_ep_size": 1}, ServingLayout(dp=2)),
        ({"tp_size": 36, "moe_tp_size": 36, "attention_dp_size": 1}, ServingLayout(dp=36, ep=36)),
    ],
)
def test_a_rows_degrees_become_one_engines_layout(given: dict[str, Any], expected: ServingLayout) -> None:
    """Ranks that a source names twice are counted once."""
    assert layout_of(_conditions(**given)) == expected


def test_a_disaggregated_row_is_read_by_its_workers() -> None:
    """Concurrency is shared by the engines of each kind; unknown numbers are said to be."""
    degrees = {f"{side}_{name}": 1 for side in ("prefill", "decode") for name in ("tp_size", "pp_size")}
    conditions = _conditions(mode="disagg", **degrees)
    row = {"id": "x", "source": "a; silicon_concurrency=120", "expected": {"ttft_ms": 10, "tpot_ms": 5}}
    assert question_of(row | {"conditions": conditions}).mode == "disagg?"
    conditions |= {"prefill_num_workers": 2, "decode_num_workers": 3}
    found = question_of(row | {"conditions": conditions})
    assert (found.mode, found.sequences, found.prompts) == ("disagg", 40.0, 60.0)


def test_number_formats_come_from_the_row_or_the_checkpoint() -> None:
    """Stated formats win; a checkpoint's suffix is next; 16 bits otherwise."""
    assert weights_of({"gemm_quant_mode": "fp8_block", "precision": "fp8"}) == "fp8_block"
    assert weights_of({"model_path": "nvidia/Model-NVFP4"}) == "nvfp4"
    assert weights_of({"model_path": "org/Model"}) == "bf16"


def test_offline_tables_give_seconds_of_a_gpu_for_each_token() -> None:
    """Tokens per second per GPU become their inverse, and the degrees are read from the table's word."""
    row = {
        "id": "x",
        "source": {"title": "t"},
        "conditions": {
            "model": "DeepSeek-R1",
            "gpu": "B200",
            "parallel": "DEP4",
            "weights": "fp4",
            "isl": 10,
            "osl": 5,
        },
        "expected": {"output_tokens_per_s_per_gpu": 500.0},
    }
    found = offline_question_of(row)
    assert found.tpot_s == pytest.approx(0.002)
    assert found.layout == ServingLayout(dp=4, ep=4)


def test_the_calibration_ships_with_its_errors_and_meets_the_bars() -> None:
    """The cross-validated table: TPOT median 12 % and MAPE 20 %, unseen models 18 %, TTFT median 25 %."""
    table = {(row.scheme, row.mode, row.quantity): row for row in cross_validated()}
    seen = table["five folds", "agg", "tpot"]
    assert seen.median <= 0.12
    assert seen.mape <= 0.20
    assert table["model left out", "agg", "tpot"].median <= 0.18
    assert table["five folds", "agg", "ttft"].median <= 0.25
    assert 0.7 <= table["model left out", "agg", "tpot"].inside_80 <= 0.97


def test_multipliers_never_beat_the_roofline() -> None:
    """Whatever format or generation, work at a roofline takes at least its data-sheet time."""
    multipliers = step.shipped().multipliers
    names = [name for name, _ in multipliers.formats] + ["unheard of"]
    for name in names:
        for generation in ("hopper", "blackwell", "ampere"):
            for mode in ("agg", "offline"):
                found = step.factors_of(multipliers, name, generation, mode)
                for (_, _, _, is_roofline), factor in zip(step.ELEMENTS, found, strict=True):
                    assert factor >= 1 if is_roofline else factor > 0


def test_parts_of_a_pair_add_up_to_more_than_either() -> None:
    """The smooth maximum of bytes and FLOPs lies between the longer one and the sum."""
    arch, device = lookup("meta-llama/Llama-3.1-8B"), device_of(topology_of_preset("H100", 1))
    load = step.Load(sequences=200, prompt=1000, output=200)
    values = step.element_values(arch, ServingLayout(), precision_of(arch, "fp8", "", device), device, load)
    parts = step.combine(values, (1.0,) * len(values))
    for one, other in step.PAIRS:
        a, b = values[step.NAMES.index(one)], values[step.NAMES.index(other)]
        assert max(a, b) * (1 - 1e-9) <= parts[one] + parts[other] <= (a + b) * (1 + 1e-9)


def test_a_configuration_far_from_all_points_is_left_to_the_physics() -> None:
    """Far away nothing is corrected and nothing is near; at a shipped point the correction is most of its residual."""
    block, points = near.shipped_memory().curves[0]
    far = near.Block(
        dimensions=tuple(value + 9 for value in block.dimensions),
        backend="other",
        version="",
        device="none",
        generation="none",
        format="none",
        mode="agg",
        degrees=(0.0, 0.0, 0.0, 0.0),
    )
    lost = near.nearness(far, 10, 1000, 1000)
    assert lost.tpot == pytest.approx(1.0, abs=0.02)
    assert lost.similarity < 0.01
    residuals = []
    for point in points:
        found = near.nearness(block, point.sequences, point.isl, point.osl)
        residuals.append(abs(math.log(point.base_tpot_s * found.tpot / point.tpot_s)))
        assert found.similarity == pytest.approx(1.0)
    assert sum(residuals) / len(residuals) < 0.1


def test_a_published_row_can_be_asked_as_it_stands() -> None:
    """The row's own words lead to an answer near its measurement."""
    row = {
        "id": "x",
        "source": "silicon_concurrency=16",
        "conditions": _conditions(isl=1024, osl=1024, moe_tp_size=4, attention_dp_size=1),
        "expected": {"ttft_ms": 1, "tpot_ms": 1},
    }
    found = estimate_of_row(row)
    assert 0.005 < found.tpot_s.value < 0.05
    assert found.similarity > 0.3


def test_a_fit_recovers_the_multipliers_that_made_its_rows() -> None:
    """Rows computed with known multipliers are predicted within a few percent by a fit that starts elsewhere."""
    pytest.importorskip("numpy")
    from head.planner.calibration import serving_fit as fitting

    truth = step.shipped().multipliers
    rows = []
    for model in ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "Qwen/Qwen3-30B-A3B"):
        for tp in (1, 4):
            for batch in (1, 8, 64):
                for isl in (256, 4096):
                    row = {
                        "id": f"{model}{tp}{batch}{isl}",
                        "source": "",
                        "conditions": _conditions(model_path=model, tp_size=tp, batch_size=batch, isl=isl),
                        "expected": {"ttft_ms": 1, "tpot_ms": 1},
                    }
                    prepared = fitting.prepare(question_of(row))
                    prepared.row = msgspec.structs.replace(prepared.row, tpot_s=fitting.base_tpot(truth, prepared))
                    rows.append(prepared)
    found = fitting.fit_multipliers(rows)
    errors = [abs(math.log(fitting.base_tpot(found, p) / p.row.tpot_s)) for p in rows]
    assert statistics.median(errors) < 0.03
    assert max(errors) < 0.2
