"""Charts: values lie where they should, nothing extreme is lost, and no text becomes a tag."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.bench.figures import told, told_ms, told_share
from common.bench.plots import (
    UNITS,
    Band,
    Chart,
    Line,
    Mark,
    Rule,
    Scale,
    draw,
    path_of,
    points_of,
    scale_of,
    thinned,
    tick_told,
)

HOSTILE = "</svg><script>alert('x')</script>&\"\u202e\x07"
NUMBERS = st.floats(-1e9, 1e9, allow_nan=False)


class TestScales:
    """Where a value lies."""

    @given(low=st.floats(1e-6, 1e6), factor=st.floats(1.5, 1e6), share=st.floats(0, 1), is_log=st.booleans())
    def test_there_and_back(self, low: float, factor: float, share: float, is_log: bool) -> None:
        """A place's value lies at that place, on even and on logarithmic axes."""
        scale = Scale(low, low * factor, is_log)
        assert scale.at(scale.back(share)) == pytest.approx(share, abs=1e-9)

    @given(low=NUMBERS, size=st.floats(1e-3, 1e9), most=st.integers(3, 12))
    def test_ticks_are_inside_and_round(self, low: float, size: float, most: int) -> None:
        """Every tick lies on the axis, they rise evenly, and there are neither none nor far too many."""
        scale = Scale(low, low + size)
        ticks = scale.ticks(most)
        slack = (abs(low) + size) * 1e-6
        assert all(low - slack <= tick <= low + size + slack for tick in ticks)
        assert ticks == sorted(set(ticks))
        assert len(ticks) <= most + 1

    @given(low=st.floats(1e-6, 1e6), factor=st.floats(1.6, 1e9))
    def test_ticks_of_a_logarithmic_axis(self, low: float, factor: float) -> None:
        """They lie on it and are few."""
        ticks = Scale(low, low * factor, True).ticks(6)
        assert all(low <= tick <= low * factor for tick in ticks)
        assert len(ticks) <= 6

    @given(st.lists(st.one_of(st.none(), NUMBERS, st.just(math.nan), st.just(math.inf)), max_size=20), st.booleans())
    def test_all_values_have_room(self, values: list[float | None], is_log: bool) -> None:
        """Every finite value (above 0 on a logarithmic axis) lies on the axis; nothing at all makes an axis still."""
        scale = scale_of(values, is_log=is_log)
        assert scale.low < scale.high
        for value in values:
            if value is not None and math.isfinite(value) and (value > 0 or not is_log):
                assert -1e-9 <= scale.at(value) <= 1 + 1e-9


class TestPaths:
    """Curves."""

    @given(st.lists(st.tuples(st.floats(0, 100), st.floats(1, 1e5)), min_size=1, max_size=60), st.booleans())
    def test_a_path_reads_back_as_its_values(self, points: list[tuple[float, float]], is_log: bool) -> None:
        """The vertices of the drawn path are the values, within half a unit of the square they are drawn in."""
        xs, ys = [x for x, _ in points], [y for _, y in points]
        x, y = Scale(0.0, 100.0), Scale(0.9, 1.1e5, is_log)
        found = points_of(path_of(xs, ys, x, y), x, y)
        places = [(x.at(a), y.at(b)) for a, b in found]
        wanted = [(x.at(a), y.at(b)) for a, b in points]
        kept = [wanted[0]]
        for place in wanted[1:]:
            # A vertex that rounds to the one before it is not drawn twice.
            if tuple(round(part * UNITS) for part in (place[0], 1 - place[1])) != tuple(
                round(part * UNITS) for part in (kept[-1][0], 1 - kept[-1][1])
            ):
                kept.append(place)
        assert len(places) == len(kept)
        for (a, b), (c, d) in zip(places, kept, strict=True):
            assert a == pytest.approx(c, abs=0.51 / UNITS)
            assert b == pytest.approx(d, abs=0.51 / UNITS)

    def test_a_gap_breaks_the_curve(self) -> None:
        """What is not known is not drawn over: two strokes, and a lone point still shows."""
        d = path_of([0, 1, 2, 3, 4], [1, 2, None, 4, None], Scale(0, 4), Scale(0, 4))
        assert d.count("M") == 2
        assert d.endswith("h0")
        assert [round(x, 3) for x, _ in points_of(d, Scale(0, 4), Scale(0, 4))] == [0, 1, 3]

    @given(
        st.lists(st.one_of(st.none(), NUMBERS), min_size=1, max_size=400),
        st.integers(2, 80),
    )
    def test_thinning_keeps_extremes_and_order(self, ys: list[float | None], most: int) -> None:
        """However few vertices are left, the least and the greatest are among them, where they were."""
        xs = [float(place) for place in range(len(ys))]
        thin_x, thin_y = thinned(xs, ys, most)
        assert len(thin_x) == len(thin_y) <= max(most, 2)
        assert thin_x == sorted(thin_x)
        assert all(ys[int(x)] == y for x, y in zip(thin_x, thin_y, strict=True))
        known = [y for y in ys if y is not None]
        if known:
            left = [y for y in thin_y if y is not None]
            assert (min(left), max(left)) == (min(known), max(known))


