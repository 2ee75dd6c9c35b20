"""Runs what the planner exports with the real tools, where they are: nothing is skipped without saying so.

    python benchmarks/planner_exports.py --bin VENV/bin       an environment with torch (CPU), accelerate, deepspeed
        [--slurm]                  SLURM_CONF names a cluster: submits the exported batch script and waits for it
        [--llama-server PATH] [--vllm-python PATH] [--sglang-source DIR]

Prints one line per check: ok, FAILED with the tool's words, or "not here". Exit status 1 when anything failed.
CI does without these tools: tests/component/test_planner_export_*.py hold the same exports to their structure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from head.planner.export import accelerate, deepspeed, kubernetes, launchers, slurm
from head.planner.export.bundle import training_script
from head.planner.export.job import TrainingJob
from head.planner.hardware.topology import topology_of_preset
from head.planner.serving.engine_flags import ServingSettings, engine_command
from head.planner.training.layout import TrainingLayout

TINY = ("--layers", "2", "--hidden", "64", "--heads", "4", "--vocab", "500")
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    *[
        (8, {"dp": 8, "sharding": sharding, "global_batch": 32, "micro_batch": 2})
        for sharding in ("none", "zero1", "zero2", "zero3", "fsdp", "hsdp")
    ],
    (16, {"tp": 4, "dp": 4, "sharding": "hsdp", "shard_group": 2, "global_batch": 16, "precision": "fp16"}),
    (16, {"tp": 8, "pp": 2, "sharding": "zero1", "global_batch": 64, "recompute": "full", "precision": "fp8"}),
    (
        8,
        {
            "dp": 8,
            "sharding": "zero3",
            "offload": "optimizer_and_weights",
            "global_batch": 8,
            "optimizer": "adamw_8bit",
        },
    ),
    (8, {"tp": 2, "cp": 2, "dp": 2, "sharding": "fsdp", "global_batch": 8, "grad_bytes": 2}),
]
SETTINGS = [
    ServingSettings(model="m"),
    ServingSettings(model="m", tp=8, pp=2, ep=True, memory_share=0.9, max_model_len=8192, max_sequences=64, dp=2),
    ServingSettings(model="m", kv_dtype="fp8", has_prefix_cache=False, is_chunked_prefill=False, is_eager=True),
    ServingSettings(model="m", has_lora=True, max_batched_tokens=8192, served_name="a b'c", has_metrics=False),
    ServingSettings(model="m", draft_method="ngram", draft_tokens=4, dtype="bf16", block_size=32),
    ServingSettings(model="m", draft_model="d", draft_tokens=4, kv_dtype="int8", gpu_layers=20),
    ServingSettings(model="m", nodes=2, node_rank=1, master_addr="10.0.0.1:5000", tp=16, role="prefill"),
]


def jobs() -> Iterator[TrainingJob]:
    """Jobs of all kinds, for GPUs."""
    for gpus, fields in LAYOUTS:
        yield TrainingJob(layout=TrainingLayout(**fields), topology=topology_of_preset("h100", gpus))


def cpu_job(folder: Path, nodes: int = 1, **changes: Any) -> TrainingJob:
    """Two processes in all, on gloo, with the exported script."""
    (folder / "train.py").write_text(training_script())
    fields: dict[str, Any] = {
        "dp": 2,
        "global_batch": 4,
        "micro_batch": 1,
        "seq": 32,
        "sharding": "fsdp",
        "precision": "fp32",
    }
    return TrainingJob(
        layout=TrainingLayout(**(fields | changes)),
        topology=topology_of_preset("h100", 2, gpus_per_node=2 // nodes),
        is_cpu=True,
        cpus_per_gpu=1,
        train_steps=4,
        save_interval=2,
        checkpoint_dir=str(folder / "checkpoints"),
    )


def main() -> None:
    """Run the checks that the arguments allow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--sglang-source", type=Path)
    options = parser.parse_args()
    checks: list[tuple[str, bool, Callable[[], str]]] = [
        ("torchrun, one node, then resumed", options.bin, lambda: torchrun_once(options.bin)),
        ("torchrun, two nodes", options.bin, lambda: torchrun_nodes(options.bin)),
        ("accelerate launch", options.bin, lambda: accelerate_launch(options.bin)),
        ("accelerate reads its files", options.bin, lambda: accelerate_files(options.bin)),
        ("deepspeed reads its files", options.bin, lambda: deepspeed_files(options.bin)),
        ("deepspeed's launcher takes the line", options.bin, lambda: deepspeed_lines(options.bin)),
        ("bash reads the batch scripts", True, bash_reads),
        ("slurm runs the batch script", options.slurm, lambda: slurm_runs(options.bin)),
        ("llama-server takes the line", options.llama_server, lambda: llama_lines(options.llama_server)),
        ("vllm takes the line", options.vllm_python, lambda: vllm_lines(options.vllm_python)),
        ("sglang has the options", options.sglang_source, lambda: sglang_options(options.sglang_source)),
        ("the Kubernetes objects are plain", True, kubernetes_plain),
    ]
    failed = 0
    for name, is_here, check in checks:
        if not is_here:
            print(f"{name:40} not here")
            continue
        try:
            print(f"{name:40} ok    {check()}")
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            failed += 1
            print(f"{name:40} FAILED {error}")
    sys.exit(1 if failed else 0)


