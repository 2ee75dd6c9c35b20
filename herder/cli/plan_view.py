"""Answers of the planner for people: one way to show any of them, made for reading down a terminal of 80 columns."""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal

import msgspec

from herder.cli import output
from herder.cli.command import Globals
from herder.cli.plan_numbers import is_quantity, plain, shell_lines, title
from herder.cli.plan_shapes import BLOCKS, INLINE, gpus
from herder.cli.plan_shapes import ROWS as SHAPED_ROWS
from herder.cli.table import Column, safe

ROWS = 30  # of one table; -o json shows all
COLUMNS = 9
ITEMS = 12  # of a list of texts
COMMANDS = 2  # of commands that differ in a rank only
WIDTH = 100  # of a pipe
# What is for programs: the same again, or in a form that nobody reads.
_HIDDEN = {
    "": ("argv", "files", "near", "visualization", "p2p_matrix", "bandwidth_matrix", "gpu_numa_mapping", "node_ids"),
    "recommend": ("best_strategy", "best", "pareto", "parameters"),
    "pareto": ("analysis",),
    "analyze": ("memory_analysis", "model"),
    "optimize": ("kernels",),
    "autotune": ("best_config", "best_score", "search_statistics"),
    "sharding": ("best", "remedies"),
    "launch": ("environment", "config", "args"),
    "export": (
        *("deepspeed_config", "accelerate_config", "fsdp_config", "megatron_args", "environment_variables"),
        *("torchrun_argv", "slurm_script", "kubernetes_config", "training_script"),
    ),
    "vllm": ("config", "expected_performance"),
    "inference": ("engine", "kv_cache", "best", "model"),
    "largescale": ("config", "slurm_script", "kubernetes_config", "efficiency"),
    "rl": ("memory_plan", "training_config"),
    "nccl": ("export_commands",),
    "estimate": (
        *("training_time_hours", "training_time_days", "total_cost_usd", "cost_per_gpu_usd", "num_checkpoints"),
        *("checkpoint_size_gb", "total_checkpoint_storage_gb", "gpu_hourly_cost"),
    ),
    "presets": ("presets", "accelerators", "aliases"),
    "validate": ("predicted", "limit", "valid", "can_proceed"),
    "memory": ("parallelism", "total_memory_gb", "details"),
    "bottleneck": ("layout", "topology_source"),
    "batchsize": ("search_iterations",),
}
_HIDDEN["rlhf"] = _HIDDEN["rl"]
_COMMANDS = ("command", "launch_command", "text", "multi_node_commands")


