"""A recipe as one Slurm job: servers, clients and the orchestrator as parts of a heterogeneous job, so that only the
servers get GPUs. Nothing of a recipe reaches a shell unquoted, nothing is slept for, whatever ends the job ends its
steps.

Each step is an array of arguments; what a recipe gives is quoted word by word. Values of #SBATCH lines, which Slurm
takes apart by rules of its own, may only have harmless characters.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import msgspec

from agent.suite import times
from agent.suite.plan import file_name
from agent.suite.ray import COUNT_NODES, RayClusterManager, vllm_command
from agent.suite.schema import Recipe
from agent.suite.servers import VllmServerManager

PORTS = {"ollama": 11434, "vllm": 8000}
DEFAULT_PORT, CLIENT_PORT, RAY_PORT = 8000, 6000, 6379
_PLAIN = re.compile(r"[A-Za-z0-9_.,:/@+=%\[\]-]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INDICES = re.compile(r"\d+(-\d+)?")


@dataclass(frozen=True, slots=True)
class Choices:
    """What is no matter of the recipe."""

    herder: str = "herder"
    """The command on the nodes."""
    server_port: int | None = None
    client_port: int = CLIENT_PORT
    timeout: int = 600
    pushgateway_node: str = ""
    plugins: tuple[str, ...] = ()
    file_roots: tuple[str, ...] = ()
    is_contained: bool = False
    """Herder's own steps run in the image `artifacts.python`, which must have it."""


