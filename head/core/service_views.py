"""What is true of services now: their state in one word, and where requests for a model may go."""

from __future__ import annotations

import msgspec

from head.core.objects import Replica, Service
from head.core.state import State
from herder.types import ServiceState

_COMING = frozenset({"pending", "waiting_copy", "starting", "unhealthy"})
_ANYWHERE = frozenset({"", "0.0.0.0", "::", "[::]"})  # listens everywhere: its node's address reaches it


class Route(msgspec.Struct, frozen=True):
    """A ready engine: where it listens, its own key, and the model name it answers to."""

    replica: str
    generation: int
    service: str
    node: str
    host: str
    port: int
    api_key: str
    served_name: str


def is_serving(state: State, replica: Replica) -> bool:
    """Whether requests may go to this replica: ready and wanted, its node not lost, no failed probe since."""
    node = state.nodes.get(replica.node)
    return (
        replica.state == "ready"
        and replica.desired == "running"
        and replica.port > 0
        and node is not None
        and node.status == "online"
        and state.unwell.get(replica.id) != replica.generation
    )


def ready_count(state: State, name: str) -> int:
    """Replicas of a service that answer."""
    return sum(is_serving(state, state.replicas[key]) for key in state.replicas_by_service.get(name, ()))


def service_state(state: State, name: str) -> ServiceState:
    """pending | starting | ready | degraded | stopping | stopped | failed; `stopped` also for one that is not there."""
    service = state.services.get(name)
    if service is None:
        return "stopped"
    if service.desired == "stopped":
        return "stopping"
    if service.replicas == 0:
        return "stopping" if state.replicas_by_service.get(name) else "stopped"
    ready = ready_count(state, name)
    if ready:
        return "ready" if ready >= service.replicas else "degraded"
    return _without_ready(state, service)


def _without_ready(state: State, service: Service) -> ServiceState:
    held = [state.replicas[key] for key in state.replicas_by_service.get(service.name, ())]
    wanted = [replica for replica in held if replica.desired == "running"]
    if any(replica.state in _COMING for replica in wanted):
        return "starting"
    if service.error is not None or any(replica.state == "failed" for replica in wanted):
        return "failed"
    return "degraded" if wanted else "pending"  # ready engines that cannot be reached


def routes(state: State, model_name: str) -> list[Route]:
    """The ready engines of a model, or of the service of that name, by replica id."""
    keys = state.replicas_by_model.get(model_name) or state.replicas_by_service.get(model_name) or {}
    found = [_route(state, state.replicas[key]) for key in keys if is_serving(state, state.replicas[key])]
    return sorted(found, key=lambda route: route.replica)


def routes_of_service(state: State, name: str) -> list[Route]:
    """The ready engines of one service, by replica id."""
    held = (state.replicas[key] for key in sorted(state.replicas_by_service.get(name, ())))
    return [_route(state, replica) for replica in held if is_serving(state, replica)]


def _route(state: State, replica: Replica) -> Route:
    # Requests carry prompts and the engine's key: they go to the node that we know, wherever a report points.
    host = state.nodes[replica.node].advertise or ("127.0.0.1" if replica.host in _ANYWHERE else replica.host)
    return Route(
        replica=replica.id,
        generation=replica.generation,
        service=replica.service,
        node=replica.node,
        host=host,
        port=replica.port,
        api_key=replica.api_key,
        served_name=replica.model or replica.service,
    )
