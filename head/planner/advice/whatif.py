"""Scenarios in words: what to change of a layout, read from "double_batch_size", "tp=4,dp=2", "seq x2" and the like.

A scenario is one or more changes, separated by commas, semicolons or "and". Each sets a field ("tp=4"), multiplies it
("seq x2", "batch *4", "gpus / 2"), or uses a verb ("double", "halve", "triple", "quadruple", "half"). What is not
understood is refused with what is known, never ignored.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from common.errors import InvalidValue
from head.planner.hardware.accelerators import PRECISIONS, find_accelerator
from head.planner.training.layout import TrainingLayout

SCENARIO_LIMIT = 400  # characters
CHANGES_LIMIT = 16
VALUE_LIMIT = 1 << 30

# words of a scenario -> field of Changes
_FIELDS = {
    "tp": "tp",
    "tensor_parallel": "tp",
    "tensor_parallel_size": "tp",
    "pp": "pp",
    "pipeline_parallel": "pp",
    "pipeline_parallel_size": "pp",
    "dp": "dp",
    "data_parallel": "dp",
    "cp": "cp",
    "context_parallel": "cp",
    "ep": "ep",
    "expert_parallel": "ep",
    "gpus": "gpus",
    "gpu": "gpus",
    "gpu_count": "gpus",
    "num_gpus": "gpus",
    "nodes": "nodes",
    "num_nodes": "nodes",
    "batch": "global_batch",
    "batch_size": "global_batch",
    "global_batch": "global_batch",
    "global_batch_size": "global_batch",
    "micro_batch": "micro_batch",
    "micro_batch_size": "micro_batch",
    "seq": "seq",
    "seq_len": "seq",
    "seq_length": "seq",
    "sequence": "seq",
    "sequence_length": "seq",
    "context": "seq",
    "context_length": "seq",
    "precision": "precision",
    "dtype": "precision",
    "recompute": "recompute",
    "checkpointing": "recompute",
    "activation_checkpointing": "recompute",
    "sharding": "sharding",
    "zero": "sharding",
    "accelerator": "accelerator",
    "gpu_type": "accelerator",
    "hardware": "accelerator",
    "offload": "offload",
    "optimizer": "optimizer",
    "virtual_stages": "virtual_stages",
}
_WORDS: dict[str, tuple[str, ...]] = {
    "recompute": ("none", "selective", "full"),
    "sharding": ("none", "zero1", "zero2", "zero3", "fsdp", "hsdp"),
    "offload": ("none", "optimizer", "optimizer_and_weights", "activations"),
    "precision": PRECISIONS,
}
_OPTIMIZERS = ("adamw", "adam", "adamw_8bit", "adafactor", "sgd", "lion", "muon")
_VERBS = {"double": 2.0, "twice": 2.0, "triple": 3.0, "quadruple": 4.0, "halve": 0.5, "half": 0.5, "quarter": 0.25}
_SET = re.compile(r"([a-z_ ]{1,40}?)\s?(?:=|:| to )\s?([a-z0-9_.+-]{1,40})")
_TIMES = re.compile(r"([a-z_ ]{1,40}?)\s?(?:x|\*|×)\s?(\d{1,6}(?:\.\d{1,6})?)")
_TIMES_BEFORE = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)\s?(?:x|\*|×)\s?([a-z_ ]{1,40})")
_DIVIDED = re.compile(r"([a-z_ ]{1,40}?)\s?/\s?(\d{1,6})")
_SINGLE = {
    "fp8": ("precision", "fp8"),
    "bf16": ("precision", "bf16"),
    "fp16": ("precision", "fp16"),
    "enable_checkpointing": ("recompute", "full"),
    "disable_checkpointing": ("recompute", "none"),
    "enable_activation_checkpointing": ("recompute", "full"),
    "gradient_checkpointing": ("recompute", "full"),
    "cpu_offload": ("offload", "optimizer"),
    "offload_optimizer": ("offload", "optimizer"),
    "fsdp": ("sharding", "fsdp"),
    "zero1": ("sharding", "zero1"),
    "zero2": ("sharding", "zero2"),
    "zero3": ("sharding", "zero3"),
}
EXAMPLES = ("double_batch_size", "tp=4,dp=2", "halve gpus", "seq x2", "precision=fp8", "accelerator=h200", "zero3")


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One field, either set to a value or multiplied by a factor."""

    field: str
    value: int | str | None = None
    factor: float | None = None


def parse_scenario(text: str) -> tuple[Change, ...]:
    """The changes that a scenario asks for, in its order.

    Raises: InvalidValue (422) naming what was not understood and what is known.
    """
    if not text.strip() or len(text) > SCENARIO_LIMIT:
        raise _unknown(text, f"a scenario has 1 to {SCENARIO_LIMIT} characters")
    parts = [part.strip() for part in re.split(r"[,;\n]|\band\b|&", text.lower())]
    found = tuple(_change(part, text) for part in parts if part)
    if not 1 <= len(found) <= CHANGES_LIMIT:
        raise _unknown(text, f"a scenario has 1 to {CHANGES_LIMIT} changes")
    fields = [change.field for change in found]
    twice = sorted({field for field in fields if fields.count(field) > 1})
    if twice:
        raise _unknown(text, f"changed twice: {', '.join(twice)}")
    return found