def script_of(recipe: Recipe, document: Any, choices: Choices = Choices()) -> str:
    """The job script. document: the recipe as it was written, which travels inside. Raises: ValueError."""
    port = choices.server_port or PORTS.get(recipe.workload.service, DEFAULT_PORT)
    parts = [
        _head(recipe),
        _modules(recipe),
        _beginning(recipe, document, choices, port),
        _images(recipe, choices),
        _commands(recipe, choices, port),
        _servers(recipe),
        _monitors(recipe, choices, port),
        _clients(),
        _orchestrator(recipe, choices, port),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _plain(value: str, place: str) -> str:
    if not _PLAIN.fullmatch(value) or value.startswith("-"):
        raise ValueError(f"{place}: {value!r} has characters that an #SBATCH line cannot bear")
    return value


def _shares_node(recipe: Recipe) -> bool:
    """Whether the orchestrator runs on the first client's node."""
    allocation = recipe.orchestration.node_allocation
    return recipe.orchestration.total_nodes == allocation.servers.nodes + allocation.clients.nodes


def _head(recipe: Recipe) -> str:
    """The #SBATCH lines: one block for each part of the heterogeneous job."""
    allocation, resources, config = (
        recipe.orchestration.node_allocation,
        recipe.resources,
        recipe.orchestration.job_config,
    )
    name = file_name(recipe.scenario)
    blocks = [
        (
            allocation.servers.nodes,
            allocation.servers.node_range,
            resources.servers.cpus_per_task,
            resources.servers.mem_gb,
            resources.servers.gpus,
        ),
        (
            allocation.clients.nodes,
            allocation.clients.node_range,
            resources.clients.cpus_per_task,
            resources.clients.mem_gb,
            resources.clients.gpus,
        ),
    ]
    if not _shares_node(recipe):
        monitors = resources.monitors
        blocks.append((1, allocation.monitors.node_range, monitors.cpus_per_task, monitors.mem_gb, 0))
    lines = [
        "#!/bin/bash -l",
        f"#SBATCH --job-name={_plain(name, 'scenario')}",
        f"#SBATCH --output={name}_%j.out",
        f"#SBATCH --error={name}_%j.err",
    ]
    limit = times.slurm_time(times.time_limit(config.time_limit))
    common = [f"--time={limit}"]
    for flag, value in (
        ("partition", recipe.partition),
        ("account", recipe.account),
        ("qos", recipe.qos),
        ("reservation", config.reservation),
    ):
        if value:
            common.append(f"--{flag}={_plain(value, flag)}")
    if config.exclusive:
        common.append("--exclusive")
    for number, (nodes, node_range, cpus, mem_gb, gpus) in enumerate(blocks):
        if number:
            lines.append("#SBATCH hetjob")
        own = [f"--nodes={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}", f"--mem={mem_gb}G"]
        own += [f"--gres=gpu:{gpus}"] if gpus else []
        # A range of bare numbers counts nodes of the allocation, which each part has for itself already.
        own += [f"--nodelist={_plain(node_range, 'node_range')}"] if node_range and not _is_index(node_range) else []
        lines += [f"#SBATCH {flag}" for flag in (*common, *own)]
    return "\n".join(lines)


def _is_index(text: str) -> bool:
    return _INDICES.fullmatch(text) is not None


def _modules(recipe: Recipe) -> str:
    """Before `set -u`, which the shell functions of module systems do not bear."""
    if recipe.modules is not None:
        return "\n".join(f"module load {shlex.quote(name)}" for name in recipe.modules)
    return 'for name in ${HPC_MODULES:-}; do module load "$name"; done'


def _beginning(recipe: Recipe, document: Any, choices: Choices, port: int) -> str:
    """The folder, the recipe in it, the token, and what ends everything."""
    folder = recipe.reporting.output_directory or "experiments/{experiment_id}"
    experiment = shlex.quote(f"{file_name(recipe.scenario)}-") + '"${SLURM_JOB_ID}"'
    pieces = [shlex.quote(piece) if piece else "" for piece in folder.split("{experiment_id}")]
    base = "" if PurePosixPath(folder).is_absolute() else '"$PWD"/'
    name = shlex.quote(file_name(recipe.scenario))
    return f"""
set -euo pipefail
umask 077
OUT={base}{experiment.join(pieces)}
mkdir -p "$OUT/logs" "$OUT/results" "$OUT/monitoring"
NAME={name}
ln -sf "$PWD/${{NAME}}_${{SLURM_JOB_ID}}.out" "$OUT/logs/slurm_job.log"
ln -sf "$PWD/${{NAME}}_${{SLURM_JOB_ID}}.err" "$OUT/logs/slurm_job.err"
export OUTPUT_DIR="$OUT" HERDER_EXECUTOR_TOKEN_FILE="$OUT/executor.token"
HERDER={shlex.quote(choices.herder)}
SERVER_PORT={port}
CLIENT_PORT={choices.client_port}
cat > "$OUT/recipe.json" <<'HERDER_RECIPE'
{json.dumps(document, default=str)}
HERDER_RECIPE
echo "results: $OUT"

STEPS=()
living() {{
  for step in "${{STEPS[@]}}"; do if kill -0 "$step" 2>/dev/null; then return 0; fi; done
  return 1
}}
end_steps() {{
  local job
  for job in "${{SLURM_JOB_ID_HET_GROUP_0:-}}" "${{SLURM_JOB_ID_HET_GROUP_1:-}}" "${{SLURM_JOB_ID_HET_GROUP_2:-}}"; do
    if [ -n "$job" ]; then scancel --quiet --signal=TERM "$job" 2>/dev/null || true; fi
  done
}}
ends() {{
  local code=$? began=$SECONDS is_early=$((SECONDS < 10)) told
  trap - EXIT INT TERM
  # srun would kill at once; a signal through Slurm lets monitors and executors end with their files complete.
  end_steps
  # Steps that are just being launched do not get it: where the job has hardly begun, it is sent every second.
  while living && [ $((SECONDS - began)) -lt 15 ]; do
    told=$SECONDS; sleep 0.2
    if [ "$is_early" = 1 ] && [ "$SECONDS" -gt "$told" ]; then end_steps; fi
  done
  for step in "${{STEPS[@]}}"; do kill -TERM "$step" 2>/dev/null || true; done
  for step in "${{STEPS[@]}}"; do wait "$step" 2>/dev/null || true; done
  exit "$code"
}}
trap ends EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# A node's name where it can be looked up, else the address that Slurm itself uses.
address() {{
  if getent hosts "$1" > /dev/null; then echo "$1"; return; fi
  local found
  found=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
  echo "${{found:-$1}}"
}}
step() {{
  # step GROUP NODE COMPONENT COMMAND...: in the background, its output where the log collector looks.
  local group=$1 node=$2 component=$3 place
  shift 3
  place=$(address "$node")
  srun --het-group="$group" --nodes=1 --ntasks=1 --nodelist="$node" --overlap --unbuffered \\
    --output="$OUT/logs/${{component}}_${{place}}.log" --error="$OUT/logs/${{component}}_${{place}}.err" "$@" &
  STEPS+=($!)
}}
mapfile -t SERVERS < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0")
mapfile -t CLIENTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")"""


def _images(recipe: Recipe, choices: Choices) -> str:
    """Pulls what is missing, under another name until it is whole."""
    lines = []
    for image in (recipe.artifacts.service, recipe.artifacts.python if choices.is_contained else None):
        if image is None or not image.remote:
            continue
        path = shlex.quote(_image_path(recipe, image.path))
        lines += [
            f"if [ ! -e {path} ]; then",
            f'  apptainer pull {path}."$SLURM_JOB_ID" {shlex.quote(image.remote)}',
            f'  mv {path}."$SLURM_JOB_ID" {path}',
            "fi",
        ]
    return "\n".join(lines)


def _image_path(recipe: Recipe, path: str) -> str:
    if recipe.artifacts.containers_dir and not PurePosixPath(path).is_absolute():
        return str(PurePosixPath(recipe.artifacts.containers_dir) / path)
    return path


def _container(recipe: Recipe, *, is_server: bool) -> list[str]:
    """What goes before a command: apptainer with the recipe's image and binds, or nothing."""
    artifacts = recipe.artifacts
    image = artifacts.service if is_server else artifacts.python
    path = _image_path(recipe, image.path) if image is not None else ""
    if not path and is_server and artifacts.container.endswith(".sif"):
        path = _image_path(recipe, artifacts.container)
    if not path:
        return []
    command = ["apptainer", "exec"]
    if is_server and recipe.resources.servers.gpus:
        command.append("--nv")
    for bind in recipe.binds:
        command += ["--bind", bind]
    return [*command, path]


def server_command(recipe: Recipe, port: int) -> list[str]:
    """The engine's start with everything that service_config says. Raises: ValueError."""
    service, config = recipe.workload.service, dict(recipe.servers.service_config)
    given = config.pop("command", None)
    if given is not None:
        if not isinstance(given, list) or not given or not all(isinstance(word, str) for word in given):
            raise ValueError("servers.service_config.command: must be a list of words")
        return [word.replace("{port}", str(port)) for word in given]
    match service:
        case "ollama":
            return ["env", f"OLLAMA_HOST=0.0.0.0:{port}", "ollama", "serve"]
        case "vllm":
            settings = VllmServerManager.parse_service_config({"service_config": config})
            model = str(config.get("model") or recipe.workload.model or "")
            return vllm_command(model, settings, port)
        case "dummy":
            return ["herder", "suite", "dummy-server", "--host=0.0.0.0", f"--port={port}"]
        case _:
            raise ValueError(
                f"servers.service_config.command: how is {service} started? Give its command as a list of words, "
                "with {port} where the port belongs"
            )


def _array(name: str, words: Sequence[str], *, before: str = "") -> str:
    return f"{name}=({' '.join([*([before] if before else []), *map(shlex.quote, words)])})"


ENVIRONMENT = '"${ENVIRONMENT[@]}"'
"""Goes before a server's command: its variables come from a file of the user's own, since anybody sees arguments."""


def _environment(recipe: Recipe) -> str:
    """Writes the variables' file and says how a command gets them; without any, commands get nothing."""
    lines = []
    for name, value in recipe.environment.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"environment: {name!r} is no name of a variable")
        lines.append(f"{name}={shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))}")
    if not lines:
        return ""
    return (
        f"printf '%s\\n' {' '.join(map(shlex.quote, lines))} > \"$OUT/environment\"\n"
        'ENVIRONMENT=(bash -c \'set -a; . "$0"; set +a; exec "$@"\' "$OUT/environment")'
    )


