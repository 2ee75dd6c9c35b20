"""What all commands share: the global options in every place of the line, examples in the help, lazy groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from herder.client_sync import Client

    _DurationType = click.ParamType[float]
    _KeyValueType = click.ParamType[tuple[str, Any]]
else:
    _DurationType = _KeyValueType = click.ParamType  # generic for the type checker only: older clicks are not

FORMATS = ("table", "json", "yaml")


@dataclass(slots=True)
class Globals:
    """The values of the global options; the innermost that was given wins."""

    url: str | None = None
    token_file: str | None = None
    context: str | None = None
    ca_file: str | None = None
    output: str = "table"
    is_quiet: bool = False
    is_colourless: bool = False

    @contextmanager
    def connect(self, **options: Any) -> Iterator[Client]:
        """A client for the head that the options, the environment and the contexts name."""
        from herder.client_sync import Client

        with Client(
            self.url, token_file=self.token_file, context=self.context, ca_file=self.ca_file, **options
        ) as client:
            yield client


def shared(ctx: click.Context) -> Globals:
    """The global options of this invocation."""
    root = ctx.find_root()
    if not isinstance(root.obj, Globals):
        root.obj = Globals()
    return root.obj


pass_globals = click.make_pass_decorator(Globals)


def _keep(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value not in (None, False):
            setattr(shared(ctx), field, value)
        else:
            shared(ctx)

    return callback


def _option(*names: str, field: str, help: str, **rest: Any) -> click.Option:
    return GlobalOption([*names], expose_value=False, callback=_keep(field), help=help, **rest)


class GlobalOption(click.Option):
    """An option that every command takes."""


def global_options() -> list[click.Option]:
    """Fresh global options for one command."""
    return [
        _option("--url", field="url", metavar="URL", help="Address of the head (HERDER_URL)."),
        _option("--token-file", field="token_file", metavar="FILE", help="File with the token (HERDER_TOKEN_FILE)."),
        _option("--context", field="context", metavar="NAME", help="A head of ~/.config/herder/config.yaml."),
        _option("--ca-file", field="ca_file", metavar="FILE", help="Who signed the head's TLS certificate."),
        _option("-o", "--output", field="output", type=click.Choice(FORMATS), help="How to print; default table."),
        _option("-q", "--quiet", field="is_quiet", is_flag=True, help="Print ids and results only."),
        _option("--no-color", field="is_colourless", is_flag=True, help="No colours (also NO_COLOR)."),
    ]


class _WithExamples:
    """Help with examples and the global options in a section of their own."""

    examples: Sequence[str]
    params: list[click.Parameter]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options, then the global ones."""
        own: list[tuple[str, str]] = []
        common: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):  # type: ignore[attr-defined]
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                (common if isinstance(parameter, GlobalOption) else own).append(record)
        if own:
            with formatter.section("Options"):
                formatter.write_dl(own)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)
        if common:
            with formatter.section("Options of every command, in any place after `herder`"):
                formatter.write_dl(common)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in self.examples))


class HerderCommand(_WithExamples, click.Command):
    """A command with examples and global options."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), takes_globals: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        if takes_globals:
            self.params.extend(global_options())


class HerderGroup(_WithExamples, click.Group):
    """A group with examples and global options; its own commands are HerderCommands."""

    command_class = HerderCommand

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.params.extend(global_options())

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are written, which tells a story better than the alphabet."""
        return list(self.commands)


class LazyGroup(HerderGroup):
    """A group whose commands are imported when they are called.

    sections: title -> {command: (module, one line of help)}. The command stands in its module as `command`.
    """

    def __init__(self, *args: Any, sections: Mapping[str, Mapping[str, tuple[str, str]]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections
        self._lines = {name: entry for section in sections.values() for name, entry in section.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All, by section."""
        return list(self._lines)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command."""
        if cmd_name not in self._lines:
            return None
        from importlib import import_module

        command = import_module(self._lines[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest commands as the hint of a misspelt one."""
        if args and args[0] not in self._lines and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], self._lines, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"no command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """By section, from the one-liners: nothing is imported for the help."""
        longest = max(len(name) for name in self._lines)
        for title, section in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(longest), line) for name, (_, line) in section.items()])


def verb(name: str, *, examples: Sequence[str], **options: Any) -> Callable[[Callable[..., Any]], HerderCommand]:
    """Decorator: a command of its own file."""
    return click.command(name, cls=HerderCommand, examples=examples, **options)


def group(name: str, *, examples: Sequence[str], default: str = "list", **options: Any) -> Callable[[Any], HerderGroup]:
    """Decorator: a group; without a subcommand it runs `default`."""

    def decorate(function: Callable[..., Any]) -> HerderGroup:
        @click.pass_context
        def run(ctx: click.Context, /, **values: Any) -> None:
            function(**values)
            if ctx.invoked_subcommand is None:
                ctx.invoke(made.commands[default])

        made = HerderGroup(
            name, callback=run, invoke_without_command=True, help=function.__doc__, examples=examples, **options
        )
        return made

    return decorate


class Duration(_DurationType):
    """Seconds, written as 90s, 15m, 2h, 7d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        from herder.cli.text import parse_duration

        if isinstance(value, int | float):
            return float(value)
        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class KeyValue(_KeyValueType):
    """NAME=VALUE, where the value is YAML: numbers, booleans and lists keep their type."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """(name, value)."""
        if isinstance(value, tuple):
            return value[0], value[1]
        name, sign, text = str(value).partition("=")
        if not sign or not name:
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        import yaml

        try:
            return name, yaml.safe_load(text)
        except yaml.YAMLError:
            return name, text
