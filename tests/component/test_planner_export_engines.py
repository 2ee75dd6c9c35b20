"""Engines' command lines: only options that the engine has, values that come back, notes for what it cannot do.

The lists of options under tests/golden/planner_exports were printed by the engines themselves (vLLM 0.32.0, SGLang
0.5.23, llama.cpp build 10434, TensorRT-LLM 1.2); benchmarks/planner_exports.py asks the real programs.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidValue
from head.planner.serving.engine_flags import ENGINES, EngineCommand, ServingSettings, engine_command

GOLDEN = Path(__file__).parents[1] / "golden" / "planner_exports"
OPTIONS: dict[str, set[str]] = {
    engine: set((GOLDEN / f"{engine}_options.txt").read_text().split()) for engine in ENGINES
}

settings = st.builds(
    ServingSettings,
    model=st.sampled_from(["m", "owner/name", "with space", "it's"]),
    served_name=st.sampled_from(["", "a b", "$(x)"]),
    tp=st.sampled_from([1, 2, 8]),
    pp=st.sampled_from([1, 2]),
    dp=st.sampled_from([1, 4]),
    ep=st.booleans(),
    nodes=st.sampled_from([1, 2]),
    memory_share=st.sampled_from([0.0, 0.85]),
    max_model_len=st.sampled_from([0, 8192]),
    max_sequences=st.sampled_from([0, 64]),
    max_batched_tokens=st.sampled_from([0, 4096]),
    is_chunked_prefill=st.booleans(),
    has_prefix_cache=st.booleans(),
    block_size=st.sampled_from([0, 32]),
    kv_dtype=st.sampled_from(["auto", "fp8", "bf16", "int8", "q4_0", "strange"]),
    quantisation=st.sampled_from(["", "fp8"]),
    is_eager=st.booleans(),
    draft_model=st.sampled_from(["", "d"]),
    draft_method=st.sampled_from(["", "ngram", "eagle"]),
    draft_tokens=st.sampled_from([0, 4]),
    has_lora=st.booleans(),
    role=st.sampled_from(["both", "prefill", "decode"]),
    gpu_layers=st.sampled_from([-1, 0, 20]),
)


def values(command: EngineCommand) -> dict[str, str]:
    """Options with the word after them."""
    return {word: after for word, after in zip(command.argv, [*command.argv[1:], ""], strict=True) if word[:2] == "--"}


@pytest.mark.parametrize("engine", ENGINES)
@given(settings)
def test_no_option_is_made_up(engine: str, wanted: ServingSettings) -> None:
    """Whatever is asked for, each option is one the engine prints in its help, and none stands twice."""
    command = engine_command(engine, wanted)
    options = [word for word in command.argv if word.startswith("--")]
    assert set(options) <= OPTIONS[engine], set(options) - OPTIONS[engine]
    assert len(options) == len(set(options))
    assert shlex.split(command.text) == list(command.argv)
    assert command.version


def test_vllm_gets_what_was_asked_for() -> None:
    """Degrees, memory, lengths, cache and drafts in vLLM's spelling."""
    command = engine_command(
        "vllm",
        ServingSettings(
            model="m", tp=8, memory_share=0.92, max_model_len=8192, kv_dtype="fp8", draft_method="ngram", draft_tokens=4
        ),
    )
    found = values(command)
    assert command.argv[:3] == ("vllm", "serve", "m")
    assert (found["--tensor-parallel-size"], found["--gpu-memory-utilization"]) == ("8", "0.92")
    assert (found["--max-model-len"], found["--kv-cache-dtype"]) == ("8192", "fp8_e4m3")
    draft: dict[str, Any] = json.loads(found["--speculative-config"])
    assert (draft["method"], draft["num_speculative_tokens"]) == ("ngram", 4)


def test_llama_s_context_is_that_of_all_slots() -> None:
    """llama-server divides its context among its slots, and a quantised cache needs flash attention."""
    found = values(
        engine_command("llamacpp", ServingSettings(model="m", max_model_len=4096, max_sequences=8, kv_dtype="int8"))
    )
    assert (found["--ctx-size"], found["--parallel"]) == ("32768", "8")
    assert (found["--cache-type-k"], found["--flash-attn"]) == ("q8_0", "on")


def test_what_an_engine_cannot_do_is_said() -> None:
    """Settings without an option leave a note, not a flag."""
    wanted = ServingSettings(model="m", dp=2, ep=True, quantisation="fp8", role="prefill", kv_dtype="strange")
    notes = engine_command("llamacpp", wanted).notes
    for word in ("data parallelism", "expert parallelism", "quantisation", "disaggregated", "strange"):
        assert any(word in note for note in notes), word
    assert not engine_command("vllm", ServingSettings(model="m")).notes


def test_tensorrt_keeps_its_cache_settings_in_a_file() -> None:
    """The YAML beside the command holds block reuse and the cache's type."""
    command = engine_command("tensorrt_llm", ServingSettings(model="m", kv_dtype="fp8", has_prefix_cache=False))
    cache = json.loads(command.files["trtllm.yaml"])["kv_cache_config"]
    assert cache == {"dtype": "fp8", "enable_block_reuse": False}
    assert values(command)["--config"] == "trtllm.yaml"


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": ""},
        {"model": "--help"},
        {"model": "a\nb"},
        {"host": "-x"},
        {"port": 0},
        {"memory_share": 1.5},
        {"tp": 0},
        {"max_model_len": -1},
        {"served_name": "x" * 5000},
    ],
)
def test_settings_that_no_engine_could_take_are_refused(wrong: dict[str, Any]) -> None:
    """Texts that read as options, line breaks and numbers out of range are 422 for every engine."""
    for engine in ENGINES:
        with pytest.raises(InvalidValue):
            engine_command(engine, ServingSettings(**({"model": "m"} | wrong)))
    with pytest.raises(InvalidValue):
        engine_command("triton", ServingSettings(model="m"))


@pytest.mark.engine
def test_the_real_llama_server_takes_the_line(tmp_path: Path) -> None:
    """llama-server understands every option of the line, and only misses the model's file."""
    program = os.environ.get("HERDER_TEST_LLAMA_SERVER", "")
    if not program:
        pytest.skip("HERDER_TEST_LLAMA_SERVER names no engine; scripts/test sets it")
    wanted = ServingSettings(
        model=str(tmp_path / "no.gguf"), max_model_len=512, max_sequences=2, kv_dtype="int8", port=18099
    )
    argv = [program, *engine_command("llamacpp", wanted).argv[1:]]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    words = done.stdout + done.stderr
    assert done.returncode != 0
    assert "invalid argument" not in words, words[-500:]
    assert "no.gguf" in words, words[-500:]
