"""What a recipe's parts must agree on, what is there but cannot be had, and what is odd enough to be told.

`errors` refuse; `warnings` do not. What made the toolkit refuse its own recipes (prompt_len for vLLM, monitors,
artifacts.container, a total of nodes that was off by the orchestrator's) is a default or a warning here.
"""

from __future__ import annotations

from collections.abc import Iterator

from agent.suite import times, workload
from agent.suite.plan import Benchmark, benchmarks_of, range_size
from agent.suite.registry import ServiceFactory
from agent.suite.schema import COMPONENTS, Recipe
from common.bench import spec

_PLACE = "orchestration.node_allocation"


def errors(recipe: Recipe, *, for_slurm: bool = True) -> list[str]:
    """What must be changed, all of it."""
    found = [*_service(recipe), *_refused(recipe), *_runs(recipe)]
    return found + (list(_slurm(recipe)) if for_slurm else [])


def _service(recipe: Recipe) -> Iterator[str]:
    service, component = recipe.workload.service, recipe.workload.component
    known = ServiceFactory.list_services()
    if service not in known:
        said = "is one of the schema's, but nothing here can ask it" if service in sum(COMPONENTS.values(), ()) else ""
        yield (
            f"workload.service: {service!r} {said or 'is not known'}: one of {', '.join(known)}; "
            "--plugin MODULE brings others"
        )
    elif component is not None and service not in COMPONENTS[component]:
        others = [name for name, services in COMPONENTS.items() if service in services]
        if others:
            yield f"workload.component: {service} is of the component {others[0]}, not {component}"
    if service in ("ollama", "vllm") and not recipe.workload.model:
        models = [entry.model for entry in recipe.workload.benchmark_suite]
        if not models or not all(models):
            yield "workload.model: is missing"


def _refused(recipe: Recipe) -> Iterator[str]:
    """Words of the schema that nothing here does."""
    if recipe.orchestration.mode == "kubernetes":
        yield "orchestration.mode: kubernetes is not there (nor was it in the toolkit); slurm is"
    if "pdf" in recipe.reporting.formats:
        yield "reporting.formats: pdf is not written; html prints well from any browser"
    for number, metric in enumerate(recipe.monitoring.metrics):
        if metric.type == "custom":
            yield f"monitoring.metrics[{number}].type: custom has no source here; prometheus, gpu and system have"
    if recipe.orchestration.node_allocation.monitors.nodes != 1:
        yield f"{_PLACE}.monitors.nodes: there is exactly one"
    strategy = recipe.orchestration.node_allocation.clients
    if strategy.target_mapping and strategy.distribution_strategy not in ("static", "round-robin"):
        yield (
            f"{_PLACE}.clients: target_mapping says who asks whom, distribution_strategy "
            f"{strategy.distribution_strategy} too; take static with it"
        )


def _runs(recipe: Recipe) -> Iterator[str]:
    """Every run is checked as the executor will."""
    try:
        runs = benchmarks_of(recipe)
    except ValueError as error:
        yield f"workload: {error}"
        return
    parts = recipe.orchestration.node_allocation.clients.nodes
    said = {text for run in runs if (text := _run_error(recipe, run, parts))}
    yield from sorted(said)


def _run_error(recipe: Recipe, run: Benchmark, parts: int) -> str:
    known = ServiceFactory.list_services()
    config = {key: value for key, value in run.config.items() if key not in ("dataset", "tokenizer")}
    if "dataset" in run.config and run.config.get("prompt_len") is not None:
        return f"workload ({run.name}): dataset brings its own prompts: leave prompt_len out"
    try:
        plan = workload.plan_of(config | {"server_endpoints": ["http://localhost"], "parts": parts})
        if recipe.workload.service in known:
            executor = ServiceFactory.create_workload_executor(recipe.workload.service, 0)
            if not executor.has_threads:
                spec.check(workload.spec_of(config, plan, executor.style, ()))
    except ValueError as error:
        return f"workload ({run.name}): {error}"
    return ""


def _slurm(recipe: Recipe) -> Iterator[str]:
    allocation = recipe.orchestration.node_allocation
    for name, group in (("servers", allocation.servers), ("clients", allocation.clients),
                        ("monitors", allocation.monitors)):  # fmt: skip
        if not group.node_range:
            continue
        try:
            size = range_size(group.node_range)
        except ValueError as error:
            yield f"{_PLACE}.{name}.node_range: {error}"
            continue
        if size != group.nodes:
            yield f"{_PLACE}.{name}.node_range: names {size} nodes, nodes says {group.nodes}"
    total, parts = recipe.orchestration.total_nodes, allocation.servers.nodes + allocation.clients.nodes
    if total is not None and total not in (parts, parts + 1):
        yield (
            f"orchestration.total_nodes: {total}, but servers + clients + 1 for the orchestrator is {parts + 1} "
            f"({parts} when the orchestrator shares the first client's node)"
        )
    for number, bind in enumerate(recipe.binds):
        pieces = bind.split(":")
        if not 1 <= len(pieces) <= 3 or not all(pieces) or (len(pieces) == 3 and pieces[2] not in ("ro", "rw")):
            yield f"binds[{number}]: {bind!r} is not host:container or host:container:ro|rw"
    distributed = recipe.servers.service_config.get("distributed")
    if recipe.workload.service == "vllm" and isinstance(distributed, dict) and distributed.get("enabled"):
        gpus = recipe.resources.servers.gpus * allocation.servers.nodes
        wanted = int(distributed.get("tensor_parallel_size") or 1) * int(distributed.get("pipeline_parallel_size") or 1)
        if wanted > gpus:
            yield f"servers.service_config.distributed: {wanted} GPUs wanted, the servers have {gpus}"
    yield from _service_config(recipe)


