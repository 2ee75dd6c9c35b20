"""Random lives of nodes and copies: any order of events, late, repeated or lost, and the invariants after each.

The agents here are small honest models with a message pipe that may lose, repeat and reorder. Journals may refuse:
a turn is then taken back with everything after it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common import limits, wire
from common.errors import ErrorInfo, HerderError
from head.core import copies, invariants
from head.core.effects import CloseSession, Send
from head.core.events import (
    AgentReported,
    AgentSaidHello,
    CordonRequested,
    DeleteModelRequested,
    Event,
    HeadStarted,
    LeaseRenewed,
    PinRequested,
    ProgressReceived,
    RegisterModelRequested,
    RemoveNodeRequested,
    ResultReceived,
    SessionClosed,
    Ticked,
    UnpinRequested,
)
from head.core.objects import Copy, copy_key
from head.core.state import State
from head.core.step import _settle, step
from head.core.turn import Turn
from herder import types as api
from tests.doubles.head_core import SECRET, START_MS, World, manifest

NODES = ("n1", "n2", "n3")
MODELS = {"a": 40, "b": 60, "c": 30, "d": 90}
HINTED = ("a", "b")  # their sizes are known before they are fetched
SOURCELESS = ("d",)
DISK, DRAM = 120, 70
ENDS = ("ok", "ok", "progress", "source_failed", "source_refused", "disk_full")
STORAGES = ("disk", "disk", "dram", "gpu0")
SOURCES = ("", "", "", "https://mirror/x", "n1:disk")
PICKS = st.integers(0, 99)


class Agent:
    """A node's agent: what it holds, what it has seen of each op, and what it wants to say."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.boot = 1
        self.process = 1
        self.session = ""
        self.held: dict[str, tuple[str, int]] = {}  # copy key -> (state, generation)
        self.seen: dict[str, int] = {}  # op -> highest generation
        self.done: dict[str, wire.Result] = {}  # unacknowledged results
        self.seq = 0

    def take(self, command: wire.Command) -> None:
        """A command arrives; older generations are refused."""
        if command.generation < self.seen.get(command.op_id, 0):
            return
        again = command.generation == self.seen.get(command.op_id)
        self.seen[command.op_id] = command.generation
        key = command.op_id.removeprefix("copy:")
        if isinstance(command.body, wire.EnsureCopy):
            state, generation = self.held.get(key, ("", 0))
            if again and generation == command.generation and state != "ready":
                return
            self.held[key] = ("ready" if state == "ready" else "fetching", command.generation)
            if state == "ready":
                self.finish(key)
        elif isinstance(command.body, wire.DropCopy):
            self.held.pop(key, None)
            self.done[command.op_id] = wire.Result(op_id=command.op_id, generation=command.generation, outcome="ok")

    def finish(self, key: str) -> None:
        """A fetch ends well."""
        _, generation = self.held[key]
        self.held[key] = ("ready", generation)
        model, op = key.partition("@")[0], f"copy:{key}"
        made = manifest(model, MODELS[model]) if key.endswith(":disk") else None
        self.done[op] = wire.Result(op_id=op, generation=generation, outcome="ok", manifest=made)

    def fail(self, key: str, code: str) -> None:
        """A fetch ends badly."""
        _, generation = self.held.pop(key)
        op, size = f"copy:{key}", MODELS[key.partition("@")[0]]
        info = ErrorInfo(
            code=code, message=code, is_retryable=code == "source_failed", details={"need": size, "free": size // 2}
        )
        self.done[op] = wire.Result(op_id=op, generation=generation, outcome="failed", error=info)

    def report(self) -> wire.Report:
        """Everything it holds."""
        self.seq += 1
        statuses = []
        for key, (state, generation) in self.held.items():
            model, storage = key.partition("@")[0], key.rpartition(":")[2]
            digest = manifest(model, MODELS[model]).digest if state == "ready" else ""
            statuses.append(
                wire.CopyStatus(
                    model=model,
                    revision="main",
                    storage=storage,
                    state=state,
                    generation=generation,
                    digest=digest,
                    bytes_total=MODELS[model],
                )
            )
        return wire.Report(seq=self.seq, copies=tuple(statuses))


class NodesAndCopies(RuleBasedStateMachine):
    """The head's core among agents."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.now_ms = START_MS
        self.agents = {name: Agent(name) for name in NODES}
        self.pipe: list[Event] = []  # from agents, not yet arrived
        self.inbox: list[tuple[str, str, wire.Message]] = []  # to agents, not yet arrived
        self.count = 0
        self.turns: list[Turn] = []  # not yet durable

    # the driver's part

    def feed(self, event: Event) -> None:
        """One event is stepped; its effects wait until `commit`."""
        self.turns.append(step(self.state, event, self.now_ms))

    @rule()
    def commit(self) -> None:
        """The journal wrote: effects leave."""
        for turn in self.turns:
            for effect in turn.effects:
                if isinstance(effect, Send):
                    self.inbox.append((effect.node, effect.session_id, effect.message))
                elif isinstance(effect, CloseSession):
                    for agent in self.agents.values():
                        if agent.session == effect.session_id:
                            agent.session = ""
        self.turns.clear()

    @precondition(lambda self: self.turns)
    @rule()
    def refuse(self) -> None:
        """The journal refused: turns are taken back, newest first."""
        for turn in reversed(self.turns):
            turn.rollback()
        self.turns.clear()

    @initialize()
    def begin(self) -> None:
        """A head, models, nodes."""
        self.feed(HeadStarted(cluster_id="c", ticket_secret=SECRET))
        self.state.settle_until_ms = self.now_ms
        for name, size in MODELS.items():
            self.request(
                RegisterModelRequested,
                body=api.RegisterModel(
                    name=name,
                    sources=() if name in SOURCELESS else (f"https://h/{name}",),
                    metadata={"size_bytes": size} if name in HINTED else {},
                ),
            )
        for name in NODES:
            self.hello(name)
        self.commit()

    def request(self, kind: type[Event], **fields: Any) -> None:
        """A request of a person."""
        self.count += 1
        self.feed(kind(request_id=f"r{self.count}", fresh_id=f"id{self.count}", **fields))

    # agents

    @rule(node=st.sampled_from(NODES))
    def hello(self, node: str) -> None:
        """An agent connects anew."""
        agent = self.agents[node]
        self.count += 1
        agent.session = f"s{self.count}"
        hello = wire.Hello(
            proto_min=1,
            proto_max=1,
            node_id=node,
            boot_id=f"boot-{agent.boot}",
            agent_id=f"agent-{agent.process}",
            version="1",
            inventory=wire.Inventory(hostname=node, disk_budget_bytes=DISK, dram_budget_bytes=DRAM),
            advertise=node,
            data_port=7000,
        )
        self.feed(AgentSaidHello(session_id=agent.session, hello=hello, peer="p"))
        self.feed(AgentReported(node=node, session_id=agent.session, report=agent.report()))

    @rule(node=st.sampled_from(NODES))
    def boot(self, node: str) -> None:
        """A machine boots: RAM and fetches are gone, disk stays."""
        agent = self.agents[node]
        agent.boot += 1
        agent.process += 1
        agent.held = {key: held for key, held in agent.held.items() if key.endswith(":disk")}
        self.hello(node)

    @rule(node=st.sampled_from(NODES))
    def say(self, node: str) -> None:
        """An agent reports, renews its lease and repeats its results; all of it may travel long."""
        agent = self.agents[node]
        if not agent.session:
            return
        self.pipe.append(AgentReported(node=node, session_id=agent.session, report=agent.report()))
        lease = wire.Lease(seq=agent.seq, sent_boottime_ms=self.now_ms, digest=agent.seq)
        self.pipe.append(LeaseRenewed(node=node, session_id=agent.session, lease=lease))
        for result in agent.done.values():
            self.pipe.append(ResultReceived(node=node, session_id=agent.session, result=result))

    @rule(node=st.sampled_from(NODES), pick=PICKS, what=st.sampled_from(ENDS), is_lost=st.booleans())
    def work(self, node: str, pick: int, what: str, is_lost: bool) -> None:
        """A fetch goes on, ends well or badly; or a held copy is lost."""
        agent = self.agents[node]
        if not agent.held:
            return
        key = sorted(agent.held)[pick % len(agent.held)]
        state, generation = agent.held[key]
        if state == "ready":
            if is_lost:
                del agent.held[key]
            return
        if what == "ok":
            agent.finish(key)
        elif what == "progress":
            size = MODELS[key.partition("@")[0]]
            progress = wire.Progress(f"copy:{key}", generation, "fetching", size // 2, size)
            self.pipe.append(ProgressReceived(node=node, session_id=agent.session, progress=progress))
        else:
            agent.fail(key, what)

    @precondition(lambda self: self.inbox)
    @rule(luck=PICKS)
    def deliver_to_agent(self, luck: int) -> None:
        """Messages arrive in order within a session, or the session ends and with it all that travels."""
        if luck == 99:
            self.inbox.clear()
            return
        node, session, message = self.inbox.pop(0)
        agent = self.agents[node]
        if agent.session != session:
            return
        if isinstance(message, wire.Command):
            agent.take(message)
        elif isinstance(message, wire.ResultAck):
            done = agent.done.get(message.op_id)
            if done is not None and done.generation == message.generation:
                del agent.done[message.op_id]

    @precondition(lambda self: self.pipe)
    @rule(pick=PICKS, is_repeated=st.booleans())
    def deliver_to_head(self, pick: int, is_repeated: bool) -> None:
        """Any frame arrives, in any order, perhaps twice."""
        index = pick % len(self.pipe)
        event = self.pipe[index]
        if not is_repeated:
            del self.pipe[index]
        self.feed(event)

    @rule(is_done=st.booleans())
    def flow(self, is_done: bool) -> None:
        """For a moment everything works: what travels arrives, and fetches end if `is_done`."""
        self.commit()
        inbox, self.inbox = self.inbox, []
        for node, session, message in inbox:
            if self.agents[node].session == session:
                self._answer(self.agents[node], message)
        for node, agent in self.agents.items():
            for key in [key for key, (state, _) in agent.held.items() if state != "ready" and is_done]:
                agent.finish(key)
            self.say(node)
        pipe, self.pipe = self.pipe, []
        for event in pipe:
            self.feed(event)
        self.commit()

    @rule(node=st.sampled_from(NODES))
    def cut(self, node: str) -> None:
        """A websocket closes; what travels is lost or arrives late."""
        session, self.agents[node].session = self.agents[node].session, ""
        self.feed(SessionClosed(node=node, session_id=session, reason="cut"))

    # time and people

    @rule(seconds=st.sampled_from([1, 1, 3, 12]))
    def tick(self, seconds: int) -> None:
        """Time passes."""
        for _ in range(seconds):
            self.now_ms += 1_000
            self.feed(Ticked())

    @rule(luck=st.integers(0, 2))
    def restart(self, luck: int) -> None:
        """A new head process on the same journal."""
        if luck:
            return
        self.commit()
        self.now_ms += 1_000
        self.feed(HeadStarted(cluster_id="c", ticket_secret=SECRET))
        for agent in self.agents.values():
            agent.session = ""
        self.state.settle_until_ms = self.now_ms

    @rule(
        node=st.sampled_from(NODES),
        model=st.sampled_from(sorted(MODELS)),
        storage=st.sampled_from(STORAGES),
        source=st.sampled_from(SOURCES),
    )
    def want(self, node: str, model: str, storage: str, source: str) -> None:
        """A copy is wanted."""
        self._do(lambda turn: copies.want(turn, model, "", f"{node}:{storage}", cause="job", source=source))

    @rule(
        node=st.sampled_from(NODES),
        model=st.sampled_from(sorted(MODELS)),
        storage=st.sampled_from(["disk", "dram"]),
        force=st.booleans(),
        is_cancel=st.booleans(),
    )
    def unwant(self, node: str, model: str, storage: str, force: bool, is_cancel: bool) -> None:
        """A copy is not wanted any more, or a fetch is cancelled."""
        key = copy_key(model, "main", f"{node}:{storage}")
        if is_cancel:
            self._do(lambda turn: copies.cancel(turn, key, "job"))
        else:
            self._do(lambda turn: copies.unwant(turn, key, cause="job", force=force))

    @rule(node=st.sampled_from(NODES), model=st.sampled_from(sorted(MODELS)), is_on=st.booleans())
    def pin(self, node: str, model: str, is_on: bool) -> None:
        """A pin comes or goes."""
        body = api.Pin(model_name=model, device=f"{node}:disk", ttl_s=5)
        self.request(PinRequested if is_on else UnpinRequested, body=body)

    @rule(node=st.sampled_from(NODES), is_cordoned=st.booleans())
    def cordon(self, node: str, is_cordoned: bool) -> None:
        """A node is closed or opened."""
        self.request(CordonRequested, node=node, is_cordoned=is_cordoned)

    @rule(node=st.sampled_from(NODES), force=st.booleans(), luck=st.integers(0, 3))
    def remove(self, node: str, force: bool, luck: int) -> None:
        """A node is forgotten, if that may be."""
        if luck:
            return
        self.request(RemoveNodeRequested, node=node, force=force)

    @rule(model=st.sampled_from(sorted(MODELS)), force=st.booleans(), luck=st.integers(0, 3))
    def delete_and_register(self, model: str, force: bool, luck: int) -> None:
        """A model is deleted and, once gone, registered again."""
        if luck:
            return
        self.request(DeleteModelRequested, model=model, force=force)
        body = api.RegisterModel(name=model, sources=(f"https://h/{model}",))
        self.request(RegisterModelRequested, body=body)

    def _do(self, action: Any) -> None:
        turn = Turn(self.state, self.now_ms, cause="test")
        try:
            action(turn)
            _settle(turn)
        except HerderError:
            turn.rollback()
            return
        self.turns.append(turn)

    @invariant()
    def holds(self) -> None:
        """All invariants, after each step."""
        invariants.check_invariants(self.state)

    def teardown(self) -> None:
        """Faults stop: what is desired comes about within some minutes, or has failed with a reason."""
        if not self.state.nodes and not self.state.models:
            return
        self.commit()
        self.pipe.clear()
        for second in range(150):
            if second > 12 and all(self._waits(key) for key in self.state.active_copies):
                break
            for node, agent in self.agents.items():
                if not agent.session:
                    self.hello(node)
                for key in [key for key, (state, _) in agent.held.items() if state != "ready"]:
                    agent.finish(key)
                self.pipe.clear()
                self.say(node)
                for event in self.pipe:
                    self.feed(event)
                self.commit()
                while self.inbox:
                    inbox, self.inbox = self.inbox, []
                    for name, session, message in inbox:
                        if self.agents[name].session == session:
                            self._answer(self.agents[name], message)
                    self.commit()
            self.now_ms += 1_000
            self.feed(Ticked())
            self.commit()
            invariants.check_invariants(self.state)
        restless = {key: self.state.copies[key] for key in self.state.active_copies if not self._waits(key)}
        assert not restless, restless
        for node, agent in self.agents.items():
            ready = {key for key, copy in self.state.copies.items() if copy.state == "ready" and f"|{node}:" in key}
            assert ready <= {key for key, (state, _) in agent.held.items() if state == "ready"}

    def _answer(self, agent: Agent, message: wire.Message) -> None:
        if isinstance(message, wire.Command):
            agent.take(message)
        elif isinstance(message, wire.ResultAck):
            agent.done.pop(message.op_id, None)

    def _waits(self, key: str) -> bool:
        """Whether a copy rightly waits: for a source that is explicitly elsewhere and never comes."""
        copy: Copy = self.state.copies[key]
        return copy.state == "waiting" and bool(copy.source)


NodesAndCopies.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestNodesAndCopies = NodesAndCopies.TestCase


def walk(seed: int, steps: int) -> NodesAndCopies:
    """A long random life: hypothesis finds short ones, this one fills disks."""
    luck = random.Random(seed)
    machine = NodesAndCopies()
    machine.begin()

    def node() -> str:
        return luck.choice(NODES)

    def model() -> str:
        return luck.choice(sorted(MODELS))

    def maybe() -> bool:
        return luck.random() < 0.5

    moves: list[tuple[int, Callable[[], None]]] = [
        (8, lambda: machine.want(node(), model(), luck.choice(STORAGES), luck.choice(SOURCES))),
        (3, lambda: machine.unwant(node(), model(), luck.choice(("disk", "dram")), maybe(), maybe())),
        (8, lambda: machine.flow(maybe())),
        (6, lambda: machine.work(node(), luck.randrange(100), luck.choice(ENDS), luck.random() < 0.1)),
        (6, lambda: machine.say(node())),
        (6, lambda: machine.deliver_to_head(luck.randrange(100), maybe()) if machine.pipe else None),
        (6, lambda: machine.deliver_to_agent(luck.randrange(100)) if machine.inbox else None),
        (6, machine.commit),
        (1, machine.refuse),
        (5, lambda: machine.tick(luck.choice((1, 1, 3, 12)))),
        (2, lambda: machine.hello(node())),
        (1, lambda: machine.boot(node())),
        (1, lambda: machine.cut(node())),
        (1, lambda: machine.restart(luck.randrange(3))),
        (2, lambda: machine.pin(node(), model(), maybe())),
        (2, lambda: machine.cordon(node(), luck.random() < 0.2)),
        (1, lambda: machine.remove(node(), maybe(), luck.randrange(4))),
        (1, lambda: machine.delete_and_register(model(), maybe(), luck.randrange(4))),
    ]
    weights, actions = zip(*moves, strict=True)
    for action in luck.choices(actions, weights, k=steps):
        action()
        machine.holds()
    machine.teardown()
    return machine


@pytest.mark.parametrize("seed", range(20))
def test_long_random_lives(seed: int) -> None:
    """Invariants hold all the way, and after the faults stop everything comes to rest."""
    machine = walk(seed, 400)
    assert machine.state.nodes
    assert {copy.state for copy in machine.state.copies.values()} <= {"ready", "failed", "waiting"}


class TestInvariants:
    """The rules themselves can fail."""

    @pytest.mark.parametrize(
        ("spoil", "rule_name"),
        [
            (lambda state: state.copies_by_node.clear(), "indices_equal_a_recomputation"),
            (lambda state: state.active_copies.update({"x": None}), "indices_equal_a_recomputation"),
            (lambda state: state.models.clear(), "copies_stand_on_something"),
            (lambda state: state.nodes.clear(), "copies_stand_on_something"),
            (lambda state: state.manifests.update({"m@main": _kept("m", "f")}), "copies_are_in_order"),
            (lambda state: state.manifests.update({"x@main": _kept("x", "f")}), "models_end"),
            (lambda state: setattr(state.live["n1"], "session_id", state.live["n2"].session_id), "sessions_are_unique"),
            (lambda state: state.live.update({"n9": state.live["n1"]}), "sessions_are_unique"),
            (lambda state: state.lost_ms.update({"n1": 1}), "sessions_are_unique"),
            (lambda state: state.offered.update({"m@main|n1:disk": ()}), "readers_are_counted"),
            (lambda state: state.readers["n1"].update({"m@main|n9:disk": None}), "readers_are_counted"),
            (lambda state: _shrink(state), "devices_are_not_overbooked"),
            (lambda state: _respell(state), "copies_are_in_order"),
        ],
    )
    def test_each_rule_sees_its_breach(self, spoil: Any, rule_name: str) -> None:
        """A rule that cannot fail is no rule."""
        world = World()
        for node in ("n1", "n2"):
            world.join(node, disk=100)
        world.register("m", "https://h/m", size=60)
        world.fetched("m", "n1:disk", 60)
        world.close("n2")
        world.want("m", "n2:disk")
        world.join("n2", disk=100)
        invariants.check_invariants(world.state)
        spoil(world.state)
        with pytest.raises(AssertionError, match=rule_name):
            invariants.check_invariants(world.state)


def _kept(model: str, salt: str) -> Any:
    from head.core.objects import ModelManifest

    return ModelManifest(manifest=manifest(model, 60, salt=salt), made_by="n1", at_ms=1)


def _shrink(state: State) -> None:
    import msgspec

    node = state.nodes["n2"]
    small = msgspec.structs.replace(node.inventory, disk_budget_bytes=10)
    state.nodes["n2"] = msgspec.structs.replace(node, inventory=small)


def _respell(state: State) -> None:
    import msgspec

    copy = state.copies["m@main|n1:disk"]
    state.copies[copy.key] = msgspec.structs.replace(copy, state="redy")


assert limits.STEP_ATTEMPTS < 100, "teardown waits for all attempts"
