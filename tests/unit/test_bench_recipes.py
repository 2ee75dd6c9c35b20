"""The benchmark recipes that come with Herder, and the page that explains every field of one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from agent.core import runs
from common import wire
from common.bench import recipe as recipes
from common.bench.recipe import BenchmarkRecipe, Load, Monitor, Search, Serve, Server, Slo
from common.errors import InvalidRecipe

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes" / "benchmark"
PAGE = (ROOT / "docs" / "benchmarking.md").read_text()
FILES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_some() -> None:
    """All parse, under the name of their file, and the page's table names each."""
    found = recipes.load_benchmarks(FOLDER)
    assert {name: path for name, (_, path) in found.items()} == {path.stem: path.name for path in FILES}
    assert len(found) >= 7
    told = PAGE.partition("## Recipes")[2].partition("\n```yaml")[0]
    assert set(re.findall(r"`([a-z-]+)`", "".join(re.findall(r"^\| (`.*?) \|", told, re.MULTILINE)))) == set(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_explains_itself(path: Path) -> None:
    """Each says what it is for, how it is run, and comments on its values; its own name stands in the command."""
    text = path.read_text()
    name = yaml.safe_load(text)["name"]
    assert text.startswith("# ")
    assert f"herder benchmarks run {name}" in text
    assert len(re.findall(r"\S +# \S", text)) >= 3
    assert recipes.parse(text).description.endswith(".")


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("smoke", lambda r: (r.load.until_s or 99) <= 30 and not r.sweep),
        ("throughput-latency", lambda r: len(r.sweep["rate"]) >= 5 and r.repetitions >= 3),
        ("saturation", lambda r: r.search is not None and r.slo is not None),
        ("mlperf-server", lambda r: r.mlperf == "server" and r.load.duration >= 600 and r.load.arrivals == "poisson"),
        ("mlperf-offline", lambda r: r.mlperf == "offline" and r.load.requests >= 24_576 and r.load.is_offline),
        ("conversations", lambda r: r.load.turns > 1 and len(r.sweep["prefix_tokens"]) == 2),
        ("embeddings", lambda r: r.load.api == "embeddings" and r.load.batch > 1),
    ],
)
def test_it_asks_what_it_says(name: str, check: Any) -> None:
    """What makes each of them what its name promises."""
    assert check(recipes.parse((FOLDER / f"{name}.yaml").read_text()))


def test_the_pages_example_is_a_recipe() -> None:
    """The whole one in the text parses, with the points that its sweep makes."""
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(recipes.points_of(recipes.parse(text))) == 6


def told(default: Any) -> str:
    """A default as the page writes it."""
    if default is msgspec.NODEFAULT:
        return "required"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, msgspec.Struct):
        return "see below"
    if default is None:
        return "none"
    if default == "":
        return "empty"
    if isinstance(default, tuple):
        return "`[]`"
    return f"`{default:g}`" if isinstance(default, int | float) else f"`{default}`"


@pytest.mark.parametrize(
    ("title", "structs"),
    [
        ("The whole", [BenchmarkRecipe]), ("server", [Server, Serve]), ("load", [Load]), ("monitor", [Monitor]),
        ("slo", [Slo]), ("search", [Search]),
    ],
)  # fmt: skip
def test_every_field_is_explained(title: str, structs: list[type[msgspec.Struct]]) -> None:
    """The page's tables are the recipe's fields, in their order, each with its default and a meaning."""
    chapter = PAGE.partition(f"\n### {title}\n")[2].partition("\n### ")[0].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", chapter, re.MULTILINE)
    wanted = []
    for struct in structs:
        for field in msgspec.structs.fields(struct):
            default = field.default
            if default is msgspec.NODEFAULT and field.default_factory is not msgspec.NODEFAULT:
                default = field.default_factory()
            wanted.append((field.encode_name, told(default)))
    assert [(name, default) for name, default, _ in rows] == wanted


def test_what_can_be_varied_is_named() -> None:
    """The page names every field that a sweep takes, and the limits of a recipe."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith("| `sweep` |")]
    assert set(re.findall(r"`(\w+)`", line)) == {"sweep", "load", *recipes.SWEPT}
    assert f"at most {recipes.MAX_POINTS} points" in line


@pytest.mark.parametrize("line", ["burstiness: .inf", "rate: .inf", "think: .nan", "parameters: {a: [.inf]}"])
def test_numbers_are_finite(line: str) -> None:
    """Infinity has no place in JSON: it would reach the load nodes as nothing, and another load would be sent."""
    load = {"rate": 5, "arrivals": "sine", "peak": 9, "duration": 5} | yaml.safe_load(line)
    document = {"name": "x", "server": {"urls": ["http://127.0.0.1:1"]}, "load": load}
    with pytest.raises(InvalidRecipe, match="numbers are finite"):
        recipes.convert(document)


@pytest.mark.parametrize(
    ("api", "url", "said"),
    [
        ("chat", "127.0.0.1:8000", "'127.0.0.1:8000' is no URL that load can go to, as http://"),
        ("chat", "http://a b", "is no URL"),
        ("chat", "postgresql://me@db/shop", "is no URL"),
        ("chat", "ftp://me:secret@a/", r"'ftp://\*\*\*@a/' is no URL"),
        ("pgvector", "http://127.0.0.1:8000", "as postgresql://USER@HOST:PORT/DATABASE"),
        ("chat", "https://a:8000/v1", ""),
        ("pgvector", "postgresql://me@db:5432/shop?sslmode=require", ""),
    ],
)
def test_urls_are_such_that_load_can_go_there(api: str, url: str, said: str) -> None:
    """A wrong one is named by who checks the recipe, not by a node when all else is made; agents take the rest."""
    load = {"rate": 1, "duration": 5, "api": api}
    load |= {"collection": "items", "vector_dim": 8} if api == "pgvector" else {}
    document = {"name": "x", "server": {"urls": [url]}, "load": load}
    if said:
        with pytest.raises(InvalidRecipe, match=said):
            recipes.convert(document)
        return
    recipes.convert(document)
    runs.check(wire.EnsureRun(run="b.0.0", kind="load", spec={}, urls=(url,)))


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"load": {"rat": 5}}, "did you mean 'rate'?"),
        ({"lod": {}}, "did you mean 'load'?"),
        ({"duration": 5}, "it is a field of load"),
        ({"load": {"repetitions": 3}}, "it is a field of the recipe itself"),
        ({"server": {"serve": {"model": "m", "replica": 2}}}, "did you mean 'replicas'?"),
        ({"load": {"zzzzzz": 5}}, ""),
        ({"load": {"rate": "fast"}}, ""),
    ],
)
def test_a_misspelt_field_is_told_its_nearest(change: dict[str, Any], hint: str) -> None:
    """Where a field of that very name stands, else what is written nearly so in its own part."""
    document = {"name": "x", "server": {"service": "s"}, "load": {"rate": 1, "duration": 5}} | change
    with pytest.raises(InvalidRecipe) as found:
        recipes.convert(document)
    assert found.value.hint == hint