def _service_config(recipe: Recipe) -> Iterator[str]:
    from agent.suite.servers import OllamaServerManager, VllmServerManager

    managers = {"ollama": OllamaServerManager, "vllm": VllmServerManager}
    manager = managers.get(recipe.workload.service)
    if manager is None:
        return
    try:
        manager.parse_service_config({"service_config": recipe.servers.service_config})
    except ValueError as error:
        yield f"servers.service_config: {error}"


def warnings(recipe: Recipe, *, for_slurm: bool = True) -> list[str]:
    """What is odd, but may be meant."""
    return [*_load_warnings(recipe), *(_slurm_warnings(recipe) if for_slurm else ())]


def _load_warnings(recipe: Recipe) -> Iterator[str]:
    load = recipe.workload
    try:
        runs = benchmarks_of(recipe)
    except ValueError:
        return
    for run in runs:
        duration = times.seconds(run.config["duration"])
        if duration < 60:
            yield f"{run.name}: duration of {duration:g} s is short: percentiles need samples"
        elif duration > 4 * 3600:
            yield f"{run.name}: duration of {duration / 3600:g} h is long"
        if times.seconds(run.config.get("warmup") or 0) < 30:
            yield f"{run.name}: warm-up of less than 30 s: caches and kernels may still be cold"
        if (run.config.get("target_rps") or 0) > 1_000:
            yield f"{run.name}: target_rps of {run.config['target_rps']:g} is high"
        if run.config.get("target_rps") is not None:
            if run.config.get("num_threads") or load.clients_per_node:
                yield f"{run.name}: with target_rps the schedule says how many are on their way, not clients_per_node"
        elif (run.config.get("num_threads") or run.config["clients_per_node"]) > 100:
            yield f"{run.name}: more than 100 clients per node"
    if load.service == "vllm" and load.prompt_len is None and not load.dataset:
        yield f"workload.prompt_len: not set: prompts have {workload.PROMPT_TOKENS} tokens"
    if "concurrency" in {name for run in runs for name in run.config}:
        yield "workload.concurrency: counts all clients together, and clients_per_node is put out of force by it"


def _slurm_warnings(recipe: Recipe) -> Iterator[str]:
    allocation, resources = recipe.orchestration.node_allocation, recipe.resources
    servers, clients = allocation.servers.nodes, allocation.clients.nodes
    if clients > 4 * servers:
        yield f"{_PLACE}: {clients} client nodes for {servers} server nodes"
    if recipe.orchestration.total_nodes == servers + clients:
        yield "orchestration.total_nodes: leaves no node for the orchestrator: it shares the first client's"
    for name, part in (("servers", resources.servers), ("clients", resources.clients)):
        if part.gpus > 8:
            yield f"resources.{name}.gpus: {part.gpus} on one node"
        if part.cpus_per_task > 128:
            yield f"resources.{name}.cpus_per_task: {part.cpus_per_task} on one node"
        if part.mem_gb > 512:
            yield f"resources.{name}.mem_gb: {part.mem_gb} on one node"
    if resources.clients.gpus:
        yield "resources.clients.gpus: clients send requests and compute nothing; these GPUs will idle"
    layers = recipe.servers.service_config.get("gpu_layers")
    if recipe.workload.service == "ollama" and layers == 0 and resources.servers.gpus:
        yield "servers.service_config.gpu_layers: 0 keeps the model off the GPUs that servers ask for; leave it out"
    if recipe.monitoring.enabled is False and recipe.monitoring.metrics:
        yield "monitoring.metrics: named, but monitoring.enabled is false"
    whole = sum(run.length_s for run in benchmarks_of(recipe)) * recipe.repetitions
    limit = times.time_limit(recipe.orchestration.job_config.time_limit)
    if whole > limit:
        yield f"orchestration.job_config.time_limit: {limit / 60:g} min, the load alone takes {whole / 60:g} min"
    if recipe.artifacts.python is not None:
        yield "artifacts.python: herder runs on the nodes themselves; --in-container runs it in this image"
    if recipe.artifacts.container and not recipe.artifacts.container.endswith(".sif") and not recipe.artifacts.service:
        yield f"artifacts.container: {recipe.artifacts.container!r} is no .sif image: servers run without a container"