def run(argv: list[str] | tuple[str, ...], folder: Path, tools: Path | None, env: dict[str, str] | None = None) -> str:
    """The output of a command that must succeed, with `tools` first on its path."""
    path = f"{tools.resolve()}:{os.environ['PATH']}" if tools else os.environ["PATH"]
    done = subprocess.run(
        argv, cwd=folder, env=os.environ | {"PATH": path} | (env or {}), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{shlex.join(argv)[:200]}: {(done.stderr or done.stdout)[-1500:]}"
    return done.stdout + done.stderr


def losses(output: str) -> list[tuple[int, float]]:
    """Steps and losses that the script printed."""
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"step"')]
    return [(row["step"], row["loss"]) for row in rows]


def torchrun_once(tools: Path) -> str:
    """The exported line trains four steps; stopped at two and started again, it gives the same losses."""
    with tempfile.TemporaryDirectory() as name:
        whole, parts = Path(name) / "whole", Path(name) / "parts"
        whole.mkdir()
        parts.mkdir()
        job = cpu_job(whole)
        line = launchers.torchrun(job, extra=(*launchers.skeleton_args(job), *TINY))
        at_once = losses(run(line.argv, whole, tools, line.env))
        job = cpu_job(parts)
        found = []
        for steps in (2, 4):
            some = msgspec.structs.replace(job, train_steps=steps)
            line = launchers.torchrun(some, extra=(*launchers.skeleton_args(some), *TINY))
            found += losses(run(line.argv, parts, tools, line.env))
        assert [step for step, _ in found] == [1, 2, 3, 4], found
        assert found == at_once, (found, at_once)
        return f"loss {found[0][1]:.4f} to {found[-1][1]:.4f}"


def torchrun_nodes(tools: Path) -> str:
    """The lines of two nodes, started beside each other, meet and train."""
    with tempfile.TemporaryDirectory() as name:
        job = cpu_job(Path(name), nodes=2)
        lines = launchers.torchrun_nodes(job, (*launchers.skeleton_args(job), *TINY))
        path = {"PATH": f"{tools.resolve()}:{os.environ['PATH']}"}
        started = [
            subprocess.Popen(line.argv, cwd=name, env=os.environ | line.env | path, stdout=subprocess.PIPE, text=True)
            for line in lines
        ]
        outputs = [process.communicate(timeout=600)[0] for process in started]
        assert all(process.returncode == 0 for process in started), outputs
        found = losses("".join(outputs))
        assert [step for step, _ in found] == [1, 2, 3, 4], outputs
        return f"{len(lines)} lines, {len(found)} steps"


def accelerate_launch(tools: Path) -> str:
    """`accelerate launch --config_file` with the exported file (that for GPUs) trains; the script finds no GPU."""
    with tempfile.TemporaryDirectory() as name:
        job = msgspec.structs.replace(cpu_job(Path(name)), is_cpu=False)  # its CPU launcher starts one process only
        line = accelerate.command(job, extra=(*launchers.skeleton_args(job), *TINY))
        for file, text in line.files.items():
            Path(name, file).write_text(text)
        found = losses(run(line.argv, Path(name), tools, line.env))
        assert [step for step, _ in found] == [1, 2, 3, 4], found
        return shlex.join(line.argv[:5])


def accelerate_files(tools: Path) -> str:
    """Accelerate's own reader takes the file of every layout (it refuses unknown keys)."""
    code = (
        "import sys; from accelerate.commands.config.config_args import load_config_from_file as load\n"
        "for path in sys.argv[1:]: print(load(path).distributed_type)"
    )
    with tempfile.TemporaryDirectory() as name:
        paths = []
        for index, job in enumerate(jobs()):
            path = Path(name, f"{index}.yaml")
            path.write_text(accelerate.command(job).files[accelerate.CONFIG_NAME])
            paths.append(str(path))
        run([str(tools / "python"), "-c", code, *paths], Path(name), tools)
        return f"{len(paths)} files"


def deepspeed_files(tools: Path) -> str:
    """DeepSpeed's schema takes the configuration of every layout, and knows each of its keys."""
    code = """
import json, sys, types
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
import deepspeed.comm
for path in sys.argv[1:]:
    config = json.load(open(path))
    dp, zero = config.pop("_dp"), config["zero_optimization"]
    deepspeed.comm.get_rank = lambda group=None: 0
    mpu = types.SimpleNamespace(get_data_parallel_world_size=lambda dp=dp: dp, get_model_parallel_world_size=lambda: 1)
    read = DeepSpeedConfig(config, mpu=mpu)
    assert read.zero_config.stage == zero["stage"]
    assert read.train_batch_size == config["train_batch_size"]
    unknown = set(zero) - set(DeepSpeedZeroConfig.model_fields) - {
        field.alias for field in DeepSpeedZeroConfig.model_fields.values()
    }
    assert not unknown, unknown
"""
    with tempfile.TemporaryDirectory() as name:
        paths = []
        for index, job in enumerate(jobs()):
            path = Path(name, f"{index}.json")
            path.write_text(json.dumps(deepspeed.config(job) | {"_dp": job.layout.dp}))
            paths.append(str(path))
        run([str(tools / "python"), "-c", code, *paths], Path(name), tools)
        return f"{len(paths)} configurations"


def deepspeed_lines(tools: Path) -> str:
    """The launcher's own parser takes the line of every layout."""
    code = (
        "import json, sys; from deepspeed.launcher.runner import parse_args\n"
        "for line in json.load(open(sys.argv[1])): args = parse_args(line); assert args.user_script == 'train.py', args"
    )
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "lines.json")
        path.write_text(json.dumps([deepspeed.command(job).argv[1:] for job in jobs()]))
        run([str(tools / "python"), "-c", code, str(path)], Path(name), tools)
        return f"{len(LAYOUTS)} lines"


