"""One suite from the servers' health to its summary, in the order of the toolkit's orchestrator.

servers healthy -> service prepared -> monitor -> clients healthy -> logs -> every benchmark, every repetition ->
results/<name>.metrics.json -> results/benchmark_suite.summary.json. What fails says its code (E001 to E008). A client
that dies costs coverage and a bounded time; an interruption stops all clients.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from agent.suite import checks, plan, reading, results
from agent.suite.asking import url_of
from agent.suite.controller import BaseWorkloadController
from agent.suite.errors import SuiteError
from agent.suite.logs import LogSource
from agent.suite.plan import Benchmark
from agent.suite.registry import ServiceFactory, load_plugins
from agent.suite.schema import Recipe
from agent.suite.servers import BaseServerManager
from herder import __version__
from herder.errors import HerderError

DEFAULT_OUTPUT = "./benchmark_output"
PUSHGATEWAY_PORT = 9091
PROGRESS_S = 10.0
_SECRET = re.compile("token|key|secret|passw|credential", re.I)


class Interrupted(Exception):
    """Somebody pressed Ctrl-C, or Slurm ended the job."""


class Orchestrator:
    """Runs one recipe against servers and executors that are there."""

    def __init__(
        self,
        server_nodes: Sequence[str],
        client_nodes: Sequence[str],
        config_file: str | Path,
        server_port: int = 11434,
        client_port: int = 5000,
        timeout: float = 600,
        *,
        enable_monitoring: bool = False,
        pushgateway_node: str | None = None,
        monitor_interval: float = 5,
        monitor_output: str | Path = "benchmark_metrics.csv",
        output_dir: str | Path | None = None,
        plugins: Sequence[str] = (),
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.server_nodes, self.client_nodes = list(server_nodes), list(client_nodes)
        self.config_file = Path(config_file)
        self.server_port, self.client_port, self.timeout = server_port, client_port, timeout
        self.enable_monitoring, self.pushgateway_node = enable_monitoring, pushgateway_node
        self.monitor_interval, self.monitor_output = monitor_interval, Path(monitor_output)
        self.plugins = tuple(plugins)
        self.say: Callable[[str], None] = say or (lambda text: None)
        self._output = output_dir
        self._stopped = threading.Event()
        self._controller: BaseWorkloadController | None = None

    def stop(self) -> None:
        """Ends the run soon; from any thread."""
        self._stopped.set()

    def run(self) -> dict[str, Any]:
        """The summary, with the figures of all benchmarks together at its top. Raises: SuiteError, Interrupted."""
        recipe, runs = self._read()
        folder = self._folder(recipe)
        try:
            return self._run(recipe, runs, folder)
        except OSError as error:
            said = f"{error.filename or folder}: {error.strerror or error}"
            raise SuiteError("E005", said, hint="OUTPUT_DIR names another folder") from None

    def _run(self, recipe: Recipe, runs: list[Benchmark], folder: Path) -> dict[str, Any]:
        endpoints = [_endpoint(node, self.server_port) for node in self.server_nodes]
        started = time.time()
        manager = self._manager(recipe)
        with ExitStack() as stack:
            stack.enter_context(self._signals())
            self._servers(manager, endpoints)
            samples = stack.enter_context(self._monitor(recipe))
            controller = self._clients(recipe)
            stack.callback(self._end_clients)
            collector = self._logs(recipe, folder, stack)
            done = self._suite(recipe, runs, endpoints, controller, folder)
        summary = self._summary(recipe, done, started, endpoints)
        if collector:
            summary["logs"] = collector
        self._write(recipe, folder, summary, done, samples)
        return summary

    # before the load
    def _read(self) -> tuple[Recipe, list[Benchmark]]:
        try:
            load_plugins(self.plugins)
            if self.enable_monitoring and not self.pushgateway_node:
                raise SuiteError("E006", "--enable-monitoring needs --pushgateway-node")
            if not self.server_nodes or not self.client_nodes:
                raise SuiteError("E006", "at least one server node and one client node are needed")
            if len(set(self.client_nodes)) < len(self.client_nodes):
                raise SuiteError("E006", "a client node is named twice: one executor runs one workload")
            recipe = reading.recipe_of(reading.load(self.config_file), where=self.config_file.name)
            found = checks.errors(recipe, for_slurm=False)
            if found:
                raise reading.Mistakes(self.config_file.name, found)
            for said in checks.warnings(recipe, for_slurm=False):
                self.say(f"warning: {said}")
            return recipe, plan.benchmarks_of(recipe)
        except OSError as error:
            raise SuiteError("E006", f"{self.config_file}: {error.strerror or error}") from None
        except reading.Mistakes as error:
            raise SuiteError("E006", str(error)) from None

    def _folder(self, recipe: Recipe) -> Path:
        """Where results go: OUTPUT_DIR, else the recipe's output_directory, else the toolkit's default."""
        named = str(self._output or os.environ.get("OUTPUT_DIR") or recipe.reporting.output_directory or DEFAULT_OUTPUT)
        experiment = f"{plan.file_name(recipe.scenario)}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path(named.replace("{experiment_id}", experiment))
        try:
            (folder / "results").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SuiteError("E006", f"{folder}: {error.strerror}", hint="OUTPUT_DIR names another folder") from None
        self.say(f"results go to {folder}")
        return folder

    def _manager(self, recipe: Recipe) -> BaseServerManager:
        config = {
            "model": recipe.workload.model,
            "health_check": {
                name: value
                for name, value in msgspec.structs.asdict(recipe.servers.health_check).items()
                if value not in (None, "")
            },
            "service_config": dict(recipe.servers.service_config),
        }
        manager = ServiceFactory.create_server_manager(recipe.workload.service, config)
        manager.say = self.say
        return manager

    def _servers(self, manager: BaseServerManager, endpoints: list[str]) -> None:
        self.say(f"servers: {', '.join(endpoints)}")
        if not self._guarded("E001", lambda: manager.verify_health(endpoints, int(self.timeout))):
            raise SuiteError("E001", "; ".join(getattr(manager, "problems", ())) or "a server is not healthy")
        if not self._guarded("E003", lambda: manager.prepare_service(endpoints, int(self.timeout))):
            raise SuiteError("E003", "; ".join(getattr(manager, "problems", ())) or "a server is not prepared")

    def _guarded(self, code: str, work: Callable[[], bool]) -> bool:
        """Runs code of a service, which may be anybody's."""
        if self._stopped.is_set():
            raise Interrupted
        try:
            return bool(work())
        except SuiteError:
            raise
        except Exception as error:
            raise SuiteError(code, f"{type(error).__name__}: {error}") from error

    @contextmanager
    def _monitor(self, recipe: Recipe) -> Iterator[Path | None]:
        """This machine's samples while the suite runs, pushed as the flags say."""
        if not self.enable_monitoring:
            yield None
            return
        from agent.monitor.api import Monitor

        kinds = {metric.type for metric in recipe.monitoring.metrics}
        metrics = [name for name, kind in (("gpu", "gpu"), ("cpu", "system"), ("ram", "system"))
                   if not kinds - {"prometheus"} or kind in kinds]  # fmt: skip
        node = str(self.pushgateway_node)
        address = node if ":" in node else f"{node}:{PUSHGATEWAY_PORT}"
        labels = {"instance": os.uname().nodename}
        if os.environ.get("SLURM_JOB_ID"):
            labels["slurm_job_id"] = os.environ["SLURM_JOB_ID"]
        self.monitor_output.parent.mkdir(parents=True, exist_ok=True)
        try:
            monitor = Monitor(
                output_file=self.monitor_output,
                interval=float(self.monitor_interval),
                metrics=metrics,
                prometheus_pushgateway_url=url_of(address),
                prometheus_grouping_labels=labels,
            )
            monitor.start()
        except (HerderError, OSError, ValueError) as error:
            raise SuiteError("E005", f"the monitor: {error}") from None
        try:
            yield self.monitor_output
        finally:
            monitor.stop()

    def _clients(self, recipe: Recipe) -> BaseWorkloadController:
        controller = ServiceFactory.create_workload_controller(
            recipe.workload.service, self.client_nodes, port=self.client_port, timeout=self.timeout
        )
        self._controller = controller
        self.say(f"clients: {', '.join(self.client_nodes)} at port {self.client_port}")
        if not self._guarded("E002", controller.verify_client_health):
            raise SuiteError("E002", "; ".join(getattr(controller, "problems", ())) or "a client is not healthy")
        return controller

    def _logs(self, recipe: Recipe, folder: Path, stack: ExitStack) -> dict[str, Any]:
        """Follows the logs that lie in the output folder; the summary of what was collected, filled at the end."""
        said: dict[str, Any] = {}
        if not recipe.logging.enabled:
            return said
        config = msgspec.to_builtins(recipe.logging)
        collector = ServiceFactory.create_log_collector(recipe.logging.type, config, folder / "logs")
        servers, clients = _hosts(self.server_nodes), _hosts(self.client_nodes)
        sources = [LogSource(node, component) for node in servers for component in ("server", "ray")]
        sources += [LogSource(node, "client") for node in clients]
        sources += [LogSource(node, "monitor") for node in dict.fromkeys((*servers, *clients))]
        sources += [LogSource("local", "orchestrator"), LogSource("job", "slurm")]
        if collector.deploy(sources) and collector.start_collection():
            stack.callback(lambda: said.update(collector.stop_collection()))
            said["folder"] = str(folder / "logs")
        return said

    # the load
    def _suite(
        self,
        recipe: Recipe,
        runs: Sequence[Benchmark],
        endpoints: Sequence[str],
        controller: BaseWorkloadController,
        folder: Path,
    ) -> list[dict[str, Any]]:
        try:
            targets = plan.targets_of(recipe, self.client_nodes, endpoints)
        except ValueError as error:
            raise SuiteError("E006", str(error)) from None
        done: list[dict[str, Any]] = []
        for run in runs:
            of_name: list[dict[str, Any]] = []
            for repetition in range(1, recipe.repetitions + 1):
                # Another seed each time: the same prompts again would be answered from prefix caches.
                config = run.config | {"name": run.name, "seed": recipe.metadata.seed + repetition - 1}
                made = self._one(recipe, run, config, repetition, endpoints, targets, controller, folder)
                of_name.append(made)
                done.append(made)
                alone = {key: value for key, value in made.items() if key != "report"}
                if recipe.repetitions > 1:
                    results.write_json(folder / "results" / f"{run.name}.r{repetition}.metrics.json", alone)
            last = {key: value for key, value in of_name[-1].items() if key != "report"}
            if recipe.repetitions > 1:
                last["repetitions"] = spread_of(of_name)
            results.write_json(folder / "results" / f"{run.name}.metrics.json", last)
        return done

    def _one(
        self,
        recipe: Recipe,
        run: Benchmark,
        config: dict[str, Any],
        repetition: int,
        endpoints: Sequence[str],
        targets: Mapping[str, Sequence[str]],
        controller: BaseWorkloadController,
        folder: Path,
    ) -> dict[str, Any]:
        """One run to its figures. Raises: SuiteError E004, E005."""
        label = run.name + (f" ({repetition} of {recipe.repetitions})" if recipe.repetitions > 1 else "")
        self.say(f"{label}: starts")
        config = config | {"server_endpoints": list(endpoints)}
        extra: dict[str, Any] = {"targets": targets} if targets else {}
        if not self._guarded("E004", lambda: controller.start_workload(config, **extra)):
            raise SuiteError("E004", "; ".join(getattr(controller, "problems", ())) or "a client did not start")
        progress = Progress(self.say, label)
        found = controller.wait(config, on_poll=progress.take, is_stopped=self._stopped.is_set)
        if self._stopped.is_set():
            raise Interrupted
        aggregated = controller.aggregated(found)
        if len(aggregated["clients_lost"]) == len(self.client_nodes):
            why = "; ".join(f"{lost['node']}: {lost['reason']}" for lost in aggregated["clients_lost"])
            raise SuiteError("E005", f"{label}: no client is left: {why}")
        files = self._raw(recipe, label, run.name, repetition, controller, found, folder)
        self.say(
            f"{label}: {aggregated['total_requests']} requests, {aggregated['total_errors']} errors, "
            f"{aggregated['throughput_rps']:.2f} requests/s, p99 {aggregated['p99_latency']:.3f} s"
            + (f", DEGRADED: covers {aggregated['coverage']}" if aggregated["is_degraded"] else "")
        )
        clients = {
            node: {key: value for key, value in said.items() if key != "figures"} for node, said in found.items()
        }
        return {
            "benchmark_name": run.name,
            "repetition": repetition,
            "overrides": run.overrides,
            "config": config,
            "client_metrics": clients | {"aggregated": aggregated},
            "report": results.merged_report(files),
        }

    def _raw(
        self,
        recipe: Recipe,
        label: str,
        name: str,
        repetition: int,
        controller: BaseWorkloadController,
        found: Mapping[str, Any],
        folder: Path,
    ) -> list[bytes]:
        """Every request of the clients, where something that is to be written is made of them."""
        is_kept = "raw_data" in recipe.reporting.include
        if not is_kept and "html" not in recipe.reporting.formats:
            return []
        files = []
        for node in found:
            data = controller.fetch_result(node) if node not in controller.lost else None
            if data is None:
                continue
            files.append(data)
            if is_kept:
                tail = f".r{repetition}" if recipe.repetitions > 1 else ""
                raw = folder / "results" / f"{name}{tail}.{plan.file_name(node)}.load.bin"
                raw.write_bytes(data)
        return files

    def _end_clients(self) -> None:
        """After an interruption or a failure nobody goes on sending."""
        controller = self._controller
        if controller is not None and (self._stopped.is_set() or _is_failing()):
            controller.stop_own()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run; in other threads than the first nobody would be called."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, frame: Any) -> None:
            if self._stopped.is_set():
                raise KeyboardInterrupt
            self._stopped.set()
            self.say("stopping the clients; once more ends at once")
            raise Interrupted

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    # after it
    def _summary(
        self, recipe: Recipe, done: Sequence[Mapping[str, Any]], started: float, endpoints: Sequence[str]
    ) -> dict[str, Any]:
        metrics = [run["client_metrics"]["aggregated"] for run in done]
        elapsed = sum(one["elapsed_seconds"] for one in metrics)
        good = sum(one["total_requests"] - one["total_errors"] for one in metrics)
        return {
            "throughput_rps": good / elapsed if elapsed else 0.0,
            "total_requests": sum(one["total_requests"] for one in metrics),
            "total_errors": sum(one["total_errors"] for one in metrics),
            "is_degraded": any(one["is_degraded"] for one in metrics),
            "is_valid": all(one["is_valid"] for one in metrics),
            "experiment": {
                "scenario": recipe.scenario,
                "service": recipe.workload.service,
                "model": recipe.workload.model,
                "server_nodes": self.server_nodes,
                "client_nodes": self.client_nodes,
                "server_endpoints": list(endpoints),
                "repetitions": recipe.repetitions,
                "started": started,
                "ended": time.time(),
                "herder_version": __version__,
                "metadata": msgspec.to_builtins(recipe.metadata),
                "recipe": _without_secrets(msgspec.to_builtins(recipe)),
                "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            },
            "benchmarks": [
                {
                    "benchmark_name": run["benchmark_name"],
                    "repetition": run["repetition"],
                    "overrides": run["overrides"],
                    "metrics": {
                        name: value
                        for name, value in run["client_metrics"]["aggregated"].items()
                        if name not in ("figures", "per_client")
                    },
                }
                for run in done
            ],
        }

    def _write(
        self,
        recipe: Recipe,
        folder: Path,
        summary: dict[str, Any],
        done: Sequence[Mapping[str, Any]],
        samples: Path | None,
    ) -> None:
        """The files that the recipe's reporting asks for; the JSON summary always, as programs read it."""
        kept, wanted = folder / "results", recipe.reporting
        sampled = results.samples_of(folder, samples)
        if "resource_utilization" in wanted.include:
            summary["resource_utilization"] = {path.stem: results.utilization(path) for path in sampled}
        if "metrics_summary" not in wanted.include:
            for one in summary["benchmarks"]:
                one.pop("metrics")
        results.write_json(kept / "benchmark_suite.summary.json", summary)
        if "csv" in wanted.formats:
            results.write_csv(kept / "benchmark_suite.csv", done)
        is_drawn = "performance_graphs" in wanted.include
        page = kept / "benchmark_suite.html"
        if "html" in wanted.formats and not results.write_html(page, recipe.scenario, done, sampled, is_drawn=is_drawn):
            results.write_html(page, recipe.scenario, done, sampled, is_drawn=False)
            self.say("the HTML page has no graphs: this service's executors keep no single requests")
        logs = sorted((folder / "logs").glob("*.*")) if (folder / "logs").is_dir() else []
        results.mark(folder, recipe, logs, sampled)
        for path in results.prune(folder.resolve().parent):
            self.say(f"removed after its retention: {path}")


class Progress:
    """Says now and then what all clients together have done."""

    def __init__(self, say: Callable[[str], None], label: str) -> None:
        self._say, self._label, self._at = say, label, time.monotonic()

    def take(self, found: Mapping[str, Any]) -> None:
        """One poll's answers."""
        if time.monotonic() - self._at < PROGRESS_S:
            return
        self._at = time.monotonic()
        parts = [f"{node} {said.get('phase') or 'silent'}" for node, said in found.items()]
        total = sum(int(said.get("requests_total") or 0) for said in found.values())
        self._say(f"{self._label}: {total} requests so far ({', '.join(parts)})")


def spread_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How far repetitions lie apart: mean and standard deviation of the main figures, never of percentiles alone."""
    made: dict[str, Any] = {"count": len(runs)}
    for name in ("throughput_rps", "avg_latency", "p50_latency", "p99_latency"):
        values = [float(run["client_metrics"]["aggregated"][name]) for run in runs]
        made[name] = {
            "values": values,
            "mean": statistics.fmean(values),
            "stddev": statistics.stdev(values) if len(values) > 1 else 0.0,
        }
    return made


def _without_secrets(recipe: dict[str, Any]) -> dict[str, Any]:
    """Results are passed on, tokens in the servers' environment are not."""
    kept = {name: "..." if _SECRET.search(name) else value for name, value in recipe.get("environment", {}).items()}
    return recipe | {"environment": kept}


def _endpoint(node: str, port: int) -> str:
    if "://" in node:
        return node.rstrip("/")
    return f"http://{node}" if ":" in node else f"http://{node}:{port}"


def _hosts(nodes: Sequence[str]) -> list[str]:
    """Each host once, without scheme and port: logs are named after machines."""
    return list(dict.fromkeys(node.partition("://")[2].partition(":")[0] if "://" in node else node.partition(":")[0]
                              for node in nodes))  # fmt: skip


def _is_failing() -> bool:
    import sys

    return sys.exc_info()[0] is not None
