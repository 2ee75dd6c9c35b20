"""Rows of arithmetic, as questions: parameter counts, FLOPs and utilisation, bytes of caches and weights.

Each function takes rows in the exchange form and gives `Errors`: relative errors by row, and for every row that cannot
be a question the reason. Nothing here raises for a row, whatever is in it.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from common.errors import HerderError
from head.planner.calibration.accuracy import AccuracyLine, Refusal
from head.planner.calibration.memory_truth import Unusable as UnusablePeak
from head.planner.calibration.training_truth import Unusable, resolve_name, row_of
from head.planner.hardware.accelerators import GIB
from head.planner.model.architecture import Architecture
from head.planner.model.flops import Convention, training_flops_per_token
from head.planner.model.kv_cache import bytes_per_token
from head.planner.model.parameters import count
from head.planner.model.presets import architecture_of, lookup
from head.planner.model.weights import weight_bytes

Row = Mapping[str, Any]
# What a row of any shape may do to code that reads it.
ROW_ERRORS = (
    HerderError,
    Unusable,
    UnusablePeak,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RecursionError,
)
MIX = re.compile(r"(?i)[ _-]*\b(q\d(?:_[0-9k](?:_[sml])?)?)\b(?:[ _-]*gguf)?")


class Errors(msgspec.Struct):
    """Relative errors with their row's id and source, and reasons by id of the rows that were refused."""

    what: str
    found: list[tuple[str, str, float]] = []
    refused: dict[str, str] = {}
    set_aside: dict[str, str] = {}  # rows that are no such question, or contradict themselves by their own check

    def line(self, scheme: str, chosen: Callable[[str], bool] = lambda _: True) -> AccuracyLine:
        """Mean, median and largest error of the chosen rows."""
        mine = [(source, abs(error)) for row, source, error in self.found if chosen(row)]
        sizes = [size for _, size in mine]
        return AccuracyLine(
            what=self.what,
            scheme=scheme,
            rows=len(sizes),
            sources=len({source for source, _ in mine} - {""}),
            mape=statistics.fmean(sizes) if sizes else None,
            median=statistics.median(sizes) if sizes else None,
            largest=max(sizes, default=None),
            refused=sum(chosen(row) for row in self.refused),
        )

    def refusals(self) -> list[Refusal]:
        """Reasons with their number of rows."""
        return refusals(self.what, self.refused)


def refusals(what: str, reasons: Mapping[str, str]) -> list[Refusal]:
    """Reasons by id, counted."""
    by_reason: dict[str, list[str]] = {}
    for row, reason in reasons.items():
        by_reason.setdefault(reason[:160], []).append(row)
    return [
        Refusal(what=what, reason=reason, rows=len(rows), example=rows[0])
        for reason, rows in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]


def id_of(row: Any, position: int) -> str:
    """The row's id, else its place in its file."""
    found = (row.get("id") or row.get("model") or row.get("name")) if isinstance(row, Mapping) else None
    return str(found) if found else f"row {position}"


def source_of(row: Any) -> str:
    """The title of a row's source, whatever its form."""
    source = row.get("source") if isinstance(row, Mapping) else None
    if isinstance(source, Mapping):
        return str(source.get("title") or source.get("url") or "")
    return str(source[0] if isinstance(source, list) and source else source or "")


def each(what: str, rows: Iterable[Any], errors_of: Callable[[Row], Iterable[float]]) -> Errors:
    """Errors of every row by `errors_of`, which may raise any of ROW_ERRORS; no error is a row that says nothing."""
    found = Errors(what=what)
    for position, row in enumerate(rows, 1):
        name = id_of(row, position)
        try:
            if not isinstance(row, Mapping):
                raise TypeError("a row is no object")
            if not row.get("usable", True):
                found.set_aside[name] = "the source says that it cannot be used"
                continue
            errors = list(errors_of(row))
        except ROW_ERRORS as error:
            found.refused[name] = reason_of(error)
            continue
        if errors:
            worst = max(errors, key=abs)
            found.found.append((name, source_of(row), worst))
        else:
            found.set_aside[name] = "it states nothing of this kind"
    return found


