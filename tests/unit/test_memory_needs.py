"""Memory of engines as placement reserves it: the planner's estimate, and what llama-server was measured to take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.runtimes.base import Setting, gguf_file
from common.errors import ErrorInfo
from common.manifest import Manifest, ManifestFile
from common.recipe import Recipe, Resources
from head.core import memory_needs, placement
from head.core.objects import ModelManifest
from head.planner.model.architecture import Architecture
from head.planner.model.headers import architecture_of_registered
from head.planner.serving.need import LlamaCppSettings, llama_cpp_need, llama_cpp_settings, shared_settings
from tests.doubles.agent_node import ensure_replica
from tests.doubles.head_core import GIB
from tests.doubles.head_engines import RECIPES, EngineWorld

MIB = 1 << 20
SMOL_BYTES = 98_362_432
# What an agent reads from SmolLM2-135M-Instruct.Q4_1.gguf.
SMOL: dict[str, Any] = {
    "architecture": "llama", "layers": 30, "heads": 9, "kv_heads": 3, "hidden": 576, "context": 8_192, "vocab": 49_152,
    "gguf": {
        "general.architecture": "llama", "llama.block_count": 30, "llama.context_length": 8_192,
        "llama.embedding_length": 576, "llama.feed_forward_length": 1_536, "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3, "llama.vocab_size": 49_152, "llama.rope.dimension_count": 64,
    },
    "quantisation": "Q4_1", "parameters": 134_515_008, "format": "gguf",
}  # fmt: skip
# A Llama of 8 billion parameters as its config.json has it.
LLAMA_8B: dict[str, Any] = {
    "config": {
        "model_type": "llama", "hidden_size": 4_096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "torch_dtype": "bfloat16",
        "max_position_embeddings": 131_072,
    },
}  # fmt: skip
# Resident memory after full slots, MiB, of llama-server on a CPU (docs/planner.md, "Memory of llama.cpp, measured").
MEASURED = [
    (LlamaCppSettings(context=2_048, slots=1), 196.5),
    (LlamaCppSettings(context=2_048, slots=4), 198.4),
    (LlamaCppSettings(context=8_192, slots=1), 338.5),
    (LlamaCppSettings(context=8_192, slots=4), 335.5),
    (LlamaCppSettings(context=8_192, slots=4, key_type="q8_0", value_type="q8_0"), 250.1),
    (LlamaCppSettings(context=8_192, slots=1, micro_batch=2_048), 402.2),
    (LlamaCppSettings(context=8_192, slots=1, has_flash_attention=False), 540.5),
    (LlamaCppSettings(context=32_768, slots=1), 879.7),
    (LlamaCppSettings(context=32_768, slots=4), 886.6),
]
LLAMACPP = Recipe(
    name="llamacpp",
    category="inference",
    runtime="llamacpp",
    model_formats=("gguf",),
    config={"context": 8_192, "parallel": 4, "gpu_layers": -1, "memory_bytes": 0, "prompt_cache_mib": 0},
)
VLLM = Recipe(
    name="vllm",
    category="inference",
    runtime="command",
    command=("/opt/vllm/bin/vllm", "serve", "{model_path}"),
    model_formats=("gguf",),
    resources=Resources(gpus=1),
)


def smol() -> Architecture:
    """SmolLM2's dimensions."""
    return architecture_of_registered(SMOL, "smol")


def world_with(detected: dict[str, Any], size: int, *recipes: Recipe, **node: Any) -> EngineWorld:
    """A node n1 with a GGUF model m of these dimensions on its disk."""
    world = EngineWorld()
    world.state.recipes = dict(RECIPES) | {recipe.name: recipe for recipe in recipes}
    world.add_node("n1", **node)
    held = world.state.nodes["n1"]
    larger = msgspec.structs.replace(held.inventory, memory_bytes=512 * GIB)
    world.state.nodes["n1"] = msgspec.structs.replace(held, inventory=larger)
    world.add_model("m", "n1", size=size)
    (kept,) = world.state.manifests.values()
    manifest = msgspec.structs.replace(kept.manifest, detected=detected)
    world.state.manifests[kept.key] = msgspec.structs.replace(kept, manifest=manifest)
    return world


@pytest.mark.parametrize(("settings", "measured"), MEASURED)
def test_llama_cpp_on_a_cpu(settings: LlamaCppSettings, measured: float) -> None:
    """The estimate is at most 15 % above and 5 % below what the server took."""
    estimate = llama_cpp_need(smol(), SMOL_BYTES, settings, 0).host_bytes / MIB
    assert 0.95 * measured <= estimate <= 1.15 * measured


