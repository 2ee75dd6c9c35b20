"""A whole cluster in the simulator: one head, many nodes, a hostile world, people who use it, and what must hold.

`Cluster(seed, ...).run()` lets faults happen until `faults.until_ms`, then lets the cluster come to rest, and then
checks that what is desired is what is there:

  no acknowledged write is lost            every engine that runs is wanted, and every wanted one runs
  every copy said ready is in the store    nothing is reserved twice (invariants after every step, at both sides)
  every job ends, or says what it waits for
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import ErrorInfo
from common.recipe import load_recipes
from head.core import events as ev
from head.core.effects import Refuse, Reply
from head.core.objects import Copy, Job
from head.core.state import JOB_ENDED
from herder import types as api
from tests.sim.sim_head import SimHead
from tests.sim.sim_node import SimNode
from tests.sim.world import Faults, World

RECIPES = {name: recipe for name, (recipe, _) in load_recipes(Path(__file__).parents[2] / "recipes").items()}
REST_MS = 1_300_000  # to come to rest after the last fault: longer than an engine may take to be ready (900 s)


class Cluster:
    """One run."""

    def __init__(
        self, seed: int, *, nodes: int, models: int, faults: Faults, requests: int, rest_ms: int = REST_MS
    ) -> None:
        self.world = World(seed, faults)
        self.head = SimHead(self.world, RECIPES)
        self.nodes: dict[str, SimNode] = {}
        for index in range(nodes):
            name = f"n{index}"
            self.nodes[name] = SimNode(self.world, self.head, name, index % 3, self.nodes)
        self.models = [f"org/m{index}" for index in range(models)]
        self.requests = requests
        self.rest_ms = rest_ms
        self.head.check_every = max(1, nodes // 10)
        self.asked = 0
        self.expected: dict[str, str] = {}  # acknowledged and not deleted since: reference -> request id
        self.refusals: Counter[str] = Counter()
        self._unanswered: dict[str, tuple[str, str]] = {}

    @property
    def replay(self) -> str:
        """The command that runs this seed again."""
        return f"python -m tests.sim.replay --seed {self.world.seed} --nodes {len(self.nodes)}"

    def run(self) -> None:
        """Starts everything, lets it be used and hurt, lets it rest, checks. Raises AssertionError with the story."""
        try:
            self._run()
        except Exception as error:
            story = "\n".join(list(self.world.recent)[-60:])
            raise AssertionError(
                f"{error!r}\nreplay: {self.replay}\nat {self.world.now_ms} ms; last:\n{story}"
            ) from error

    def _run(self) -> None:
        world = self.world
        world.after(0, "head", self.head.start)
        for node in self.nodes.values():
            world.after(world.rng.randint(0, 3000), "agent", node.start)
        for model in self.models:
            world.after(world.rng.randint(4000, 8000), "register", partial(self._register, model))
        spread = max(1, world.faults.until_ms - 12_000)
        for _ in range(self.requests):
            world.after(12_000 + world.rng.randint(0, spread), "request", self._random_request)
        world.after(1000, "faults", self._hurt)
        world.run_until(world.faults.until_ms)
        if not self.head.is_up:
            self.head.start()
        for node in self.nodes.values():
            node.to_head_cut_until_ms = node.from_head_cut_until_ms = node.ledger_full_until_ms = 0
            if not node.is_up:
                node.start()
        world.note("faults end")
        world.run_until(world.now_ms + self.rest_ms)
        self.check()

    # people
    def submit(self, kind: type[ev.RequestEvent], **fields: Any) -> str:
        """A request through the API; its id. Nobody answers while the head is down."""
        self.asked += 1
        request_id = f"req-{self.asked}"
        if self.head.is_up:
            self.head.take(kind(request_id=request_id, actor="sim", fresh_id=f"job-{self.asked}", **fields))
        return request_id

    def _register(self, model: str) -> None:
        body = api.RegisterModel(model, sources=(f"https://origin/{model}",))
        request_id = self.submit(ev.RegisterModelRequested, body=body)
        self.world.after(5000, "register", lambda: self._register_again(model, request_id))

    def _register_again(self, model: str, request_id: str) -> None:
        answer = self.head.answers.get(request_id)
        if isinstance(answer, Reply):
            self.expected[f"model:{model}"] = request_id
        elif answer is None and model not in self.head.state.models:
            self._register(model)

    def _random_request(self) -> None:
        rng = self.world.rng
        model = rng.choice(self.models)
        node = rng.choice(list(self.nodes))
        if model not in self.head.state.models or node not in self.head.state.nodes:
            return
        gpus = self.nodes[node].gpus
        device = f"{node}:{rng.choice(['disk', 'disk', 'dram', *(f'gpu{index}' for index in range(gpus))])}"
        other = f"{rng.choice(list(self.nodes))}:disk"
        action = rng.choice(["download", "download", "copy", "move", "serve", "serve", "stop_serve", "delete", "mixed"])
        actions: tuple[api.JobAction, ...]
        match action:
            case "download":
                actions = (api.JobAction(action="download", model=model, target=device),)
            case "copy" | "move":
                actions = (api.JobAction(action=action, model=model, from_=self._holder_of(model), to=other),)
            case "serve":
                actions = (api.JobAction(action="serve", model=model, device=device),)
            case "stop_serve" | "delete":
                actions = (api.JobAction(action=action, model=model, device=device),)
            case _:
                actions = (
                    api.JobAction(action_id="a", action_type="download", model_name=model, devices=(f"{node}:disk",)),
                    api.JobAction(action_id="b", action_type="download", model_name=model, devices=(other,)),
                    api.JobAction(
                        action_id="c", action_type="serve", model_name=model, devices=(device,), dependencies=("a", "b")
                    ),
                    api.JobAction(
                        action_id="d",
                        action_type="health_check",
                        model_name=model,
                        devices=(device,),
                        dependencies=("c",),
                    ),
                )
        request_id = self.submit(ev.CreateJobRequested, body=api.CreateJob(action, actions))
        self.world.after(3000, "noted", lambda: self._note_answer(request_id))
        if rng.random() < 0.2:
            self.world.after(rng.randint(10, 20_000), "cancel", lambda: self._cancel(request_id))
        if rng.random() < 0.05:
            self.world.after(rng.randint(10, 20_000), "drain", lambda: self._drain(node))

    def _holder_of(self, model: str) -> str:
        """A device with a ready copy where there is one, else any."""
        state = self.head.state
        copies = [state.copies[key] for key in state.copies_by_model.get(model, {})]
        ready = [copy.device for copy in copies if copy.state == "ready" and copy.device.endswith(":disk")]
        return self.world.rng.choice(ready or [f"{name}:disk" for name in self.nodes])

    def _note_answer(self, request_id: str) -> None:
        match self.head.answers.get(request_id):
            case Reply(reference=reference) if reference:
                self.expected[reference] = request_id
            case Refuse(error=error):
                self.refusals[error.code] += 1
            case _:
                pass

    def _cancel(self, request_id: str) -> None:
        answer = self.head.answers.get(request_id)
        if isinstance(answer, Reply) and answer.reference.startswith("job:"):
            self.submit(ev.CancelJobRequested, job=answer.reference.removeprefix("job:"))

    def _drain(self, node: str) -> None:
        self.submit(ev.DrainRequested, node=node, body=api.DrainNode(deadline_s=60))
        self.world.after(90_000, "uncordon", lambda: self._uncordon(node))

    def _uncordon(self, node: str) -> None:
        if self.head.is_up:
            self.submit(ev.CordonRequested, node=node, is_cordoned=False)
        else:
            self.world.after(2000, "uncordon", lambda: self._uncordon(node))

    # the world
    def _hurt(self) -> None:
        world, faults = self.world, self.world.faults
        if not world.is_hostile:
            return
        rng = world.rng
        if self.head.is_up and world.chance(faults.head_crash_per_s):
            self.head.crash()
            world.after(rng.randint(500, 20_000), "head", self.head.start_again)
        if world.chance(faults.head_stall_per_s):
            self.head.stall(rng.randint(500, 12_000))
        if world.chance(faults.head_disk_full_per_s):
            world.note("head's disk is full")
            self.head.disk_full_until_ms = world.now_ms + rng.randint(500, 20_000)
        for node in self.nodes.values():
            self._hurt_node(node)
        world.after(1000, "faults", self._hurt)

    def _hurt_node(self, node: SimNode) -> None:
        world, faults, rng = self.world, self.world.faults, self.world.rng
        if world.chance(faults.partition_per_s):
            until_ms = world.now_ms + rng.randint(1000, 60_000)
            way = rng.choice(["to", "from", "both"])
            world.note(f"{node.name} partitioned ({way}) until {until_ms}")
            if way != "from":
                node.to_head_cut_until_ms = until_ms
            if way != "to":
                node.from_head_cut_until_ms = until_ms
        if world.chance(faults.disconnect_per_s):
            node.disconnect()
        if node.is_up and world.chance(faults.agent_crash_per_s):
            node.crash()
            world.after(rng.randint(100, 30_000), "agent", lambda: self._start_node(node))
        if world.chance(faults.reboot_per_s):
            node.reboot()
            world.after(rng.randint(5000, 60_000), "agent", lambda: self._start_node(node))
        if world.chance(faults.agent_disk_full_per_s):
            node.ledger_full_until_ms = world.now_ms + rng.randint(500, 10_000)
        if world.chance(faults.mover_crash_per_s):
            node.crash_mover()
        if world.chance(faults.holder_crash_per_s):
            node.crash_holder()
        for engine in list(node.machine.engines.values()):
            if world.chance(faults.engine_crash_per_s):
                node.end_engine(engine, 139)
            elif world.chance(faults.engine_hang_per_s):
                engine.is_hung = True

    def _start_node(self, node: SimNode) -> None:
        if not node.is_up:
            node.start()

    # what must hold at rest
    def check(self) -> None:
        """Raises AssertionError that names everything that is not as it should be."""
        wrong = [*self._lost_writes(), *self._copies_at_rest(), *self._engines_at_rest(), *self._jobs_at_rest()]
        assert not wrong, "not at rest:\n  " + "\n  ".join(wrong[:20])

    def _lost_writes(self) -> list[str]:
        state = self.head.state
        return [
            f"{reference} was acknowledged ({request_id}) and is gone"
            for reference, request_id in self.expected.items()
            if (reference.startswith("job:") and reference[4:] not in state.jobs)
            or (reference.startswith("model:") and reference[6:] not in state.models)
        ]

    def _copies_at_rest(self) -> list[str]:
        wrong = []
        for copy in self.head.state.copies.values():
            holder, _, storage = copy.device.partition(":")
            if storage.startswith("gpu"):
                continue
            machine = self.nodes[holder].machine
            key = (copy.model, copy.revision)
            is_there = key in machine.store if storage == "disk" else f"{key[0]}@{key[1]}" in machine.holdings
            if copy.desired == "absent":
                wrong.append(f"copy {copy.key} shall be gone and is {copy.state}")
            elif copy.state == "ready" and not is_there:
                wrong.append(f"copy {copy.key} is said to be ready and is not there")
            elif copy.state not in ("ready", "failed", "waiting"):
                wrong.append(f"copy {copy.key} rests in {copy.state}: {copy.error}")
        for name, node in self.nodes.items():
            for model, revision in node.machine.store:
                known: Copy | None = self.head.state.copies.get(f"{model}@{revision}|{name}:disk")
                if known is None:
                    wrong.append(f"{name} holds {model} and the head does not know")
        return wrong

    def _engines_at_rest(self) -> list[str]:
        wrong = []
        replicas = self.head.state.replicas
        for name, node in self.nodes.items():
            for replica_id, engine in node.machine.engines.items():
                wanted = replicas.get(replica_id)
                if wanted is None or wanted.node != name or wanted.desired != "running":
                    wrong.append(f"{name} runs {replica_id} (run {engine.run}), which nobody wants")
        for replica in replicas.values():
            running = self.nodes[replica.node].machine.engines.get(replica.id)
            if replica.desired == "stopped":
                wrong.append(f"replica {replica.id} shall be gone and is {replica.state}")
            elif replica.state == "ready" and running is None:
                wrong.append(f"replica {replica.id} is said to be ready and does not run")
            elif replica.state not in ("ready", "failed") and not self._may_wait(replica.model, replica.node):
                wrong.append(f"replica {replica.id} rests in {replica.state}: {replica.error}")
        return wrong

    def _may_wait(self, model: str, node: str) -> bool:
        """Whether a replica may still wait: its copy failed or waits for room."""
        copies = [self.head.state.copies[key] for key in self.head.state.copies_by_model.get(model, {})]
        here = [copy for copy in copies if copy.device.startswith(f"{node}:") and not copy.replica]
        return not here or any(copy.state in ("failed", "waiting") for copy in here)

    def _jobs_at_rest(self) -> list[str]:
        wrong = []
        for job in self.head.state.jobs.values():
            if job.state not in JOB_ENDED:
                running = [step for step in job.steps if step.state == "running"]
                if not all(step.note for step in running) or not running or job.is_cancelling:
                    wrong.append(f"job {job.id} rests in {job.state}: {job.steps}")
        return wrong

    def summary(self) -> dict[str, object]:
        """What happened, for people."""
        jobs: Counter[str] = Counter(job.state for job in self.head.state.jobs.values())
        codes: Counter[str] = Counter(_code(job) for job in self.head.state.jobs.values() if job.state == "failed")
        return {
            "trace": self.world.trace,
            "virtual_s": self.world.now_ms / 1000,
            "head_starts": self.head.starts,
            "revision": self.head.journal.revision,
            "jobs": dict(jobs),
            "failed_with": dict(codes),
            "refused_with": dict(self.refusals),
            "copies": len(self.head.state.copies),
            "engines": sum(len(node.machine.engines) for node in self.nodes.values()),
        }


def _code(job: Job) -> str:
    errors: list[ErrorInfo] = [step.error for step in job.steps if step.error is not None]
    return errors[0].code if errors else "?"
