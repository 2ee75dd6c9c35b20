"""The small world of `head_core` with recipes and agents that hold engines and answer checks."""

from __future__ import annotations

from typing import Any

import msgspec

from common import wire
from common.errors import ErrorInfo
from common.recipe import Health, Recipe, Resources
from head.core.effects import Refuse, Reply, Send
from head.core.events import (
    AgentReported,
    CancelJobRequested,
    CreateJobRequested,
    CreateServiceRequested,
    DeleteServiceRequested,
    Event,
    ResultReceived,
    WhyRequested,
)
from head.core.objects import Job, Object, Replica, Service, Step
from head.core.state import _TABLES, State, restore
from herder import types as api
from tests.doubles.head_core import SECRET, START_MS, World, inventory

RECIPES = {
    "llamacpp": Recipe(
        name="llamacpp",
        category="inference",
        runtime="llamacpp",
        model_formats=("gguf",),
        args=("--ctx-size", "{ctx}"),
        env={"A": "1"},
        health=Health(ready_timeout_s=60),
        config={"ctx": 2048, "gpu_memory_bytes": 0, "flash": False},
    ),
    "vllm": Recipe(
        name="vllm",
        category="inference",
        runtime="command",
        command=("serve", "{model_path}", "--port", "{port}"),
        model_formats=("safetensors",),
        resources=Resources(gpus=1),
    ),
    "twin": Recipe(
        name="twin",
        category="inference",
        runtime="command",
        command=("twin",),
        model_formats=("safetensors", "gguf"),
        resources=Resources(gpus=2),
    ),
    "shared": Recipe(
        name="shared",
        category="tools",
        runtime="command",
        command=("shared",),
        resources=Resources(gpus=1, gpu_memory_bytes=10 << 30),
    ),
}


