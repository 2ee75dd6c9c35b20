"""What aiconfigurator says of a configuration, beside our own answer, where that package is installed.

It is asked in a process of its own that is ended after some seconds: it imports pandas, reads large tables, and must
neither hold up nor break our answer. That process has no network: a model whose config.json the package does not bring
and the question does not give is not looked for. Nothing of ours depends on what it says.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import msgspec

from common.errors import HerderError
from head.planner.hardware.accelerators import accelerator
from head.planner.hardware.topology import Topology
from head.planner.model.architecture import Architecture
from head.planner.serving.estimate import EngineSettings, Workload
from herder.decoding import UNREADABLE

PACKAGE, CORE = "aiconfigurator", "aiconfigurator_core"
TIMEOUT_S = 15.0
ANSWER_BYTES = 64 << 10
_BACKENDS = {"vllm", "sglang", "trtllm"}
# Formats in its words: (matrix products, experts). Empty: as the model's files say.
_FORMATS: dict[str, str] = {"": "", "bf16": "bfloat16", "fp8": "fp8", "nvfp4": "nvfp4"}
_KV_FORMATS = {"": "", "auto": "", "bf16": "bfloat16", "fp8": "fp8"}


class SecondOpinion(msgspec.Struct, frozen=True, kw_only=True):
    """Its answer for the chosen configuration of one engine, or the reason why there is none; seconds."""

    source: str = PACKAGE
    version: str = ""
    reason: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None
    output_tokens_per_s: float | None = None
    configuration: str = ""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The question, as its process takes it."""

    model: str  # a name that the package knows, or empty beside config
    config: dict[str, Any] | None
    system: str
    backend: str
    isl: int
    osl: int
    batch: int
    tp: int
    pp: int
    dp: int
    moe_tp: int
    moe_ep: int
    gemm: str = ""
    moe: str = ""
    kv: str = ""
    prefix: int = 0


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """What its process answers."""

    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    tokens_per_s: float = 0.0
    backend_version: str = ""
    error: str = ""


class NoOpinion(Exception):
    """Why it was not asked, or said nothing."""


def second_opinion(
    arch: Architecture,
    topology: Topology,
    settings: EngineSettings,
    workload: Workload,
    config: dict[str, Any] | None = None,
) -> SecondOpinion | None:
    """Its opinion of one engine under its share of the load; None when the package is not installed.

    config: the model's config.json, where the question gave it.
    """
    if util.find_spec(PACKAGE) is None or util.find_spec(CORE) is None:
        return None
    version = metadata.version(PACKAGE)
    try:
        asked = question_of(arch, topology, settings, workload, config)
        said = _said(msgspec.json.encode(asked))
    except NoOpinion as why:
        return SecondOpinion(version=version, reason=str(why))
    words = f"{asked.system}, {asked.backend} {said.backend_version}, tp {asked.tp}, pp {asked.pp}, dp {asked.dp}"
    return SecondOpinion(
        version=version,
        ttft_s=said.ttft_ms / 1e3,
        tpot_s=said.tpot_ms / 1e3,
        output_tokens_per_s=said.tokens_per_s,
        configuration=f"{words}, {asked.batch} sequences of {asked.isl} + {asked.osl} tokens",
    )


def question_of(
    arch: Architecture,
    topology: Topology,
    settings: EngineSettings,
    workload: Workload,
    config: dict[str, Any] | None,
) -> Asked:
    """The configuration in its words. Raises: NoOpinion for what it has no words for."""
    layout = settings.layout
    if settings.backend not in _BACKENDS:
        raise NoOpinion(f"it does not know the engine {settings.backend}")
    if settings.weights not in _FORMATS or settings.kv_dtype not in _KV_FORMATS:
        raise NoOpinion(f"it has no words for weights {settings.weights or 'auto'} or cache {settings.kv_dtype}")
    if workload.concurrency <= 0:
        raise NoOpinion("it answers for a number of requests in flight, not for a rate")
    folder = _core_folder()
    known = (folder / "model_configs" / f"{arch.name.replace('/', '--')}_config.json").is_file()
    if not known and config is None:
        raise NoOpinion(f"it does not bring the config.json of {arch.name}; the question may give it")
    return Asked(
        model="" if config is not None else arch.name,
        config=config,
        system=_system(folder, topology.accelerator.name),
        backend=settings.backend,
        isl=workload.isl,
        osl=workload.osl,
        batch=max(1, round(workload.concurrency / layout.dp)),
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        moe_tp=layout.tp * layout.dp // layout.ep,
        moe_ep=layout.ep,
        gemm=_FORMATS[settings.weights],
        moe=_FORMATS[settings.weights] if arch.is_moe else "",
        kv=_KV_FORMATS[settings.kv_dtype],
        prefix=int(workload.isl * workload.prefix_hit),
    )


def _core_folder() -> Path:
    spec = util.find_spec(CORE)
    if spec is None or not spec.submodule_search_locations:
        raise NoOpinion("its data are not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _system(folder: Path, name: str) -> str:
    """Its name of our accelerator."""
    for path in sorted((folder / "systems").glob("*.yaml")):
        try:
            if accelerator(path.stem).name == name:
                return path.stem
        except HerderError:
            continue
    raise NoOpinion(f"it has no measurements of {name}")


@lru_cache(maxsize=64)
def _said(question: bytes) -> Said:
    """Asks its process; answers are kept, failures are not. Raises: NoOpinion."""
    root = Path(__file__).resolve().parents[2]
    env = {name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "head.planner.second_opinion_child"],
            input=question,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            env=env if root.name.endswith("-packages") else env | {"PYTHONPATH": str(root)},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoOpinion(f"it did not answer within {TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise NoOpinion(f"its process did not start: {error.strerror}") from None
    try:
        said = msgspec.json.decode(done.stdout[-ANSWER_BYTES:].strip().rpartition(b"\n")[2], type=Said)
    except UNREADABLE:
        raise NoOpinion(f"its process ended with status {done.returncode}") from None
    if said.error:
        raise NoOpinion(said.error[:300])
    if not (said.ttft_ms > 0 and said.tpot_ms > 0):
        raise NoOpinion("it gave no latencies")
    return said