def _commands(recipe: Recipe, choices: Choices, port: int) -> str:
    """The arrays that the steps are made of."""
    server = server_command(recipe, port)
    own = server[0] == "herder"
    words = [] if own else _container(recipe, is_server=True)
    executor = [
        "executor",
        "--service",
        recipe.workload.service,
        "--port",
        str(choices.client_port),
        "--host",
        "0.0.0.0",
    ]
    for root in choices.file_roots or _dataset_roots(recipe):
        executor += ["--file-root", root]
    for plugin in choices.plugins:
        executor += ["--plugin", plugin]
    if choices.is_contained and recipe.artifacts.python is None:
        raise ValueError("artifacts.python: is missing: in which image does herder run?")
    herder = _container(recipe, is_server=False) if choices.is_contained else []
    before = ENVIRONMENT if recipe.environment else ""
    lines = [
        *filter(None, [_environment(recipe)]),
        _array("SERVER", words + ([] if own else server), before=before)[:-1]
        + (' "$HERDER" ' + shlex.join(server[1:]) if own else "")
        + ")",
        _array("HERDER_RUN", herder)[:-1] + (" " if herder else "") + '"$HERDER")',
        _array("EXECUTOR", executor),
    ]
    return "\n".join(lines)


def _dataset_roots(recipe: Recipe) -> Iterator[str]:
    named = {recipe.artifacts.dataset, recipe.workload.dataset or "", recipe.workload.tokenizer or ""}
    named |= {entry.dataset or "" for entry in recipe.workload.benchmark_suite}
    folders = {str(PurePosixPath(path).parent) for path in named if path.startswith("/")}
    yield from sorted(folders)


