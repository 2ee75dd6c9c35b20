"""Job scripts of suites: what stands in them, and that nothing of a recipe is read by a shell."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent.suite import reading, script
from agent.suite.errors import SuiteError
from agent.suite.ray import RayClusterManager, vllm_command

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "recipes" / "suite").glob("*.yaml"))
GOLDEN = ROOT / "tests" / "golden" / "suite"
HOSTILE = (
    "a b",
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned; '",
    '"; touch pwned; "',
    "x\ntouch pwned",
    "\\",
    "*",
)


def made(document: Any, **choices: Any) -> str:
    """The script of a document."""
    return script.script_of(reading.recipe_of(document, for_slurm=True), document, script.Choices(**choices))


def changed(path: Path, **parts: Any) -> dict[str, Any]:
    """A shipped recipe with dotted places (`__`) set anew."""
    document: dict[str, Any] = copy.deepcopy(reading.load(path))
    for place, value in parts.items():
        *folders, last = place.split("__")
        inner = document
        for key in folders:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return document


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_scripts_are_as_they_were(path: Path) -> None:
    """The script of every shipped recipe; HERDER_GOLDEN=write writes them anew."""
    golden = GOLDEN / f"{path.stem}.sh"
    text = made(reading.load(path))
    if os.environ.get("HERDER_GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_bash_reads_the_scripts(path: Path) -> None:
    """No script has a mistake of syntax, or sleeps instead of asking; shellcheck, where it is, finds nothing."""
    text = made(reading.load(path), pushgateway_node="g", plugins=("p",), file_roots=("/d",))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=20)
    assert not re.search(r"^\s*sleep", text, re.M)
    if shutil.which("shellcheck"):
        subprocess.run(
            ["shellcheck", "-s", "bash", "-S", "warning", "-"], input=text, text=True, check=True, timeout=60
        )


def test_only_servers_get_gpus() -> None:
    """Each part of the job asks for what it needs; the orchestrator's has no GPU and one node."""
    text = made(reading.load(ROOT / "recipes" / "suite" / "ollama.yaml"))
    head = text.partition("\nmodule")[0]
    servers, clients, orchestrator = head.split("#SBATCH hetjob")
    assert "--gres=gpu:1" in servers
    assert "--gres" not in clients + orchestrator
    assert "--nodes=2" in clients
    assert "--nodes=1" in orchestrator
    for part in (servers, clients, orchestrator):
        for flag in ("--partition=gpu", "--account=my-project", "--qos=default", "--time=02:00:00", "--exclusive"):
            assert f"#SBATCH {flag}\n" in part


def test_knobs_of_the_job_stand_in_the_script() -> None:
    """Reservation, named nodes, modules, environment, binds, images and ports are where they are read."""
    document = changed(
        ROOT / "recipes" / "suite" / "vllm.yaml",
        orchestration__job_config={"time_limit": "1-00:00:00", "exclusive": False, "reservation": "r1"},
        orchestration__node_allocation__servers={"nodes": 1, "node_range": "node[007]"},
        orchestration__total_nodes=2, modules=["A/1", "B"], environment={"X": "a b"},
    )  # fmt: skip
    text = made(document, server_port=9001, client_port=9002)
    for said in ("#SBATCH --reservation=r1", "#SBATCH --nodelist=node[007]", "#SBATCH --time=24:00:00",
                 "module load A/1", "module load B", '"${ENVIRONMENT[@]}" apptainer exec --nv --bind',
                 "--max-model-len=2048", "--gpu-memory-utilization=0.9", "--port=9001", "--port 9002", "apptainer pull",
                 "--het-group=1 --nodes=1 --ntasks=1 --nodelist=\"${CLIENTS[0]}\""):  # fmt: skip
        assert said in text, said
    assert "--exclusive" not in text
    assert text.count("hetjob") == 1, "the orchestrator shares the first client's node"