def bash_reads() -> str:
    """`bash -n` on the batch script of every layout."""
    for job in jobs():
        done = subprocess.run(["bash", "-n"], input=slurm.script(job), capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
    return f"{len(LAYOUTS)} scripts"


def slurm_runs(tools: Path | None) -> str:
    """sbatch takes the scripts (--test-only where the cluster has no GPUs), and one runs to its end and resumes."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        job = msgspec.structs.replace(cpu_job(folder, nodes=2), time_limit="0:10:00")
        setup = f'export PATH={shlex.quote(str(tools.resolve()))}:"$PATH"\n' if tools else ""
        found: list[tuple[int, float]] = []
        for steps in (2, 4):
            some = msgspec.structs.replace(job, train_steps=steps)
            text = slurm.script(some, (*launchers.skeleton_args(some), *TINY)).replace(
                "set -u\n", f"set -u\n{setup}", 1
            )
            (folder / "job.sbatch").write_text(text)
            run(["sbatch", "--test-only", "job.sbatch"], folder, None)
            number = run(["sbatch", "--parsable", "job.sbatch"], folder, None).strip()
            state = wait_for_job(number)
            output = (folder / f"train-{number}.out").read_text()
            assert state == "COMPLETED", (
                f"{state}: {output[-800:]} {(folder / f'train-{number}.err').read_text()[-1500:]}"
            )
            found += losses(output)
        assert [step for step, _ in found] == [1, 2, 3, 4], found
        return "two nodes, one torchrun each, stopped and resumed"


def wait_for_job(number: str) -> str:
    """The state in which a job ended."""
    for _ in range(300):
        shown = run(["scontrol", "show", "job", number], Path.cwd(), None)
        state = re.search(r"JobState=(\w+)", shown)
        if state and state[1] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            return state[1]
        time.sleep(1)
    return "UNKNOWN"


def llama_lines(program: Path) -> str:
    """llama-server parses every line; it then fails for want of the model's file, and of nothing else."""
    for settings in SETTINGS:
        argv = engine_command("llamacpp", settings).argv
        argv = (str(program.resolve()), *argv[1:], "--no-warmup")
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=tempfile.gettempdir())
        words = done.stdout + done.stderr
        assert "error: " not in words.replace("error loading model", "") or "model" in words, words[-800:]
        assert not re.search(r"invalid argument|unknown argument|error while handling argument", words), words[-800:]
        assert re.search(r"failed to (?:load|open|read)|No such file|does not exist", words), words[-800:]
    return f"{len(SETTINGS)} lines"


