"""A Ray cluster for vLLM over several nodes: Ray's own commands, as argument lists.

`ray stop` ends every Ray process of the machine, whoever started it: on a shared machine say so to its users first.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from agent.suite.errors import SuiteError

COMMAND_S = 120.0
COUNT_NODES = (
    "import ray, sys; ray.init(address='auto', logging_level='error'); "
    "sys.exit(sum(node['Alive'] for node in ray.nodes()) < int(sys.argv[1]))"
)
"""A program that ends with 0 when so many nodes are in the cluster; Ray's own command for it needs the dashboard."""


class RayClusterManager:
    """Starts and joins Ray on this machine."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        """config: `distributed.ray` of a recipe."""
        self.config = dict(config or {})
        self.head_address = ""
        self.said = ""
        """What the last command said."""

    def get_head_ip(self) -> str:
        """This node's address on the network, as its routes have it; nothing is sent."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
                return str(probe.getsockname()[0])
            except OSError:
                return socket.gethostbyname(socket.gethostname())

    def get_ray_start_command(self, head_address: str = "", *, port: int = 6379, temp_dir: str = "") -> list[str]:
        """`ray start` of a worker that joins `head_address`, or of a head without one."""
        command = ["ray", "start", "--disable-usage-stats"]
        command += [f"--address={head_address}"] if head_address else ["--head", f"--port={port}"]
        names = {
            "object_manager_port": "--object-manager-port",
            "node_manager_port": "--node-manager-port",
            "num_cpus_per_node": "--num-cpus",
            "num_gpus_per_node": "--num-gpus",
        }
        if not head_address:
            names["dashboard_port"] = "--dashboard-port"
        command += [
            f"{flag}={int(self.config[key])}" for key, flag in names.items() if self.config.get(key) is not None
        ]
        return command + ([f"--temp-dir={temp_dir}"] if temp_dir and not head_address else [])

    def start_head_node(self, port: int = 6379, temp_dir: str = "") -> bool:
        """Starts the head here; `head_address` is where workers join. Raises: SuiteError without Ray."""
        is_up = self._run(self.get_ray_start_command(port=port, temp_dir=temp_dir))
        self.head_address = f"{self.get_head_ip()}:{port}" if is_up else ""
        return is_up

    def connect_worker(self, head_address: str) -> bool:
        """Joins this node to a head. Raises: SuiteError without Ray."""
        return self._run(self.get_ray_start_command(head_address))

    def start_worker_node(self, head_address: str) -> bool:
        """The same under its other name."""
        return self.connect_worker(head_address)

    def check_cluster_status(self) -> bool:
        """Whether a cluster answers here. Raises: SuiteError without Ray."""
        return self._run(["ray", "status"])

    def wait_for_nodes(self, count: int, timeout: float = 300.0) -> bool:
        """Waits until so many nodes are in: asked again and again instead of slept for. Raises: SuiteError."""
        self._run(["ray", "--version"])
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._run(["python3", "-c", COUNT_NODES, str(count)]):
                return True
            time.sleep(1.0)
        return False

    def stop_ray(self) -> bool:
        """Ends all of Ray on this machine. Raises: SuiteError without Ray."""
        self.head_address = ""
        return self._run(["ray", "stop"])

    def generate_vllm_distributed_command(self, model: str, service_config: dict[str, Any], port: int) -> list[str]:
        """vLLM's server over the cluster."""
        return vllm_command(model, service_config | {"backend": "ray"}, port)

    def _run(self, command: Sequence[str]) -> bool:
        if shutil.which(command[0]) is None:
            raise SuiteError("E003", "the command `ray` is not on PATH", hint="pip install 'ray[default]', or leave "
                             "servers.service_config.distributed out for a single node")  # fmt: skip
        # On one node as on many: without the same mode everywhere nodes do not find each other.
        environment = os.environ | {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}
        try:
            done = subprocess.run(
                list(command), capture_output=True, text=True, timeout=COMMAND_S, check=False, env=environment
            )
        except subprocess.TimeoutExpired:
            self.said = f"{command[0]} {command[1]} took more than {COMMAND_S:g} s"
            return False
        self.said = (done.stdout + done.stderr)[-2_000:]
        return done.returncode == 0


def vllm_command(model: str, config: dict[str, Any], port: int, *, host: str = "0.0.0.0") -> list[str]:
    """vLLM's server with every key of a service_config as its flag: max_model_len is --max-model-len.

    The module is named instead of `vllm serve`, which the images that recipes of the toolkit name do not have.
    """
    distributed = dict(config.get("distributed") or {})
    command = ["python3", "-m", "vllm.entrypoints.openai.api_server", f"--model={model}"]
    command += [f"--host={host}", f"--port={port}"]
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = int(config.get(name) or distributed.get(name) or 1)
        if size > 1:
            command.append(f"--{name.replace('_', '-')}={size}")
    if distributed.get("enabled") or config.get("backend") == "ray":
        command.append("--distributed-executor-backend=ray")
    own = ("distributed", "tensor_parallel_size", "pipeline_parallel_size", "backend", "model", "port")
    for name, value in config.items():
        if name in own or value is None or value is False:
            continue
        flag = f"--{str(name).replace('_', '-')}"
        command.append(flag if value is True else f"{flag}={value}")
    return command
