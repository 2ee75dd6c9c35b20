"""A recipe from a few answers: what `herder suite create` asks for, or gets from its flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from agent.suite import checks, reading

KINDS = ("ollama", "vllm", "vllm-distributed", "dummy")


@dataclass(frozen=True, slots=True)
class Answers:
    """What differs from one recipe to the next."""

    kind: str = "ollama"
    scenario: str = "benchmark"
    partition: str = "gpu"
    account: str = "default"
    model: str = ""
    servers: int = 1
    clients: int = 1
    gpus: int = 1
    cpus: int = 8
    mem_gb: int = 64
    clients_per_node: int = 10
    duration: str = "2m"
    warmup: str = "30s"
    time_limit: str = "01:00:00"
    target_rps: float | None = None
    image: str = ""
    remote: str = ""
    containers_dir: str = ""


def document_of(answers: Answers) -> dict[str, Any]:
    """The recipe. Raises: reading.Mistakes when the answers do not go together."""
    service = answers.kind.partition("-")[0]
    load: dict[str, Any] = {"component": "inference", "service": service, "duration": answers.duration,
                            "warmup": answers.warmup}  # fmt: skip
    if answers.model:
        load["model"] = answers.model
    if answers.target_rps is not None:
        load |= {"target_rps": answers.target_rps, "request_distribution": "poisson"}
    else:
        load["clients_per_node"] = answers.clients_per_node
    config: dict[str, Any] = {}
    if service == "vllm":
        config = {"max_model_len": 2048}
        load |= {"prompt_len": 512, "gen_tokens": 128}
    if answers.kind == "vllm-distributed":
        config["distributed"] = {
            "enabled": True,
            "backend": "ray",
            "tensor_parallel_size": max(1, answers.gpus * answers.servers),
        }
    made: dict[str, Any] = {
        "scenario": answers.scenario,
        "partition": answers.partition,
        "account": answers.account,
        "orchestration": {
            "mode": "slurm",
            "total_nodes": answers.servers + answers.clients + 1,
            "node_allocation": {"servers": {"nodes": answers.servers}, "clients": {"nodes": answers.clients}},
            "job_config": {"time_limit": answers.time_limit, "exclusive": True},
        },
        "resources": {
            "servers": {"gpus": answers.gpus, "cpus_per_task": answers.cpus, "mem_gb": answers.mem_gb},
            "clients": {"gpus": 0, "cpus_per_task": 4, "mem_gb": 8},
        },
        "workload": load,
        "servers": {"health_check": {"timeout": 600, "interval": 5}} | ({"service_config": config} if config else {}),
    }
    if answers.image:
        service_image = {"path": answers.image} | ({"remote": answers.remote} if answers.remote else {})
        made["artifacts"] = {"service": service_image}
        if answers.containers_dir:
            made["artifacts"]["containers_dir"] = answers.containers_dir
    recipe = reading.recipe_of(made, for_slurm=True)
    found = checks.errors(recipe)
    if found:
        raise reading.Mistakes("recipe", found)
    return made


def text_of(document: dict[str, Any]) -> str:
    """As YAML."""
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