def vllm_lines(python: Path) -> str:
    """vLLM's own parser takes every line, and reads back what was meant."""
    code = """
import json, sys
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.entrypoints.launchers.cli_args import make_arg_parser
parser = make_arg_parser(FlexibleArgumentParser())
options = {option for action in parser._actions for option in action.option_strings}
for line in json.load(open(sys.argv[1])):
    assert not [word for word in line if word.startswith("--") and word not in options], line
    args = parser.parse_args(line[1:])
    assert args.model_tag == "m" and args.port == 8000
print(len(options), "options known")
"""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "lines.json")
        path.write_text(json.dumps([engine_command("vllm", settings).argv[1:] for settings in SETTINGS]))
        env = {"VLLM_NO_USAGE_STATS": "1"}
        return run([str(python), "-c", code, str(path)], Path(name), None, env).strip().splitlines()[-1]


def sglang_options(source: Path) -> str:
    """Every option of the lines is a field of SGLang's arguments (or one of those it registers by hand)."""
    texts = [path.read_text() for path in (source / "srt" / "arg_groups" / "fields").glob("*.py")]
    fields = {name.replace("_", "-") for text in texts for name in re.findall(r"^    (\w+): A\[", text, re.MULTILINE)}
    fields |= set(re.findall(r'"--([a-z-]+)"', (source / "srt" / "server_args.py").read_text()))
    used = {word[2:] for settings in SETTINGS for word in engine_command("sglang", settings).argv if word[:2] == "--"}
    assert not used - fields, used - fields
    return f"{len(used)} of {len(fields)}"


def kubernetes_plain() -> str:
    """One pod for each node, each asking for the GPUs of a node."""
    for job in jobs():
        found = kubernetes.pytorch_job(job)
        replicas = found["spec"]["pytorchReplicaSpecs"]
        assert sum(part["replicas"] for part in replicas.values()) == job.nodes
        json.dumps(found, allow_nan=False)
    return f"{len(LAYOUTS)} objects (no API server here that knows the type)"


if __name__ == "__main__":
    main()
