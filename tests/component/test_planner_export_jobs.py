"""Exports of training jobs: golden texts, structure, and shells that read what was written and nothing else.

The real launchers are run by benchmarks/planner_exports.py; what stands here needs bash and Python only.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from common.errors import InvalidValue
from head.planner.export import accelerate, deepspeed, kubernetes, launchers, megatron, slurm
from head.planner.export.bundle import FRAMEWORKS, export, launch, training_script
from head.planner.export.job import TrainingJob
from head.planner.hardware.topology import topology_of_preset
from head.planner.model.hf_config import architecture_of_config
from head.planner.training.layout import TrainingLayout

GOLDEN = Path(__file__).parents[1] / "golden" / "planner_exports"
# Every option of Megatron-LM (Megatron-Core 0.15/0.16) that the export may write, from megatron/training/arguments.py.
MEGATRON_OPTIONS = set(
    (GOLDEN / "megatron_options.txt").read_text().split(),
)
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
HOSTILE = (
    "a b",
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned #",
    '"$HOME"',
    "*",
    "--flag",
    "ünï",
    "\\",
    "a'b\"c",
)


def job(gpus: int = 16, changes: dict[str, Any] | None = None, **layout: Any) -> TrainingJob:
    """Two nodes of eight H100, tensor parallel 4, sharded over the rest, unless said otherwise."""
    fields: dict[str, Any] = {
        "tp": 4,
        "dp": gpus // 4,
        "global_batch": 64,
        "micro_batch": 2,
        "sharding": "fsdp",
        "recompute": "full",
    }
    return TrainingJob(
        layout=TrainingLayout(**(fields | layout)),
        topology=topology_of_preset("h100", gpus, network="infiniband"),
        **({"architecture": architecture_of_config(LLAMA, "llama-8b")} | (changes or {})),
    )


def sh(script: str, folder: Path) -> str:
    """What a POSIX shell prints for a script."""
    done = subprocess.run(["sh", "-c", script], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout


@pytest.mark.parametrize("name", ["job.sbatch", "pytorchjob.yaml", "ds_config.json", "accelerate.yaml", "commands.txt"])
def test_an_export_is_as_it_was(name: str) -> None:
    """The exported files of one job are byte for byte the reviewed ones."""
    answer = export(job())
    files = dict(answer["files"])
    lines = [*answer["multi_node_commands"], answer["deepspeed_command"], answer["accelerate_command"]]
    files["commands.txt"] = "\n".join([*lines, answer["megatron_command"], ""])
    assert files[name] == (GOLDEN / name).read_text()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_export_has_all_that_the_seed_named(framework: str) -> None:
    """Every field of the seed's answer, finite and JSON-safe, for each framework."""
    answer = export(job(), framework)
    json.dumps(answer, allow_nan=False)
    wanted = {"name", "description", "deepspeed_config", "accelerate_config", "fsdp_config", "megatron_args"}
    wanted |= {"environment_variables", "torchrun_command", "deepspeed_command", "training_script", "slurm_script"}
    assert wanted <= set(answer)
    with pytest.raises(InvalidValue):
        export(job(), "horovod")


def test_a_launch_has_the_four_launchers_or_one() -> None:
    """The seed's /launch: all four with the environment, or the one asked for; nodes have lines of their own."""
    answer = launch(job())
    assert {"torchrun", "deepspeed", "accelerate", "megatron", "environment"} == set(answer["commands"])
    assert len(answer["commands"]["torchrun"]["multi_node_commands"]) == 2
    assert launch(job(), "deepspeed")["framework"] == "deepspeed"
    with pytest.raises(InvalidValue):
        launch(job(), "mpirun")


@pytest.mark.parametrize("word", HOSTILE)
def test_a_shell_reads_back_exactly_what_was_meant(word: str, tmp_path: Path) -> None:
    """Arguments and variables with spaces, quotes and substitutions come through sh as they are, and run nothing."""
    given = job(changes={"script_args": ("--text", word), "env": {"NOTE": word}})
    (tmp_path / "bin").mkdir()
    probe = tmp_path / "bin" / "torchrun"
    probe.write_text('#!/bin/sh\nprintf "%s\\n" "$NOTE" "$@"\n')
    probe.chmod(0o755)
    line = launchers.torchrun(given, node_rank=1)
    printed = sh(f"PATH={shlex.quote(str(tmp_path / 'bin'))}:$PATH; export PATH; {line.text}", tmp_path).splitlines()
    assert printed == [word, *line.argv[1:]]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("word", [word for word in HOSTILE if not word.startswith("--")])
