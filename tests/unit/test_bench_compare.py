"""Comparing results: what is noise, what is not, and what must not be compared at all."""

from __future__ import annotations

import random
import statistics
from typing import Any

import pytest

from common.bench.compare import Result, compare, difference, result_of, t_975
from tests.doubles import bench_reports as made


def result(name: str, rates: dict[float, list[float]], **others: Any) -> Result:
    """A result whose points have these requests/s at these loads."""
    points = [
        {"number": number, "changes": {"rate": rate}, "repetition": place, "status": "completed", "is_valid": True,
         "reasons": [], "coverage": 1.0, "figures": {"req_s": value, "ttft_p50_ms": 100 / value}}
        for number, (rate, place, value) in enumerate(
            (rate, place, value) for rate, values in rates.items() for place, value in enumerate(values)
        )
    ]  # fmt: skip
    return Result(name, made.benchmark([{"point": point} for point in points], **others))


class TestNoise:
    """Welch's interval over repetitions."""

    @pytest.mark.parametrize(
        ("freedom", "value"),
        [(1, 12.7062), (2, 4.30265), (4, 2.77645), (10, 2.22814), (30, 2.04227), (120, 1.97993), (300, 1.96790)],
    )
    def test_students_t(self, freedom: float, value: float) -> None:
        """As the tables have it."""
        assert t_975(freedom) == pytest.approx(value, abs=1e-4)

    def test_fractions_of_a_degree_of_freedom(self) -> None:
        """They fall without a jump, where the way of calculating changes as well."""
        values = [t_975(1 + place / 16) for place in range(16 * 260)]
        assert values == sorted(values, reverse=True)
        assert t_975(200) - t_975(200.001) < 1e-4

    def test_a_known_example(self) -> None:
        """The interval of two small samples, worked out by hand: gap 2, variances 1, five samples each."""
        base, other = [9.0, 9.5, 10.0, 10.5, 11.0], [11.0, 11.5, 12.0, 12.5, 13.0]
        change, interval, verdict = difference(base, other)
        bound = 2.306 * (2 * statistics.variance(base) / 5) ** 0.5
        assert change == pytest.approx(0.2)
        assert interval is not None
        assert interval[0] == pytest.approx((2 - bound) / 10, rel=1e-3)
        assert interval[1] == pytest.approx((2 + bound) / 10, rel=1e-3)
        assert verdict == "more"

    def test_differences_within_the_noise_are_the_same(self) -> None:
        """A gap smaller than what repetitions differ by is no difference."""
        assert difference([10.0, 12.0, 11.0], [11.0, 12.5, 10.5])[2] == "same"

    def test_chance_is_called_a_difference_about_once_in_twenty(self) -> None:
        """Of many pairs from one distribution, about 5 % are said to differ: the interval means what it says."""
        rng = random.Random(7)
        wrong = sum(
            difference([rng.gauss(100, 5) for _ in range(4)], [rng.gauss(100, 5) for _ in range(4)])[2] != "same"
            for _ in range(2000)
        )
        assert 0.03 < wrong / 2000 < 0.07

    def test_one_repetition_says_nothing_of_the_noise(self) -> None:
        """It is said, and not guessed."""
        change, interval, verdict = difference([10.0], [20.0, 21.0])
        assert change == pytest.approx(1.05)
        assert (interval, verdict) == (None, "unknown")

    def test_equal_repetitions(self) -> None:
        """Results without any spread: equal ones are the same, others differ."""
        assert difference([0.0, 0.0], [0.0, 0.0])[2] == "same"
        assert difference([5.0, 5.0], [6.0, 6.0])[2] == "more"
        assert difference([0.0, 0.0], [1.0, 1.0]) == (None, None, "more")


