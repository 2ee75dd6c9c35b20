"""`herder models`: register, list, show, change and forget models."""

from __future__ import annotations

import time
from typing import Any, get_args

import click

from herder import types
from herder.cli import output, text, views
from herder.cli.command import Globals, KeyValue, group, pass_globals

TYPES = click.Choice(get_args(types.ModelType))


@group(
    "models",
    examples=(
        "herder models",
        "herder models add smollm2 --source file:///srv/models/smollm2.gguf",
        "herder models locations smollm2",
    ),
)
def command() -> None:
    """Register, list, show and delete models. Without a subcommand: list them."""


@command.command(
    "add",
    examples=(
        "herder models add smollm2 --source file:///srv/models/smollm2.gguf",
        "herder models add org/name --source hf://org/name@main",
        "herder models add e5 --type embedding --source https://host/e5/ --metadata license=mit",
    ),
)
@click.argument("name")
@click.option(
    "--source", "sources", multiple=True, metavar="URL", help="file://, http(s)://, hf://, ssh://; may repeat."
)
@click.option("--type", "kind", type=TYPES, default="llm", show_default=True, help="What it is for.")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or version word.")
@click.option("--metadata", type=KeyValue(), multiple=True, metavar="NAME=VALUE", help="Anything worth keeping.")
@pass_globals
def add(
    options: Globals,
    name: str,
    sources: tuple[str, ...],
    kind: types.ModelType,
    revision: str,
    metadata: tuple[tuple[str, Any], ...],
) -> None:
    """Make a model known under NAME (as smollm2 or org/name). Nothing is fetched yet."""
    with options.connect() as client:
        model = client.register_model(name, type=kind, sources=sources, revision=revision, metadata=dict(metadata))
    then = f"; `herder download {model.name} NODE:disk` fetches it" if model.sources else ""
    output.emit(options, model, f"{model.name} is registered{then}", quiet=model.name)


@command.command("list", examples=("herder models list", "herder models list --type embedding --search e5 -o json"))
@click.option("--type", "kind", type=TYPES, help="Only models of this type.")
@click.option("--search", default="", help="Only names that hold this.")
@pass_globals
def list_models(options: Globals, kind: types.ModelType | None = None, search: str = "") -> None:
    """List models and where they are."""
    with options.connect() as client:
        found = client.models(type=kind, search=search).all()
    rows = [views.model_row(model) for model in found]
    shown = output.table(options, views.MODELS, rows, empty="no models; `herder models add` registers one")
    output.emit(options, found, shown, quiet="\n".join(model.name for model in found))


@command.command("show", examples=("herder models show smollm2", "herder models show org/name -o yaml"))
@click.argument("name")
@pass_globals
def show(options: Globals, name: str) -> None:
    """Show a model: what its files say, and where it is."""
    with options.connect() as client:
        model = client.model(name)
    output.emit(options, model, _shown(options, model), quiet=model.name)


def _shown(options: Globals, model: types.ModelView) -> str:
    now_ms = int(time.time() * 1000)
    pairs = [
        ("name", model.name),
        ("type", model.type),
        ("revision", model.revision),
        ("sources", "\n".join(model.sources)),
        ("format", model.format),
        ("size", text.size(model.size or None)),
        ("files", str(model.files or "")),
        ("digest", model.digest),
        ("served at", ", ".join(f"{url} ({device})" for device, url in sorted(model.services.items()))),
        ("registered", f"{text.age(model.created_ms, now_ms)} ago"),
        *((name, _brief(value)) for name, value in model.detected.items() if name != "format"),
        *((f"metadata {name}", _brief(value)) for name, value in model.metadata.items()),
    ]
    shown = output.fields(options, pairs)
    if model.copies:
        rows = [views.copy_row(copy, now_ms) for copy in model.copies]
        shown += "\n\n" + output.table(options, views.COPIES, rows, empty="")
    return shown


def _brief(value: Any) -> str:
    shown = str(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}… ({len(shown)} characters)"


@command.command(
    "update",
    examples=(
        "herder models update smollm2 --source https://host/smollm2.gguf",
        "herder models update smollm2 --metadata owner=me --remove-metadata note",
    ),
)
@click.argument("name")
@click.option("--source", "sources", multiple=True, metavar="URL", help="The new sources, in place of the old ones.")
@click.option("--type", "kind", type=TYPES, help="The new type.")
@click.option("--revision", help="The new revision.")
@click.option("--metadata", type=KeyValue(), multiple=True, metavar="NAME=VALUE", help="Set or change.")
@click.option("--remove-metadata", multiple=True, metavar="NAME", help="Take away.")
@pass_globals
def update(
    options: Globals,
    name: str,
    sources: tuple[str, ...],
    kind: types.ModelType | None,
    revision: str | None,
    metadata: tuple[tuple[str, Any], ...],
    remove_metadata: tuple[str, ...],
) -> None:
    """Change what is known of a model."""
    changes: dict[str, Any] = {**dict(metadata), **dict.fromkeys(remove_metadata)}
    if not (sources or kind or revision or changes):
        raise click.UsageError("nothing to change was given")
    with options.connect() as client:
        model = client.update_model(
            name, type=kind, sources=sources or None, revision=revision, metadata=changes or None
        )
    output.emit(options, model, f"{model.name} is changed", quiet=model.name)


@command.command(
    "delete",
    examples=("herder models delete smollm2", "herder models delete smollm2 --force   # also pinned or in use"),
)
@click.argument("name")
@click.option("--force", is_flag=True, help="Also with pinned copies, or copies in use.")
@pass_globals
def delete(options: Globals, name: str, force: bool) -> None:
    """Forget a model and drop all its copies."""
    with options.connect() as client:
        gone = client.delete_model(name, force=force)
    said = "is gone" if gone.is_done else "is being deleted: its copies are being dropped"
    output.emit(options, gone, f"{gone.key} {said}", quiet="")


@command.command("locations", examples=("herder models locations smollm2",))
@click.argument("name")
@pass_globals
def locations(options: Globals, name: str) -> None:
    """List every copy of a model, with state and progress."""
    with options.connect() as client:
        found = client.model_locations(name).all()
    now_ms = int(time.time() * 1000)
    rows = [views.copy_row(copy, now_ms) for copy in found]
    shown = output.table(options, views.COPIES, rows, empty=f"no copies; `herder download {name} NODE:disk` makes one")
    output.emit(options, found, shown, quiet="\n".join(copy.device for copy in found))


@command.command("manifest", examples=("herder models manifest smollm2", "herder models manifest org/name -o json"))
@click.argument("name")
@click.option("--revision", default="", help="Default: the model's present one.")
@pass_globals
def manifest(options: Globals, name: str, revision: str) -> None:
    """List the files of a model with sizes and digests."""
    with options.connect() as client:
        found = client.model_manifest(name, revision=revision)
    rows = [[file.path, text.size(file.size), file.sha256 or "-"] for file in found.files]
    head = output.fields(
        options,
        [
            ("model", f"{found.model}@{found.revision}"),
            ("format", found.format),
            ("size", text.size(found.size)),
            ("digest", found.digest),
        ],
    )
    shown = head + "\n\n" + output.table(options, views.FILES, rows, empty="no files")
    output.emit(options, found, shown, quiet=found.digest)