def reason_of(error: BaseException) -> str:
    """Why a row was refused, in words."""
    if isinstance(error, HerderError):
        return error.message
    return str(error) if isinstance(error, Unusable | UnusablePeak) else f"{type(error).__name__}: {str(error)[:100]}"


# parameter counts
def counts(rows: Iterable[Any]) -> Errors:
    """Total, embedding, routed and active parameters, as far as a row states them; the largest difference counts.

    Rows name fields as the golden file does or as the exchange form does.
    """

    def errors_of(row: Row) -> list[float]:
        name = str(row.get("model") or row.get("name") or "")
        counted = count(architecture_of(row["config"], name))
        stated: dict[tuple[str, ...], int] = {
            ("total", "total_params"): counted.total,
            ("routed_experts", "routed_expert_params"): counted.routed_experts,
            ("active", "active_params"): counted.active,
            ("active_no_input_embedding_params",): counted.active_no_input_embedding,
            ("active_no_embedding_params", "active_non_embedding_params"): counted.active_no_embeddings,
        }
        found = []
        for names, ours in stated.items():
            value = next((row[field] for field in names if row.get(field) is not None), None)
            if value is not None:
                found.append((ours - int(value)) / max(int(value), 1))
        embedding = row.get("embedding") or row.get("embedding_params")
        if embedding:  # of untied models some sources count one table, some both; zero stands for "not told apart"
            both = [(own - int(embedding)) / int(embedding) for own in (counted.embedding, counted.input_embedding)]
            found.append(min(both, key=abs))
        return found

    return each("parameter counts", rows, errors_of)


# FLOPs and utilisation
def flops_of_golden(rows: Iterable[Any]) -> Errors:
    """Rates that follow from tokens per second by the convention that the row names."""

    def errors_of(row: Row) -> list[float]:
        arch = lookup(row["model"]) if "model" in row else architecture_of(row["config"])
        flops = training_flops_per_token(arch, row["seq"], row["convention"], has_mtp=row.get("mtp", False))
        return [flops * row["tokens_per_s"] / 1e12 / row["tflops"] - 1]

    return each("FLOPs and MFU arithmetic", rows, errors_of)


def convention_of(row: Row) -> Convention:
    """The convention that a row's own words name. Raises: Unusable when they name none."""
    check = row.get("check") or {}
    words = " ".join(str(part or "") for part in (row.get("flops_convention"), check.get("formula")))
    words = f"{words} {check.get('convention') or ''}".lower().replace(" ", "")
    rules: tuple[tuple[str, Convention], ...] = (
        ("causal-halved]", "causal"),
        ("fullattn+6n_total", "full_attention_total"),
        ("fullattn", "full_attention"),
        ("12*l*d*s", "mosaicml"),
        ("12*l*h*q*t", "palm"),
        ("96*b", "megatron_hardware"),
        ("96b", "megatron_hardware"),
        ("72*b", "megatron_model"),
        ("72b", "megatron_model"),
        ("6*n*tokens", "6n"),
    )
    found = next((name for word, name in rules if word in words), None)
    if found is None:
        raise Unusable("the row names no convention that is known")
    return found


def flops_of_runs(rows: Iterable[Any]) -> Errors:
    """Published TFLOP/s or utilisation of training runs against tokens per second by the row's own convention.

    Rows whose own check says that they contradict themselves, or that did not check them, are set aside.
    """

    def errors_of(row: Row) -> list[float]:
        if (row.get("check") or {}).get("ok") is not True or row.get("flags"):
            return []
        return [_flops_error(row)]

    return each("FLOPs and MFU arithmetic", rows, errors_of)