def _servers(recipe: Recipe) -> str:
    config = VllmServerManager.parse_service_config({"service_config": recipe.servers.service_config}) \
        if recipe.workload.service == "vllm" else {}  # fmt: skip
    distributed = config.get("distributed") or {}
    if distributed.get("enabled"):
        return _ray(recipe, distributed)
    return """
ENDPOINTS=()
for node in "${SERVERS[@]}"; do
  ENDPOINTS+=("$(address "$node")")
  step 0 "$node" container "${SERVER[@]}"
done"""


def _ray(recipe: Recipe, distributed: dict[str, Any]) -> str:
    """One engine over all server nodes: Ray's head on the first, workers on the others, the engine on the first."""
    manager = RayClusterManager(distributed.get("ray") or {})
    container = _container(recipe, is_server=True)
    before = ENVIRONMENT if recipe.environment else ""
    head = [*container, *manager.get_ray_start_command(port=RAY_PORT), "--block"]
    worker = [*container, *manager.get_ray_start_command("@HEAD@"), "--block"]
    probe = [*container, "python3", "-c", COUNT_NODES]
    limit = int(recipe.servers.health_check.timeout or 600)
    return f"""
export RAY_AUTH_MODE="${{RAY_AUTH_MODE:-disabled}}"
HEAD=${{SERVERS[0]}}
HEAD_IP=$(getent ahostsv4 "$(address "$HEAD")" | awk 'NR == 1 {{ print $1 }}')
{_array("RAY_HEAD", head, before=before)}
{_array("RAY_WORKER", worker, before=before)}
{_array("RAY_PROBE", probe, before=before)}
step 0 "$HEAD" ray "${{RAY_HEAD[@]}}"
for node in "${{SERVERS[@]:1}}"; do
  step 0 "$node" ray "${{RAY_WORKER[@]/@HEAD@/$HEAD_IP:{RAY_PORT}}}"
done
began=$SECONDS
until srun --het-group=0 --nodes=1 --ntasks=1 --nodelist="$HEAD" --overlap \\
    "${{RAY_PROBE[@]}}" "${{#SERVERS[@]}}" > /dev/null 2>&1; do
  for step in "${{STEPS[@]}}"; do
    kill -0 "$step" 2>/dev/null || {{ echo "a node of Ray has ended: see $OUT/logs" >&2; exit 1; }}
  done
  if [ $((SECONDS - began)) -gt {limit} ]; then echo "Ray's nodes did not get together in {limit} s" >&2; exit 1; fi
done
ENDPOINTS=("$(address "$HEAD")")
step 0 "$HEAD" container "${{SERVER[@]}}\""""


