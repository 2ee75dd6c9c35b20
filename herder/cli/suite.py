"""`herder suite`: recipes of the HPC benchmark toolkit: checked, made, turned into Slurm jobs. Needs no head."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herder.cli import output
from herder.cli.command import Globals, group, pass_globals
from herder.cli.table import Column

if TYPE_CHECKING:
    from agent.suite.schema import Recipe

EXAMPLES = (
    "herder suite create --kind vllm --model facebook/opt-125m --out vllm.yaml",
    "herder suite validate vllm.yaml",
    "herder suite script vllm.yaml > job.sh",
    "herder suite run vllm.yaml --host me@login.cluster --chdir /scratch/me/run",
    "herder suite jobs",
    "herder suite logs --job-id 1234",
)


@group("suite", examples=EXAMPLES)
def command() -> None:
    """Recipes of the HPC benchmark toolkit: check, make, submit, follow.

    `herder orchestrate` and `herder executor` run them; a job of `herder suite run` starts both.
    """


def _read(path: str, plugins: tuple[str, ...], *, for_slurm: bool = True) -> tuple[Recipe, Any]:
    """(recipe, its document). Raises: click.ClickException with every mistake."""
    from agent.suite import checks, reading
    from agent.suite.errors import SuiteError
    from agent.suite.registry import load_plugins

    try:
        load_plugins(plugins)
        document = reading.load(Path(path))
        recipe = reading.recipe_of(document, where=path, for_slurm=for_slurm)
        found = checks.errors(recipe, for_slurm=for_slurm)
    except reading.Mistakes as error:
        found = list(error.found)
    except SuiteError as error:
        raise click.ClickException(str(error)) from None
    if found:
        lines = "\n".join(f"  {said}" for said in found)
        raise click.ClickException(f"E006: {path} has {len(found)} mistake{'s' * (len(found) > 1)}:\n{lines}")
    return recipe, document


@command.command("validate", examples=("herder suite validate recipes/suite/ollama.yaml",))
@click.argument("recipe", type=click.Path())
@click.option("--local", is_flag=True, help="Without what only a Slurm job needs.")
@click.option("--strict", is_flag=True, help="Warnings count as mistakes.")
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="A module that registers services.")
@pass_globals
def validate(options: Globals, recipe: str, local: bool, strict: bool, plugins: tuple[str, ...]) -> int:
    """Say everything that is wrong with a recipe, and what is odd.

    Ends with 1 for a recipe that cannot be run.
    """
    from agent.suite import checks
    from agent.suite.plan import benchmarks_of

    read, _ = _read(recipe, plugins, for_slurm=not local)
    warned = checks.warnings(read, for_slurm=not local)
    for said in warned:
        output.note(options, f"warning: {said}")
    runs = benchmarks_of(read)
    value = {"recipe": recipe, "is_valid": True, "warnings": warned, "benchmarks": [run.name for run in runs]}
    count = len(runs) * read.repetitions
    text = f"{recipe}: valid, {count} run{'s' * (count != 1)} of {read.workload.service}"
    output.emit(options, value, text + (f", {len(warned)} warnings" if warned else ""))
    return output.EXIT_FAILED if strict and warned else output.EXIT_OK


@command.command("create", examples=("herder suite create", "herder suite create --kind ollama --model llama3.2 --yes"))
@click.option("--kind", type=click.Choice(["ollama", "vllm", "vllm-distributed", "dummy"]), help="What serves.")
@click.option("--scenario", help="Its name.")
@click.option("--partition", help="Slurm's partition.")
@click.option("--account", help="Slurm's account.")
@click.option("--model", help="What is served.")
@click.option("--servers", type=click.IntRange(1), help="Server nodes.")
@click.option("--clients", type=click.IntRange(1), help="Client nodes.")
@click.option("--gpus", type=click.IntRange(0), help="GPUs of a server node.")
@click.option("--cpus", type=click.IntRange(1), help="CPUs of a server node.")
@click.option("--mem-gb", type=click.IntRange(1), help="Memory of a server node.")
@click.option("--clients-per-node", type=click.IntRange(1), help="Closed loop: clients of a node.")
@click.option("--target-rps", type=float, help="Open loop instead: requests per second of all clients.")
@click.option("--duration", help="Of the measured part, as 2m.")
@click.option("--warmup", help="Before it, as 30s.")
@click.option("--time-limit", help="Of the job, as 01:00:00.")
@click.option("--image", help="The service's container image, a .sif file.")
@click.option("--remote", help="Where the image is pulled from, as docker://ollama/ollama.")
@click.option("--containers-dir", help="Where images lie.")
@click.option("--out", type=click.Path(), help="The file; else it is printed.")
@click.option("--yes", is_flag=True, help="Ask nothing: what is not given has its default.")
@pass_globals
def create(options: Globals, /, out: str | None, yes: bool, **given: Any) -> int:
    """Make a recipe from a few answers; what is not given as a flag is asked for on a terminal."""
    from dataclasses import fields

    from agent.suite import reading, wizard

    answers: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not yes and sys.stdin.isatty():
        asked = ("kind", "scenario", "partition", "account", "model", "servers", "clients", "gpus", "clients_per_node",
                 "duration", "warmup", "time_limit")  # fmt: skip
        defaults = {field.name: field.default for field in fields(wizard.Answers)}
        for name in asked:
            if name not in answers and not (name == "clients_per_node" and "target_rps" in answers):
                kind = click.Choice(wizard.KINDS) if name == "kind" else None
                answers[name] = click.prompt(name.replace("_", " "), default=defaults[name], type=kind)
    try:
        text = wizard.text_of(wizard.document_of(wizard.Answers(**answers)))
    except reading.Mistakes as error:
        raise click.ClickException("E006: " + "; ".join(error.found)) from None
    if out:
        with Path(out).open("x") as file:
            file.write(text)
        output.note(options, f"{out}: `herder suite validate {out}` checks it")
    else:
        click.echo(text, nl=False)
    return output.EXIT_OK


def _job_options(function: Any) -> Any:
    """Options of what is made for Slurm."""
    for option in (
        click.option("--herder", "herder_command", default="herder", help="The command `herder` on the nodes."),
        click.option("--server-port", type=click.IntRange(1, 65_535), help="Default 11434 for Ollama, else 8000."),
        click.option(
            "--in-container", is_flag=True, help="Run herder in the Python image of the recipe, which must have it."
        ),
        click.option("--client-port", type=click.IntRange(1, 65_535), default=6000, help="Default 6000."),
        click.option("--timeout", type=click.IntRange(1), default=600, help="Of each step in seconds; default 600."),
        click.option("--pushgateway-node", default="", help="Push samples of the orchestrator's node there."),
        click.option("--file-root", "roots", multiple=True, help="Folder of datasets; else those that are named."),
        click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="A module that registers services."),
    ):
        function = option(function)
    return function


def _script(recipe: Recipe, document: Any, given: dict[str, Any]) -> str:
    from agent.suite import script

    choices = script.Choices(
        herder=given["herder_command"],
        server_port=given["server_port"],
        client_port=given["client_port"],
        timeout=given["timeout"],
        pushgateway_node=given["pushgateway_node"],
        plugins=given["plugins"],
        file_roots=given["roots"],
        is_contained=given["in_container"],
    )
    try:
        return script.script_of(recipe, document, choices)
    except ValueError as error:
        raise click.ClickException(f"E006: {error}") from None


@command.command("script", examples=("herder suite script vllm.yaml | sbatch",))
@click.argument("recipe", type=click.Path())
@_job_options
@pass_globals
def script(options: Globals, /, recipe: str, **given: Any) -> int:
    """Print the job script: servers, clients and orchestrator as parts of one heterogeneous job."""
    from agent.suite import checks

    read, document = _read(recipe, given["plugins"])
    for said in checks.warnings(read):
        output.note(options, f"warning: {said}")
    click.echo(_script(read, document, given), nl=False)
    return output.EXIT_OK


@command.command("run", examples=("herder suite run ollama.yaml", "herder suite run ollama.yaml --host me@login"))
@click.argument("recipe", type=click.Path())
@click.option("--host", default="", help="Submit there over ssh; else here.")
@click.option("--chdir", default="", help="Folder in which the job begins; made when it is missing.")
@_job_options
@pass_globals
def run(options: Globals, /, recipe: str, host: str, chdir: str, **given: Any) -> int:
    """Submit a recipe as a job with sbatch, here or on a login node."""
    from agent.suite import checks, submit
    from agent.suite.errors import SuiteError
    from agent.suite.plan import file_name

    read, document = _read(recipe, given["plugins"])
    for said in checks.warnings(read):
        output.note(options, f"warning: {said}")
    text = _script(read, document, given)
    folder = read.reporting.output_directory or "experiments/{experiment_id}"
    try:
        job = submit.submit(text, name=file_name(read.scenario), recipe=recipe, output=folder, host=host, folder=chdir)
    except SuiteError as error:
        output.show_error(error.code, str(error), error.hint)
        return output.EXIT_FAILED
    from dataclasses import asdict

    output.emit(options, asdict(job), f"job {job.job_id}, results in {job.folder}", quiet=job.job_id)
    return output.EXIT_OK


@command.command("list", examples=("herder suite list", "herder suite list --dir ~/recipes"))
@click.option("--dir", "folders", multiple=True, type=click.Path(), help="Where recipes lie; default ./recipes/suite.")
@pass_globals
def list_(options: Globals, folders: tuple[str, ...]) -> int:
    """List recipes, and say which of them cannot be run."""
    from agent.suite import checks, reading

    rows, values = [], []
    for folder in folders or ("recipes/suite",):
        for path in sorted(Path(folder).glob("*.y*ml")):
            found: list[str] = []
            nodes, service, name = "", "", ""
            try:
                recipe = reading.recipe_of(reading.load(path), where=path.name, for_slurm=True)
                found = checks.errors(recipe)
                name, service = recipe.scenario, recipe.workload.service
                allocation = recipe.orchestration.node_allocation
                nodes = f"{allocation.servers.nodes}+{allocation.clients.nodes}"
            except reading.Mistakes as error:
                found = list(error.found)
            except OSError as error:
                found = [str(error.strerror)]
            values.append({"path": str(path), "scenario": name, "service": service, "mistakes": found})
            rows.append([str(path), name, service, nodes, "valid" if not found else f"{len(found)} mistakes"])
    columns = [Column("FILE"), Column("SCENARIO"), Column("SERVICE"), Column("NODES"), Column("STATE")]
    output.emit(options, values, output.table(options, columns, rows, empty="No recipes there."))
    return output.EXIT_OK


@command.command("jobs", examples=("herder suite jobs",))
@click.option("--limit", type=click.IntRange(1, 1_000), default=20, help="Default 20.")
@pass_globals
def jobs(options: Globals, limit: int) -> int:
    """List jobs that were submitted from here, with what Slurm says of them."""
    from dataclasses import asdict

    from agent.suite import submit

    found = [(job, submit.state_of(job)) for job in submit.jobs()[-limit:]]
    rows = [[job.job_id, job.name, job.host or "here", state, job.folder] for job, state in found]
    columns = [Column("JOB"), Column("SCENARIO"), Column("HOST"), Column("STATE"), Column("RESULTS")]
    values = [asdict(job) | {"state": state} for job, state in found]
    output.emit(options, values, output.table(options, columns, rows, empty="No job was submitted from here."))
    return output.EXIT_OK


@command.command("logs", examples=("herder suite logs", "herder suite logs --job-id 1234 --tail 50"))
@click.option("--job-id", default="", help="Default the newest.")
@click.option("--tail", type=click.IntRange(1, 100_000), default=200, help="Last lines of each file; default 200.")
@click.option("--grep", default="", help="Only lines with this text.")
@click.option("--summary", is_flag=True, help="Count lines, errors and warnings of each file instead.")
@pass_globals
def logs(options: Globals, job_id: str, tail: int, grep: str, summary: bool) -> int:
    """Read the logs of a job: servers, clients, orchestrator, Slurm's own."""
    from agent.suite import submit
    from agent.suite.errors import SuiteError

    counts: dict[str, list[int]] = {}
    try:
        for name, line in submit.log_lines(submit.job_of(job_id), tail=tail):
            if grep not in line:
                continue
            if not summary:
                output.stream(f"{name}: {line}\n")
                continue
            kept, lower = counts.setdefault(name, [0, 0, 0]), line.lower()
            kept[0] += 1
            kept[1] += "error" in lower or "traceback" in lower
            kept[2] += "warn" in lower
        if summary:
            columns = [Column("FILE"), *(Column(title, is_number=True) for title in ("LINES", "ERRORS", "WARNINGS"))]
            rows = [[name, *map(str, kept)] for name, kept in counts.items()]
            output.emit(options, counts, output.table(options, columns, rows, empty="No lines."))
    except SuiteError as error:
        output.show_error(error.code, str(error), error.hint)
        return output.EXIT_FAILED
    return output.EXIT_OK


@command.command("dummy-server", examples=("herder suite dummy-server --port 8000 --first-ms 20",))
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8000, help="Default 8000; 0 takes a free one.")
@click.option("--model", default="dummy", help="The name that it serves.")
@click.option("--first-ms", type=click.FloatRange(0), default=10.0, help="Until the first token; default 10.")
@click.option("--token-ms", type=click.FloatRange(0), default=1.0, help="Between tokens; default 1.")
def dummy_server(host: str, port: int, model: str, first_ms: float, token_ms: float) -> int:
    """Serve /health and OpenAI's API with answers of known times: to try a suite without an engine."""
    from agent.suite.dummy_server import main

    main([f"--host={host}", f"--port={port}", f"--model={model}", f"--first-ms={first_ms}", f"--token-ms={token_ms}"])
    return output.EXIT_OK
