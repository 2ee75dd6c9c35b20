"""Recipes from what people send, the table of points, names of kept files."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import pytest

from common.bench.documents import changed, endless
from common.bench.recipe import convert
from common.errors import DiskFull, InvalidName, InvalidRecipe, NotFound
from head.bench import store as store_module
from head.bench.store import Store
from head.bench.summary import summary_csv
from head.core.benchmark_documents import document_of
from herder.types import CreateBenchmark

RECIPE = convert(
    {
        "name": "rates",
        "server": {"service": "chat"},
        "load": {"rate": 2, "duration": "10s", "nodes": 2},
        "sweep": {"rate": [1, 2, 4]},
        "labels": {"team": "a", "why": "nightly"},
    }
)


class TestDocuments:
    """A recipe by name, a document, or the first changed by the second."""

    def test_a_recipe_as_it_is(self) -> None:
        """By name alone."""
        assert convert(document_of(CreateBenchmark("rates"), {"rates": RECIPE})) == RECIPE

    def test_values_take_their_places(self) -> None:
        """What the document says replaces the same place; the rest stays; null takes away."""
        asked = CreateBenchmark("rates", {"load": {"duration": "1m"}, "labels": {"team": None}}, "mine")
        made = convert(document_of(asked, {"rates": RECIPE}))
        assert (made.name, made.load.duration, made.load.rate, made.load.nodes) == ("mine", 60.0, 2.0, 2)
        assert made.labels == {"why": "nightly"}

    def test_another_server_takes_the_place_of_the_recipes(self) -> None:
        """Of service, serve and urls there is one, of rate and concurrency as well; a sweep is replaced whole."""
        document = {"server": {"urls": ["http://h:1"]}, "load": {"concurrency": 4}, "sweep": {"concurrency": [4, 8]}}
        made = convert(document_of(CreateBenchmark("rates", document), {"rates": RECIPE}))
        assert (made.server.service, made.server.urls) == ("", ("http://h:1",))
        assert (made.load.rate, made.load.concurrency) == (None, 4)
        assert made.sweep == {"concurrency": [4, 8]}

    def test_the_recipe_itself_is_not_touched(self) -> None:
        """Changes are made on a copy, at every depth."""
        base: dict[str, Any] = {"load": {"rate": 1, "parameters": {"a": 1}}}
        changed(base, {"load": {"concurrency": 3, "parameters": {"a": 2, "b": 3}}})
        assert base == {"load": {"rate": 1, "parameters": {"a": 1}}}

    def test_a_change_within_what_is_served(self) -> None:
        """One field of `serve` keeps its others, from the command line and through the API alike; a service ends it."""
        served = {"name": "s", "server": {"serve": {"model": "a", "replicas": 2, "engine": "vllm"}, "via": "gateway"}}
        made = changed(served, {"server": {"serve": {"model": "b", "engine": None}}})
        assert made["server"] == {"serve": {"model": "b", "replicas": 2}, "via": "gateway"}
        assert changed(served, {"server": {"service": "chat"}})["server"] == {"service": "chat", "via": "gateway"}
        made = changed(served, {"server": {"serve": None, "urls": ["http://h:1"]}})
        assert made["server"] == {"urls": ["http://h:1"], "via": "gateway"}

    def test_where_a_number_is_endless(self) -> None:
        """The whole place is told, in mappings and lists; a document that has none is fine."""
        assert endless({"load": {"steps": [1, float("nan")]}, "a": float("inf")}) == "load.steps.1"
        assert endless({"load": {"rate": 1.5, "steps": [], "name": "inf"}}) is None

    def test_nothing_was_sent(self) -> None:
        """An empty request is told what it lacks; an unknown recipe is a KeyError of its name."""
        with pytest.raises(InvalidRecipe, match="neither"):
            document_of(CreateBenchmark(), {})
        with pytest.raises(KeyError):
            document_of(CreateBenchmark("nope"), {"rates": RECIPE})


def test_the_table_of_points() -> None:
    """One line per point: what was varied, how it ended, figures by name; what a point lacks is empty."""
    point = {"number": 0, "repetition": 0, "status": "completed", "is_valid": True, "reasons": [], "coverage": 1.0,
             "skew_ms": 0.25, "changes": {"rate": 4.0, "scenarios": ["D(1,2)"]}, "figures": {"req_s": 3.9}}  # fmt: skip
    other = point | {"number": 1, "is_valid": False, "reasons": ["late", "degraded"], "changes": {}, "figures": {}}
    rows = list(csv.DictReader(io.StringIO(summary_csv({"points": [point, other]}))))
    assert rows[0]["load.rate"] == "4"
    assert rows[0]["load.scenarios"] == '["D(1,2)"]'
    assert (rows[0]["req_s"], rows[1]["req_s"], rows[1]["reasons"]) == ("3.9", "", "late degraded")


class TestStore:
    """Results stay where they belong."""

    @pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a..b", "a\0b", "x" * 201, "é"])
    def test_no_name_leads_outside(self, tmp_path: Path, name: str) -> None:
        """Benchmarks, runs, artifacts and replicas: what is no plain name is refused."""
        store = Store(tmp_path)
        with pytest.raises(InvalidName):
            store.folder(name)
        with pytest.raises(InvalidName):
            store.run("bench-1", name)
        with pytest.raises(InvalidName):
            store.log("bench-1", name)
        with pytest.raises(InvalidName):
            store.incoming("bench-1", "bench-1.0.0", name, 1)

    @pytest.mark.parametrize(
        "name",
        [
            "../benchmark.json", "/etc/passwd", "runs/../benchmark.json", "runs/a/../../x", "points/0/.x", "runs/a",
            "other/x", "logs/a/b", "benchmark.json/x", "runs//load.bin", "", "points/0/report.json/..",
        ],
    )  # fmt: skip
    def test_only_kept_files_are_found(self, tmp_path: Path, name: str) -> None:
        """Whatever else is asked for is not found, and not looked for."""
        store = Store(tmp_path)
        (tmp_path / "benchmarks" / "bench-1" / "runs" / "a").mkdir(parents=True)
        (tmp_path / "benchmarks" / "benchmark.json").write_text("secret")
        with pytest.raises(NotFound):
            store.open("bench-1", name)

    def test_links_are_not_followed(self, tmp_path: Path) -> None:
        """A link that came into the folder is neither listed nor opened."""
        store = Store(tmp_path)
        run = store.run("bench-1", "r")
        run.mkdir(parents=True)
        (tmp_path / "secret").write_text("x")
        (run / "load.bin").symlink_to(tmp_path / "secret")
        os.mkfifo(run / "pipe.bin")
        assert store.files("bench-1") == []
        for name in ("load.bin", "pipe.bin"):
            with pytest.raises(NotFound):
                store.open("bench-1", f"runs/r/{name}")

    def test_what_is_kept_is_listed_and_read(self, tmp_path: Path) -> None:
        """Names and bytes; parts of files are not among them."""
        store = Store(tmp_path)
        store.write(store.folder("bench-1") / "benchmark.json", b"{}")
        store.write(store.point("bench-1", 3) / "report.json", b"[1]")
        file = store.incoming("bench-1", "bench-1.3.0", "load.bin", 5)
        file.write(b"12345")
        assert [kept.name for kept in store.files("bench-1")] == ["benchmark.json", "points/3/report.json"]
        file.commit()
        file.discard()
        assert store.artifacts("bench-1", "bench-1.3.0") == {"load.bin": 5}
        opened, size = store.open("bench-1", "runs/bench-1.3.0/load.bin")
        assert (opened.read(), size) == (b"12345", 5)
        opened.close()

    def test_removal_and_leftovers(self, tmp_path: Path) -> None:
        """A benchmark goes with its files; at the start what is left of unknown ones goes, but for whole results."""
        store = Store(tmp_path)
        for name in ("bench-1", "bench-2", "bench-3"):
            store.write(store.folder(name) / "benchmark.json", b"{}")
        store.incoming("bench-2", "r", "load.bin", 5)  # a crash comes here
        (store.root / ".removed-x").mkdir()
        store.incoming("bench-4", "r", "load.bin", 5).commit()  # of a benchmark that never ended
        store.remove("bench-1")
        assert not store.folder("bench-1").exists()
        assert store.remove_leftovers({"bench-2"}) == (2, ["bench-3"])
        assert sorted(entry.name for entry in store.root.iterdir()) == ["bench-2", "bench-3"]
        assert [path.name for path in store.run("bench-2", "r").iterdir()] == []
        store.remove("bench-1")  # again, as after a crash

    def test_no_room_is_said_before_the_first_byte(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A full disk is `disk_full`, and nothing is left of the file."""
        monkeypatch.setattr(store_module, "check_room", lambda folder, size: None)

        def full(fd: int, size: int) -> bool:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(store_module, "allocate", full)
        store = Store(tmp_path)
        with pytest.raises(DiskFull):
            store.incoming("bench-1", "r", "load.bin", 1 << 40)
        assert list(store.run("bench-1", "r").iterdir()) == []

    def test_the_journal_is_left_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What would fill the disk to the brim is refused, although it would fit: the journal lies there, too."""
        free = os.statvfs(tmp_path)
        monkeypatch.setattr(store_module, "RESERVE_BYTES", free.f_blocks * free.f_frsize)
        monkeypatch.setattr(store_module, "RESERVE_PERCENT", 100)
        store = Store(tmp_path)
        with pytest.raises(DiskFull):
            store.incoming("bench-1", "r", "load.bin", 1)
        with pytest.raises(DiskFull):
            store.write(store.folder("bench-1") / "benchmark.json", b"{}")
        assert store.files("bench-1") == []