class TestComparison:
    """Whole results."""

    def test_better_and_worse(self) -> None:
        """More requests per second are better, more milliseconds are worse; the change is against the first."""
        found = compare([result("a", {5: [10.0, 10.1, 9.9]}), result("b", {5: [8.0, 8.1, 7.9]})])
        figures = {figure.name: figure for figure in found.loads[0].figures}
        assert figures["req_s"].change[1] == pytest.approx(-0.2)
        assert (figures["req_s"].verdict[1], figures["req_s"].is_better[1]) == ("less", False)
        assert (figures["ttft_p50_ms"].verdict[1], figures["ttft_p50_ms"].is_better[1]) == ("more", False)

    def test_points_that_must_not_be_believed_are_left_out(self) -> None:
        """An invalid repetition is named and not counted."""
        bad = result("b", {5: [10.0, 10.2, 99.0]})
        bad.benchmark["points"][2] |= {"is_valid": False, "reasons": ["late"]}
        found = compare([result("a", {5: [10.0, 10.1, 9.9]}), bad])
        assert found.loads[0].figures[0].values[1].repetitions == 2
        assert any("b: invalid and left out: point 2" in remark for remark in found.remarks)

    def test_nothing_to_be_believed(self) -> None:
        """A load without a valid repetition anywhere is said and has no figures."""
        both = [result(name, {5: [1.0]}) for name in "ab"]
        for one in both:
            one.benchmark["points"][0] |= {"is_valid": False, "reasons": ["late"]}
        found = compare(both)
        assert found.loads == ()
        assert any("rate=5: no valid repetition anywhere" in remark for remark in found.remarks)

    def test_loads_that_one_side_lacks_are_named(self) -> None:
        """Only what all have is compared."""
        found = compare([result("a", {5: [1.0], 9: [1.0]}), result("b", {5: [1.0]})])
        assert [load.changes for load in found.loads] == [{"rate": 5}]
        assert any("rate=9" in remark for remark in found.remarks)
        assert any("one repetition" in remark for remark in found.remarks)

    def test_what_was_not_the_same_is_said(self) -> None:
        """Model, engine flags, hardware: each with both values; ports are no difference."""
        node = {"cpus": 8, "cpu_model": "EPYC", "gpus": ["H200", "H200"]}

        def facts(gpu: str, *argv: str) -> dict[str, Any]:
            return {"nodes": {"gpu1": node | {"gpus": [gpu]}}, "engines": [{"argv": list(argv)}]}

        found = compare(
            [
                result("a", {5: [1.0]}, facts=facts("H200", "vllm", "serve", "--port", "8001")),
                result("b", {5: [1.0]}, model="other", facts=facts("H100", "vllm", "serve", "--port", "8002")),
            ]
        )
        assert {difference.what for difference in found.differences} == {"model", "server hardware"}
        assert not found.is_serious
        flags = compare(
            [
                result("a", {5: [1.0]}, facts=facts("H200", "vllm", "serve")),
                result("b", {5: [1.0]}, facts=facts("H200", "vllm", "serve", "--enforce-eager")),
            ]
        )
        assert [difference.what for difference in flags.differences] == ["engine flags"]
        assert "--enforce-eager" in flags.differences[0].values[1]

    def test_another_load_is_serious(self) -> None:
        """Other prompts make other questions; another seed or number of load nodes does not."""
        one = {"load": {"rate": 5, "scenarios": ["D(100,50)"], "seed": 1, "nodes": 1}, "slo": {"ttft": 500}}
        same = {"load": {"rate": 5, "scenarios": ["D(100,50)"], "seed": 2, "nodes": 2}, "slo": {"ttft": 500}}
        other = {"load": {"rate": 5, "scenarios": ["D(999,50)"]}, "slo": {"ttft": 500}}
        assert not compare([result("a", {5: [1.0]}, recipe=one), result("b", {5: [1.0]}, recipe=same)]).is_serious
        assert compare([result("a", {5: [1.0]}, recipe=one), result("b", {5: [1.0]}, recipe=other)]).is_serious

    def test_files(self) -> None:
        """A run's own report, a benchmark's view and an export of both are results; other documents are not."""
        report = made.report(rate=5, seconds=10)
        assert result_of(report, "run.json").benchmark["points"][0]["number"] == 0
        whole = made.benchmark([made.point(0, {"rate": 5}, report)])
        assert result_of({"benchmark": whole, "points": [report]}, "x").benchmark["id"] == whole["id"]
        assert result_of(whole, "x").benchmark["id"] == whole["id"]
        others: list[Any] = [[], {}, {"points": 3}, "text"]
        for wrong in others:
            with pytest.raises(ValueError, match="x is"):
                result_of(wrong, "x")
        with pytest.raises(ValueError, match="two results"):
            compare([result_of(report, "x")])

    def test_two_runs_without_a_head(self) -> None:
        """Reports of `herder bench` compare by their plans."""
        a = result_of(made.report(rate=5, seconds=20), "a")
        b = result_of(made.report(rate=5, seconds=20, seed=3), "b")
        found = compare([a, b])
        assert found.loads[0].figures[0].values[0].repetitions == 1
        assert {figure.verdict[1] for figure in found.loads[0].figures} <= {"unknown", "missing"}