def apply_scenario(
    layout: TrainingLayout, changes: tuple[Change, ...], *, gpus_per_node: int = 8, accelerator: str = ""
) -> tuple[TrainingLayout, str]:
    """The changed layout and accelerator. A change of `gpus` or `nodes` goes to dp; dp is kept when tp or pp change.

    Raises: InvalidValue when the outcome has no whole degrees or batches.
    """
    values: dict[str, Any] = {}
    for change in changes:
        if change.field == "accelerator":
            accelerator = str(change.value)
        elif change.field in ("gpus", "nodes"):
            unit = gpus_per_node if change.field == "nodes" else 1
            wanted = _changed(change, max(1, layout.gpus // unit)) * unit
            others = _degrees(layout, values)
            if wanted % others:
                raise InvalidValue(
                    f"{wanted} GPUs are not a multiple of tp*pp*cp = {others}",
                    hint="change tp or pp as well",
                    gpus=wanted,
                )
            values["dp"] = wanted // others
        else:
            values[change.field] = _changed(change, getattr(layout, change.field))
    changed = msgspec.structs.replace(layout, **values)
    samples = changed.micro_batch * changed.dp
    if changed.global_batch % samples:
        raise InvalidValue(
            f"global batch {changed.global_batch} is not a multiple of micro_batch*dp = {samples}",
            hint="change the batch as well",
            global_batch=changed.global_batch,
        )
    return changed, accelerator


def _degrees(layout: TrainingLayout, values: dict[str, Any]) -> int:
    """tp*pp*cp after the changes so far."""
    product = 1
    for field in ("tp", "pp", "cp"):
        product *= int(values.get(field, getattr(layout, field)))
    return product


def _changed(change: Change, old: Any) -> Any:
    """The new value of a field. A product must be whole and positive."""
    if change.factor is None:
        return change.value
    if not isinstance(old, int):
        raise InvalidValue(f"{change.field} cannot be multiplied", field=change.field)
    product = old * change.factor
    if round(product) < 1 or abs(product - round(product)) > 1e-9 * product or product > VALUE_LIMIT:
        raise InvalidValue(f"{change.field} {old} x {change.factor:g} is not a whole number", field=change.field)
    return round(product)


def _change(part: str, text: str) -> Change:
    """One change from its words."""
    squeezed = re.sub(r"[\s-]+", "_", part)
    if squeezed in _SINGLE:
        field, value = _SINGLE[squeezed]
        return Change(field=field, value=value)
    verb, _, rest = squeezed.partition("_")
    if verb in _VERBS and rest:
        return _scaled(_field(rest, text), _VERBS[verb], text)
    if match := _SET.fullmatch(part):
        return _set(_field(match[1], text), match[2], text)
    for pattern, order in ((_TIMES, (1, 2)), (_TIMES_BEFORE, (2, 1))):
        if match := pattern.fullmatch(part):
            return _scaled(_field(match[order[0]], text), float(match[order[1]]), text)
    if (match := _DIVIDED.fullmatch(part)) and int(match[2]) > 0:
        return _scaled(_field(match[1], text), 1 / int(match[2]), text)
    raise _unknown(text, f"not understood: {part[:60]!r}")


def _field(words: str, text: str) -> str:
    """The field that some words name, with or without "the" and "number of"."""
    name = re.sub(r"[\s-]+", "_", words.strip()).strip("_")
    name = re.sub(r"^(?:set_|use_|change_|the_|number_of_|num_of_)+", "", name)
    if name not in _FIELDS:
        raise _unknown(text, f"no field {name[:60]!r}")
    return _FIELDS[name]


def _scaled(field: str, factor: float, text: str) -> Change:
    """A multiplied field."""
    if field in _WORDS or field in ("accelerator", "optimizer"):
        raise _unknown(text, f"{field} is a word and cannot be multiplied")
    if not 1e-6 < factor <= VALUE_LIMIT:
        raise _unknown(text, f"a factor of {factor:g} is out of range")
    return Change(field=field, factor=factor)


def _set(field: str, value: str, text: str) -> Change:
    """A field set to a word or a whole number."""
    if field == "sharding" and value in ("0", "1", "2", "3"):
        value = "none" if value == "0" else f"zero{value}"
    if field == "gpus" and not value[:1].isdigit():
        field = "accelerator"  # "gpu=b200"
    if field == "accelerator":
        found = find_accelerator(value)
        if found is None:
            raise _unknown(text, f"unknown accelerator {value[:60]!r}")
        return Change(field=field, value=found.name)
    allowed = _OPTIMIZERS if field == "optimizer" else _WORDS.get(field)
    if allowed is not None:
        if value not in allowed:
            raise _unknown(text, f"{field} is one of {', '.join(allowed)}")
        return Change(field=field, value=value)
    size = re.fullmatch(r"(\d{1,10})(k?)", value)
    number = int(size[1]) * (1024 if size[2] else 1) if size else 0
    if not 1 <= number <= VALUE_LIMIT:
        raise _unknown(text, f"{field} must be a whole number of at least 1")
    return Change(field=field, value=number)


def _unknown(text: str, why: str) -> InvalidValue:
    """The refusal, with everything that would be understood."""
    return InvalidValue(
        f"scenario {text[:80]!r}: {why}",
        hint="e.g. " + "; ".join(EXAMPLES),
        fields=sorted(set(_FIELDS.values())),
        verbs=sorted(_VERBS),
        examples=list(EXAMPLES),
    )
