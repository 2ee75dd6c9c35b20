"""A recipe from its file: all mistakes at once, each with its place.

msgspec stops at the first mistake, so the document is walked along the schema here: unknown keys, missing ones and
values of the wrong kind are gathered; only a document without any becomes a Recipe.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from agent.suite import times
from agent.suite.schema import NEEDS, SLURM_NEEDS, Recipe, Workload

MAX_BYTES = 1 << 20
MAX_DEPTH = 30
_TIMES = ("duration", "warmup", "scrape_interval", "retention", "request_timeout")


class Mistakes(ValueError):
    """Everything that is wrong with a recipe."""

    def __init__(self, where: str, found: Iterable[str]) -> None:
        self.where, self.found = where, tuple(found)
        super().__init__(f"{where}: " + "; ".join(self.found))


def load(path: Path) -> Any:
    """The plain document of a YAML or JSON file. Raises: Mistakes, OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise Mistakes(path.name, ["larger than 1 MiB"])
    try:
        document = json.loads(data) if path.suffix.lower() == ".json" else _yaml(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Mistakes(path.name, [f"neither YAML nor JSON: {' '.join(str(error).split())[:200]}"]) from None
    if not isinstance(document, dict):
        raise Mistakes(path.name, ["must be a mapping of keys to values"])
    return document


class _Strict(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: the first of the two would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ. Raises: yaml.YAMLError."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int) and key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {key!r} is there twice")
            seen.add(key if isinstance(key, str | int) else id(key_node))
        return super().construct_mapping(node, deep=deep)


def _yaml(data: bytes) -> Any:
    loader = _Strict(data)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def recipe_of(document: Any, *, where: str = "recipe", for_slurm: bool = False) -> Recipe:
    """The recipe of a plain document; a flat workload configuration is one, too. Raises: Mistakes."""
    document = unflattened(document)
    found = shape_mistakes(document, for_slurm=for_slurm)
    if found:
        raise Mistakes(where, found)
    return msgspec.convert(_without_empty(document), Recipe)


def _without_empty(document: Any) -> Any:
    """Without keys whose value was left empty: they have their defaults."""
    if isinstance(document, dict):
        return {key: _without_empty(value) for key, value in document.items() if value is not None}
    return [_without_empty(value) for value in document] if isinstance(document, list) else document


def unflattened(document: Any) -> Any:
    """{service, model, duration, ...} as the toolkit's job wrote it, as a recipe with a workload."""
    if not isinstance(document, dict) or "workload" in document:
        return document
    own = {field.name for field in msgspec.structs.fields(Workload)}
    inside = {key: value for key, value in document.items() if key in own}
    if not inside:
        return document
    # Such a file has never had a warm-up; the default of 30 s is one of recipes.
    return {key: value for key, value in document.items() if key not in own} | {"workload": {"warmup": 0} | inside}


def shape_mistakes(document: Any, *, for_slurm: bool) -> list[str]:
    """Everything that does not fit the schema, each with its place."""
    found: list[str] = []
    if not isinstance(document, dict):
        return ["must be a mapping of keys to values"]
    _walk(document, Recipe, "", found, 0)
    for needed in NEEDS + (SLURM_NEEDS if for_slurm else ()):
        if not _has(document, needed) and _has(document, needed.rpartition(".")[0]):
            found.append(f"{needed}: is missing")
    return found


def _has(document: Any, place: str) -> bool:
    for key in place.split(".") if place else ():
        if not isinstance(document, dict) or document.get(key) is None:
            return False
        document = document[key]
    return True


def _walk(value: Any, kind: Any, place: str, found: list[str], depth: int) -> None:
    """Adds what is wrong with a value of a kind."""
    if depth > MAX_DEPTH:
        found.append(f"{place}: nested too deep")
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        _walk_struct(value, kind, place, found, depth)
    elif get_origin(kind) is list and _is_struct(get_args(kind)[0]):
        if not isinstance(value, list):
            found.append(f"{place}: must be a list")
            return
        for number, item in enumerate(value):
            _walk(item, get_args(kind)[0], f"{place}[{number}]", found, depth + 1)
    elif get_origin(kind) in (Union, types.UnionType) and any(_is_struct(part) for part in get_args(kind)):
        _walk(value, next(part for part in get_args(kind) if _is_struct(part)), place, found, depth)
    else:
        _leaf(value, kind, place, found)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _walk_struct(value: Any, kind: type[msgspec.Struct], place: str, found: list[str], depth: int) -> None:
    if not isinstance(value, Mapping):
        found.append(f"{place or 'the recipe'}: must be a mapping of keys to values")
        return
    kinds = get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    prefix = f"{place}." if place else ""
    for key, inner in value.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.7)
            found.append(f"{prefix}{key}: no such key" + (f"; did you mean {near[0]}?" if near else ""))
        elif inner is None:
            continue
        elif key == "time_limit":
            _time(inner, prefix + key, times.time_limit, found)
        elif key in _TIMES:
            _time(inner, prefix + key, times.seconds, found)
        else:
            _walk(inner, kinds[key], prefix + str(key), found, depth + 1)
    for name, field in fields.items():
        if field.required and name not in value and f"{prefix}{name}" not in NEEDS:
            found.append(f"{prefix}{name}: is missing")


def _time(value: Any, place: str, read: Any, found: list[str]) -> None:
    try:
        read(value)
    except ValueError as error:
        found.append(f"{place}: {error}")


def _leaf(value: Any, kind: Any, place: str, found: list[str]) -> None:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        said, _, inside = str(error).partition(" - at `$")
        options = _options(kind)
        if options and "enum" in said:
            wrong = [item for item in value if item not in options] if isinstance(value, list) else [value]
            said, inside = f"{', '.join(map(repr, wrong))} is not one of {', '.join(options)}", ""
        elif "enum" not in said and not isinstance(value, list | dict):
            said = f"{value!r}: {said}"
        found.append(f"{place}{inside.rstrip('`')}: {said}")


def _options(kind: Any) -> tuple[str, ...]:
    """The words that a kind allows, for a message."""
    args = get_args(kind)
    if args and all(isinstance(part, str) for part in args):
        return args
    for part in args:
        options = _options(part)
        if options:
            return options
    return ()