@pytest.mark.parametrize("word", HOSTILE)
def test_variables_of_servers_are_no_arguments(word: str, tmp_path: Path) -> None:
    """A server gets them as they were written, from a file of the user's own: anybody can read a command's words."""
    document = changed(ROOT / "recipes" / "suite" / "ollama.yaml", environment={"HF_TOKEN": f"hf_{word}", "Y": True})
    text = made(document)
    begin = text.index("printf '%s")
    written = text[begin : text.index("\nSERVER=(")]
    printed = 'import os; print(os.environ["HF_TOKEN"] + os.environ["Y"], end="")'
    read = f"""printf '%s|' "${{ENVIRONMENT[@]}}"; "${{ENVIRONMENT[@]}}" python3 -c '{printed}'"""
    done = subprocess.run(
        ["bash", "-euc", f"umask 077\n{written}\n{read}"], cwd=tmp_path, timeout=30, check=True,
        capture_output=True, text=True, env={"PATH": os.environ["PATH"], "OUT": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.endswith(f"|hf_{word}true")
    assert "hf_" not in done.stdout.rpartition("|")[0], "what is an argument"
    assert (tmp_path / "environment").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("word", HOSTILE)
def test_nothing_of_a_recipe_reaches_a_shell(word: str, tmp_path: Path) -> None:
    """What a recipe says stays one word of one command, whatever it holds; #SBATCH lines refuse it."""
    document = changed(
        ROOT / "recipes" / "suite" / "ollama.yaml",
        modules=[word], environment={"X": word}, binds=[f"{word}:/b"],
        artifacts={"service": {"path": word, "remote": word}}, workload__model=word, scenario=word,
        reporting={"output_directory": f"{word}/{{experiment_id}}"},
    )  # fmt: skip
    text = made(document, herder=word, plugins=(word,), file_roots=(word,), pushgateway_node=word)
    body = text[text.index("\nmodule load") :]
    names = ("srun", "apptainer", "scancel", "mv", "module", "ln")
    fakes = "\n".join(f'{name}() {{ printf "%s\\n" "{name}" "$@" >> "$LOG.$BASHPID"; }}' for name in names)
    fakes += '\nscontrol() { echo "$3"; }\ngetent() { :; }\n'
    log = tmp_path / "log"
    subprocess.run(
        ["bash", "-c", fakes + body], cwd=tmp_path, timeout=30, check=False,
        capture_output=True, env={"PATH": os.environ["PATH"], "LOG": str(log), "SLURM_JOB_ID": "1",
                                  "SLURM_JOB_NODELIST_HET_GROUP_0": "n1", "SLURM_JOB_NODELIST_HET_GROUP_1": "n2"},
    )  # fmt: skip
    assert not list(tmp_path.rglob("pwned"))
    said = "".join(one.read_text() for one in tmp_path.glob("log.*"))  # a file each: steps write at the same time
    assert f"module\nload\n{word}\n" in said
    assert f"\n--bind\n{word}:/b\n" in said, "the server's step was reached"
    assert f"\n--plugin\n{word}\n" in said, "the orchestrator's step was reached"
    for place, value in (("partition", word), ("account", word), ("qos", word)):
        with pytest.raises(ValueError, match="#SBATCH"):
            made(changed(ROOT / "recipes" / "suite" / "ollama.yaml", **{place: value}))


def test_the_recipe_travels_inside() -> None:
    """What the orchestrator reads is the document, byte for byte the same data."""
    document = reading.load(ROOT / "recipes" / "suite" / "vllm.yaml")
    found = re.search(r"<<'HERDER_RECIPE'\n(.*)\nHERDER_RECIPE\n", made(document))
    assert found is not None
    assert json.loads(found[1]) == document


def test_herder_runs_in_an_image_only_when_asked_to() -> None:
    """The toolkit's python image has no herder: it is used, and pulled, for those who put it there."""
    image = {"python": {"path": "/c/p.sif", "remote": "docker://p"}}
    document = changed(ROOT / "recipes" / "suite" / "dummy.yaml", artifacts=image)
    assert "p.sif" not in re.sub(r"^\{.*$", "", made(document), flags=re.M)
    contained = made(document, is_contained=True)
    assert 'HERDER_RUN=(apptainer exec /c/p.sif "$HERDER")' in contained
    assert "docker://p\n" in contained
    with pytest.raises(ValueError, match="in which image"):
        made(changed(ROOT / "recipes" / "suite" / "dummy.yaml"), is_contained=True)


def test_a_service_without_a_known_start_says_what_is_missing() -> None:
    """Services of plugins give their command; {port} in it is the server's."""
    document = changed(ROOT / "recipes" / "suite" / "dummy.yaml", workload__service="mine")
    with pytest.raises(ValueError, match="how is mine started"):
        made(document)
    document["servers"] = {"service_config": {"command": ["mine", "--listen={port}"]}}
    assert "SERVER=(mine --listen=8000)" in made(document)


def test_ray_is_started_by_its_own_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and worker get the recipe's ports and sizes; a machine without Ray says so."""
    config = {"dashboard_port": 8265, "object_manager_port": 8076, "node_manager_port": 8077, "num_cpus_per_node": 4,
              "num_gpus_per_node": 2}  # fmt: skip
    manager = RayClusterManager(config)
    assert manager.get_ray_start_command(port=6380) == [
        "ray", "start", "--disable-usage-stats", "--head", "--port=6380", "--object-manager-port=8076",
        "--node-manager-port=8077", "--num-cpus=4", "--num-gpus=2", "--dashboard-port=8265",
    ]  # fmt: skip
    assert "--address=h:1" in manager.get_ray_start_command("h:1")
    assert "--dashboard-port=8265" not in manager.get_ray_start_command("h:1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SuiteError) as caught:
        manager.start_head_node()
    assert caught.value.code == "E003"
    (tmp_path / "ray").write_text(f'#!{shutil.which("sh", path=os.defpath)}\necho "$@" >> {tmp_path}/said\n')
    (tmp_path / "ray").chmod(0o755)
    assert manager.start_head_node(6380)
    assert manager.head_address == f"{manager.get_head_ip()}:6380"
    assert manager.connect_worker("h:1")
    assert manager.stop_ray()
    assert [line.split()[0] for line in (tmp_path / "said").read_text().splitlines()] == ["start", "start", "stop"]


def test_every_setting_of_vllm_is_a_flag() -> None:
    """Switches, numbers and parallel sizes; what is off is left out."""
    command = vllm_command("m", {"enforce_eager": True, "trust_remote_code": False, "max_model_len": 9,
                                 "distributed": {"enabled": True, "tensor_parallel_size": 4}}, 8000)  # fmt: skip
    assert command[3:] == [
        "--model=m", "--host=0.0.0.0", "--port=8000", "--tensor-parallel-size=4", "--distributed-executor-backend=ray",
        "--enforce-eager", "--max-model-len=9",
    ]  # fmt: skip
