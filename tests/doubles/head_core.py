"""A small world around the head's core for unit tests: a state, a clock, nodes that speak, and no I/O.

Every step checks the invariants. Agents are only what a test says of them: `report`, `result` and `lease` are sent in
a node's present session.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common import wire
from common.errors import ErrorInfo
from common.manifest import Manifest, ManifestFile
from head.core.effects import Alarm, CloseSession, Effect, Refuse, Reply, Send
from head.core.events import (
    AgentReported,
    AgentSaidHello,
    Event,
    HeadStarted,
    LeaseRenewed,
    ProgressReceived,
    RegisterModelRequested,
    ResultReceived,
    SessionClosed,
    Ticked,
)
from head.core.invariants import check_invariants
from head.core.objects import Copy, copy_key
from head.core.state import State
from head.core.step import step
from head.core.turn import Turn
from herder import types as api

START_MS = 1_000_000_000_000
GIB = 1 << 30
SECRET = bytes(range(32))


def inventory(
    *, disk: int = 100 * GIB, dram: int = 0, gpus: tuple[int, ...] = (), hostname: str = "host"
) -> wire.Inventory:
    """An inventory with these budgets in bytes; `gpus` are their memories."""
    cards = tuple(wire.Gpu(index=i, uuid=f"GPU-{i}", name="card", memory_bytes=size) for i, size in enumerate(gpus))
    return wire.Inventory(hostname=hostname, disk_budget_bytes=disk, dram_budget_bytes=dram, gpus=cards)


def manifest(model: str, size: int, revision: str = "main", *, salt: str = "0") -> Manifest:
    """A manifest of one file; another salt is another content."""
    digest = "b3:" + (salt * 64)[:64]
    return Manifest(
        model=model,
        revision=revision,
        files=(ManifestFile(path="weights.gguf", size=size, blob=digest, chunk_bytes=1 << 20),),
        digest=digest,
        format="gguf",
    )


class World:
    """The core with its state and time."""

    def __init__(self, *, is_settled: bool = True) -> None:
        self.state = State()
        self.now_ms = START_MS
        self.effects: list[Effect] = []  # of the last step
        self.turn: Turn | None = None
        self._requests = 0
        self._sessions = 0
        self._seqs = 0
        self.boots: dict[str, str] = {}
        self.step(HeadStarted(cluster_id="cluster-1", ticket_secret=SECRET))
        if is_settled:
            self.state.settle_until_ms = self.now_ms

    # time and events

    def step(self, event: Event) -> list[Effect]:
        """One event; its effects."""
        self.turn = step(self.state, event, self.now_ms)
        check_invariants(self.state)
        self.effects = self.turn.effects
        return self.effects

    def pass_s(self, seconds: float, *, alive: tuple[str, ...] = ()) -> list[Effect]:
        """Lets time pass, with a tick each second; `alive` nodes renew their leases. All effects of it."""
        effects: list[Effect] = []
        for _ in range(int(seconds)):
            self.now_ms += 1_000
            for node in alive:
                effects += self.lease(node)
            effects += self.step(Ticked())
        return effects

    def request(self, kind: type[Event], **fields: Any) -> Any:
        """A request; the Reply or the ErrorInfo of the refusal."""
        self._requests += 1
        fields.setdefault("fresh_id", f"id-{self._requests}")
        event = kind(request_id=f"req-{self._requests}", actor=fields.pop("actor", "ann"), **fields)
        answers = [effect for effect in self.step(event) if isinstance(effect, Reply | Refuse)]
        assert len(answers) == 1, "each request is answered exactly once"
        return answers[0].error if isinstance(answers[0], Refuse) else answers[0]

    def register(self, name: str, *sources: str, revision: str = "main", size: int | None = None) -> None:
        """Registers a model that must be taken."""
        metadata = {} if size is None else {"size_bytes": size}
        body = api.RegisterModel(name=name, sources=sources, revision=revision, metadata=metadata)
        answer = self.request(RegisterModelRequested, body=body)
        assert isinstance(answer, Reply), answer

    def do(self, action: Any) -> Any:
        """Runs a function of a turn as a step would, with reconciliation; what it returned. Raises what it raised."""
        from head.core import step as step_module

        turn = Turn(self.state, self.now_ms, cause="test")
        try:
            result = action(turn)
            step_module._settle(turn)
        except Exception:
            turn.rollback()
            check_invariants(self.state)
            raise
        check_invariants(self.state)
        self.turn, self.effects = turn, turn.effects
        return result

    # nodes

    def hello(self, node: str, inventory: wire.Inventory, **fields: Any) -> list[Effect]:
        """A hello in a new session."""
        self._sessions += 1
        boot = fields.pop("boot_id", self.boots.get(node, f"boot-{node}"))
        self.boots[node] = boot
        session = fields.pop("session_id", f"session-{self._sessions}")
        hello = wire.Hello(
            proto_min=fields.pop("proto_min", 1),
            proto_max=fields.pop("proto_max", 1),
            node_id=node,
            boot_id=boot,
            agent_id=fields.pop("agent_id", f"agent-{node}"),
            version="0.1.0",
            inventory=inventory,
            data_port=fields.pop("data_port", 7000),
            advertise=fields.pop("advertise", f"{node}.local"),
            **fields,
        )
        return self.step(AgentSaidHello(session_id=session, hello=hello, peer="10.0.0.1"))

    def join(self, node: str, *copies: wire.CopyStatus, **budgets: Any) -> list[Effect]:
        """A hello that must be taken, and the first report."""
        effects = self.hello(node, inventory(hostname=node, **budgets))
        assert any(isinstance(effect, Send) and isinstance(effect.message, wire.Welcome) for effect in effects)
        return effects + self.report(node, *copies)

    def session(self, node: str) -> str:
        """The node's present session."""
        return self.state.live[node].session_id

    def report(
        self,
        node: str,
        *copies: wire.CopyStatus,
        ops: tuple[wire.OpStatus, ...] = (),
        replicas: tuple[wire.ReplicaStatus, ...] = (),
        runs: tuple[wire.RunStatus, ...] = (),
    ) -> list[Effect]:
        """A report in the node's session."""
        self._seqs += 1
        report = wire.Report(seq=self._seqs, copies=copies, ops=ops, replicas=replicas, runs=runs, digest=self._seqs)
        return self.step(AgentReported(node=node, session_id=self.session(node), report=report))

    def lease(self, node: str, *, digest: int | None = None) -> list[Effect]:
        """A heartbeat; by default nothing changed since the last report."""
        self._seqs += 1
        said = self.state.live[node].report_digest or 0 if digest is None else digest
        lease = wire.Lease(seq=self._seqs, sent_boottime_ms=self.now_ms - START_MS + 500, digest=said)
        return self.step(LeaseRenewed(node=node, session_id=self.session(node), lease=lease))

    def close(self, node: str) -> list[Effect]:
        """The node's websocket closes."""
        return self.step(SessionClosed(node=node, session_id=self.session(node), reason="gone"))

    def progress(self, node: str, key: str, state: str, done: int = 0, total: int = 0, **fields: Any) -> list[Effect]:
        """Progress of a copy's command under its present generation, unless told otherwise."""
        generation = fields.pop("generation", self.state.copies[key].generation if key in self.state.copies else 0)
        progress = wire.Progress(
            op_id=f"copy:{key}", generation=generation, state=state, bytes_done=done, bytes_total=total, **fields
        )
        return self.step(ProgressReceived(node=node, session_id=self.session(node), progress=progress))

    def result(
        self,
        key: str,
        outcome: str = "ok",
        *,
        manifest: Manifest | None = None,
        error: ErrorInfo | None = None,
        generation: int | None = None,
        detail: dict[str, Any] | None = None,
    ) -> list[Effect]:
        """The end of a copy's command, said by its node."""
        node = key.rpartition("|")[2].partition(":")[0]
        copy = self.state.copies.get(key)
        result = wire.Result(
            op_id=f"copy:{key}",
            generation=generation if generation is not None else copy.generation if copy else 1,
            outcome=outcome,
            manifest=manifest,
            error=error,
            detail=detail or {},
        )
        return self.step(ResultReceived(node=node, session_id=self.session(node), result=result))

    # copies

    def want(self, model: str, device: str, *, source: str = "", revision: str = "", cause: str = "test") -> Copy:
        """Makes a copy wanted, as a job step does."""
        from head.core import copies

        wanted: Copy = self.do(lambda turn: copies.want(turn, model, revision, device, cause=cause, source=source))
        return wanted

    def fetched(self, model: str, device: str, size: int, *, revision: str = "main", salt: str = "0") -> str:
        """Makes a copy ready on disk or dram, with the agent's answers; its key."""
        self.want(model, device, revision=revision)
        storages = ("disk", "dram") if device.endswith(":dram") else ("disk",)
        for storage in storages:
            key = copy_key(model, revision, f"{device.partition(':')[0]}:{storage}")
            if self.state.copies[key].state != "ready":
                made = manifest(model, size, revision, salt=salt) if storage == "disk" else None
                self.result(key, manifest=made)
            assert self.state.copies[key].state == "ready", self.state.copies[key]
        return copy_key(model, revision, device)

    def commands(self, node: str = "") -> Iterator[wire.Command]:
        """The commands among the last effects."""
        for effect in self.effects:
            if isinstance(effect, Send) and isinstance(effect.message, wire.Command) and node in ("", effect.node):
                yield effect.message

    def command(self, body: type[wire.CommandBody], node: str = "") -> wire.Command | None:
        """The last command of a kind among the last effects."""
        found = [command for command in self.commands(node) if isinstance(command.body, body)]
        return found[-1] if found else None

    def alarms(self, effects: list[Effect] | None = None) -> dict[str, bool]:
        """Alarms among these effects (the last ones by default): name -> whether on."""
        found = self.effects if effects is None else effects
        return {effect.name: effect.is_on for effect in found if isinstance(effect, Alarm)}

    def is_frozen(self) -> bool:
        """Whether replacement is frozen."""
        return self.state.is_frozen

    def closings(self) -> dict[str, str]:
        """Sessions closed by the last effects: session -> error code."""
        found = [effect for effect in self.effects if isinstance(effect, CloseSession)]
        return {effect.session_id: effect.error.code if effect.error else "" for effect in found}


def status(copy: Copy, state: str = "ready", **fields: Any) -> wire.CopyStatus:
    """What an agent says of a copy; by default of its present generation and digest."""
    fields.setdefault("generation", copy.generation)
    fields.setdefault("digest", copy.digest)
    return wire.CopyStatus(
        model=copy.model, revision=copy.revision, storage=copy.device.partition(":")[2], state=state, **fields
    )


def error(code: str, *, is_retryable: bool = False, **details: Any) -> ErrorInfo:
    """An error as an agent sends it."""
    return ErrorInfo(code=code, message=code, details=details, is_retryable=is_retryable)
