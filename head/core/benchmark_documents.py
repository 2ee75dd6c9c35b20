"""A benchmark's recipe from what a person sent: one of the head's by name, a whole document, or the first changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from common.bench.recipe import BenchmarkRecipe
from common.errors import InvalidRecipe
from herder.types import CreateBenchmark

ALTERNATIVES = (
    ("server", ("service", "serve", "urls")),
    ("load", ("rate", "concurrency", "steps", "trace")),
)
"""Of each group a recipe has one: the document's takes the place of the other's."""
WHOLE = frozenset({"sweep", "search", "slo"})
"""What a document says of these replaces all that the recipe said."""


def document_of(asked: CreateBenchmark, known: Mapping[str, BenchmarkRecipe]) -> dict[str, Any]:
    """The document to check. Raises: InvalidRecipe, KeyError with the name of a recipe that is not known."""
    document = dict(asked.document)
    if asked.recipe:
        document = changed(msgspec.to_builtins(known[asked.recipe]), document)
    elif not document:
        raise InvalidRecipe("neither a recipe nor a document was sent", hint="give `recipe`, `document`, or both")
    if asked.name:
        document["name"] = asked.name
    return document


def changed(recipe: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with the document's values in their places; a null takes a value away."""
    made = dict(recipe)
    for part, names in ALTERNATIVES:
        there, said = made.get(part), document.get(part)
        if isinstance(there, Mapping) and isinstance(said, Mapping) and any(said.get(name) for name in names):
            made[part] = {name: value for name, value in there.items() if name not in names}
    for name, value in document.items():
        there = made.get(name)
        if value is None:
            made.pop(name, None)
        elif isinstance(there, Mapping) and isinstance(value, Mapping) and name not in WHOLE:
            made[name] = changed(there, value)
        else:
            made[name] = value
    return made
