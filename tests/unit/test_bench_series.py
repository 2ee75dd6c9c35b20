"""Monitors' CSV files as columns on wall time, also when they were cut off or lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.bench.series import Columns, bounded, moment, series_of, within

NODE = (
    "timestamp,gpu0_util,gpu0_throttle,cpu_percent\n2026-01-31T12:00:00.250Z,85.5,none,45\n"
    "2026-01-31T12:00:01.250Z,,none,46\n"
)
ENGINE = "timestamp,replica,requests_running\n1000,chat-0,3\n1000,chat-1,4\n1001,chat-0,5\n"


def test_columns_of_a_node() -> None:
    """Numbers by column; an empty cell is not known, never zero; words are no numbers and have no column."""
    columns = series_of({"n1": NODE}, {})["nodes"]["n1"]
    assert columns["t_s"] == [1_769_860_800.25, 1_769_860_801.25]
    assert columns["gpu0_util"] == [85.5, None]
    assert columns["cpu_percent"] == [45, 46]
    assert "gpu0_throttle" not in columns


def test_engines_are_told_apart() -> None:
    """Lines of several engines in one file; an engine that two nodes sampled is taken from the fuller file."""
    shorter = "timestamp,replica,requests_running\n1000,chat-0,99\n"
    engines = series_of({}, {"n1": ENGINE, "n2": shorter})["engines"]
    assert engines["chat-0"] == {"t_s": [1000.0, 1001.0], "requests_running": [3.0, 5.0]}
    assert engines["chat-1"]["requests_running"] == [4.0]


@pytest.mark.parametrize("text", ["", "\n", "a,b\n1,2\n", "timestamp\nnever\n", 'timestamp,a\n1000,"cut', "\0"])
def test_what_cannot_be_read_is_left_out(text: str) -> None:
    """A file that is empty, foreign or cut off spoils nothing."""
    found = series_of({"n1": text, "n2": NODE}, {"n1": text})
    assert found["nodes"]["n2"]["cpu_percent"] == [45, 46]
    assert all(value is None for values in found["engines"].values() for value in values.get("a", []))


@given(st.text(max_size=300))
def test_any_text_is_borne(text: str) -> None:
    """Whatever a node sent as its CSV, reading ends without an error."""
    found = series_of({"n1": text, "n2": f"timestamp,x\n{text}"}, {"n1": f"timestamp,replica\n1,{text}"})
    assert set(found) == {"nodes", "engines"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1790000000.5", 1_790_000_000.5), ("1790000000500", 1_790_000_000.5), ("2026-01-31T12:00:00", 1_769_860_800.0),
     ("2026-01-31T13:00:00+01:00", 1_769_860_800.0), ("soon", None), ("nan", None)],
)  # fmt: skip
def test_moments(text: str, seconds: float | None) -> None:
    """Seconds, milliseconds, ISO 8601 with and without a zone."""
    assert moment(text) == seconds


def test_a_stretch_of_time() -> None:
    """Samples of the stretch, with times after its begin."""
    columns: Columns = {"t_s": [10.0, 11.0, 12.0, 13.0], "a": [1.0, None, 3.0, 4.0]}
    assert within(columns, 11.0, 12.5) == {"t_s": [0.0, 1.0], "a": [None, 3.0]}
    assert within({}, 0.0, 1.0) == {"t_s": []}


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=200), st.integers(1, 50))
def test_bounding_keeps_the_least_and_the_greatest(values: list[float | None], most: int) -> None:
    """However short it becomes, no extreme is lost; what is short enough stays as it is."""
    columns: Columns = {"t_s": [float(place) for place in range(len(values))], "a": values}
    found = bounded(columns, most)
    assert len(found["t_s"]) <= max(most, 0) or found["a"] == values
    if len(values) <= most:
        assert found == columns
        return
    known = [value for value in values if value is not None]
    low = [value for value in found["a"]["min"] if value is not None]
    high = [value for value in found["a"]["max"] if value is not None]
    assert (min(low, default=None), max(high, default=None)) == (min(known, default=None), max(known, default=None))
