"""Jobs and services under random orders, answers, failures and restarts; invariants after every step.

Agents are hostile to the order of things, not to the protocol: answers come late, twice, of older generations or not at
all, nodes vanish, boot and return, the head starts again anywhere. In the end every agent does as it is told, and then
every job has to end.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from common.errors import EngineFailed, ErrorInfo, SourceFailed
from head.core.events import CordonRequested, DrainRequested, HeadStarted
from head.core.objects import Job, Replica
from head.core.state import JOB_ENDED, STEP_ENDED
from herder import types as api
from tests.doubles.head_core import GIB, SECRET, manifest
from tests.doubles.head_engines import EngineWorld

NODES = ("n1", "n2", "n3")
MODELS = ("a", "b")
DEVICES = tuple(f"{node}:{storage}" for node in NODES for storage in ("disk", "dram", "gpu0", "gpu1"))
ACTIONS = ("download", "move", "copy", "serve", "stop_serve", "delete", "health_check")
BOOM = EngineFailed("boom").info()


class JobsMachine(RuleBasedStateMachine):
    """A small cluster that gets orders and answers in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = EngineWorld()
        for node in NODES:
            self.world.add_node(node, gpus=(24 * GIB, 24 * GIB), dram=8 * GIB)
        for model in MODELS:
            self.world.add_model(model)
        self.world.fetched("a", "n1:disk", GIB)
        self.ended: dict[str, Job] = {}
        self.step_ends: dict[tuple[str, str], str] = {}

    @property
    def online(self) -> list[str]:
        """Nodes with an open session that has reported."""
        live = self.world.state.live
        return [node for node in NODES if node in live and live[node].session_id and live[node].has_reported]

    # orders

    @rule(
        data=st.lists(
            st.tuples(st.sampled_from(ACTIONS), st.sampled_from(MODELS), st.sampled_from(DEVICES), st.integers(0, 7)),
            min_size=1,
            max_size=5,
        ),
        priority=st.integers(-2, 2),
        retries=st.sampled_from([None, 0, 2]),
    )
    def order(self, data: list[tuple[str, str, str, int]], priority: int, retries: int | None) -> None:
        """A job of any shape; each step may depend on those before it."""
        actions: list[dict[str, Any]] = []
        for number, (kind, model, device, mask) in enumerate(data):
            action: dict[str, Any] = {"action_id": f"s{number}", "action_type": kind, "model_name": model}
            action["devices"] = ["n1:disk", device] if kind == "copy" and device != "n1:disk" else [device]
            action["dependencies"] = [f"s{other}" for other in range(number) if mask >> other & 1]
            if retries is not None:
                action["retries"] = retries
            actions.append(action)
        self.world.job(*actions, priority=priority)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Any job, ended or not."""
        if self.world.state.jobs:
            self.world.cancel(data.draw(st.sampled_from(sorted(self.world.state.jobs))))

    @rule(model=st.sampled_from(MODELS), count=st.integers(0, 3), policy=st.sampled_from(["keep", "replace"]))
    def serve(self, model: str, count: int, policy: str) -> None:
        """A service that may run anywhere."""
        self.world.serve(f"free-{model}", model, replicas=count, on_unreachable=policy)

    @rule(data=st.data())
    def unserve(self, data: st.DataObject) -> None:
        """Any service."""
        if self.world.state.services:
            self.world.unserve(data.draw(st.sampled_from(sorted(self.world.state.services))))

    # agents

    @rule(data=st.data(), is_good=st.booleans(), is_stale=st.booleans())
    def copy_ends(self, data: st.DataObject, is_good: bool, is_stale: bool) -> None:
        """An agent says how a copy's command ended."""
        keys = [key for key, copy in self.world.state.copies.items() if not copy.replica]
        keys = [key for key in keys if key.rpartition("|")[2].partition(":")[0] in self.online]
        if keys:
            key = data.draw(st.sampled_from(sorted(keys)))
            self._copy_answer(key, is_good=is_good, lag=1 if is_stale else 0)

    def _copy_answer(self, key: str, *, is_good: bool, lag: int = 0) -> None:
        copy = self.world.state.copies[key]
        made = manifest(copy.model, GIB) if copy.device.endswith(":disk") and copy.desired == "present" else None
        error = None if is_good else SourceFailed("cut").info()
        outcome = "ok" if is_good else "failed"
        self.world.result(
            key, outcome, manifest=made if is_good else None, error=error, generation=copy.generation - lag
        )

    @rule(
        data=st.data(),
        state=st.sampled_from(["waiting_copy", "starting", "ready", "unhealthy", "failed", "stopping", "stopped"]),
        is_stale=st.booleans(),
    )
    def engine_says(self, data: st.DataObject, state: str, is_stale: bool) -> None:
        """A report with one engine in some state and whatever else is ready."""
        replicas = [key for key, replica in self.world.state.replicas.items() if replica.node in self.online]
        if replicas:
            key = data.draw(st.sampled_from(sorted(replicas)))
            generation = self.world.replica(key).generation - (1 if is_stale else 0)
            self._report(self.world.replica(key).node, key, state, generation)

    def _report(self, node: str, key: str = "", state: str = "", generation: int = 0) -> None:
        statuses = []
        for other in self.world.state.replicas_by_node.get(node, ()):
            replica = self.world.state.replicas[other]
            if other == key:
                error = BOOM if state == "failed" else None
                statuses.append(self.world.status(key, state, generation=generation, error=error))
            elif replica.state not in ("pending", "failed"):
                port = {"port": replica.port, "host": "h"} if replica.state == "ready" else {}
                statuses.append(self.world.status(other, replica.state, **port))
        self.world.engines(node, *statuses)

    @rule(data=st.data(), outcome=st.sampled_from(["ok", "failed", "cancelled"]))
    def engine_result(self, data: st.DataObject, outcome: str) -> None:
        """An agent answers a replica's command."""
        replicas = [key for key, replica in self.world.state.replicas.items() if replica.node in self.online]
        if replicas:
            self._engine_answer(data.draw(st.sampled_from(sorted(replicas))), outcome)

    def _engine_answer(self, key: str, outcome: str) -> None:
        replica = self.world.replica(key)
        detail = {"host": "h", "port": 9000 + replica.slot, "pid": 5}
        error = BOOM if outcome == "failed" else None
        self.world.answer(
            f"replica:{key}", outcome, node=replica.node, generation=replica.generation, detail=detail, error=error
        )

    @rule(data=st.data(), outcome=st.sampled_from(["ok", "failed"]))
    def check_result(self, data: st.DataObject, outcome: str) -> None:
        """An agent answers a health check."""
        checks = [check for check in self.world.state.checks.values() if check.node in self.online]
        if checks:
            check = data.draw(st.sampled_from(checks))
            error = ErrorInfo("unhealthy", "no") if outcome == "failed" else None
            self.world.answer(f"check:{check.id}", outcome, node=check.node, generation=check.generation, error=error)

    # the world

    @rule(seconds=st.sampled_from([1, 5, 20, 90]))
    def time_passes(self, seconds: int) -> None:
        """Leases are renewed where a session is open."""
        self.world.pass_s(seconds, alive=tuple(self.online))

    @rule(node=st.sampled_from(NODES))
    def session_closes(self, node: str) -> None:
        """A websocket closes."""
        if node in self.online:
            self.world.close(node)

    @rule(node=st.sampled_from(NODES), is_boot=st.booleans())
    def node_returns(self, node: str, is_boot: bool) -> None:
        """An agent dials in and reports; perhaps after a boot."""
        self._return(node, is_boot=is_boot)

    def _return(self, node: str, *, is_boot: bool = False) -> None:
        known = self.world.state.nodes[node]
        fields = {"boot_id": f"boot-{self.world.state.revision}"} if is_boot else {"boot_id": known.boot_id}
        self.world.hello(node, known.inventory, agent_id=f"agent-{node}-{self.world.state.revision}", **fields)
        self._report(node)

    @rule(node=st.sampled_from(NODES), is_on=st.booleans())
    def cordon(self, node: str, is_on: bool) -> None:
        """Cordon or uncordon, which also ends a drain."""
        self.world.request(CordonRequested, node=node, is_cordoned=is_on)

    @rule(node=st.sampled_from(NODES), seconds=st.sampled_from([0, 30, 600]))
    def drain(self, node: str, seconds: int) -> None:
        """A drain with a deadline."""
        self.world.request(DrainRequested, node=node, body=api.DrainNode(deadline_s=seconds))

    @rule()
    def head_restarts(self) -> None:
        """The head starts again; the agents are back when they are back."""
        self.world.restart()

    # what must hold

    @invariant()
    def ends_absorb(self) -> None:
        """A step or job that has ended never changes again."""
        for key, job in self.world.state.jobs.items():
            if key in self.ended:
                assert job == self.ended[key], f"{key} changed after its end"
            if job.state in JOB_ENDED:
                self.ended[key] = job
            for step in job.steps:
                name = (key, step.id)
                if name in self.step_ends:
                    assert step.state == self.step_ends[name], f"{name} was {self.step_ends[name]}, is {step.state}"
                if step.state in STEP_ENDED:
                    self.step_ends[name] = step.state

    @invariant()
    def orders_go_only_to_known_nodes(self) -> None:
        """Whoever shall run something is there."""
        for replica in self.world.state.replicas.values():
            assert replica.node in self.world.state.nodes

    def teardown(self) -> None:
        """When every agent is back and does as it is told, every job ends."""
        for node in NODES:
            self.world.request(CordonRequested, node=node, is_cordoned=False)
            self._return(node)
        for _ in range(80):
            self._obey()
            self.world.pass_s(15, alive=NODES)
            self.ends_absorb()
            if not self.world.state.live_jobs:
                break
        # whoever still waits, waits for a GPU that a service keeps: those give up by their timeouts
        self.world.now_ms += 3 * 3_600_000
        self.world.step(HeadStarted(cluster_id="x", ticket_secret=SECRET, recipes=self.world.state.recipes))
        for node in NODES:
            self._return(node)
        for _ in range(40):
            if not self.world.state.live_jobs:
                return
            self._obey()
            self.world.pass_s(15, alive=NODES)
        stuck = {
            key: [(step.id, step.action, step.phase, step.note) for step in self.world.the_job(key).steps]
            for key in self.world.state.live_jobs
        }
        raise AssertionError(f"jobs that never end: {stuck}")

    def _obey(self) -> None:
        """Every open order is answered well."""
        for key in sorted(self.world.state.copies):
            copy = self.world.state.copies.get(key)
            if copy is None or copy.replica or (copy.desired == "present" and copy.state in ("ready", "failed")):
                continue
            self._copy_answer(key, is_good=True)
        for key in sorted(self.world.state.replicas):
            replica: Replica | None = self.world.state.replicas.get(key)
            if replica is not None and replica.state not in ("ready", "failed"):
                self._engine_answer(key, "ok")
        for check in list(self.world.state.checks.values()):
            self.world.answer(f"check:{check.id}", node=check.node, generation=check.generation)


JobsMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestJobsMachine = JobsMachine.TestCase
