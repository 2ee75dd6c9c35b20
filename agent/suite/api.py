"""The suite for Python programs, under the names of the HPC benchmark toolkit's document.

    from agent.suite.api import Orchestrator
    results = Orchestrator(["gpu1"], ["cpu1"], "recipe.yaml", server_port=8000, client_port=6000).run()
    results["throughput_rps"]

A kind of service of one's own: three classes and `ServiceFactory.register_service`, in a module that `--plugin` names.
"""

from agent.suite.controller import (
    BaseWorkloadController,
    DummyWorkloadController,
    OllamaWorkloadController,
    VllmWorkloadController,
)
from agent.suite.errors import CODES, SuiteError
from agent.suite.executors import (
    BaseWorkloadExecutor,
    DummyWorkloadExecutor,
    OllamaWorkloadExecutor,
    VllmWorkloadExecutor,
)
from agent.suite.logs import BaseLogCollector, LogSource, TailerLogCollector
from agent.suite.orchestrator import Interrupted, Orchestrator
from agent.suite.ray import RayClusterManager
from agent.suite.registry import ServiceFactory
from agent.suite.servers import BaseServerManager, DummyServerManager, OllamaServerManager, VllmServerManager
from agent.suite.workload import Style

__all__ = [
    "CODES",
    "BaseLogCollector",
    "BaseServerManager",
    "BaseWorkloadController",
    "BaseWorkloadExecutor",
    "DummyServerManager",
    "DummyWorkloadController",
    "DummyWorkloadExecutor",
    "Interrupted",
    "LogSource",
    "OllamaServerManager",
    "OllamaWorkloadController",
    "OllamaWorkloadExecutor",
    "Orchestrator",
    "RayClusterManager",
    "ServiceFactory",
    "Style",
    "SuiteError",
    "TailerLogCollector",
    "VllmServerManager",
    "VllmWorkloadController",
    "VllmWorkloadExecutor",
]