def _flops_error(row: Row) -> float:
    expected = row["expected"]
    if "gpu_hours" in expected:
        return _lifetime_error(row)
    convention = convention_of(row)
    asked = row_of(row)
    tokens_per_s = asked.layout.global_batch * asked.layout.seq / asked.step_s / asked.gpus
    arch = asked.architecture
    if convention == "mosaicml":  # its models learn a vector for each position of the sequence, and N counts them
        arch = msgspec.structs.replace(arch, positions=asked.layout.seq)
    if expected.get("tokens_per_s_per_gpu") and expected.get("model_tflops_per_gpu"):
        tokens_per_s = float(expected["tokens_per_s_per_gpu"])
    stated = _stated_tflops(row, convention)
    errors = [
        training_flops_per_token(arch, asked.layout.seq, convention, has_mtp=has_mtp) * tokens_per_s
        for has_mtp in ((False, True) if arch.mtp_layers else (False,))
    ]
    return min((flops / 1e12 / stated - 1 for flops in errors), key=abs)


def _stated_tflops(row: Row, convention: Convention) -> float:
    """The rate that follows the convention: with recomputation for Megatron's hardware FLOPs."""
    expected, peak = row["expected"], row["hardware"].get("peak_tflops")
    fields: tuple[str, ...]
    shares: tuple[str, ...]
    if convention == "megatron_hardware":
        fields, shares = ("hw_tflops_per_gpu",), ("hfu",)
    else:
        fields, shares = ("model_tflops_per_gpu",), ("mfu", "derived_mfu")
    for field in fields:
        if expected.get(field):
            return float(expected[field])
    for share in shares:
        if expected.get(share) and peak:
            return float(expected[share]) * float(peak)
    raise Unusable("no rate and no utilisation of the named convention")


def _lifetime_error(row: Row) -> float:
    """Utilisation over GPU hours: 6 N tokens / (hours x peak)."""
    arch, expected = _named(row["model"]), row["expected"]
    hours, share = float(expected["gpu_hours"]), expected.get("derived_lifetime_mfu_6ND")
    if not share:
        raise Unusable("GPU hours without a utilisation")
    flops = 6.0 * count(arch).active * float(row["train"]["tokens"])
    return float(flops / (hours * 3600 * float(row["hardware"]["peak_tflops"]) * 1e12) / share - 1)


def _named(model: Mapping[str, Any]) -> Architecture:
    name = str(model["name"])
    found = resolve_name(name) or resolve_name(re.sub(r"\s*\(.*\)", "", name))
    if found is None:
        raise Unusable(f"the dimensions of {model['name']!r} are not known")
    return found


# bytes
def serving_bytes(rows: Iterable[Any]) -> tuple[Errors, Errors]:
    """KV cache and weights of engines' start-up logs: (cache bytes, weight bytes). Other kinds of rows are no rows."""
    logs = [row for row in rows if isinstance(row, Mapping) and row.get("kind") == "serving_memory_log"]

    def cache_errors(row: Row) -> list[float]:
        expected, conditions = row["expected"], row["conditions"]
        tokens, gib = expected.get("kv_tokens"), expected.get("kv_cache_gib")
        if not tokens or not gib:
            return []
        arch, _ = _model_of(str(conditions["model"]))
        dtype = {1: "fp8", 2: "bf16"}[int(conditions.get("kv_bytes") or 2)]
        each_token = bytes_per_token(arch, tp=int(conditions.get("tp") or 1), dtype=dtype)
        return [float(tokens * each_token / GIB / gib - 1)]

    def weight_errors(row: Row) -> list[float]:
        stated = row["expected"].get("weights_gib_per_rank")
        if not stated:
            return []
        arch, dtype = _model_of(str(row["conditions"]["model"]))
        ours = weight_bytes(arch, dtype=dtype, tp=int(row["conditions"].get("tp") or 1)).per_rank
        return [float(ours / GIB / stated - 1)]

    return each("KV cache bytes", logs, cache_errors), each("weight bytes", logs, weight_errors)


def _model_of(name: str) -> tuple[Architecture, str]:
    """A model and the GGUF mix that its name ends with; the presets read other formats from the name themselves."""
    mix = MIX.search(name)
    plain = MIX.sub("", name).strip() if mix else name
    return lookup(plain), mix[1].lower() if mix else ""
