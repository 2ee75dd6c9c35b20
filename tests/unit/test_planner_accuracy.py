"""The accuracy table: it keeps its own words, judges by the bars, and no row of any shape breaks the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import planner_accuracy, planner_accuracy_areas, planner_accuracy_rows
from head.planner.calibration import serving_step
from head.planner.calibration.accuracy import (
    AccuracyLine,
    AccuracyTable,
    Bar,
    held,
    markdown,
    missed,
    shipped_accuracy,
)
from head.planner.endpoints.base import ask
from head.planner.endpoints.calibrating import AccuracyAnswer
from head.planner.endpoints.questions import Desk
from head.planner.endpoints.table import BY_PATH

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
RUN: dict[str, Any] = {
    "id": "new-1",
    "source": {"title": "A source that nobody knows"},
    "model": {"name": "gpt", "layers": 24, "hidden": 2304, "heads": 24, "ffn": 9216, "vocab": 51200, "tied": True},
    "hardware": {"gpu": "A100-SXM-80GB", "gpus": 32, "peak_tflops": 312},
    "parallel": {"dp": 32},
    "train": {"seq": 2048, "gbs": 512, "mbs": 16, "precision": "fp16", "recompute": "full"},
    "expected": {"iter_time_s": 3.528, "hw_tflops_per_gpu": 137},
    "flops_convention": "F=96BsLh^2(1+s/6h+V/16Lh)",
    "check": {"ok": True},
}


def test_the_table_covers_every_area() -> None:
    """The shipped table says date and rows, and has a line with a verdict for every bar of the plan."""
    table = shipped_accuracy()
    assert table.date
    assert table.row_set
    judged = {line.what for line in table.lines if line.is_met is not None}
    assert judged >= {what for what, _, _ in planner_accuracy.BARS} | {"time"}
    schemes = {line.scheme for line in table.lines if line.what == planner_accuracy_areas.TRAINING}
    assert {"5 folds", "model left out", "source left out"} <= schemes
    assert table.calibrations


def test_verdicts_follow_from_the_numbers() -> None:
    """Each shipped verdict is what its bar says of its own numbers: none was written by hand."""
    for line in shipped_accuracy().lines:
        again = planner_accuracy.judged(msgspec.structs.replace(line, bar="" if line.what != "time" else line.bar))
        if line.what == planner_accuracy_areas.MEMORY and line.bar:
            assert "0 of" in line.figure or line.is_met is False
        assert (again.bar, again.is_met) == (line.bar, line.is_met), line


def test_bars_judge() -> None:
    """A line meets its bar only when every number that is asked for is there and within it."""
    bar = Bar(mape=0.08, median=0.05)
    line = AccuracyLine(what="x", scheme="y", rows=3, mape=0.07, median=0.04)
    assert held(line, bar).is_met is True
    assert held(msgspec.structs.replace(line, median=0.06), bar).is_met is False
    assert held(msgspec.structs.replace(line, mape=None), bar).is_met is False
    assert held(msgspec.structs.replace(line, rows=0), bar).is_met is None
    assert held(line, None).is_met is None
    assert Bar(largest=0.0).text == "exact"
    assert missed([held(msgspec.structs.replace(line, median=0.06), bar)])


def test_the_endpoint_answers_the_shipped_table() -> None:
    """GET /plan/accuracy counts the bars that are met and returns each line."""
    found = ask(BY_PATH["accuracy"], {}, Desk())
    assert isinstance(found, AccuracyAnswer)
    table = shipped_accuracy()
    assert found.lines == table.lines
    assert 0 < found.bars_met <= found.bars == sum(line.is_met is not None for line in table.lines)


def test_markdown_has_a_row_a_line() -> None:
    """The documents' table has every line, with what it misses told plainly."""
    line = AccuracyLine(what="a", scheme="b", rows=2, mape=0.5, bar="MAPE 8 %", is_met=False)
    text = markdown(AccuracyTable(date="", row_set="", lines=(line, line)))
    assert text.count("| a | b | 2 |") == 2
    assert "**no**" in text


def test_rows_of_unknown_sources_are_judged() -> None:
    """A training run of an unknown source gets an estimate, and stands among those never seen."""
    lines, refused = planner_accuracy_areas.truth_training([RUN])
    assert not refused
    assert lines[0].scheme == planner_accuracy_areas.UNSEEN
    assert lines[0].rows == 1
    error = lines[0].mape
    assert error is not None
    assert error < 0.5