def test_parts_follow_their_settings() -> None:
    """Each setting moves its own part: tokens the cache, cache types too, the micro-batch the buffers."""

    def parts(**fields: Any) -> dict[str, int]:
        return llama_cpp_need(smol(), SMOL_BYTES, LlamaCppSettings(**{"context": 4_096, "slots": 1, **fields}), 0).host

    plain = parts()
    assert plain["weights"] == SMOL_BYTES
    assert plain["kv_cache"] == 4_096 * 30 * 2 * 3 * 64 * 2
    assert parts(context=8_192)["kv_cache"] == 2 * plain["kv_cache"]
    assert parts(key_type="q8_0", value_type="q8_0")["kv_cache"] == plain["kv_cache"] * 8.5 / 16
    assert parts(micro_batch=1_024)["buffers"] == 2 * plain["buffers"]
    assert parts(prompt_cache_bytes=GIB)["prompt_cache"] == GIB
    assert parts(context=0)["kv_cache"] == 2 * plain["kv_cache"]  # what the model was made for
    assert parts(context=1_000, slots=4)["kv_cache"] == parts(context=1_024)["kv_cache"]  # 4 slots of 256


def test_layers_on_gpus_leave_the_host() -> None:
    """Each layer's weights and cache are on one side; two GPUs hold half each and the head once."""
    settings = LlamaCppSettings(context=8_192, slots=4)
    on_cpu = llama_cpp_need(smol(), SMOL_BYTES, settings, 0)
    whole = llama_cpp_need(smol(), SMOL_BYTES, settings, 1)
    half = llama_cpp_need(smol(), SMOL_BYTES, msgspec.structs.replace(settings, gpu_layers=15), 1)
    two = llama_cpp_need(smol(), SMOL_BYTES, settings, 2)
    assert on_cpu.gpu == {}
    assert whole.host["kv_cache"] == 0
    assert whole.gpu["kv_cache"] == on_cpu.host["kv_cache"]
    assert half.gpu["kv_cache"] + half.host["kv_cache"] == on_cpu.host["kv_cache"]
    assert SMOL_BYTES <= half.gpu["weights"] + half.host["weights"] <= 1.01 * SMOL_BYTES
    assert two.gpu["kv_cache"] * 2 == whole.gpu["kv_cache"]
    assert whole.gpu["weights"] / 2 < two.gpu["weights"] < whole.gpu["weights"]


def test_windows_hold_windows() -> None:
    """A model whose sliding layers llama.cpp keeps in a small cache needs less than one where it does not."""
    layers = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
    config = {**LLAMA_8B["config"], **layers, "sliding_window": 1_024, "head_dim": 128}
    settings = LlamaCppSettings(context=65_536, slots=1)
    windowed = architecture_of_registered({"config": {**config, "model_type": "gemma3_text"}})
    need = llama_cpp_need(windowed, GIB, settings, 0)
    assert need.host["kv_cache"] == 2 * 8 * 128 * 2 * (65_536 + 5 * 1_536)


def test_the_command_line_wins() -> None:
    """Words of the command line, in both spellings of flags, override the configuration."""
    config = {"context": 4_096, "parallel": 4, "gpu_layers": 10, "prompt_cache_mib": 5}
    assert llama_cpp_settings(config, ()) == LlamaCppSettings(
        context=4_096, slots=4, gpu_layers=10, prompt_cache_bytes=5 * MIB
    )
    words: tuple[str, ...] = (
        "-c",
        "512",
        "--parallel",
        "2",
        "-ctk",
        "q8_0",
        "--cache-type-v",
        "q4_0",
        "-ub",
        "256",
        "-cram",
        "64",
    )
    words += ("-fa", "off")
    assert llama_cpp_settings(config, words) == LlamaCppSettings(
        context=512,
        slots=2,
        gpu_layers=10,
        key_type="q8_0",
        value_type="q4_0",
        micro_batch=256,
        has_flash_attention=False,
        prompt_cache_bytes=64 * MIB,
    )
    odd = {"context": "many", "parallel": True, "gpu_layers": -7, "prompt_cache_mib": -1}
    assert llama_cpp_settings(odd, ("-c", "x", "--cache-ram", "-1", "-np")) == LlamaCppSettings()