def _monitors(recipe: Recipe, choices: Choices, port: int) -> str:
    """`herder monitor` on the nodes that the recipe's metrics name; every source with its own interval."""
    if not recipe.monitoring.enabled:
        return ""
    groups: dict[str, dict[str, Any]] = {}
    default = [("gpu", 5.0, ["servers"]), ("system", 5.0, ["all"])]
    given = [(m.type, times.seconds(m.scrape_interval), m.targets) for m in recipe.monitoring.metrics] or default
    for kind, interval, targets in given:
        for group in ("servers", "clients"):
            if group in targets or "all" in targets:
                made = groups.setdefault(group, {"metrics": [], "interval": interval, "is_engine": False})
                made["interval"] = min(made["interval"], interval)
                made["metrics"] += {"gpu": ["gpu"], "system": ["cpu", "ram", "disk", "network"]}.get(kind, [])
                made["is_engine"] |= kind == "prometheus" and group == "servers"
    lines = []
    for group, made in groups.items():
        number, nodes = (0, "SERVERS") if group == "servers" else (1, "CLIENTS")
        metrics = ",".join(dict.fromkeys(made["metrics"])) or "cpu"
        words = f"--interval {made['interval']:g}s --metrics {metrics}"
        engine = ""
        if made["is_engine"]:
            engine = f' --engine "http://127.0.0.1:{port}" --engine-save "$OUT/monitoring/{group}_$node.engine.csv"'
        lines += [
            f'for node in "${{{nodes}[@]}}"; do',
            f'  step {number} "$node" monitor "${{HERDER_RUN[@]}}" monitor --quiet {words} '
            f'--save "$OUT/monitoring/{group}_$node.csv"{engine}',
            "done",
        ]
    return "\n".join(lines)


def _clients() -> str:
    return """
PLACES=()
for node in "${CLIENTS[@]}"; do
  PLACES+=("$(address "$node")")
  step 1 "$node" client "${HERDER_RUN[@]}" "${EXECUTOR[@]}"
done"""


def _orchestrator(recipe: Recipe, choices: Choices, port: int) -> str:
    """The orchestrator waits for servers and clients itself; a step that ends before it ends the job."""
    extra = ["--timeout", str(int(choices.timeout))]
    if choices.pushgateway_node:
        extra += ["--enable-monitoring", "--pushgateway-node", choices.pushgateway_node]
    for plugin in choices.plugins:
        extra += ["--plugin", plugin]
    output = ' --monitor-output "$OUT/monitoring/orchestrator.csv"' if choices.pushgateway_node else ""
    shares = _shares_node(recipe)
    group, node = (1, '"${CLIENTS[0]}"') if shares else (2, '"$ORCHESTRATOR"')
    find = "" if shares else (
        '\nORCHESTRATOR=$(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_2")'
    )  # fmt: skip
    return f"""{find}
srun --het-group={group} --nodes=1 --ntasks=1 --nodelist={node} --overlap --unbuffered \\
  --output="$OUT/logs/orchestrator_local.log" --error="$OUT/logs/orchestrator_local.err" \\
  "${{HERDER_RUN[@]}}" orchestrate --server-nodes "${{ENDPOINTS[@]}}" --client-nodes "${{PLACES[@]}}" \\
  --workload-config-file "$OUT/recipe.json" --server-port "$SERVER_PORT" --client-port "$CLIENT_PORT" \\
  {shlex.join(extra)}{output} &
MAIN=$!
STEPS+=("$MAIN")
while kill -0 "$MAIN" 2>/dev/null; do
  wait -n || true
  if kill -0 "$MAIN" 2>/dev/null; then
    for step in "${{STEPS[@]}}"; do
      if ! kill -0 "$step" 2>/dev/null; then
        echo "a step ended before the orchestrator: see $OUT/logs" >&2
        exit 1
      fi
    done
  fi
done
code=0
wait "$MAIN" || code=$?
exit "$code\""""


def document_of(recipe: Recipe) -> Any:
    """A recipe as plain data."""
    return msgspec.to_builtins(recipe)