def test_flops_follow_the_rows_own_convention() -> None:
    """The convention is read from the row's words; a row that names none is refused, and no other is tried."""
    found = planner_accuracy_rows.flops_of_runs([RUN, {**RUN, "id": "new-2", "flops_convention": "ours"}])
    assert [row for row, _, _ in found.found] == ["new-1"]
    assert abs(found.found[0][2]) < 0.02
    assert found.refused == {"new-2": "the row names no convention that is known"}


def test_counts_are_exact_or_told() -> None:
    """A count that is one off is an error that is not zero; a configuration without dimensions is refused."""
    rows = [
        {"model": "a", "config": LLAMA, "total_params": 8_030_261_248},
        {"model": "b", "config": LLAMA, "total_params": 8_030_261_249},
        {"model": "c", "config": {}},
    ]
    found = planner_accuracy_rows.counts(rows)
    assert {name: error == 0 for name, _, error in found.found} == {"a": True, "b": False}
    assert list(found.refused) == ["c"]


_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**6) | st.floats(-1, 1e9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_SECTIONS = ("source", "model", "hardware", "parallel", "train", "expected", "conditions", "kind", "points", "config")
_BROKEN = st.dictionaries(st.sampled_from((*_SECTIONS, "id", "usable", "check")), _JSON, max_size=6)
_CHANGED = st.builds(
    lambda section, value: {**RUN, section: value}, st.sampled_from(_SECTIONS), _JSON | st.just({})
) | st.builds(
    lambda section, field, value: {**RUN, section: {**RUN[section], field: value}},
    st.sampled_from(("model", "hardware", "parallel", "train", "expected")),
    st.sampled_from(("tp", "pp", "gpus", "seq", "gbs", "mbs", "layers", "heads", "iter_time_s", "gpu", "precision")),
    _JSON,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_JSON | _BROKEN | _CHANGED, max_size=3))
def test_no_row_breaks_the_command(rows: list[Any]) -> None:
    """Whatever a row holds, it is judged, set aside or refused with a reason; the others are judged all the same."""
    kinds = ("peak_training_memory", "offline_max_throughput", "serving_memory_log")
    typed = [{**row, "kind": kind} for row in rows if isinstance(row, dict) for kind in kinds]
    every = [*rows, *typed, RUN]
    lines, _ = planner_accuracy_areas.truth_training(every)
    assert sum(line.rows for line in lines if line.scheme == planner_accuracy_areas.UNSEEN) >= 1
    planner_accuracy_areas.truth_memory(every)
    planner_accuracy_areas.truth_serving(every)
    planner_accuracy_areas.truth_collectives(every, set())
    for found in (
        planner_accuracy_rows.counts(every),
        planner_accuracy_rows.flops_of_runs(every),
        *planner_accuracy_rows.serving_bytes(every),
    ):
        assert all(found.refused.values())


def test_a_folder_of_rows_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--truth takes whichever files are there, prints the table, and names what was refused and why."""
    broken = {**RUN, "id": "new-3", "parallel": {"tp": 7}}
    (tmp_path / "training_runs.json").write_text(json.dumps([RUN, broken, 5, None]))
    (tmp_path / "inference_silicon.json").write_text(json.dumps({"rows": [{"id": "x"}]}))
    planner_accuracy.main(["--truth", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "rows that do not ship (never seen)" in shown
    assert "the degrees do not multiply to the number of GPUs (new-3)" in shown
    assert "serving" in shown.partition("refused rows")[2]


def test_a_file_that_holds_no_rows_is_told(tmp_path: Path) -> None:
    """A document without a list of rows ends the command with its name."""
    (tmp_path / "memory.json").write_text('{"nothing": 1}')
    with pytest.raises(SystemExit, match=r"memory\.json: no list of rows"):
        planner_accuracy.main(["--truth", str(tmp_path)])


def test_the_whole_table_is_written_only_from_what_ships() -> None:
    """--write beside --truth or --quick is refused: the shipped table is the whole one."""
    with pytest.raises(SystemExit):
        planner_accuracy.main(["--truth", ".", "--write"])


def test_no_interval_is_without_width() -> None:
    """A kind of serving with too few measured neighbours at hand gets the interval of those farther off, never none."""
    fitted = serving_step.shipped()
    for name in ("tpot", "ttft"):
        for mode in ("agg", "disagg", "disagg?", "offline"):
            for similarity in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0):
                low, high = serving_step.interval(fitted.spread, name, mode, similarity)
                assert low <= 0 <= high
                assert high - low > 0.05