def test_engines_are_known_by_their_commands() -> None:
    """vLLM and SGLang servers with their options; other programs are not theirs."""
    vllm = shared_settings(("vllm", "serve", "m", "--gpu-memory-utilization=0.5", "--max-model-len", "4096"), 2)
    assert vllm is not None
    assert (vllm.engine, vllm.share, vllm.context, vllm.tp) == ("vllm", 0.5, 4_096, 2)
    sglang = shared_settings(("python", "-m", "sglang.launch_server", "--tp", "4", "--kv-cache-dtype", "fp8_e5m2"), 4)
    assert sglang is not None
    assert (sglang.engine, sglang.share, sglang.kv_type, sglang.tp) == ("sglang", 0.88, "fp8", 4)
    assert shared_settings(("/bin/serve", "vllm"), 1) is None
    assert shared_settings((), 1) is None


class TestPlacement:
    """What is reserved, refused and explained."""

    def test_the_estimate_is_reserved(self) -> None:
        """A llama.cpp replica reserves what the planner says of the service's own settings."""
        world = world_with(SMOL, SMOL_BYTES, LLAMACPP)
        world.serve("s", recipe="llamacpp", config={"context": 2_048, "args": ["-ctk", "q8_0"]})
        settings = LlamaCppSettings(context=2_048, slots=4, key_type="q8_0")
        assert world.replica("s-0").memory_bytes == llama_cpp_need(smol(), SMOL_BYTES, settings, 0).host_bytes
        assert "the planner's estimate: weights 94 MiB, KV cache" in world.ask_why("replica", "s-0").reason

    def test_a_declaration_wins(self) -> None:
        """Declared memory is reserved whatever the planner says."""
        world = world_with(SMOL, SMOL_BYTES, LLAMACPP)
        world.serve("s", recipe="llamacpp", config={"memory_bytes": 5 * GIB})
        assert world.replica("s-0").memory_bytes == 5 * GIB
        assert "estimate" not in world.ask_why("replica", "s-0").reason

    @pytest.mark.parametrize("detected", [{}, {"gguf": {"general.architecture": "x"}}, {"config": "no"}, {"layers": 3}])
    def test_without_dimensions_by_size(self, detected: dict[str, Any]) -> None:
        """What cannot be estimated is placed by the model's bytes and a tenth, as before."""
        world = world_with(detected, SMOL_BYTES, LLAMACPP)
        world.serve("s", recipe="llamacpp")
        assert world.replica("s-0").memory_bytes == placement.estimate_memory_bytes(SMOL_BYTES, "disk")

    def test_a_refusal_names_the_parts(self) -> None:
        """A node without room: the reason, the candidates and the error's details have weights, cache and buffers."""
        world = world_with(SMOL, SMOL_BYTES, LLAMACPP)
        world.serve("s", recipe="llamacpp", config={"context": 64 << 20})
        reason = world.service("s").reason
        for word in ("the planner's estimate", "weights 94 MiB", "KV cache 1440.0 GiB", "buffers", "67108864 tokens"):
            assert word in reason
        (candidate,) = world.ask_why("service", "s").candidates
        assert candidate.verdict == "refused"
        assert "KV cache 1440.0 GiB" in candidate.reason
        need = placement.need_of(world.state, world.service("s"), "s-0", world.state.recipes["llamacpp"], 0, 0)
        with pytest.raises(Exception, match="the planner's estimate") as caught:
            placement.choose(world.state, need, world.now_ms)
        told: ErrorInfo = caught.value.info()  # type: ignore[attr-defined]
        assert told.details["memory"]["estimated_by"] == "planner"
        assert told.details["memory"]["kv_cache_bytes"] == 1_440 * GIB

    def test_a_place_shows_its_estimate(self) -> None:
        """Where an engine fits, `why` has the parts among its numbers."""
        world = world_with(SMOL, SMOL_BYTES, LLAMACPP)
        world.serve("s", recipe="llamacpp")
        need = placement.need_of(world.state, world.service("s"), "s-1", world.state.recipes["llamacpp"], 0, 0)
        (candidate,) = placement.candidates(world.state, need, world.now_ms)
        assert candidate.verdict == placement.FITS
        assert candidate.numbers["memory"]["weights_bytes"] == SMOL_BYTES

    def test_a_gpu_that_is_too_small(self) -> None:
        """llama.cpp on a GPU needs its cache there, and not only its weights."""
        world = world_with(SMOL, SMOL_BYTES, LLAMACPP, gpus=(GIB,))
        world.serve("small", recipe="llamacpp", devices=("n1:gpu0",), config={"context": 4_096})
        assert world.replica("small-0").is_exclusive
        world = world_with(SMOL, SMOL_BYTES, LLAMACPP, gpus=(GIB,))
        world.serve("large", recipe="llamacpp", devices=("n1:gpu0",), config={"context": 65_536})
        assert "the planner's estimate" in world.service("large").reason
        assert "gpu0" in world.service("large").reason

    @pytest.mark.parametrize(("size", "args", "fits"), [(24, (), True), (16, (), False), (24, ("0.7",), False)])
    def test_an_engine_with_a_share(self, size: int, args: tuple[str, ...], fits: bool) -> None:
        """vLLM's model, activations and one sequence must fit into its share of the GPU."""
        world = world_with(LLAMA_8B, 16_060_522_240, VLLM, gpus=(size * GIB,), engines=False)
        words = ["--max-model-len", "8192", *(f"--gpu-memory-utilization={share}" for share in args)]
        world.serve("s", recipe="vllm", config={"args": words})
        reason = world.service("s").reason
        assert (not reason) == fits
        assert fits or "for the engine" in reason


