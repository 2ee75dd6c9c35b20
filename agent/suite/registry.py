"""Which services there are: their server manager, workload controller and workload executor, by name.

The three of the toolkit are there from the start. Others come from `ServiceFactory.register_service` in a module that
is named with `--plugin`, or from an entry point of the group `herder.services` with the service's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from agent.suite.errors import SuiteError

if TYPE_CHECKING:
    from agent.suite.controller import BaseWorkloadController
    from agent.suite.executors import BaseWorkloadExecutor
    from agent.suite.logs import BaseLogCollector
    from agent.suite.servers import BaseServerManager

GROUP = "herder.services"


class ServiceFactory:
    """Makes the parts of a service."""

    _servers: ClassVar[dict[str, type[BaseServerManager]]] = {}
    _controllers: ClassVar[dict[str, type[BaseWorkloadController]]] = {}
    _executors: ClassVar[dict[str, type[BaseWorkloadExecutor]]] = {}
    _collectors: ClassVar[dict[str, type[BaseLogCollector]]] = {}

    @classmethod
    def register_service(
        cls,
        name: str,
        server_class: type[BaseServerManager],
        controller_class: type[BaseWorkloadController],
        executor_class: type[BaseWorkloadExecutor],
    ) -> None:
        """Makes a service known. A name that is there already gets the new classes."""
        cls._servers[name] = server_class
        cls._controllers[name] = controller_class
        cls._executors[name] = executor_class

    @classmethod
    def register_log_collector(cls, collector_type: str, collector_class: type[BaseLogCollector]) -> None:
        """Makes a way to collect logs known."""
        cls._collectors[collector_type] = collector_class

    @classmethod
    def create_server_manager(cls, service_name: str, config: dict[str, Any]) -> BaseServerManager:
        """The manager of a service's servers. Raises: ValueError for a service that is not known."""
        made: BaseServerManager = cls._found(cls._servers, service_name)(config)
        return made

    @classmethod
    def create_workload_controller(
        cls,
        service_name: str,
        client_nodes: list[str],
        port: int = 5000,
        timeout: float = 600,
        health_timeout: float | None = None,
    ) -> BaseWorkloadController:
        """The controller of a service's executors. Raises: ValueError for a service that is not known."""
        made = cls._found(cls._controllers, service_name)
        # Classes of others know the three arguments of the document.
        controller: BaseWorkloadController = made(client_nodes, port, timeout)
        controller.service = service_name
        if health_timeout is not None:
            controller.health_timeout = health_timeout
        return controller

    @classmethod
    def create_workload_executor(cls, service_name: str, port: int = 5000) -> BaseWorkloadExecutor:
        """The executor of a service. Raises: ValueError for a service that is not known."""
        executor: BaseWorkloadExecutor = cls._found(cls._executors, service_name)(port)
        executor.service = service_name
        return executor

    @classmethod
    def create_log_collector(
        cls, collector_type: str, config: dict[str, Any], output_dir: str | Path
    ) -> BaseLogCollector:
        """A collector of logs. Raises: ValueError for a kind that is not known."""
        cls._register_own()
        if collector_type not in cls._collectors:
            raise ValueError(f"unknown log collector {collector_type!r}: one of {', '.join(sorted(cls._collectors))}")
        return cls._collectors[collector_type](config, Path(output_dir))

    @classmethod
    def list_services(cls) -> list[str]:
        """Names of all that can be benchmarked."""
        cls._register_own()
        return sorted({*cls._servers, *(entry.name for entry in entry_points(group=GROUP))})

    @classmethod
    def list_log_collectors(cls) -> list[str]:
        """Kinds of collectors."""
        cls._register_own()
        return sorted(cls._collectors)

    @classmethod
    def _found(cls, kinds: dict[str, Any], name: str) -> Any:
        cls._register_own()
        if name not in kinds:
            for entry in entry_points(group=GROUP, name=name):
                loaded = entry.load()
                if callable(loaded) and name not in kinds:
                    loaded()
        if name not in kinds:
            raise ValueError(
                f"unknown service {name!r}: one of {', '.join(cls.list_services())}; "
                "--plugin MODULE brings others that call ServiceFactory.register_service"
            )
        return kinds[name]

    @classmethod
    def _register_own(cls) -> None:
        from agent.suite import controller, executors, logs, servers

        own: dict[str, Any] = {
            "ollama": (
                servers.OllamaServerManager, controller.OllamaWorkloadController, executors.OllamaWorkloadExecutor
            ),
            "vllm": (servers.VllmServerManager, controller.VllmWorkloadController, executors.VllmWorkloadExecutor),
            "dummy": (servers.DummyServerManager, controller.DummyWorkloadController, executors.DummyWorkloadExecutor),
        }  # fmt: skip
        for name, classes in own.items():
            if name not in cls._servers:
                cls.register_service(name, *classes)
        cls._collectors.setdefault("tailer", logs.TailerLogCollector)


def load_plugins(modules: Iterable[str]) -> None:
    """Imports modules that register services. Raises: SuiteError E006 for one that cannot be imported."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise SuiteError(
                "E006",
                f"the plugin {name!r} cannot be imported: {type(error).__name__}: {error}",
                hint="a plugin is a module's name, found on PYTHONPATH",
            ) from error
