"""The servers' side of a service: whether they are ready, and what they need before load comes.

Methods answer with a bool, as the toolkit's document has them; `problems` says why one was False. Endpoints are asked
at the same time, each until the deadline.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from agent.suite.asking import ask, ask_json, ask_lines, at_once, reason, url_of

ASK_S = 5.0


class BaseServerManager(ABC):
    """Servers of one service."""

    default_port = 8000

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.problems: list[str] = []
        self.say: Callable[[str], None] = lambda text: None
        """Told of progress."""

    @abstractmethod
    def verify_health(self, endpoints: list[str], timeout: int = 600) -> bool:
        """Whether all endpoints get ready in time."""

    @abstractmethod
    def prepare_service(self, endpoints: list[str], timeout: int = 600) -> bool:
        """Brings all endpoints to where load can come, as with a model that is pulled."""

    @abstractmethod
    def get_health_check_endpoint(self) -> str:
        """The path that is asked."""

    @classmethod
    def parse_service_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The service's own settings with their defaults, from a recipe or its `service_config`. Raises: ValueError."""
        return dict(config)

    def get_service_name(self) -> str:
        """The service."""
        return type(self).__name__.replace("ServerManager", "").lower()

    # for those that ask over HTTP
    @property
    def _health(self) -> dict[str, Any]:
        return dict(self.config.get("health_check") or {})

    @property
    def _model(self) -> str:
        inner = self.config.get("service_config") or {}
        return str(self.config.get("model") or inner.get("model") or "")

    def _verify(self, endpoints: Sequence[str], paths: Sequence[str], timeout: float) -> bool:
        """Asks each endpoint for each path until all answer 200, or the recipe says that nobody asks."""
        health = self._health
        if health.get("enabled") is False:
            self.say("health checks are switched off by the recipe")
            return True
        limit = float(health.get("timeout") or timeout)
        interval = float(health.get("interval") or 2.0)
        wanted = [str(health["endpoint"])] if health.get("endpoint") else []
        wanted += [path for path in paths if path not in wanted]

        def until(endpoint: str) -> str:
            deadline = time.monotonic() + limit
            said = ""
            while True:
                said = _first_problem(url_of(endpoint), wanted, max(0.1, min(ASK_S, deadline - time.monotonic())))
                if not said:
                    return ""
                if time.monotonic() + interval > deadline:
                    return f"{endpoint}: {said}, after {limit:g} s"
                time.sleep(interval)

        return self._each(endpoints, until)

    def _each(self, endpoints: Sequence[str], work: Callable[[str], str]) -> bool:
        """Does work for each endpoint at once; it answers with a problem or nothing."""
        self.problems = [said for said in at_once(work, endpoints) if said]
        return not self.problems


def _first_problem(url: str, paths: Sequence[str], timeout_s: float) -> str:
    for path in paths:
        try:
            status, _ = ask("GET", f"{url}/{path.lstrip('/')}", timeout_s=timeout_s)
        except OSError as error:
            return f"{path}: {reason(error)}"
        if status != 200:
            return f"{path} answers {status}"
    return ""


class OllamaServerManager(BaseServerManager):
    """Ollama: ready when /api/tags answers; a model that is not there is pulled."""

    default_port = 11434

    def verify_health(self, endpoints: list[str], timeout: int = 600) -> bool:
        """Whether all endpoints answer in time."""
        return self._verify(endpoints, ["/api/tags"], timeout)

    def get_health_check_endpoint(self) -> str:
        """The list of models."""
        return "/api/tags"

    @classmethod
    def parse_service_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """model and gpu_layers; the latter goes with every request as `num_gpu`."""
        inner = dict((config.get("servers") or {}).get("service_config") or config.get("service_config") or config)
        layers = inner.get("gpu_layers")
        if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < -1):
            raise ValueError(f"gpu_layers {layers!r}: a whole number; -1 for all, 0 for none")
        return {"model": inner.get("model"), "gpu_layers": layers} | inner

    def prepare_service(self, endpoints: list[str], timeout: int = 600) -> bool:
        """Pulls the model where it is not."""
        model = self._model
        if not model:
            self.problems = ["workload.model is missing: which model is to be pulled?"]
            return False
        return self._each(endpoints, lambda endpoint: self._prepare(endpoint, model, timeout))

    def _prepare(self, endpoint: str, model: str, timeout: float) -> str:
        url, deadline = url_of(endpoint), time.monotonic() + timeout
        try:
            if _has_model(url, model):
                return ""
            self.say(f"{endpoint}: pulling {model}")
            for state in ask_lines(f"{url}/api/pull", body={"model": model, "stream": True}, timeout_s=timeout):
                if state.get("error"):
                    return f"{endpoint}: pull of {model}: {state['error']}"
                self._progress(endpoint, model, state)
                if time.monotonic() > deadline:
                    return f"{endpoint}: pull of {model} took more than {timeout:g} s"
            if not _has_model(url, model):
                return f"{endpoint}: {model} is not there after its pull"
        except OSError as error:
            return f"{endpoint}: {reason(error)}"
        return ""

    def _progress(self, endpoint: str, model: str, state: dict[str, Any]) -> None:
        total, done = state.get("total"), state.get("completed")
        if isinstance(total, int) and total > 0 and isinstance(done, int):
            step = done * 10 // total
            if step != getattr(self, "_step", None):
                self._step = step
                self.say(f"{endpoint}: {model} {done / total:.0%}")


