"""`herder plan`: the planner at the command line, by itself or with a cluster's inventory.

The verbs, their options and their help are made from the planner's own table of endpoints, so that command line and
API cannot differ. Without --cluster nothing is asked of any daemon.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from herder.cli import output, plan_calibrate, plan_view
from herder.cli.command import Globals, HerderCommand, HerderGroup, pass_globals
from herder.decoding import UNREADABLE
from herder.errors import HerderApiError

if TYPE_CHECKING:
    from head.planner.endpoints.base import Endpoint

CONFIG_BYTES = 1 << 20
_WEIGHTS = (".gguf", ".safetensors")
EXAMPLES = (
    "herder plan recommend llama-3.1-70b --gpu h100 --gpus 64 --training",
    "herder plan memory llama-3.1-8b --tp 2 --gpu a100-80gb",
    "herder plan vllm qwen3-32b --gpu h200 --gpus 2",
    "herder plan analyze ./config.json",
    "herder plan topology --cluster",
)


class PlanGroup(HerderGroup):
    """A group whose verbs are the planner's endpoints; the planner is imported when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The endpoints' verbs in the table's order, then what only the command line has."""
        from head.planner.endpoints.table import BY_VERB

        return list(dict.fromkeys([*BY_VERB, *self.commands]))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, made from its question."""
        from head.planner.endpoints.table import BY_VERB

        if cmd_name in self.commands:
            return self.commands[cmd_name]
        endpoint = BY_VERB.get(cmd_name)
        return _command(endpoint) if endpoint is not None else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest verbs as the hint of a misspelt one."""
        import difflib

        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], known, n=3)
            ctx.fail(f"no command {args[0]!r}.{' Did you mean ' + ' or '.join(near) + '?' if near else ''}")
        return super().resolve_command(ctx, args)


@click.group("plan", cls=PlanGroup, examples=EXAMPLES)
def command() -> None:
    """Plan training and serving: memory, time, cost, layouts, engine settings.

    Nothing runs and nothing is changed. A model is a preset, the path of a config.json, or, with --cluster, a model of
    the cluster. A machine is named by --gpu; without it, it is this machine's or (--cluster) the cluster's GPUs.
    Every number shows the 80 % interval that it was measured to be right in.
    """


command.add_command(plan_calibrate.calibrate)


def _command(endpoint: Endpoint) -> click.Command:
    """The command of one endpoint: the model as argument, every other field as an option."""
    parameters: list[click.Parameter] = []
    fields = msgspec.structs.fields(endpoint.question)
    takes_several = any(field.name == "models" for field in fields)
    for field in fields:
        if field.name == "model" and takes_several:
            continue
        parameter = _parameter(field, needs_model=endpoint.needs_model)
        if parameter is not None:
            parameters.append(parameter)
    parameters.append(click.Option(["--cluster"], is_flag=True, help="Ask the head: its inventory, its models."))
    help_ = "A file of herder plan calibrate; 'none': only the shipped one. [the default file, if it is there]"
    if endpoint.path == "export":
        parameters.append(click.Option(["--write"], metavar="DIR", help="Write the files there; none may exist yet."))
    parameters.append(click.Option(["--calibration"], metavar="FILE", help=help_))
    return HerderCommand(
        endpoint.verb,
        params=parameters,
        callback=_callback(endpoint),
        help=_help(endpoint),
        short_help=endpoint.summary + ".",
        examples=[_example(endpoint)],
    )


def _help(endpoint: Endpoint) -> str:
    """The summary, and what the question itself says beyond it."""
    from head.planner.endpoints.questions import Question

    more = "" if endpoint.question is Question else (endpoint.question.__doc__ or "").strip()
    return f"{endpoint.summary}.\n\n{more}".strip()


def _callback(endpoint: Endpoint) -> Callable[..., None]:
    @pass_globals
    def run(
        options: Globals, /, cluster: bool, calibration: str | None, write: str | None = None, **values: Any
    ) -> None:
        if cluster and calibration:
            raise click.UsageError("--calibration is for answers of this machine; a head has its own")
        question = {name: value for name, value in values.items() if value is not None and value != ()}
        files = _read_model(question)
        if files and cluster:
            raise click.UsageError("a file of weights is read on this machine: leave --cluster out, or register it")
        answer = (
            _by_head(options, endpoint, question) if cluster else _by_ourselves(endpoint, question, files, calibration)
        )
        if write:
            click.echo(f"wrote {', '.join(_written(Path(write), answer['files']))} to {write}", err=True)
        if endpoint.path == "accuracy":
            output.emit(options, answer, plan_calibrate.accuracy_view(answer, options))
        else:
            output.emit(options, answer, plan_view.render(answer, options, endpoint.path))

    return run


def _written(folder: Path, files: dict[str, str]) -> list[str]:
    """Writes the files of an export. Raises: UsageError when one of them is there already."""
    found = [name for name in files if (folder / name).exists()]
    if found:
        raise click.UsageError(f"{folder} holds {', '.join(found)} already")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with (folder / Path(name).name).open("x", encoding="utf-8") as file:
            file.write(text)
    return list(files)


