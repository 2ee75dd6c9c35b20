"""A benchmark's recipe from what a person sent: one of the head's by name, a whole document, or the first changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from common.bench.documents import changed
from common.bench.recipe import BenchmarkRecipe
from common.errors import InvalidRecipe
from herder.types import CreateBenchmark


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
