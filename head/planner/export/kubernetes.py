"""A PyTorchJob of the Kubeflow training operator for a job.

Versions: kubeflow.org/v1 (training operator 1.7 to 1.9): with `nprocPerNode` set it gives every pod torchrun's own
PET_* variables (nodes, rank, master), so the command names no address.
"""

from __future__ import annotations

from typing import Any

import yaml

from head.planner.export.job import TrainingJob, label
from head.planner.export.launchers import process_environment

RESOURCES = {"NVIDIA": "nvidia.com/gpu", "AMD": "amd.com/gpu", "Intel": "habana.ai/gaudi", "Google": "google.com/tpu"}
BACKOFF_LIMIT = 3


def pytorch_job(job: TrainingJob, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """The object: one pod per node, one torchrun in each."""
    replicas = {"Master": {"replicas": 1, "restartPolicy": "OnFailure", "template": {"spec": _pod(job, extra)}}}
    if job.nodes > 1:
        replicas["Worker"] = {
            "replicas": job.nodes - 1,
            "restartPolicy": "OnFailure",
            "template": {"spec": _pod(job, extra)},
        }
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": label(job.name), "namespace": job.namespace},
        "spec": {
            "nprocPerNode": str(job.gpus_per_node),
            "runPolicy": {"backoffLimit": BACKOFF_LIMIT, "cleanPodPolicy": "None"},
            "pytorchReplicaSpecs": replicas,
        },
    }


def manifest(job: TrainingJob, extra: tuple[str, ...] = ()) -> str:
    """The object as YAML."""
    return yaml.safe_dump(pytorch_job(job, extra), sort_keys=False)


def _pod(job: TrainingJob, extra: tuple[str, ...]) -> dict[str, Any]:
    """One pod. Command and arguments are lists: no shell reads them (and $(NAME) is kept from expanding)."""
    resource = RESOURCES.get(job.topology.accelerator.vendor, RESOURCES["NVIDIA"])
    limits = {} if job.is_cpu else {resource: job.gpus_per_node}
    args = [_literal(word) for word in (job.script, *job.script_args, *extra)]
    container: dict[str, Any] = {
        "name": "pytorch",
        "image": job.image,
        "command": ["torchrun"],
        "args": args,
        "env": [{"name": name, "value": _literal(value)} for name, value in sorted(process_environment(job).items())],
        "resources": {"limits": limits, "requests": {"cpu": str(job.cpus_per_gpu * job.gpus_per_node)}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108 - where NCCL and loaders share memory
    }
    shared = {"medium": "Memory", "sizeLimit": f"{job.shared_memory_gib}Gi"}
    return {"containers": [container], "volumes": [{"name": "shm", "emptyDir": shared}]}


def _literal(text: str) -> str:
    """Kubernetes expands $(NAME) in commands and variables; $$ keeps a dollar sign."""
    return text.replace("$(", "$$(")
