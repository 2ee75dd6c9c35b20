"""What must hold of a whole cluster once nothing hurts it: desired is there, and nothing else moves or grows."""

from __future__ import annotations

from collections.abc import Iterator

from common import limits
from head.core import events as ev
from head.core.effects import Reply
from head.core.state import JOB_ENDED, State
from herder import types as api
from tests.sim.people import People
from tests.sim.sim_head import SimHead
from tests.sim.sim_node import SimNode

QUIET_ROWS = 80  # records that a cluster at rest may write in QUIET_MS: what waits is tried again now and then
QUIET_MS = 200_000


class Rest:
    """Looks at head and machines; every method yields what is wrong, in words."""

    def __init__(self, head: SimHead, nodes: dict[str, SimNode], people: People) -> None:
        self.head = head
        self.nodes = {name: node for name, node in nodes.items() if not node.is_gone}
        self.stores = [node.machine.store for node in nodes.values()]
        self.people = people

    @property
    def _state(self) -> State:
        return self.head.state

    def wrong(self) -> list[str]:
        """Everything that is not as it should be."""
        return [
            *self.people.history.broken(self._state),
            *self._copies(),
            *self._engines(),
            *self._services(),
            *self._jobs(),
            *self._nodes(),
            *self._models(),
            *self._queues(),
            *self._agents(),
            *self._quiet(),
            *self._whys(),
        ]

    def _copies(self) -> Iterator[str]:
        for copy in self._state.copies.values():
            holder, _, storage = copy.device.partition(":")
            if storage.startswith("gpu"):
                continue
            if holder not in self.nodes:
                yield f"copy {copy.key} is on a node that is gone"
                continue
            machine = self.nodes[holder].machine
            key = (copy.model, copy.revision)
            is_there = key in machine.store if storage == "disk" else f"{key[0]}@{key[1]}" in machine.holdings
            if copy.desired == "absent":
                yield f"copy {copy.key} shall be gone and is {copy.state}"
            elif copy.state == "ready" and not is_there:
                yield f"copy {copy.key} is said to be ready and is not there"
            elif copy.state not in ("ready", "failed", "waiting"):
                yield f"copy {copy.key} rests in {copy.state}: {copy.error}"
        for name, node in self.nodes.items():
            live = self._state.live.get(name)
            listed = {(status.model, status.revision) for status in live.unknown_copies} if live else set()
            for model, revision in node.machine.store:
                known = f"{model}@{revision}|{name}:disk" in self._state.copies
                if not known and (model, revision) not in listed:
                    yield f"{name} holds {model}@{revision} and the head does not know"

    def _engines(self) -> Iterator[str]:
        replicas = self._state.replicas
        for name, node in self.nodes.items():
            for replica_id, engine in node.machine.engines.items():
                wanted = replicas.get(replica_id)
                if wanted is None or wanted.node != name or wanted.desired != "running":
                    yield f"{name} runs {replica_id} (run {engine.run}), which nobody wants"
        for replica in replicas.values():
            if replica.node not in self.nodes:
                yield f"replica {replica.id} is on a node that is gone"
                continue
            running = self.nodes[replica.node].machine.engines.get(replica.id)
            if replica.desired == "stopped":
                yield f"replica {replica.id} shall be gone and is {replica.state}"
            elif replica.state == "ready" and running is None:
                yield f"replica {replica.id} is said to be ready and does not run"
            elif replica.state == "ready" and running is not None and running.port != replica.port:
                yield f"replica {replica.id} listens on {running.port}, not {replica.port}"
            elif replica.state not in ("ready", "failed") and not self._may_wait(replica.model, replica.node):
                yield f"replica {replica.id} rests in {replica.state}: {replica.error}"

    def _may_wait(self, model: str, node: str) -> bool:
        """Whether a replica may still wait: its copy failed or waits for room, or its engines never work."""
        if model in self.people.world.broken_models:
            return True
        copies = [self._state.copies[key] for key in self._state.copies_by_model.get(model, {})]
        here = [copy for copy in copies if copy.device.startswith(f"{node}:") and not copy.replica]
        return bool(model) and (not here or any(copy.state in ("failed", "waiting") for copy in here))

    def _services(self) -> Iterator[str]:
        for service in self._state.services.values():
            held = self._state.replicas_by_service.get(service.name, {})
            running = [key for key in held if self._state.replicas[key].desired == "running"]
            if service.desired == "stopped":
                yield f"service {service.name} shall be gone and is there with {list(held)}"
            elif len(running) > service.replicas:
                yield f"service {service.name} has {len(running)} replicas, wanted {service.replicas}"
            elif len(running) < service.replicas and not service.reason:
                yield f"service {service.name} has {len(running)} of {service.replicas} replicas and says no reason"
            outdated = [key for key in running if self._state.replicas[key].spec_hash != service.spec_hash]
            if outdated and not service.reason:
                yield f"service {service.name} still has {outdated} of an older spec"

    def _jobs(self) -> Iterator[str]:
        names: set[str] = set()
        for job in self._state.jobs.values():
            if job.name.startswith("job-"):
                if job.name in names:
                    yield f"job {job.name} was made twice"
                names.add(job.name)
            if job.state not in JOB_ENDED:
                running = [step for step in job.steps if step.state == "running"]
                if not all(step.note for step in running) or not running or job.is_cancelling:
                    yield f"job {job.id} rests in {job.state}: {job.steps}"

    def _nodes(self) -> Iterator[str]:
        for name, node in self._state.nodes.items():
            if name not in self.nodes:
                yield f"{name} is known and should not be"
            elif node.status != "online":
                yield f"{name} is {node.status}"
        for name in self.nodes:
            if name not in self._state.nodes:
                yield f"{name} did not come back"

    def _models(self) -> Iterator[str]:
        for model in self._state.models.values():
            if model.is_deleting:
                yield f"model {model.name} shall be gone and is there"
        held = {model for store in self.stores for model, _ in store}
        for name in self.people.history.unevictable - held:
            yield f"the last copy of {name} is gone"

    def _queues(self) -> Iterator[str]:
        state, pipeline = self._state, self.head.pipeline
        things = len(state.copies) + len(state.replicas) + len(state.checks) + len(state.runs)
        sizes = {
            "commanded_ms": (len(state.commanded_ms), 2 * things + 20),
            "progress": (len(state.progress), len(state.copies)),
            "last_used_ms": (len(state.last_used_ms.keys() - state.copies.keys()), 0),
            "avoided": (len(state.avoided.keys() - state.copies.keys()), 0),
            "offered": (len(state.offered), 0),
            "readers": (sum(len(readers) for readers in state.readers.values()), 0),
            "measured": (len(state.measured.keys() - state.replicas.keys()), 0),
            "unwell": (len(state.unwell.keys() - state.replicas.keys()), 0),
            "due_ms": (len(state.due_ms), len(state.services) + len(state.live_jobs)),
            "live": (len(state.live.keys() - state.nodes.keys()), 0),
            "lost_ms": (len(state.lost_ms), 0),
            "checks": (len(state.checks), 0),
            "parked": (pipeline.parked, 0),
            "open records": (pipeline.open_records, limits.JOURNAL_BATCH_RECORDS),
            "sessions": (len(self.head.sessions), len(self.nodes)),
        }
        for name, (size, most) in sizes.items():
            if size > most:
                yield f"the head's {name} has {size} entries at rest; at most {most}"

    def _agents(self) -> Iterator[str]:
        for name, node in self.nodes.items():
            state = node.state
            sizes = {
                "asks": (len(state.asks), 0),
                "moving": (len(state.moving.keys() - state.copies.keys()), 0),
                "engines": (len(state.engines.keys() - state.replicas.keys()), 0),
                "checks": (len(state.checks), 0),
                "unacknowledged outcomes": (sum(not outcome.is_acked for outcome in state.outcomes.values()), 0),
                "outcomes": (len(state.outcomes), limits.OUTCOMES_KEPT),
                "results sent": (len(state.results_sent_ms.keys() - state.outcomes.keys()), 0),
            }
            for what, (size, most) in sizes.items():
                if size > most:
                    yield f"{name} has {size} {what} at rest; at most {most}"

    def _quiet(self) -> Iterator[str]:
        count = sum(1 for at_ms in self.head.written_ms if at_ms > self.head.world.now_ms - QUIET_MS)
        rows = self.head.journal.history[len(self.head.journal.history) - count :]
        if len(rows) > QUIET_ROWS:
            last = [f"{row.what} {row.kind}:{row.key}" for row in rows[-12:]]
            yield f"{len(rows)} records in the last {QUIET_MS // 1000} s: {last}"

    def _whys(self) -> Iterator[str]:
        for kind in ("node", "model", "copy", "service", "replica", "job", "benchmark"):
            for key in list(self._state.table(kind)):
                request_id = self.people.submit(ev.WhyRequested, kind=kind, key=key)
                answer = self.head.answers.get(request_id)
                value = answer.value if isinstance(answer, Reply) else None
                if not isinstance(value, api.Why) or not value.reason:
                    yield f"why {kind} {key}: {answer}"
