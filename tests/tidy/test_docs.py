"""The documents say what is: links, commands, settings, examples, tables, and the words of architecture.md."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import click
import msgspec
import pytest
import yaml

from agent.config import AgentConfig
from common import errors, wire
from common.recipe import Recipe, parse_recipe
from head.config import HeadConfig
from head.core.job_files import steps_of
from herder.cli.main import cli
from herder.types import CreateJob, JobAction

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
OTHERS = {"cli.md", "architecture.md"}  # made from the commands themselves; also names those that come later
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def ids_of(paths: tuple[Path, ...]) -> list[str]:
    """Names for the tests' reports."""
    return [path.name for path in paths]


def prose_of(page: Path) -> str:
    """A page without its code."""
    text = _FENCE.sub("", page.read_text())
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def blocks_of(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each block of code, the indented ones with an empty language."""
    text = page.read_text()
    yield from _FENCE.findall(text)
    text = _FENCE.sub("", text)
    for found in re.finditer(r"(?:^    .*\n)+", text, re.MULTILINE):
        yield "", re.sub(r"^    ", "", found[0], flags=re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """The names that headings of a page can be linked by, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=ids_of(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    """Every link to a file of this repository finds it, and the heading behind '#'."""
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name} -> {target}"
        if anchor:
            assert anchor in anchors_of(there), f"{page.name} -> {target}"


@pytest.mark.parametrize("page", PAGES, ids=ids_of(PAGES))
def test_named_files_exist(page: Path) -> None:
    """Files of this repository that a page names in code style are there."""
    folders = "agent|benchmarks|common|docs|head|herder|monitoring|recipes|scripts|systemd|tests"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def commands_of(page: Path) -> Iterator[tuple[str, bool]]:
    """Every `herder ...` command line on a page, continuations resolved, and whether it is only named in a sentence."""
    for _, text in blocks_of(page):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|(?!\|)|;", line.strip().removeprefix("$ ")):
                if re.match(r"(?:\S+=\S+ )*(?:\S*/bin/)?herder ", part.strip()):
                    yield part.strip(), False
    for code in re.findall(r"`(herder [^`\n]+)`", _FENCE.sub("", page.read_text())):
        yield code, True


def parse(line: str) -> None:
    """Parses a command line as click does, without running it. Raises: click.ClickException."""
    words = shlex.split(re.sub(r"\$\(.*?\)", "X", line), comments=True)
    words = words[words.index(next(word for word in words if word.rpartition("/")[2] == "herder")) + 1 :]
    words = [word for word in words if not re.fullmatch(r"\.\.\.|>.*", word)]
    context, command = click.Context(cli, info_name="herder"), cast(click.Command, cli)
    while True:
        context = command.make_context(command.name, words, parent=context)
        words = [*context._protected_args, *context.args]
        if not isinstance(command, click.Group) or not words:
            return
        _, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OTHERS], ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    """Every herder command on a page is one that the command line takes, down to its options."""
    wrong = []
    for command, is_named in commands_of(page):
        try:
            parse(command)
        except click.exceptions.Exit:
            pass  # --help and --version end at once
        except click.MissingParameter as error:
            if not is_named:
                wrong.append(f"{command}: {error.format_message()}")
        except click.ClickException as error:
            wrong.append(f"{command}: {error.format_message()}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=ids_of(PAGES))
def test_yaml_and_json_blocks_parse(page: Path) -> None:
    """Blocks marked as YAML or JSON are that."""
    for language, text in blocks_of(page):
        if language in ("yaml", "json"):
            assert yaml.safe_load(text) is not None, f"{page.name}: {text}"
        if language == "json":
            msgspec.json.decode(text)


# Words that mean what another word of architecture.md means already; "\w*" takes plurals.
SYNONYMS = {
    r"worker nodes?|compute nodes?|workers? joins?": "node",
    r"slaves?|minions?": "agent",
    r"masters?|control servers?|coordinators?": "head",
    r"workflows?|pipelines? of steps": "job",
    r"deployments?": "service",
    r"replicants?|model instances?|engine instances?": "replica",
    r"blueprints?|playbooks?": "recipe",
    r"artifacts?|artefacts?": "model",
}


@pytest.mark.parametrize("page", PAGES, ids=ids_of(PAGES))
def test_words_are_ours(page: Path) -> None:
    """No page calls a thing by another word than architecture.md does, and none is left unfinished."""
    prose = prose_of(page)
    found = [
        f"{match[0]!r}: say {word}"
        for text, word in SYNONYMS.items()
        for match in re.finditer(rf"\b(?:{text})\b", prose)
    ]
    found += re.findall(r"\b(?:TO" r"DO|TB" r"D|FIX" r"ME|lorem)\b", prose)
    assert not found, found


# settings
def leaves(cls: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, default) of every setting."""
    for field in msgspec.structs.fields(cls):
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        if isinstance(default, msgspec.Struct):
            yield from leaves(type(default), f"{prefix}{field.encode_name}.")
        else:
            yield f"{prefix}{field.encode_name}", default


def shown(default: Any) -> str:
    """A default as the table shows it."""
    if default == "":
        return "empty"
    if default is None:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return "`[]`" if not default else f"`{list(default)}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def chapter(page: Path, title: str) -> str:
    """The text of a second-level chapter."""
    return page.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("title", "cls", "prefix"), [("Head", HeadConfig, "HERDER_HEAD_"), ("Agent", AgentConfig, "HERDER_AGENT_")]
)
def test_every_setting_is_explained(title: str, cls: type[msgspec.Struct], prefix: str) -> None:
    """docs/configuration.md lists exactly the settings of each daemon, in order, with default and variable."""
    text = chapter(ROOT / "docs" / "configuration.md", title)
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| `(\w+)` \| (\S.*) \|$", text, re.MULTILINE)
    expected = [(name, shown(default), prefix + name.upper().replace(".", "__")) for name, default in leaves(cls)]
    assert sorted(row[:3] for row in rows) == sorted(expected)


def examples(page: str, name: str) -> list[str]:
    """The blocks of code that follow `<!-- example: NAME -->`."""
    text = (ROOT / "docs" / page).read_text()
    found = re.findall(rf"<!-- example: {name} -->\n```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no example of {name}"
    return found


def check_config(module: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs `--check-config`, the example's files being put into a folder."""
    for number, path in enumerate(sorted(set(re.findall(r"/etc/herder/[\w.-]+", text)))):
        made = folder / f"{number}-{Path(path).name}"
        if path.endswith((".crt", ".key")):
            _certificate(folder)
            made = folder / f"tls{made.suffix}"
        else:
            made.write_text("a secret\n")
            made.chmod(0o600)
        text = text.replace(path, str(made))
    config = folder / "config.yaml"
    config.write_text(text)
    return subprocess.run(
        [sys.executable, "-m", module, "--config", str(config), "--check-config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _certificate(folder: Path) -> None:
    if (folder / "tls.key").exists():
        return
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=head", "-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    (folder / "tls.key").chmod(0o600)


@pytest.mark.parametrize("page", ["configuration.md", "operations.md"])
@pytest.mark.parametrize("module", ["head", "agent"])
def test_examples_of_configuration_are_good(module: str, page: str, tmp_path: Path) -> None:
    """--check-config takes the examples."""
    for text in examples(page, module):
        done = check_config(module, text, tmp_path)
        assert done.returncode == 0, done.stderr


# what scripts make
def test_the_tables_of_the_api_are_current() -> None:
    """scripts/gen-api-docs would write what is there."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gen-api-docs"), "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_error_code_is_listed() -> None:
    """docs/api.md has a row for each code, with its status."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    assert rows == {code: str(cls.status) for code, cls in errors.BY_CODE.items()}


# jobs and recipes
def test_examples_of_jobs_make_steps() -> None:
    """Every job file in docs/jobs.md is accepted, and both dialects are shown."""
    dialects = set()
    for text in examples("jobs.md", "job"):
        job = msgspec.convert(yaml.safe_load(text), CreateJob)
        assert steps_of(job.actions)
        dialects.add("order" if job.actions[0].action else "graph")
    assert dialects == {"order", "graph"}


def test_examples_of_bad_jobs_are_refused() -> None:
    """What docs/jobs.md shows as refused is refused, with the code that it says."""
    text = (ROOT / "docs" / "jobs.md").read_text()
    shown_bad = re.findall(r"<!-- refused: (\w+) -->\n```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert shown_bad
    for code, block in shown_bad:
        job = msgspec.convert(yaml.safe_load(block), CreateJob)
        with pytest.raises(errors.HerderError) as caught:
            steps_of(job.actions)
        assert caught.value.code == code


def test_every_field_of_a_job_is_explained() -> None:
    """docs/jobs.md has a row for each field of a job and of its actions."""
    text = (ROOT / "docs" / "jobs.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    for cls in (CreateJob, JobAction):
        assert {field.encode_name for field in msgspec.structs.fields(cls)} <= listed


def test_examples_of_recipes_are_good() -> None:
    """Every recipe in docs/recipes.md is accepted."""
    for text in examples("recipes.md", "recipe"):
        assert parse_recipe(text).name


def test_every_field_of_a_recipe_is_explained() -> None:
    """docs/recipes.md has a row for each field of a recipe, and for no other."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    listed = re.findall(r"^\| `([\w.]+)` \| (.+?) \|", text.partition("\n## Fields\n")[2].partition("\n## ")[0], re.M)
    expected = {name for name, _ in recipe_fields(Recipe)}
    assert {name for name, _ in listed} == expected


def recipe_fields(cls: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, default) of each field of a recipe."""
    for field in msgspec.structs.fields(cls):
        if isinstance(field.default, msgspec.Struct):
            yield from recipe_fields(type(field.default), f"{prefix}{field.encode_name}.")
        else:
            yield f"{prefix}{field.encode_name}", field.default


# the protocol
def test_every_message_is_explained() -> None:
    """docs/protocol.md explains every kind of message and command, and every field of them."""
    text = (ROOT / "docs" / "protocol.md").read_text()
    kinds = {kind: cls for cls, kind in wire.KINDS.items()}
    commands = {str(cls.__struct_config__.tag): cls for cls in wire.CommandBody.__subclasses__()}
    headed = set(re.findall(r"^### `(\w+)`", text, re.MULTILINE))
    assert headed == kinds.keys() | commands.keys()
    for name, cls in {**kinds, **commands}.items():
        section = text.partition(f"\n### `{name}`")[2].partition("\n### ")[0].partition("\n## ")[0]
        said = set(re.findall(r"`(\w+)`", section))
        missing = {field.encode_name for field in msgspec.structs.fields(cls)} - said
        assert not missing, f"{name}: {sorted(missing)}"


def test_every_alert_is_listed() -> None:
    """docs/metrics.md lists the shipped alerts with their severities."""
    rules = yaml.safe_load((ROOT / "monitoring" / "prometheus" / "rules" / "herder.yml").read_text())
    alerts = {
        rule["alert"]: rule["labels"]["severity"]
        for group in rules["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    text = (ROOT / "docs" / "metrics.md").read_text().partition("\n## Alerts\n")[2]
    assert dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE)) == alerts
