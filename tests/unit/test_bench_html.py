"""The report as a page: it stands alone, tells the verdict first, holds its numbers, and lets no text out."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from common.bench import html, html_time
from common.bench.html import DATA_BYTES, of_run, render
from common.bench.html_rows import bracket_of, groups_of, rows_of
from common.bench.markup import Markup, tag
from tests.doubles import bench_reports as made

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[31m"
VOID = {"meta", "br", "col"}


class Page(HTMLParser):
    """What a browser would make of a page, as far as the tests ask."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.inside: dict[str, list[str]] = {}
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Counts it."""
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Every element is closed in its order."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Text, by the element that it stands in."""
        self.inside.setdefault(self.open[-1] if self.open else "", []).append(data)
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        """What people read."""
        return " ".join(" ".join(self.text).split())

    @property
    def data(self) -> dict[str, Any]:
        """The JSON in the page."""
        found: dict[str, Any] = json.loads(self.inside["script"][0])
        return found


def sweep(**others: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A small sweep of three rates, twice each."""
    reports = [
        made.point(number, {"rate": rate}, made.report(rate=rate, seconds=12, seed=number), repetition=number % 2)
        for number, rate in enumerate((2, 2, 8, 8, 20, 20))
    ]
    return made.benchmark(reports, **others), reports


class TestThePage:
    """As a file."""

    def test_it_fetches_nothing_and_runs_only_itself(self) -> None:
        """No address, no inline style, no handler; the policy forbids all but the style and script by their digests."""
        page = Page(render(*sweep(), {}))
        policy = next(a["content"] or "" for tag, a in page.elements if a.get("http-equiv"))
        assert policy.startswith("default-src 'none'; ")
        for kind, name in (("style", "style-src"), ("script", "script-src")):
            (inline,) = [text for text in page.inside[kind] if not text.startswith("{")]
            digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
            assert f"{name} 'sha256-{digest}'" in policy
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg')|@import|url\(", inline)
        for element, attributes in page.elements:
            assert element not in ("link", "iframe", "object", "embed", "img", "base", "form")
            assert not {name for name in attributes if name.startswith("on") or name in ("src", "style")}
            assert (attributes.get("href") or "#").startswith("#")
        assert not page.open

    def test_hostile_texts_stay_texts(self) -> None:
        """A model, an error, a node or a label may be called anything: no element and no attribute comes of it."""
        benchmark, reports = sweep(
            model=HOSTILE, service=HOSTILE, name=HOSTILE, note=HOSTILE, labels={HOSTILE: HOSTILE}
        )
        plain = Page(render(*sweep(), {}))
        for report in reports:
            report["plan"] |= {"model": HOSTILE, "url": HOSTILE, "scenarios": [HOSTILE]}
            report["errors"] = {HOSTILE: 3}
            report["error_samples"] = {HOSTILE: [HOSTILE]}
            report["warnings"] = report["reasons"] = [{"code": HOSTILE, "said": HOSTILE}]
            report["point"]["changes"] = {HOSTILE: HOSTILE}
        benchmark |= {
            "facts": {HOSTILE: HOSTILE},
            "load_nodes": [HOSTILE],
            "error": {"code": HOSTILE, "message": HOSTILE},
        }
        columns = {"t_s": [made.START_S + 1, made.START_S + 2], HOSTILE: [1.0, 2.0]}
        text = render(benchmark, reports, {"nodes": {HOSTILE: columns}, "engines": {HOSTILE: columns}})
        page = Page(text)
        assert text.count("<script") == 2
        assert text.count("</script>") == 2
        assert {element for element, _ in page.elements} - {element for element, _ in plain.elements} <= {"code"}
        assert not any("onerror" in attributes for _, attributes in page.elements)
        assert "\x1b" not in text
        assert page.data["benchmark"]["model"] == HOSTILE
        assert "alert(2)" in page.words

    def test_the_numbers_stand_in_it(self) -> None:
        """The JSON in the page is the benchmark and its reports."""
        benchmark, reports = sweep()
        data = Page(render(benchmark, reports, {})).data
        assert data["benchmark"] == json.loads(json.dumps(benchmark))
        assert data["reports"][3]["histograms"] == json.loads(json.dumps(reports[3]["histograms"]))

    def test_data_is_bounded_and_says_what_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is too much is left out step by step, the figures last, and the page says so."""
        benchmark, reports = sweep()
        monkeypatch.setattr(html, "DATA_BYTES", 40_000)
        data, left_out = html.data_of(benchmark, reports, {})
        assert len(data) <= 40_000
        assert "all histograms" in left_out
        assert "Left out to keep it small" in Page(render(benchmark, reports, {})).words
        monkeypatch.setattr(html, "DATA_BYTES", 10)
        assert html.data_of(benchmark, reports, {})[1] == ["everything"]

    def test_many_points_still_open(self) -> None:
        """500 points make a page of bounded size whose details are closed."""
        report = made.report(rate=5, seconds=20)
        reports = [
            made.point(number, {"rate": 1 + number // 5}, report, repetition=number % 5) for number in range(500)
        ]
        text = render(made.benchmark(reports), reports, {})
        assert len(text) < 25_000_000
        assert len(re.findall(r'<details id="point-\d+">', text)) == 500
        data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
        assert data is not None
        assert len(data[1]) <= DATA_BYTES * 1.1

    def test_nothing_was_measured(self) -> None:
        """A benchmark without a report is a page still, and says so."""
        empty = made.benchmark([], status="failed", error={"code": "no_nodes", "message": "no node may send"})
        words = Page(render(empty, [], {})).words
        assert "no_nodes: no node may send" in words
        assert "Nothing was measured" in words
        assert render({}, [], {})


class TestVerdict:
    """Loud and clear."""

    def test_valid(self) -> None:
        """A clean result says so, once."""
        text = render(*sweep(), {})
        assert 'class="verdict valid"' in text
        assert 'class="verdict invalid"' not in text

    def test_invalid_with_reasons_before_any_figure(self) -> None:
        """What must not be believed, and why, stands above every number."""
        benchmark, reports = sweep()
        late = [{"code": "late", "said": "the generator sent late: p99 9 ms"}]
        reports[1] |= {"is_valid": False, "reasons": late}
        reports[1]["point"] |= {"is_valid": False, "reasons": ["late"]}
        text = render(benchmark, reports, {})
        words = Page(text).words
        assert "1 of 6 points must not be believed" in words
        assert "late: the generator sent late: p99 9 ms (point 1)" in words
        assert text.index("verdict invalid") < text.index('class="tile"') < text.index("<table")

    def test_nothing_may_be_believed(self) -> None:
        """Where every point is invalid the large figures and the curves' names say so, too."""
        benchmark, reports = sweep()
        for report in reports:
            report |= {"is_valid": False, "reasons": [{"code": "late", "said": "late"}]}
            report["point"] |= {"is_valid": False, "reasons": ["late"]}
        words = Page(render(benchmark, reports, {})).words
        assert "None of it may be believed" in words
        assert "What was measured must not be believed" in words
        assert "; not to be believed" in words
        assert "rate=20 (not to be believed)" in words
        assert "no samples" not in words

    def test_degraded_with_its_coverage(self) -> None:
        """A lost load node is said with the share that was performed; the point is neither valid nor invalid."""
        benchmark, reports = sweep(is_degraded=True)
        reports[4]["point"] |= {"coverage": 0.5, "is_valid": False, "reasons": ["degraded"]}
        text = render(benchmark, reports, {})
        assert 'class="verdict degraded"' in text
        assert "verdict invalid" not in text
        assert "point 4: 50 % of its schedule was performed" in Page(text).words

    def test_a_point_that_failed(self) -> None:
        """A point without a report is in the table and in the verdict with its error."""
        benchmark, reports = sweep()
        benchmark["points"][2] |= {"status": "failed", "error": {"code": "node_lost", "message": "n1 is gone"}}
        words = Page(render(benchmark, [reports[number] for number in (0, 1, 3, 4, 5)], {})).words
        assert "failed: node_lost: n1 is gone (point 2)" in words
        assert "1 of 6 points did not run to their end" in words

    def test_points_that_were_cancelled(self) -> None:
        """They are named together, without a reason that nobody gave."""
        benchmark, reports = sweep()
        for number in (4, 5):
            benchmark["points"][number] |= {"status": "cancelled"}
        words = Page(render(benchmark, [reports[number] for number in range(4)], {})).words
        assert "cancelled (points 4, 5)" in words

    def test_the_sentence(self) -> None:
        """What was asked and found, with the numbers."""
        benchmark, reports = sweep(recipe={})
        for report in reports:
            del report["point"]["figures"]["goodput_req_s"]
            report["goodput"] = None
        words = Page(render(benchmark, reports, {})).words
        assert "was given 3 different loads, 2 times each from 2 load nodes together: rate 2 to 20." in words
        assert "Throughput was highest with rate=20" in words


class TestSearch:
    """The bracket."""

    def reports(self) -> list[dict[str, Any]]:
        """Points that met the SLO up to 8, and not from 16 on; 12 must not be believed."""
        found = []
        for number, (rate, share, word) in enumerate(
            ((4, 1.0, ""), (8, 0.995, ""), (16, 0.4, ""), (12, 0.2, "late"), (10, 0.0, "no_success"))
        ):
            report = made.report(rate=2, seconds=6, seed=number)
            report["goodput"] |= {"slo_attainment": share}
            report |= {"is_valid": not word, "reasons": [{"code": word, "said": ""}] if word else []}
            found.append(made.point(number, {"rate": rate}, report))
        return found

    def test_between_the_most_that_met_and_the_least_that_did_not(self) -> None:
        """A generator that was late says nothing of the server; a server that answered nothing does."""
        rows = rows_of({}, self.reports())
        assert bracket_of(groups_of(rows), "rate", {"ttft": 500, "attainment": 0.99}) == (8.0, 10.0)

    def test_it_is_marked_and_said(self) -> None:
        """The head's own result stands in the sentence, the bracket in the curve."""
        reports = self.reports()
        recipe = {"slo": {"ttft": 500, "attainment": 0.99}, "search": {"over": "rate"}}
        benchmark = made.benchmark(
            reports, recipe=recipe, best={"over": "rate", "load": 8.0, "why": "it failed at rate 10"}
        )
        text = render(benchmark, reports, {})
        assert "The highest rate that met it is 8.00; it failed at rate 10." in Page(text).words
        assert 'class="bracket"' in text
        assert "the answer lies between 8.00" in Page(text).words


class TestCharts:
    """What is drawn of a point."""

    def test_machines_stand_on_the_points_own_time(self) -> None:
        """Samples of wall time are drawn from the point's start on; others than the point's are not drawn."""
        report = made.report(rate=4, seconds=10)
        row = rows_of({}, [made.point(0, {}, report)])[0]
        times = [report["created"] + at for at in range(-5, 30)]
        series = {"nodes": {"gpu1": {"t_s": times, "gpu0_util": [float(at) for at in range(35)]}}, "engines": {}}
        (chart,) = [made for made in html_time.over_time(row, series, html_time.Detail()) if "GPU utilisation" in made]
        from common.bench.plots import Scale, points_of

        found = re.search(r'data-x="lin (\S+) (\S+)".*?data-name="gpu1 gpu0" d="([^"]+)"', chart)
        assert found is not None
        points = points_of(found[3], Scale(float(found[1]), float(found[2])), Scale(0, 104))
        assert [round(x, 2) for x, _ in points[:2]] == [0, 1]
        assert [y for _, y in points[:2]] == pytest.approx([5, 6], abs=0.02)
        assert points[-1][0] <= float(found[2])

    def test_counters_become_rates_and_sums_become_means(self) -> None:
        """`_total` is drawn as growth per second, a histogram's sum and count as the mean in between."""
        report = made.report(rate=4, seconds=10)
        row = rows_of({}, [made.point(0, {}, report)])[0]
        count = 8
        columns = {
            "t_s": [report["created"] + at for at in range(count)],
            "decodes_total": [100.0 * at for at in range(count)],
            "ttft_seconds_sum": [0.5 * at for at in range(count)],
            "ttft_count": [10.0 * at for at in range(count)],
            "scrape_ms": [1.0] * count,
        }
        drawn = html_time.over_time(row, {"engines": {"chat-0": columns}}, html_time.Detail())
        titles = [re.search(r"<b>(.*?)</b>", chart)[1] for chart in drawn]  # type: ignore[index]
        assert titles[-2:] == ["Engine: decodes", "Engine: ttft mean, ms"]
        curve = html_time._with_means(columns)["ttft mean, ms"]
        assert curve == [pytest.approx(50.0)] * (count - 1)

    def test_many_machines_become_their_range(self) -> None:
        """Beyond what a chart can show: least, median and greatest, and the chart says so."""
        report = made.report(rate=4, seconds=10)
        row = rows_of({}, [made.point(0, {}, report)])[0]
        nodes = {
            f"n{node}": {"t_s": [report["created"] + at for at in range(9)], "cpu_percent": [float(node)] * 9}
            for node in range(20)
        }
        (chart,) = [
            chart for chart in html_time.over_time(row, {"nodes": nodes}, html_time.Detail()) if "CPU of" in chart
        ]
        assert "least, median and greatest of 20" in chart
        assert chart.count("data-name=") == 3


class TestOneRun:
    """A page of `herder bench`."""

    def test_its_report_alone_is_enough(self) -> None:
        """Made from the report, without a head: figures, distributions with their percentiles, the run over time."""
        report = made.report(rate=8, seconds=20)
        words = Page(render(*of_run(report), {})).words
        p99 = report["latency"]["ttft"]["percentiles"]["p99"]
        assert f"{p99:.1f}"[:4] in words
        assert "In flight" in words
        assert "How latencies are distributed" in words

    def test_servers_and_classes_are_told_apart(self) -> None:
        """Where several servers were asked, each has its line; one alone has none."""
        report = made.report(rate=8, seconds=10)
        summary = {"percentiles": {"p50": 12.5, "p99": 99.0}}
        report["endpoints"] = {"http://a/": {"sent": 7, "ttft": summary}, "http://b/": {"sent": 8, "ttft": summary}}
        report["classes"] = {"D(9,9)": {"sent": 15}}
        words = Page(render(*of_run(report), {})).words
        assert "Servers" in words
        assert "http://b/ 8 0 12.5 ms 99.0 ms" in words
        assert "Classes of requests" not in words

    def test_a_point_of_a_head_keeps_what_it_knows(self) -> None:
        """The kept report of one point brings its recipe, its changes and its coverage along."""
        report = made.report(rate=8, seconds=10) | {
            "point": {"number": 3, "changes": {"rate": 8}, "repetition": 1, "skew_ms": 0.2, "coverage": 0.5},
            "coverage": {"share": 0.5}, "recipe": {"name": "x"}, "recipe_sha256": "ab",
        }  # fmt: skip
        benchmark, reports = of_run(report)
        assert (benchmark["recipe"], benchmark["points"][0]["coverage"]) == ({"name": "x"}, 0.5)
        assert rows_of(benchmark, reports)[0].changes == {"rate": 8}


class TestMarkup:
    """Escaping by construction."""

    def test_only_markup_is_markup(self) -> None:
        """A string is text, whatever it holds; an element is an element."""
        assert tag("p", "<b>", tag("i", '"&'), class_='a"b') == '<p class="a&quot;b">&lt;b&gt;<i>&quot;&amp;</i></p>'
        assert tag("p", Markup("<b>x</b>"), hidden=True, id=None) == "<p hidden><b>x</b></p>"