# fields of questions, for options
def kind_of_field(type_: Any) -> tuple[Any, tuple[str, ...], bool]:
    """(int, float, str, bool or None; choices; whether it is a list) of a field's type."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin is Annotated:
        return kind_of_field(arguments[0])
    if origin in (UnionType, typing.Union):
        inner = [argument for argument in arguments if argument is not type(None)]
        return kind_of_field(inner[0]) if len(inner) == 1 else (None, (), False)
    if origin is Literal:
        return str, tuple(str(choice) for choice in arguments if choice), False
    if origin in (list, tuple):
        kind, choices, _ = kind_of_field(arguments[0])
        return kind, choices, True
    return (type_ if type_ in (int, float, str, bool) else None), (), False


def description_of(type_: Any) -> str:
    """The description of a field, wherever in its type it stands."""
    if typing.get_origin(type_) is Annotated:
        for meta in type_.__metadata__:
            if isinstance(meta, msgspec.Meta) and meta.description:
                return meta.description
    for argument in typing.get_args(type_):
        found = description_of(argument)
        if found:
            return found
    return ""


# answers
def render(answer: Mapping[str, Any], options: Globals, path: str = "") -> str:
    """The whole answer as text; a batch script as itself, so that it can go into a file."""
    if path == "slurm":
        return safe(str(answer["script"])).rstrip()
    width = output.line_width() or WIDTH
    hidden = frozenset((*_HIDDEN[""], *_HIDDEN.get(path, ()), *_others(answer, path)))
    lines = _Page(options, width, hidden).section(answer, 0)
    if any("(" in line and _has_interval(answer) for line in lines):
        lines += ["", "(low-high): 80 % interval. -o json has conventions and the nearest measurements."]
    if answer.get("files") and path == "export":
        lines += ["", *_wrapped("files  ", ", ".join(answer["files"]) + "; --write DIR writes them", width)]
    return "\n".join(lines).rstrip()


def _others(answer: Mapping[str, Any], path: str) -> list[str]:
    """Of an export the commands of other tools than the one that was asked for."""
    if path != "export":
        return []
    tool = {"pytorch": "torchrun", "fsdp": "torchrun"}.get(answer["framework"], answer["framework"])
    found = [name for name in answer if name.endswith("_command") and name != f"{tool}_command"]
    return found if tool == "torchrun" else [*found, "multi_node_commands"]


def _has_interval(item: Any) -> bool:
    if is_quantity(item):
        return True
    if isinstance(item, Mapping):
        return any(_has_interval(value) for value in item.values())
    return isinstance(item, list | tuple) and any(_has_interval(value) for value in item)


class _Page:
    """One answer on its way to text."""

    def __init__(self, options: Globals, width: int, hidden: frozenset[str]) -> None:
        self.options, self.width, self.hidden = options, width, hidden

    def section(self, value: Mapping[str, Any], depth: int, name: str = "") -> list[str]:
        """Plain values first, as `name  value`; then what has parts, each under its name."""
        found = _matching(BLOCKS, value)
        if found is not None:
            return self.pairs(found(value), depth)
        shown = {key: item for key, item in value.items() if key not in self.hidden and not _is_empty(item)}
        if "multi_node_commands" in shown:  # the first of them is the command
            shown = {key: item for key, item in shown.items() if key not in ("command", "torchrun_command")}
        pairs = [(title(key), _line(key, item, name)) for key, item in shown.items() if _is_line(key, item)]
        lines = self.pairs(pairs, depth)
        for key, item in shown.items():
            if _is_line(key, item):
                continue
            if lines and depth == 0:
                lines.append("")
            lines.append("  " * depth + title(key))
            lines += self.block(key, item, depth + 1)
        return lines

    def pairs(self, pairs: Sequence[tuple[str, str]], depth: int) -> list[str]:
        """`title  text`, with the texts under each other."""
        longest = max((len(word) for word, _ in pairs), default=0)
        lines = []
        for word, text in pairs:
            lines += _wrapped(f"{'  ' * depth}{word.ljust(longest)}  ", text, self.width)
        return lines

    def block(self, name: str, item: Any, depth: int) -> list[str]:
        """A value that takes lines of its own."""
        pad = "  " * depth
        if isinstance(item, str):
            if name in _COMMANDS or name.endswith("_command"):
                return [pad + line for line in shell_lines(item, self.width - len(pad))]
            return [pad + line for line in safe(item).rstrip("\n").split("\n")]
        if name == "comparison" and isinstance(item, Mapping):
            return self.rows(list(item.values()), depth)
        if isinstance(item, Mapping):
            return self.section(item, depth, name)
        if name in _COMMANDS or name.endswith("_commands"):
            lines = [pad + line for one in item[:COMMANDS] for line in shell_lines(one, self.width - len(pad))]
            return [*lines, *([f"{pad}... {len(item) - COMMANDS} more, a rank each"] if len(item) > COMMANDS else [])]
        if all(isinstance(row, Mapping) and not is_quantity(row) for row in item):
            return self.rows(item, depth)
        if any(isinstance(row, str) for row in item):
            lines = [line for row in item[:ITEMS] for line in _wrapped(f"{pad}- ", plain(row, name), self.width)]
            return [*lines, *([f"{pad}... {len(item) - ITEMS} more"] if len(item) > ITEMS else [])]
        return _wrapped(pad, ", ".join(plain(row, name) for row in item), self.width)

    def rows(self, rows: Sequence[Mapping[str, Any]], depth: int) -> list[str]:
        """A list of objects: as a table where the objects are flat, else one after the other.

        What is too long for a cell stands below its row. Of objects of a known shape the first is shown in full.
        """
        pad = "  " * depth
        shaped = _matching(SHAPED_ROWS, rows[0])
        if shaped is not None:
            block = _matching(BLOCKS, rows[0])
            lines = self.table([shaped(row) for row in rows[:ROWS]], depth) if len(rows) > 1 else []
            details = self.pairs(block(rows[0]), depth) if block is not None else []
            return [*lines, *([""] if lines and details else []), *details]
        flat = [_flat(row, self.hidden) for row in rows[:ROWS]]
        names = list(dict.fromkeys(name for row in flat for name in row))
        is_deep = any(not _is_line(name, cell) for row in flat for name, cell in row.items())
        wordy = {name for name in names[1:] if any(_is_long(row.get(name)) for row in flat)}
        if is_deep or len(rows) == 1 or len(wordy) == len(names):
            lines = []
            for at, row in enumerate(rows[:ROWS]):
                lines += [*([""] if at else []), *self.section(row, depth)]
        else:
            lines = self.table(flat, depth, wordy)
        return [*lines, *([f"{pad}... {len(rows) - ROWS} more; -o json shows all"] if len(rows) > ROWS else [])]

    def table(self, rows: Sequence[Mapping[str, Any]], depth: int, wordy: Collection[str] = ()) -> list[str]:
        """Rows of plain cells."""
        pad = "  " * depth
        names = [name for name in dict.fromkeys(n for row in rows for n in row) if name not in wordy][:COLUMNS]
        names = [name for name in names if any(not _is_empty(row.get(name)) for row in rows)]
        cells = [[plain(row.get(name, ""), name) for name in names] for row in rows]
        columns = [
            Column(
                title(name).upper() if name.islower() else name,
                is_number=all(cell[:1].isdigit() or cell[:1] in "$-" for cell in column),
                shrinks_to=28 if at == 0 else 0,
                rank=at if at > 1 else 0,
            )
            for at, (name, column) in enumerate(zip(names, zip(*cells, strict=True), strict=True))
        ]
        drawn = output.render_table(self.options, columns, cells, width=max(40, self.width - 2 * depth)).split("\n")
        lines = [pad + drawn[0]]
        for row, line in zip(rows, drawn[1:], strict=True):
            lines.append(pad + line)
            for name in wordy:
                lines += _wrapped(f"{pad}    ", plain(row[name], name), self.width) if row.get(name) else []
        return lines


Shapes = Sequence[tuple[frozenset[str], Callable[[Mapping[str, Any]], Any]]]


def _matching(shapes: Shapes, item: Any) -> Callable[[Mapping[str, Any]], Any] | None:
    """How an object of a known shape is shown."""
    if not isinstance(item, Mapping):
        return None
    return next((show for names, show in shapes if names <= item.keys()), None)


def _line(name: str, item: Any, parent: str) -> str:
    """What fits behind a title."""
    shown = _matching(INLINE, item)
    if shown is not None:
        return str(shown(item))
    if name == "gpus" and isinstance(item, Sequence):
        return gpus(item)
    if isinstance(item, Sequence) and not isinstance(item, str):
        return ", ".join(plain(one, name) for one in item)
    return plain(item, name, parent=parent)


def _is_line(name: str, item: Any) -> bool:
    if isinstance(item, str):
        is_command = name in _COMMANDS or name.endswith("_command")
        return "\n" not in item and not is_command
    if item is None or isinstance(item, bool | int | float) or is_quantity(item):
        return True
    if isinstance(item, Mapping):
        return _matching(INLINE, item) is not None
    if name == "gpus":
        return True
    return len(item) <= ITEMS and all(isinstance(one, bool | int | float) for one in item)


def _flat(row: Mapping[str, Any], hidden: frozenset[str]) -> dict[str, Any]:
    """An object's plain fields, and those of the objects right inside of it."""
    found: dict[str, Any] = {}
    for name, item in row.items():
        if _is_empty(item) or name in hidden:
            continue
        if _is_line(name, item):
            found[name] = item
        elif isinstance(item, Mapping):
            inner = {key: value for key, value in item.items() if key not in hidden and key not in found}
            found |= {key: value for key, value in inner.items() if _is_line(key, value)}
        else:
            found[name] = item
    return found


def _is_empty(item: Any) -> bool:
    return item is None or (isinstance(item, str | Sequence | Mapping) and not item)


def _is_long(cell: Any) -> bool:
    return isinstance(cell, str) and len(cell) > 40


def _wrapped(lead: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        max(width, len(lead) + 20),
        initial_indent=lead,
        subsequent_indent=" " * (len(lead) + (2 if text.startswith("- ") else 0)),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [lead.rstrip()]