class TestDrawing:
    """The SVG."""

    def chart(self, text: str) -> Chart:
        """One with everything in it."""
        return Chart(
            text, Scale(0, 10, label=text), Scale(1, 1000, True), [Line(text, [0, 5, 10], [1, 10, 100], 1, True)],
            [Mark(5, 10, text, kind="drop"), Mark(1, 1, text, kind="ring")],
            [Rule("x", 2, text), Rule("y", 50, text, True)], [Band(0, 1, text), Band(2, 3, text, "bracket")],
            group=text, note=text, unit=text,
        )  # fmt: skip

    def test_hostile_text_stays_text(self) -> None:
        """Names of others in every place make no element, and read back as they were written."""
        made = draw(self.chart(HOSTILE))
        assert "<script" not in made
        texts = "".join(ElementTree.fromstring(re.sub(r"[\x00-\x08]", "", made)).itertext())
        assert texts.count("alert('x')") >= 8

    def test_it_is_well_formed_and_complete(self) -> None:
        """Line, marks, rules, bands and labels are there, as elements of one tree."""
        tree = ElementTree.fromstring(draw(self.chart("latency")))
        kinds = [element.tag for element in tree.iter()]
        assert kinds.count("circle") == 2
        assert kinds.count("rect") == 2
        path = next(element for element in tree.iter("path") if element.get("data-name") == "latency")
        found = points_of(path.get("d") or "", Scale(0, 10), Scale(1, 1000, True))
        assert [(round(x), round(y)) for x, y in found] == [(0, 1), (5, 10), (10, 100)]

    def test_places_by_percent(self) -> None:
        """A mark stands where its values lie, in percent of the plot, and a rule at its value."""
        tree = ElementTree.fromstring(
            draw(Chart("a", Scale(0, 10), Scale(0, 4), marks=[Mark(2.5, 3, "m")], rules=[Rule("y", 1, "limit", True)]))
        )
        circle = next(tree.iter("circle"))
        assert (circle.get("cx"), circle.get("cy")) == ("25%", "25%")
        rule = next(element for element in tree.iter("line") if element.get("class") == "rule limit")
        assert rule.get("y1") == rule.get("y2") == "75%"

    def test_nothing_to_draw_says_so(self) -> None:
        """A chart without a sample is not an empty frame."""
        assert "no samples" in draw(Chart("a", Scale(0, 1), Scale(0, 1), [Line("x", [0, 1], [None, None])]))


class TestNumbers:
    """Numbers as people read them."""

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234"), (math.inf, "-")],
    )
    def test_about_three_digits(self, value: float, text: str) -> None:
        """Neither noise nor a lost digit."""
        assert told(value) == text

    @pytest.mark.parametrize(
        ("value", "text"), [(0.85, "850 µs"), (12.3, "12.3 ms"), (999.4, "999 ms"), (1240, "1.24 s"), (None, "-")]
    )
    def test_milliseconds_in_the_unit_that_reads_best(self, value: float | None, text: str) -> None:
        """The unit changes where the number would grow."""
        assert told_ms(value) == text

    @pytest.mark.parametrize(
        ("value", "text"), [(1.0, "100 %"), (0.9996, "99.960 %"), (0.5, "50 %"), (0.0002, "0.02 %")]
    )
    def test_shares_never_round_up_to_all(self, value: float, text: str) -> None:
        """99.96 % is not shown as 100 %: what failed is seen."""
        assert told_share(value) == text

    @pytest.mark.parametrize(("value", "text"), [(0.5, "0.5"), (1500, "1,500"), (250_000, "250k"), (2.5e6, "2.5M")])
    def test_ticks_are_short(self, value: float, text: str) -> None:
        """As short as they go."""
        assert tick_told(value) == text