def test_a_batch_script_runs_nothing_of_its_arguments(word: str, tmp_path: Path) -> None:
    """The Slurm script, run with stand-ins for Slurm's programs, hands on the words and starts one torchrun a node."""
    given = job(
        changes={
            "script_args": ("--text", word),
            "checkpoint_dir": f"{tmp_path}/check {word.replace('/', '_')}",
            "env": {"NOTE": word},
        }
    )
    text = slurm.script(given)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False, timeout=30).returncode == 0
    for name, body in {
        "scontrol": 'echo "n7\nn8"',
        "srun": 'printf "%s\\n" "$NOTE" "$@" > args',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for step in (9, 10, 11):  # 10 is the newest that is complete
        folder = Path(given.checkpoint_dir) / f"step-{step}"
        folder.mkdir(parents=True)
        if step != 11:
            (folder / ".metadata").touch()
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[7-8]"}
    env |= {"SLURM_CPUS_PER_TASK": "64", "HOME": str(tmp_path)}
    subprocess.run(["bash"], input=text, text=True, cwd=tmp_path, env=env, check=True, timeout=30, capture_output=True)
    words = (tmp_path / "args").read_text().splitlines()
    assert words[0] == word
    assert words.count("torchrun") == 1
    assert "--ntasks-per-node=1" in words
    assert f"--rdzv-endpoint=n7:{20_000 + 41}" in words
    assert words[-4:] == ["--text", word, "--resume", str(Path(given.checkpoint_dir) / "step-10")]
    assert not (tmp_path / "pwned").exists()


def test_a_failing_training_fails_the_batch_script(tmp_path: Path) -> None:
    """The job's state tells the truth: srun's exit status is the script's."""
    for name, body in {"scontrol": "echo n1", "srun": "exit 3"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"}
    env |= {"SLURM_CPUS_PER_TASK": "8", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash"], input=slurm.script(job()), text=True, cwd=tmp_path, env=env, timeout=30, check=False
    )
    assert done.returncode == 3


def test_the_batch_script_asks_for_what_the_job_needs() -> None:
    """Nodes, one task each, GPUs, account, partition, time; modules and conda before variables are checked."""
    given = job(changes={"account": "p200", "partition": "gpu", "modules": ("CUDA/12.6",), "conda_env": "my env"})
    text = slurm.script(given)
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    assert directives["nodes"] == "2"
    assert directives["ntasks-per-node"] == "1"
    assert directives["gres"] == "gpu:8"
    assert (directives["account"], directives["partition"]) == ("p200", "gpu")
    assert text.index("module load CUDA/12.6") < text.index("conda activate 'my env'") < text.index("set -u")


@pytest.mark.parametrize(
    "wrong",
    [
        {"script": "--help"},
        {"script": "a\nb"},
        {"name": "x y"},
        {"name": "a\n#SBATCH --uid=0"},
        {"account": "a b"},
        {"time_limit": "soon"},
        {"master_port": 80},
        {"master_addr": "host;reboot"},
        {"env": {"A B": "c"}},
        {"env": {"A": "b\nc"}},
        {"modules": ("a;b",)},
        {"namespace": "Default"},
    ],
)
def test_texts_that_do_not_belong_are_refused(wrong: dict[str, Any]) -> None:
    """Line breaks, options and shell syntax in names are 422 before anything is written."""
    with pytest.raises(InvalidValue):
        job(changes=wrong)


@pytest.mark.parametrize("wrong", [{"dp": 3}, {"global_batch": 63}, {"tp": 16}])
def test_a_layout_that_does_not_fit_the_machines_is_refused(wrong: dict[str, Any]) -> None:
    """tp*pp*cp*dp must be the number of GPUs, and the batch must divide: the seed checked neither."""
    with pytest.raises(InvalidValue):
        job(**wrong)


@pytest.mark.parametrize("sharding", ["none", "zero1", "zero2", "zero3", "fsdp", "hsdp"])
def test_deepspeed_batches_multiply_and_stages_follow(sharding: str) -> None:
    """The batch is micro batch times accumulation times ranks; the stage is that of the sharding."""
    given = job(sharding=sharding)
    config = deepspeed.config(given)
    product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * given.layout.dp
    assert config["train_batch_size"] == product == given.layout.global_batch
    assert config["zero_optimization"]["stage"] == deepspeed.STAGES[sharding]
    assert config["bf16"]["enabled"]
    line = deepspeed.command(given)
    assert line.files["hostfile"] == "node0 slots=8\nnode1 slots=8\n"
    assert json.loads(line.files["ds_config.json"]) == config


def test_accelerate_and_fsdp_agree_with_the_layout() -> None:
    """Processes, machines and mesh multiply to the GPUs; micro batch is the same in every part."""
    given = job(sharding="hsdp", shard_group=2)
    config = yaml.safe_load(accelerate.command(given, node_rank=1).files["accelerate.yaml"])
    assert (config["num_processes"], config["num_machines"], config["machine_rank"]) == (16, 2, 1)
    sizes = config["parallelism_config"]
    assert sizes["parallelism_config_dp_replicate_size"] == 2
    assert sizes["parallelism_config_dp_shard_size"] == 2
    assert sizes["parallelism_config_tp_size"] == 4
    mesh = accelerate.fsdp(given)["mesh"]
    assert mesh["dp_replicate"] * mesh["dp_shard"] * mesh["tp"] == 16
    assert accelerate.fsdp(job(sharding="zero2"))["sharding_strategy"] == "SHARD_GRAD_OP"


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"pp": 2, "dp": 2, "virtual_stages": 4, "partition": "layers_and_embedding", "precision": "fp8"},
        {"tp": 8, "cp": 2, "dp": 1, "sharding": "zero1", "precision": "nvfp4", "grad_bytes": 2},
        {"sharding": "hsdp", "shard_group": 2, "recompute": "selective", "offload": "optimizer", "precision": "fp16"},
        {"sharding": "zero2", "optimizer": "sgd", "has_flash_attention": False},
    ],
)
def test_megatron_gets_only_options_it_has(layout: dict[str, Any]) -> None:
    """Each option of the list is one of Megatron-LM's, none twice, and the sizes are the layout's."""
    given = job(**layout)
    arguments = megatron.arguments(given)
    options = [word for word in arguments if word.startswith("--")]
    assert len(options) == len(set(options))
    assert set(options) <= MEGATRON_OPTIONS, set(options) - MEGATRON_OPTIONS
    assert arguments[arguments.index("--tensor-model-parallel-size") + 1] == str(given.layout.tp)
    assert arguments[arguments.index("--num-query-groups") + 1] == "8"


