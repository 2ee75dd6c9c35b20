"""What one accelerator can do: peaks, memory, links, power, price; found by the many names people and drivers give it.

The table is `head/planner/data/accelerators.json`, one device a line with its sources. Peaks are dense (never the
doubled figures with sparsity). Memory is given twice: what the vendor prints, and what a process can see.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib import resources
from typing import Any

import msgspec

from common.errors import InvalidValue, NotFound

GIB = 1 << 30
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "fp8", "mxfp8", "int8", "fp4", "nvfp4", "mxfp4")

# What a kernel computes in when the card has no units for the precision asked: narrow weights are widened first.
# bf16 without units runs on the fp32 units (V100, T4), not on the fp16 ones.
_LADDER = {
    "fp4": ("fp4", "fp8", "bf16", "fp16", "fp32"),
    "fp8": ("fp8", "bf16", "fp16", "fp32"),
    "int8": ("int8", "bf16", "fp16", "fp32"),
    "bf16": ("bf16", "fp32", "fp16"),
    "fp16": ("fp16", "bf16", "fp32"),
    "tf32": ("tf32", "fp32", "bf16"),
    "fp32": ("fp32", "tf32", "bf16"),
}
_SAME = {"mxfp8": "fp8", "nvfp4": "fp4", "mxfp4": "fp4", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Accelerator(msgspec.Struct, frozen=True, kw_only=True):
    """One device. Rates are per second and one way; `scaleup` is NVLink, xGMI, ICI or the like."""

    name: str
    vendor: str = ""
    generation: str = ""  # ampere, hopper, blackwell, cdna3, tpu ...
    compute_capability: str = ""
    multiprocessors: int = 0
    peak_flops_by_precision: dict[str, float]  # dense FLOP/s
    matmul_flops_by_precision: dict[str, float] = {}  # best measured matrix product, where one was published
    memory_bytes: int  # as printed by the vendor, whose GB are GiB
    visible_bytes: int  # what a process can see of it
    memory_bytes_per_s: float
    scaleup_bytes_per_s: float = 0.0  # per GPU to all its peers together
    scaleup_gpus: int = 1  # how many reach each other at that rate
    gpus_per_node: int = 8  # of the usual machine
    pcie_bytes_per_s: float = 0.0
    nic_bytes_per_s: float = 0.0  # usual, per GPU
    tdp_w: float | None = None
    usd_per_hour: float | None = None
    price_source: str = ""
    aliases: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def has_units_for(self, precision: str) -> bool:
        """Whether matrix products of this precision run on units of their own."""
        return canonical_precision(precision) in self.peak_flops_by_precision

    def compute_precision(self, precision: str) -> str:
        """The precision that products asked for in `precision` really run in on this card."""
        for candidate in _LADDER[canonical_precision(precision)]:
            if candidate in self.peak_flops_by_precision:
                return candidate
        raise InvalidValue(f"{self.name} states no peak rate", accelerator=self.name)

    def peak_flops(self, precision: str) -> float:
        """Dense FLOP/s for products asked for in `precision` (see `compute_precision`)."""
        return self.peak_flops_by_precision[self.compute_precision(precision)]

    @property
    def link_bytes_per_s(self) -> float:
        """One-way rate to a GPU of the same node: the scale-up link, else PCIe."""
        return self.scaleup_bytes_per_s if self.scaleup_gpus > 1 else self.pcie_bytes_per_s


def canonical_precision(precision: str) -> str:
    """fp32, tf32, fp16, bf16, fp8, int8 or fp4.

    Raises: InvalidValue for a word that is none of `PRECISIONS`.
    """
    word = precision.strip().lower()
    word = _SAME.get(word, word)
    if word not in _LADDER:
        raise InvalidValue(
            f"unknown precision {precision[:40]!r}", hint="one of " + ", ".join(PRECISIONS), known=list(PRECISIONS)
        )
    return word


@cache
def all_accelerators() -> tuple[Accelerator, ...]:
    """The shipped devices, in the order of the table."""
    text = resources.files("head.planner").joinpath("data", "accelerators.json").read_bytes()
    table: dict[str, Any] = msgspec.json.decode(text)
    return tuple(_of_row(row, str(table["price_source"])) for row in table["accelerators"])


def accelerator_names() -> tuple[str, ...]:
    """Names of the shipped devices."""
    return tuple(device.name for device in all_accelerators())


def accelerator(name: str) -> Accelerator:
    """The device meant by `name`: its own name, an alias, a driver's name or a machine's ("DGX-GB300").

    A name that leaves out the form or the memory gets the usual part ("H100" is the SXM one with 80 GB). A MIG name
    ("A100-SXM4-40GB MIG 3g.20gb") gets that share of the card.
    Raises: NotFound with near matches.
    """
    found = find_accelerator(name)
    if found is None:
        near = near_accelerators(name)
        raise NotFound(
            f"unknown accelerator {name[:80]!r}",
            hint=f"did you mean {', '.join(near)}?" if near else "give its numbers instead of a name",
            near=near,
            known=list(accelerator_names()),
        )
    return found


def find_accelerator(name: str) -> Accelerator | None:
    """As `accelerator`, but None for an unknown name."""
    name = name[:200]
    share = re.search(r"\bMIG\s+(\d)g\.(\d+)gb\b", name, re.IGNORECASE)
    if share:
        whole = find_accelerator(name[: share.start()])
        return None if whole is None else _mig_share(whole, int(share[1]), int(share[2]))
    plain = re.sub(r"\([^()]*\)", " ", name)
    for spelling in (name, plain, re.sub(r"(?i)\bsxm\d\b", "sxm", plain)):
        if exact := _by_alias().get(_squeezed(spelling)):
            return exact
    return _by_words(plain)


def near_accelerators(name: str, count: int = 5) -> list[str]:
    """Names most like an unknown one."""
    keys = _by_alias()
    close = difflib.get_close_matches(_squeezed(name[:80]), list(keys), n=count * 3, cutoff=0.5)
    return list(dict.fromkeys(keys[key].name for key in close))[:count]


def given_accelerator(
    *,
    name: str = "given",
    peak_tflops: float | dict[str, float],
    memory_gib: float,
    memory_gb_per_s: float,
    link_gb_per_s: float = 0.0,
    scaleup_gpus: int = 1,
    gpus_per_node: int = 8,
    pcie_gb_per_s: float = 31.0,
    nic_gbit_per_s: float = 0.0,
    tdp_w: float | None = None,
    usd_per_hour: float | None = None,
) -> Accelerator:
    """A device from explicit numbers. A single peak is taken as bf16 and fp16; memory is what a process can see.

    Raises: InvalidValue for a number that is not finite and positive.
    """
    peaks = dict(peak_tflops) if isinstance(peak_tflops, dict) else {"bf16": peak_tflops, "fp16": peak_tflops}
    peaks = {canonical_precision(precision): float(value) for precision, value in peaks.items()}
    wanted = {f"peak_tflops[{key}]": value for key, value in peaks.items()}
    wanted |= {"memory_gib": memory_gib, "memory_gb_per_s": memory_gb_per_s}
    wanted |= {"scaleup_gpus": scaleup_gpus, "gpus_per_node": gpus_per_node}
    bad = [field for field, value in wanted.items() if not 0 < value < 1e9]
    rates = {"link_gb_per_s": link_gb_per_s, "pcie_gb_per_s": pcie_gb_per_s, "nic_gbit_per_s": nic_gbit_per_s}
    bad += [field for field, value in rates.items() if not 0 <= value < 1e9]
    if bad or not peaks:
        raise InvalidValue(
            f"an accelerator's {', '.join(bad) or 'peak_tflops'} must be positive and finite", fields=bad
        )
    return Accelerator(
        name=name,
        peak_flops_by_precision={key: value * 1e12 for key, value in peaks.items()},
        memory_bytes=int(memory_gib * GIB),
        visible_bytes=int(memory_gib * GIB),
        memory_bytes_per_s=memory_gb_per_s * 1e9,
        scaleup_bytes_per_s=link_gb_per_s * 1e9 if scaleup_gpus > 1 else 0.0,
        scaleup_gpus=scaleup_gpus,
        gpus_per_node=gpus_per_node,
        pcie_bytes_per_s=pcie_gb_per_s * 1e9,
        nic_bytes_per_s=nic_gbit_per_s * 1e9 / 8,
        tdp_w=tdp_w,
        usd_per_hour=usd_per_hour,
        price_source="given" if usd_per_hour is not None else "",
    )


def _of_row(row: dict[str, Any], price_source: str) -> Accelerator:
    """One line of the table in SI units."""
    return Accelerator(
        name=row["name"],
        vendor=row["vendor"],
        generation=row["generation"],
        compute_capability=row["compute_capability"],
        multiprocessors=row["multiprocessors"],
        peak_flops_by_precision={key: value * 1e12 for key, value in row["peak_tflops"].items()},
        matmul_flops_by_precision={key: value * 1e12 for key, value in row["matmul_tflops"].items()},
        memory_bytes=int(row["memory_gib"] * GIB),
        visible_bytes=int(row["visible_gib"] * GIB),
        memory_bytes_per_s=row["memory_gb_per_s"] * 1e9,
        scaleup_bytes_per_s=row["scaleup_gb_per_s"] * 1e9,
        scaleup_gpus=row["scaleup_gpus"],
        gpus_per_node=row["gpus_per_node"],
        pcie_bytes_per_s=row["pcie_gb_per_s"] * 1e9,
        nic_bytes_per_s=row["nic_gbit_per_s"] * 1e9 / 8,
        tdp_w=row["tdp_w"],
        usd_per_hour=row["usd_per_hour"],
        price_source=price_source if row["usd_per_hour"] is not None else "",
        aliases=tuple(row["aliases"]),
        sources=tuple(row["sources"]),
        notes=(f"visible memory: {row['visible_basis']}", *row["notes"]),
    )


def _squeezed(name: str) -> str:
    """Letters and digits only, without the vendor's and family's decoration."""
    words = re.findall(r"[a-z]+|\d+", name.lower())
    decoration = {"nvidia", "amd", "intel", "google", "aws", "instinct", "geforce", "tesla", "corporation", "habana"}
    return "".join(word for word in words if word not in decoration)


@cache
def _by_alias() -> dict[str, Accelerator]:
    """Every squeezed name and alias."""
    found: dict[str, Accelerator] = {}
    for device in all_accelerators():
        for name in (device.name, *device.aliases):
            found.setdefault(_squeezed(name), device)
    return found


_FORMS = {"sxm": "sxm", "pcie": "pcie", "pci": "pcie", "nvl": "nvl", "hgx": "sxm", "dgx": "sxm", "oam": "oam"}
_FAMILY = re.compile(r"(?:g[bh]|[abhlt]|v|mi|gaudi|trainium)\d{1,4}[a-z]{0,2}")


def _by_words(name: str) -> Accelerator | None:
    """By family, form and memory, when a name says them in an order or mix of its own ("a100 pcie 40g hbm2e").

    Every word must be understood: a name with an unknown word is unknown, not the family's usual part.
    """
    words = [re.sub(r"^sxm\d$", "sxm", word) for word in re.findall(r"[a-z0-9.]+", name.lower())]
    decoration = {"nvidia", "amd", "instinct", "tesla", "intel", "google", "aws", "habana", "gpu", "gpus", "card"}
    family = form = ""
    memory_gib = 0.0
    for word in words:
        if size := re.fullmatch(r"(\d+)(?:g|gb|gib)", word):
            memory_gib = float(size[1])
        elif word in _FORMS:
            form = _FORMS[word]
        elif _FAMILY.fullmatch(word) and not family:
            family = word
        elif word not in decoration and not re.fullmatch(r"hbm\d?e?|gddr\d?x?|nvl\d+|cu\d+|\d{2,4}w|\d?x|x\d", word):
            return None
    if not family:
        return None
    parts = [device for device in all_accelerators() if device.name.lower().split("-")[0] == family]
    if memory_gib:
        parts = [device for device in parts if abs(memory_gib * GIB / device.memory_bytes - 1) < 0.07]
    if form and form != "oam":
        parts = [device for device in parts if form in device.name.lower().split("-")] or [
            device for device in parts if device.name.count("-") == 0
        ]
    usual = _by_alias().get(family)
    return usual if usual in parts else next(iter(parts), None)


def _mig_share(whole: Accelerator, slices: int, memory_gb: int) -> Accelerator:
    """A MIG instance: `slices` of 7 of the compute, memory and its rate as the instance's memory over the card's.

    Source: NVIDIA MIG user guide, profile tables (7 compute and 8 memory slices).
    """
    compute = min(1.0, slices / 7)
    eighths = max(1, min(8, round(8 * memory_gb * GIB / whole.memory_bytes)))
    return msgspec.structs.replace(
        whole,
        name=f"{whole.name} MIG {slices}g.{memory_gb}gb",
        multiprocessors=max(1, int(whole.multiprocessors * compute)),
        peak_flops_by_precision={key: value * compute for key, value in whole.peak_flops_by_precision.items()},
        matmul_flops_by_precision={key: value * compute for key, value in whole.matmul_flops_by_precision.items()},
        memory_bytes=whole.memory_bytes * eighths // 8,
        visible_bytes=min(whole.visible_bytes * eighths // 8, memory_gb * GIB),
        memory_bytes_per_s=whole.memory_bytes_per_s * eighths / 8,
        scaleup_bytes_per_s=0.0,
        scaleup_gpus=1,
        usd_per_hour=None,
        price_source="",
        notes=(*whole.notes, "a MIG instance: no links to its siblings, PCIe shared with them"),
    )