@pytest.mark.parametrize(
    "files",
    [
        {"a.gguf": 1, "b.gguf": 9},
        {"m-00002-of-00002.gguf": 9, "m-00001-of-00002.gguf": 5, "other.gguf": 50},
        {"mmproj-big.gguf": 99, "m.gguf": 5},
        {"x/m.GGUF": 5, "readme.md": 99},
    ],
)
def test_the_files_that_the_agent_loads(files: dict[str, int]) -> None:
    """Weights are counted of the file that the agent's adapter chooses, with its other shards."""
    listed = tuple(ManifestFile(path, size, f"b3:{path}", 1) for path, size in files.items())
    manifest = Manifest("m", "main", listed, "b3:0", "gguf", SMOL)
    world = world_with(SMOL, SMOL_BYTES, LLAMACPP)
    world.serve("s", recipe="llamacpp")
    world.state.manifests["m@main"] = ModelManifest(manifest, "n1", 0)
    chosen = gguf_file(Setting(ensure_replica("s-0"), "h", 1, "/r", "/", manifest)).lstrip("/")
    shards = sum(size for path, size in files.items() if path.startswith("m-0"))
    on_host, _ = memory_needs.needs_of(world.state, world.service("s"), LLAMACPP)
    assert on_host is not None
    assert on_host.host["weights"] == (shards or files[chosen])


def test_files_that_the_command_names_count() -> None:
    """A draft model or a projector beside the weights is counted when the command names it."""
    listed = (ManifestFile("m.gguf", 50, "b3:1", 1), ManifestFile("mmproj.gguf", 7, "b3:2", 1))
    world = world_with(SMOL, SMOL_BYTES, LLAMACPP)
    world.serve("s", recipe="llamacpp", config={"args": ["--mmproj", "{model_dir}/mmproj.gguf"]})
    world.state.manifests["m@main"] = ModelManifest(Manifest("m", "main", listed, "b3:0", "gguf", SMOL), "n1", 0)
    on_host, _ = memory_needs.needs_of(world.state, world.service("s"), LLAMACPP)
    assert on_host is not None
    assert on_host.host["weights"] == 57


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(SMOL["gguf"])), _VALUES, st.sampled_from(sorted(LLAMA_8B["config"])), _VALUES)
def test_hostile_metadata_decides_nothing(pair: str, value: Any, field: str, other: Any) -> None:
    """Whatever a model's files say, a placement is made or refused, never failed."""
    for detected in (
        {**SMOL, "gguf": {**SMOL["gguf"], pair: value}},
        {"config": {**LLAMA_8B["config"], field: other}},
        {**SMOL, "gguf": None, "config": other},
    ):
        world = world_with(detected, SMOL_BYTES, LLAMACPP)
        world.serve("s", recipe="llamacpp")
        need = placement.need_of(world.state, world.service("s"), "s-1", LLAMACPP, 0, 0)
        assert placement.candidates(world.state, need, world.now_ms)


def test_nothing_is_read_when_deciding() -> None:
    """Once imported, an estimate opens no file: the core stays pure."""
    code = """
import sys, msgspec
from tests.unit.test_memory_needs import *
world = world_with(SMOL, SMOL_BYTES, LLAMACPP, VLLM, gpus=(24 * GIB,))
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event in ("open", "import", "socket.connect") else None)
world.serve("s", recipe="llamacpp")
world.serve("v", recipe="vllm")
assert world.replica("s-0").memory_bytes and world.replica("v-0").gpus, world.service("v").reason
print(opened)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
