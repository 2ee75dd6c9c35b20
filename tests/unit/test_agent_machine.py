"""A Hypothesis machine over the agent's core: any order of commands, answers, deaths and restarts.

The invariants of the core are checked after each event by the node itself. Here: a fence is never passed, at most
one process runs per replica, and once the world is quiet and obedient, what is there is what was last ordered.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.core import effects as fx
from agent.core import events as ev
from common import limits, wire
from common.errors import ErrorInfo
from tests.doubles.agent_node import Node, drop_copy, ensure_copy, ensure_replica, op_of

MODELS = st.sampled_from(["org/m", "n"])
STORAGE = st.sampled_from(["disk", "dram"])
REPLICAS = st.sampled_from(["chat-0", "chat-1"])
FAILED = ErrorInfo("source_failed", "gone", is_retryable=True)
SICK = ErrorInfo("unhealthy", "no answer", is_retryable=True)


class AgentMachine(RuleBasedStateMachine):
    """See the module's first lines."""

    def __init__(self) -> None:
        super().__init__()
        self.node = Node(is_eager=False).start().open()
        self.generation = 0
        self.wanted: dict[str, tuple[int, wire.AnyCommand]] = {}  # what was last ordered, by op id
        self.newest: dict[str, int] = {}  # highest generation seen, by task
        self.history: list[tuple[wire.AnyCommand, int]] = []

    def _order(self, body: wire.AnyCommand) -> None:
        self.generation += 1
        self.wanted[op_of(body)] = (self.generation, body)
        self.history.append((body, self.generation))
        if self.node.session_id:
            self.node.command(body, self.generation)

    @rule(model=MODELS, storage=STORAGE)
    def ensure_copy(self, model: str, storage: str) -> None:
        """A copy is ordered."""
        self._order(ensure_copy(storage, model))

    @rule(model=MODELS, storage=STORAGE)
    def drop_copy(self, model: str, storage: str) -> None:
        """A copy is ordered away."""
        self._order(drop_copy(storage, model))

    @rule(replica=REPLICAS, model=MODELS, storage=STORAGE, parallel=st.integers(1, 2))
    def ensure_replica(self, replica: str, model: str, storage: str, parallel: int) -> None:
        """An engine is ordered."""
        self._order(ensure_replica(replica, model=model, storage=storage, config={"parallel": parallel}))

    @rule(replica=REPLICAS)
    def stop_replica(self, replica: str) -> None:
        """An engine is ordered to end."""
        self._order(wire.StopReplica(replica))

    @precondition(lambda self: self.history and self.node.session_id)
    @rule(data=st.data())
    def repeat_a_command(self, data: st.DataObject) -> None:
        """Any earlier command comes again, late or twice."""
        body, generation = data.draw(st.sampled_from(self.history))
        self.node.command(body, generation)

    @precondition(lambda self: self.node.mover_asks or self.node.holder_asks)
    @rule(data=st.data(), is_ok=st.booleans())
    def finish(self, data: st.DataObject, is_ok: bool) -> None:
        """The mover or the holder ends any of its requests."""
        tokens = [*self.node.mover_asks, *self.node.holder_asks]
        self.node.finish(data.draw(st.sampled_from(tokens)), None if is_ok else FAILED)

    @precondition(lambda self: self.node.processes)
    @rule(data=st.data(), is_well=st.booleans())
    def probe(self, data: st.DataObject, is_well: bool) -> None:
        """An engine answers a probe."""
        self.node.probe(data.draw(st.sampled_from(sorted(self.node.processes))), None if is_well else SICK)

    @precondition(lambda self: self.node.processes)
    @rule(data=st.data(), code=st.sampled_from([0, 1, -9]))
    def crash(self, data: st.DataObject, code: int) -> None:
        """An engine ends by itself."""
        self.node.exit(data.draw(st.sampled_from(sorted(self.node.processes))), code)

    @precondition(lambda self: self.node.state.outcomes)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        """The head acknowledges a result."""
        outcome = self.node.state.outcomes[data.draw(st.sampled_from(sorted(self.node.state.outcomes)))]
        self.node.ack(outcome.key, outcome.result.generation)

    @rule(ms=st.sampled_from([1, 250, 5_000, 60_000]))
    def wait(self, ms: int) -> None:
        """Time passes."""
        self.node.wait(ms)

    @rule()
    def restart_agent(self) -> None:
        """kill -9 of the agent; mover requests die with it, the holder and the engines stay."""
        self.node.start()

    @rule()
    def reboot(self) -> None:
        """The machine restarts."""
        self.node.reboot()

    @rule()
    def kill_mover(self) -> None:
        """The mover dies and comes back."""
        self.node.kill_mover()

    @rule()
    def kill_holder(self) -> None:
        """The holder dies and comes back empty."""
        self.node.kill_holder()

    @rule()
    def cut_session(self) -> None:
        """The head goes away, and comes back perhaps later."""
        if self.node.session_id:
            self.node.close()
        else:
            self.node.open()

    @invariant()
    def nothing_old_is_held(self) -> None:
        """No task is older than an order that was delivered for it."""
        held = {key: task.generation for key, task in self.node.state.copies.items()}
        held |= {key: task.generation for key, task in self.node.state.replicas.items()}
        for key, generation in held.items():
            assert self.newest.get(key, 0) <= generation <= self.generation, f"{key} went back"
            self.newest[key] = generation
        for replica, process in self.node.processes.items():
            task_of = self.node.state.replicas.get(replica)
            assert task_of is not None, f"{replica} runs, and nobody knows it"
            assert task_of.run == process.run, "an older process is still there"

    def teardown(self) -> None:
        """The world becomes quiet: everything obeys, the head repeats its orders, and order and world agree."""
        node = self.node
        if not node.session_id:
            node.open()
        node.is_eager = True
        for token in [*node.mover_asks, *node.holder_asks]:
            if token in node.mover_asks or token in node.holder_asks:
                node.finish(token)
        for replica, process in list(node.processes.items()):
            if node.state.engine(replica).is_ending:
                node.obey(replica, process.run)
        stops_first = sorted(self.wanted.items(), key=lambda item: _rank(item[1][1]))
        for _ in range(4):
            for outcome in list(node.state.outcomes.values()):
                node.ack(outcome.key, outcome.result.generation)
            for _, (generation, body) in stops_first:
                node.command(body, generation)
            for replica in sorted(node.processes):
                node.probe(replica)
            node.wait(limits.REPLICA_BACKOFF_CAP_MS // 100)
        node.wait(limits.REPLICA_BACKOFF_CAP_MS)
        for replica in sorted(node.processes):
            node.probe(replica)
        self._compare()

    def _compare(self) -> None:
        node = self.node
        bodies = [body for _, body in self.wanted.values()]
        stopped = {body.replica for body in bodies if isinstance(body, wire.StopReplica)}
        assert not stopped & set(node.processes), "a stopped engine runs"
        for body in bodies:
            if isinstance(body, wire.EnsureReplica):
                task = node.state.replicas[body.replica]
                assert task.order == body or task.generation > self.wanted[op_of(body)][0]
                copy = node.state.copy(body.model, body.revision, "dram" if body.storage == "dram" else "disk")
                if copy is not None and copy.state == "ready" and copy.desired == "present":
                    assert task.state in ("ready", "failed"), task.state
            if isinstance(body, wire.EnsureCopy) and body.storage == "disk":
                copy = node.state.copy(body.model, body.revision, "disk")
                assert copy is not None
                assert copy.state == "ready", copy
        assert not node.state.asks, "a request is open in a quiet world"


def _rank(body: wire.AnyCommand) -> int:
    """Stops before drops before copies on disk before copies in RAM before engines."""
    match body:
        case wire.StopReplica():
            return 0
        case wire.DropCopy():
            return 1 if body.storage == "dram" else 2
        case wire.EnsureCopy():
            return 3 if body.storage == "disk" else 4
        case _:
            return 5


TestAgentMachine = AgentMachine.TestCase
TestAgentMachine.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_every_effect_has_a_performer() -> None:
    """The daemon performs every effect that the core can emit."""
    from pathlib import Path

    source = Path("agent/daemon.py").read_text()
    kinds = [cls.__name__ for cls in fx.Effect.__subclasses__()]
    assert [name for name in kinds if f"fx.{name}()" not in source] == []
    assert ev.Event.__subclasses__()