def _read_model(question: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A model that is a file or a folder: its config.json goes into the question, what headers say is returned by name.

    Raises: UsageError for what cannot be read as what its name says.
    """
    name = question.get("model")
    if not isinstance(name, str):
        return {}
    path = Path(name)
    if path.suffix in _WEIGHTS and path.is_file():
        return {name: _read_headers([path])}
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(part for suffix in _WEIGHTS for part in path.glob(f"*{suffix}"))
            if not found:
                raise click.UsageError(f"{name} has neither a config.json nor weights ({', '.join(_WEIGHTS)})")
            kind = [part for part in found if part.suffix == found[0].suffix]
            return {name: _read_headers(kind)}
        path = path / "config.json"
    elif path.suffix != ".json":
        return {}
    _read_config(question, path)
    return {}


def _read_headers(paths: list[Path]) -> dict[str, Any]:
    """What the headers of GGUF or safetensors files say, as an agent reads them; no weight is read."""
    from agent.metadata import gguf, safetensors
    from agent.metadata.limits import BadFile

    try:
        if paths[0].suffix == ".gguf":
            return {"detected": gguf.describe(paths), "source": "headers"}
        tensors = {name: tensor for path in paths for name, tensor in safetensors.read_header(path).items()}
    except BadFile as error:
        raise click.UsageError(str(error)) from None
    shapes = {name: {"dtype": tensor.dtype, "shape": tensor.shape} for name, tensor in tensors.items()}
    return {"tensors": shapes, "source": "headers"}


def _read_config(question: dict[str, Any], path: Path) -> None:
    """The content of a config.json in the place of its name."""
    with path.open("rb") as file:
        text = file.read(CONFIG_BYTES + 1)
    try:
        config = msgspec.json.decode(text) if len(text) <= CONFIG_BYTES else None
    except UNREADABLE:
        config = None
    if not isinstance(config, dict):
        raise click.UsageError(f"{path} is not a config.json: a JSON object of at most 1 MiB")
    question |= {"config": config, "model": path.resolve().parent.name or "config.json"}


def _by_ourselves(
    endpoint: Endpoint, question: dict[str, Any], files: dict[str, dict[str, Any]], calibration: str | None = None
) -> Any:
    """The answer of the planner in this process, with this machine's own GPUs as inventory."""
    own = plan_calibrate.own_calibration(calibration)
    from common.errors import HerderError
    from head.planner.endpoints.base import ask

    try:
        desk = msgspec.structs.replace(_own_desk(endpoint, question), models=files)
        return msgspec.to_builtins(ask(endpoint, question, desk, own))
    except HerderError as error:
        raise HerderApiError(
            error.code, error.message, hint=error.hint, details=error.details, status=error.status
        ) from None


def _own_desk(endpoint: Endpoint, question: dict[str, Any]) -> Any:
    """This machine's GPUs, where the question does not name others and the driver is there."""
    from head.planner.endpoints.questions import Desk, PlacedQuestion, kind_of

    takes_machine = issubclass(endpoint.question, PlacedQuestion) or endpoint.path in ("topology", "health", "nccl")
    if not takes_machine or question.get("gpu") or question.get("mock_topology") or question.get("mock"):
        return Desk()
    import socket

    from agent.probe.host import read_inventory
    from agent.probe.nvml import Nvml

    nvml = Nvml()
    try:
        inventory = read_inventory(Path.cwd(), nvml)
    finally:
        nvml.close()
    kind = msgspec.structs.replace(kind_of(inventory), node_ids=(socket.gethostname(),))
    return Desk(kinds=(kind,), source="detected")


def _by_head(options: Globals, endpoint: Endpoint, question: dict[str, Any]) -> Any:
    """The head's answer."""
    with options.connect() as client:
        return client.plan(endpoint.path, question, method=endpoint.method)


def _example(endpoint: Endpoint) -> str:
    words = ["herder", "plan", endpoint.verb]
    for name, value in endpoint.example:
        if name in ("model", "models"):
            words += value if isinstance(value, list) else [str(value)]
        elif value is True:
            words.append(f"--{name.replace('_', '-')}")
        else:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _parameter(field: Any, *, needs_model: bool) -> click.Parameter | None:
    """A field of a question as an option; dictionaries (config, dimensions) have none: files and the API give them."""
    kind, choices, is_list = plan_view.kind_of_field(field.type)
    if kind is None:
        return None
    if field.name in ("model", "models"):
        return click.Argument([field.name], required=needs_model, nargs=-1 if is_list else 1)
    text = plan_view.description_of(field.type)
    default = None if field.default in (msgspec.NODEFAULT, "", None) else field.default
    name = "--" + field.name.replace("_", "-")
    shown = f" [{default}]" if default is not None and not isinstance(default, bool) else ""
    if kind is bool:
        return click.Option(
            [f"{name}/--no-{name[2:]}"], default=None, help=f"{text}{' [on]' if default else ''}".strip()
        )
    type_: Any = click.Choice(choices) if choices else kind
    required = field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT
    return click.Option([name], type=type_, multiple=is_list, required=required, help=f"{text}{shown}".strip())
