"""Fitting the step-time constants: what a fit recovers, and what it must not learn."""

from __future__ import annotations

import math
import statistics

import msgspec
import pytest

pytest.importorskip("numpy")

from head.planner.calibration.training_accuracy import line_of
from head.planner.calibration.training_fit import Table, fit_table, folds, left_out, refit
from head.planner.calibration.training_rows import TrainingRow, shipped_rows
from head.planner.training.constants import shipped
from head.planner.training.step_time import estimate, step_seconds


def some_rows() -> list[TrainingRow]:
    """A sample over all sources, small enough to fit in a second."""
    return [row for row in shipped_rows() if row.is_fitted][::6]


def test_a_fit_explains_rows_that_it_did_not_see() -> None:
    """Even from a sixth of the rows, rows left out are predicted far better than by one efficiency for all (17 %)."""
    table = Table(some_rows())
    held = left_out(table, folds(table.rows, 3))
    assert len(held) == len(table.rows)
    assert statistics.fmean(abs(residual.error) for residual in held) < 0.14


def test_a_cluster_twice_as_slow_is_learnt_by_its_stack_alone() -> None:
    """Rows of a new stack that take twice as long move that stack's answers, and leave the others where they were."""
    rows = some_rows()
    slow = [
        msgspec.structs.replace(row, id=f"slow-{row.id}", stack="tortoise", source="tortoise", step_s=2 * row.step_s)
        for row in rows
        if row.stack == "mosaic"
    ]
    fitted = fit_table(Table([*rows, *slow]), name="with a slow cluster")
    row = next(row for row in rows if row.stack == "mosaic")
    ours = step_seconds(row.architecture, row.topology(), row.layout, "tortoise", fitted)
    theirs = step_seconds(row.architecture, row.topology(), row.layout, "mosaic", fitted)
    assert 1.3 < ours / theirs < 2.1


def test_own_rows_are_near_rows() -> None:
    """A fit with this cluster's rows answers their configurations with what was measured, and names them as near."""
    rows = some_rows()
    own = msgspec.structs.replace(rows[5], id="own-1", source="this cluster", stack="ours", step_s=1.3 * rows[5].step_s)
    fitted = refit([own], name="own", date="2026-01-01")
    found = estimate(own.architecture, own.topology(), own.layout, "ours", fitted)
    assert found.step_s.near[0].id == "own-1"
    assert abs(found.step_s.value / own.step_s - 1) < 0.15
    before = estimate(own.architecture, own.topology(), own.layout, "ours")
    assert found.step_s.high / found.step_s.low < before.step_s.high / before.step_s.low
    published = estimate(own.architecture, own.topology(), own.layout, own.stack)
    assert published.step_s.high / published.step_s.low >= math.exp(2 * shipped().site_spread) * (1 - 1e-9)


def test_folds_keep_groups_together_and_repeat() -> None:
    """Rows of one model are in one fold, the same at every call."""
    rows = some_rows()
    parts = folds(rows, 5, lambda row: row.architecture.name)
    where: dict[str, set[str]] = {}
    for row, part in zip(rows, parts, strict=True):
        where.setdefault(row.architecture.name, set()).add(part)
    assert all(len(found) == 1 for found in where.values())
    assert parts == folds(rows, 5, lambda row: row.architecture.name)


def test_an_error_line_counts_what_it_says() -> None:
    """Mean, median, bias and coverage of three known residuals."""
    table = Table(some_rows()[:12])
    held = left_out(table, folds(table.rows, 2))[:3]
    line = line_of("three", held, [(0.0, math.inf), (0.0, 0.0), (0.0, math.inf)])
    assert line.rows == 3
    assert line.covered == pytest.approx(2 / 3)
    assert line.mape == pytest.approx(statistics.fmean(abs(residual.error) for residual in held))
    assert line.bias == pytest.approx(statistics.fmean(residual.error for residual in held))