def _has_model(url: str, model: str) -> bool:
    """Whether Ollama has a model; a name without a tag means `latest`."""
    _, tags = ask_json("GET", f"{url}/api/tags", timeout_s=30.0)
    names = {str(entry.get("name") or entry.get("model")) for entry in tags.get("models") or () if entry}
    return model in names or (":" not in model and f"{model}:latest" in names)


class VllmServerManager(BaseServerManager):
    """vLLM: ready when /health and /v1/models answer; the model must be one that is served."""

    defaults: dict[str, Any] = {  # noqa: RUF012
        "max_model_len": 2048,
        "gpu_memory_utilization": 0.9,
        "enforce_eager": False,
        "trust_remote_code": False,
    }
    ray_defaults: dict[str, Any] = {  # noqa: RUF012
        "dashboard_port": 8265,
        "object_manager_port": 8076,
        "node_manager_port": 8077,
    }

    def verify_health(self, endpoints: list[str], timeout: int = 600) -> bool:
        """Whether all endpoints answer in time; each counts."""
        return self._verify(endpoints, ["/health", "/v1/models"], timeout)

    def get_health_check_endpoint(self) -> str:
        """vLLM's own."""
        return "/health"

    @classmethod
    def parse_service_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Everything with its defaults; tensor_parallel_size may stand outside `distributed`."""
        inner = dict((config.get("servers") or {}).get("service_config") or config.get("service_config") or config)
        distributed = {"enabled": False, "backend": "ray", "tensor_parallel_size": 1, "pipeline_parallel_size": 1}
        distributed |= {name: inner.pop(name) for name in ("tensor_parallel_size", "pipeline_parallel_size")
                        if name in inner}  # fmt: skip
        given = dict(inner.get("distributed") or {})
        unknown = set(given) - {*distributed, "ray"}
        if unknown:
            raise ValueError(f"distributed.{min(unknown)}: no such key")
        if given.get("backend", "ray") != "ray":
            raise ValueError(f"distributed.backend {given['backend']!r}: ray is the one there is")
        ray = cls.ray_defaults | dict(given.pop("ray", None) or {})
        return cls.defaults | inner | {"distributed": distributed | given | {"ray": ray}}

    def prepare_service(self, endpoints: list[str], timeout: int = 600) -> bool:
        """Checks that every endpoint serves the model."""
        model = self._model
        if not model:
            self.problems = ["workload.model is missing: vLLM wants its name with every request"]
            return False

        def check(endpoint: str) -> str:
            try:
                _, found = ask_json("GET", f"{url_of(endpoint)}/v1/models", timeout_s=30.0)
            except OSError as error:
                return f"{endpoint}: {reason(error)}"
            served = [str(entry.get("id")) for entry in found.get("data") or () if isinstance(entry, dict)]
            return "" if model in served else f"{endpoint} serves {', '.join(served) or 'nothing'}, not {model}"

        return self._each(endpoints, check)


class DummyServerManager(BaseServerManager):
    """Any HTTP server with /health."""

    def verify_health(self, endpoints: list[str], timeout: int = 600) -> bool:
        """Whether all endpoints answer in time."""
        return self._verify(endpoints, ["/health"], timeout)

    def get_health_check_endpoint(self) -> str:
        """What is asked."""
        return "/health"

    def prepare_service(self, endpoints: list[str], timeout: int = 600) -> bool:
        """Needs nothing."""
        return True