class EngineWorld(World):
    """A world with recipes; agents hold what commands told them to."""

    def __init__(self) -> None:
        super().__init__()
        self.state.recipes = dict(RECIPES)

    def add_node(self, name: str, *, engines: bool = True, **budgets: Any) -> None:
        """A node with llama.cpp (unless told otherwise) that has reported nothing."""
        found = {"llamacpp": "b1"} if engines else {}
        self.hello(name, msgspec.structs.replace(inventory(hostname=name, **budgets), engines=found))
        self.report(name)

    def add_model(self, name: str = "m", *disks: str, size: int = 1 << 30) -> None:
        """A registered GGUF model, ready on the disks of these nodes."""
        self.register(name, f"https://host/{name}.gguf")
        for node in disks:
            self.fetched(name, f"{node}:disk", size)

    def restart(self) -> None:
        """The head starts again from what the journal would hold; nothing volatile survives."""
        objects: list[Object] = [thing for name in _TABLES.values() for thing in getattr(self.state, name).values()]
        revision, recipes = self.state.revision, self.state.recipes
        copied = [msgspec.json.decode(msgspec.json.encode(thing), type=type(thing)) for thing in objects]
        self.state = State()
        for thing in copied:
            restore(self.state, thing)
        self.state.revision = revision
        self.now_ms += 5_000
        from head.core.events import HeadStarted

        self.step(HeadStarted(cluster_id="other", ticket_secret=SECRET, recipes=recipes))
        assert self.now_ms > START_MS

    # requests

    def serve(self, name: str = "svc", model: str = "m", **fields: Any) -> Any:
        """A service; the Reply or the ErrorInfo."""
        body = api.CreateService(name=name, model=model, **fields)
        return self.request(CreateServiceRequested, body=body, api_key="key-1")

    def unserve(self, name: str = "svc") -> Any:
        """Deletes a service."""
        return self.request(DeleteServiceRequested, service=name)

    def job(self, *actions: dict[str, Any], **fields: Any) -> Any:
        """A job by its file's content; its id, or the ErrorInfo of the refusal."""
        extra = {key: fields.pop(key) for key in ("idempotency_key", "request_sha256", "fresh_id") if key in fields}
        body = msgspec.convert({"name": "test", "actions": list(actions), **fields}, api.CreateJob)
        answer = self.request(CreateJobRequested, body=body, **extra)
        return answer.reference.partition(":")[2] if isinstance(answer, Reply) else answer

    def cancel(self, job: str) -> Any:
        """Cancels a job."""
        return self.request(CancelJobRequested, job=job)

    def ask_why(self, kind: str, key: str) -> Any:
        """The answer to a question (an api.Why), or the ErrorInfo."""
        self.step(WhyRequested(request_id="why", kind=kind, key=key))
        (answer,) = [effect for effect in self.effects if isinstance(effect, Reply | Refuse)]
        return answer.error if isinstance(answer, Refuse) else answer.value

    # looking

    def the_job(self, job: str) -> Job:
        """The job now."""
        return self.state.jobs[job]

    def the_step(self, job: str, index: int = 0) -> Step:
        """One of its steps now."""
        return self.state.jobs[job].steps[index]

    def states(self, job: str) -> list[str]:
        """The states of its steps."""
        return [step.state for step in self.state.jobs[job].steps]

    def service(self, name: str = "svc") -> Service:
        """The service now."""
        return self.state.services[name]

    def replica(self, name: str = "svc-0") -> Replica:
        """The replica now."""
        return self.state.replicas[name]

    # agents

    def status(self, name: str = "svc-0", state: str = "ready", **fields: Any) -> wire.ReplicaStatus:
        """What an agent says of a replica; by default of its present generation, listening on 9000."""
        fields.setdefault("generation", self.replica(name).generation)
        if state == "ready":
            fields = {"host": "10.0.0.1", "port": 9000, "pid": 77, **fields}
        return wire.ReplicaStatus(replica=name, state=state, **fields)

    def engines(self, node: str, *statuses: wire.ReplicaStatus) -> None:
        """A report of a node that holds the ready copies the head knows there, and these engines."""
        held = [self.state.copies[key] for key in self.state.copies_by_node.get(node, ())]
        copies = tuple(
            wire.CopyStatus(
                model=copy.model,
                revision=copy.revision,
                storage=copy.device.partition(":")[2],
                state=copy.state,
                generation=copy.generation,
                digest=copy.digest,
                bytes_total=copy.bytes,
                bytes_done=copy.bytes,
            )
            for copy in held
            if copy.state == "ready" and not copy.replica
        )
        self._seqs += 1
        report = wire.Report(seq=self._seqs, copies=copies, replicas=statuses, digest=self._seqs)
        self.step(AgentReported(node=node, session_id=self.session(node), report=report))

    def ready(self, name: str = "svc-0", **fields: Any) -> None:
        """The engine of a replica becomes ready."""
        node = self.replica(name).node
        others = [
            self.status(key, self.state.replicas[key].state, port=self.state.replicas[key].port)
            for key in self.state.replicas_by_node.get(node, ())
            if key != name and self.state.replicas[key].state == "ready"
        ]
        self.engines(node, *others, self.status(name, **fields))

    def answer(
        self,
        op: str,
        outcome: str = "ok",
        *,
        node: str,
        generation: int,
        error: ErrorInfo | None = None,
        detail: dict[str, Any] | None = None,
    ) -> None:
        """The end of any command, said by a node."""
        result = wire.Result(op_id=op, generation=generation, outcome=outcome, error=error, detail=detail or {})
        self.step(ResultReceived(node=node, session_id=self.session(node), result=result))

    def stopped(self, name: str = "svc-0") -> None:
        """The agent says that a replica's engine is gone."""
        replica = self.replica(name)
        self.answer(f"replica:{name}", node=replica.node, generation=replica.generation)

    def events(self, *events: Event) -> None:
        """Several events."""
        for event in events:
            self.step(event)

    def sent_commands(self) -> list[tuple[str, wire.Command]]:
        """(node, command) among the last effects."""
        return [
            (effect.node, effect.message)
            for effect in self.effects
            if isinstance(effect, Send) and isinstance(effect.message, wire.Command)
        ]
