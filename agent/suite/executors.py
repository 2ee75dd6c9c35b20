"""What an executor of each service is: a style for the load generator, or threads of its own.

A class that leaves `_run_benchmark` alone is driven by Herder's load generator with its `style`. One that overrides it,
as classes of the toolkit do, gets N threads in a process of its own. Either way the process that serves the HTTP
contract sends no load itself.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from agent.suite import times
from agent.suite.workload import Style


class BaseWorkloadExecutor:
    """Runs on a client node; `run` serves the HTTP contract."""

    style = Style()
    """How the load generator asks this service."""

    def __init__(self, port: int = 5000) -> None:
        self.port = port
        self.service = ""
        self.workload_running = False
        self.shared_resources: dict[str, Any] = {}
        self.metrics_lock = threading.Lock()
        self.per_thread_metrics: dict[int, dict[str, Any]] = {}
        """By thread: requests, errors, latencies (seconds) as they grow; read once a second."""
        self.recorded: list[float] = []
        self.recorded_errors = 0

    def get_service_name(self) -> str:
        """The name in metrics."""
        return self.service or type(self).__name__.replace("WorkloadExecutor", "").lower()

    def _prepare_shared_resources(self, workload_config: dict[str, Any]) -> None:
        """Hook, before any thread starts."""

    def _run_benchmark(self, workload_config: dict[str, Any], thread_id: int) -> dict[str, Any] | None:
        """One thread's work until its duration is over or `workload_running` is false.

        Returns counts: total_requests, errors, elapsed_seconds, total_latency, latencies (seconds); or None, when it
        calls `record` for each request.
        """
        raise AssertionError("the load generator works for executors without a loop of their own")

    def record(self, latency_seconds: float, *, is_good: bool = True) -> None:
        """Counts a request; from any thread."""
        with self.metrics_lock:
            if is_good:
                self.recorded.append(latency_seconds)
            else:
                self.recorded_errors += 1

    def _parse_duration(self, duration: Any) -> int:
        return int(times.seconds(duration))

    @property
    def has_threads(self) -> bool:
        """Whether it works with threads of its own."""
        return type(self)._run_benchmark is not BaseWorkloadExecutor._run_benchmark

    @property
    def reference(self) -> str:
        """Where another process finds the class: `module:Name`, or `file.py:Name` for a program's own."""
        kind = type(self)
        module = kind.__module__
        if module == "__main__":
            import sys

            module = str(Path(str(sys.modules["__main__"].__file__)).resolve())
        return f"{module}:{kind.__qualname__}"

    def run(self, host: str = "127.0.0.1", **options: Any) -> None:
        """Serves until SIGTERM or SIGINT. See agent.suite.executor.serve for the options."""
        from agent.suite.executor import serve

        serve(self, host=host, **options)


class OllamaWorkloadExecutor(BaseWorkloadExecutor):
    """Ollama's own chat, streamed."""

    style = Style("ollama", apis=("ollama", "chat", "completions"))


class VllmWorkloadExecutor(BaseWorkloadExecutor):
    """OpenAI's completions, streamed: models without a chat template are asked, too."""

    style = Style("completions", apis=("completions", "chat"))


class DummyWorkloadExecutor(BaseWorkloadExecutor):
    """Plain GET of a path of any HTTP server."""

    style = Style("http", "/health", "GET", apis=("http", "chat", "completions", "ollama"))