def test_megatron_builds_a_mixture_of_experts_with_latent_attention() -> None:
    """DeepSeek-like: ranks of the latent, experts and the pattern of dense and expert layers."""
    config = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "vocab_size": 129280,
    }
    arguments = megatron.model_arguments(architecture_of_config(config, "deepseek"), 4096)
    assert {word for word in arguments if word.startswith("--")} <= MEGATRON_OPTIONS
    pairs = dict(itertools.pairwise(arguments))
    assert (pairs["--kv-lora-rank"], pairs["--q-lora-rank"], pairs["--v-head-dim"]) == ("512", "1536", "128")
    assert (pairs["--num-experts"], pairs["--moe-router-topk"], pairs["--moe-ffn-hidden-size"]) == ("256", "8", "2048")
    pattern: list[int] = eval(pairs["--moe-layer-freq"])  # Megatron-LM evaluates it, too
    assert pattern == [0] * 3 + [1] * 58


def test_the_kubernetes_object_is_one_pod_a_node_and_no_shell() -> None:
    """Replicas make the nodes, limits a node's GPUs; $(NAME) in an argument is not expanded."""
    given = job(changes={"script_args": ("--text", "$(HOSTNAME)"), "name": "My_Run.1"})
    found = yaml.safe_load(kubernetes.manifest(given))
    assert found == kubernetes.pytorch_job(given)
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", found["metadata"]["name"])
    replicas = found["spec"]["pytorchReplicaSpecs"]
    assert (replicas["Master"]["replicas"], replicas["Worker"]["replicas"]) == (1, 1)
    container = replicas["Worker"]["template"]["spec"]["containers"][0]
    assert container["name"] == "pytorch"
    assert container["command"] == ["torchrun"]
    assert container["args"][-1] == "$$(HOSTNAME)"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert found["spec"]["nprocPerNode"] == "8"


def test_the_training_script_is_whole_and_takes_the_exported_arguments() -> None:
    """It compiles, imports what it uses, and knows every argument that the export gives it."""
    tree = ast.parse(training_script())
    options = set(re.findall(r'add_argument\("(--[a-z-]+)"', training_script()))
    for sharding in ("none", "zero1", "zero2", "zero3", "fsdp", "hsdp"):
        given = msgspec.structs.replace(job(sharding=sharding, offload="optimizer"), is_cpu=True)
        assert {word for word in launchers.skeleton_args(given) if word.startswith("--")} <= options
    imported = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    known = imported | stored | set(dir(builtins)) | {"__doc__", "__name__"}
    assert used <= known, used - known
    assert imported <= used | {"dist", "nn"}
