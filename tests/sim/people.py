"""People and programs who use the cluster: every request that the API knows, at random, and what they expect of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from head.core import events as ev
from head.core.effects import Refuse, Reply
from herder import types as api
from tests.sim.history import ANY, History
from tests.sim.sim_head import SimHead
from tests.sim.sim_node import SimNode
from tests.sim.world import World

RETRIES = 12


class People:
    """Asks at random through the head's door."""

    def __init__(self, world: World, head: SimHead, nodes: dict[str, SimNode], models: list[str]) -> None:
        self.world = world
        self.head = head
        self.nodes = nodes
        self.models = models
        self.history = History(head)
        self.asked = 0
        self.services: list[str] = []
        self.keys: list[str] = []
        self._acts: list[Callable[[], None]] = [
            *[self._job] * 10,
            *[self._create_service] * 4,
            *[self._delete_service] * 2,
            *[self._pin] * 3,
            self._unpin,
            self._cordon,
            self._drain,
            *[self._label] * 2,
            self._remove_node,
            *[self._update_model] * 2,
            self._delete_model,
            *[self._key] * 2,
            self._revoke,
            self._other_body,
        ]

    # the door
    def submit(
        self,
        kind: type[ev.RequestEvent],
        facts: dict[str, str] | None = None,
        /,
        *,
        once: str = "",
        fresh_id: str = "",
        **fields: Any,
    ) -> str:
        """A request through the API; its id. Nobody answers while the head is down."""
        self.asked += 1
        request_id = f"req-{self.asked}"
        body = fields.get("body")
        body = fields.get("recipe") if body is None else body
        digest = hashlib.sha256(msgspec.json.encode(body)).hexdigest() if body is not None else ""
        if self.head.is_up:
            self.history.asked(request_id, facts or {}, once, digest[:12])
            event = kind(
                request_id=request_id,
                actor="sim",
                fresh_id=fresh_id or f"id-{self.asked}",
                idempotency_key=once,
                request_sha256=digest,
                **fields,
            )
            self.head.take(event)
        return request_id

    def insist(self, kind: type[ev.RequestEvent], facts: dict[str, str], *, tries: int = RETRIES, **fields: Any) -> str:
        """Asks under an Idempotency-Key, again and again until there is an answer; the key."""
        key = f"once-{self.asked}"
        self._try(kind, facts, key, tries, fields)
        return key

    def _try(
        self, kind: type[ev.RequestEvent], facts: dict[str, str], key: str, tries: int, fields: dict[str, Any]
    ) -> None:
        request_id = self.submit(kind, facts, once=key, **fields)
        wait_ms = self.world.rng.randint(100, 6000)

        def look() -> None:
            answer = self.head.answers.get(request_id)
            is_again = self.world.rng.random() < 0.2  # a client that lost the answer
            is_odd = isinstance(answer, Refuse) and answer.error.code in ("state_read_only", "unavailable")
            if tries > 0 and (answer is None or is_again or is_odd):
                self._try(kind, facts, key, tries - 1, fields)

        self.world.after(wait_ms, "again", look)

    # models
    def register(self, model: str) -> None:
        """Makes a model known; asked again until it is."""
        is_local = model.startswith("local/")
        if is_local:
            self.history.unevictable.add(model)
        sources = () if is_local else (f"https://origin/{model}",)
        self.insist(
            ev.RegisterModelRequested,
            {f"model:{model}": "there"},
            tries=100,
            body=api.RegisterModel(model, sources=sources),
        )

    def random_request(self) -> None:
        """Something that somebody wants."""
        if self.head.state.nodes and self.head.state.models:
            self.world.rng.choice(self._acts)()

    def _model(self) -> str:
        return self.world.rng.choice(self.models)

    def _node(self) -> str:
        return self.world.rng.choice(list(self.nodes))

    def _device(self, node: str) -> str:
        gpus = self.nodes[node].machine.gpus
        return f"{node}:{self.world.rng.choice(['disk', 'disk', 'dram', *(f'gpu{index}' for index in range(gpus))])}"

    def _update_model(self) -> None:
        model, rng = self._model(), self.world.rng
        if rng.random() < 0.15 and not model.startswith("local/"):
            body = api.UpdateModel(revision=rng.choice(["main", "v2"]))
            self.submit(ev.UpdateModelRequested, model=model, body=body)
            return
        note = f"note {self.asked}"
        body = api.UpdateModel(metadata={"note": note})
        self.submit(ev.UpdateModelRequested, {f"note:{model}": note}, model=model, body=body)

    def _delete_model(self) -> None:
        model, rng = self._model(), self.world.rng
        if model.startswith("local/"):
            return
        facts = {f"model:{model}": ANY, f"note:{model}": ANY}
        self.submit(ev.DeleteModelRequested, facts, model=model, force=rng.random() < 0.5)
        self.world.after(rng.randint(5_000, 40_000), "register", partial(self.register, model))

    # jobs
    def _job(self) -> None:
        rng = self.world.rng
        node = self._node()
        actions = self._actions(node, self._model())
        actions = tuple(
            msgspec.structs.replace(action, timeout_s=rng.randint(1, 120)) if rng.random() < 0.05 else action
            for action in actions
        )
        name = f"job-{self.asked}"
        body = api.CreateJob(name, actions, priority=rng.choice([0, 0, 0, -5, 50]))
        if rng.random() < 0.3:
            self.insist(ev.CreateJobRequested, {}, body=body)
            return
        request_id = self.submit(ev.CreateJobRequested, {f"job:id-{self.asked + 1}": "there"}, body=body)
        if rng.random() < 0.2:
            self.world.after(rng.randint(10, 20_000), "cancel", lambda: self._cancel(request_id))

    def _actions(self, node: str, model: str) -> tuple[api.JobAction, ...]:
        rng = self.world.rng
        device, other = self._device(node), f"{self._node()}:disk"
        action = rng.choice(["download", "download", "copy", "move", "serve", "serve", "stop_serve", "delete", "graph"])
        match action:
            case "download":
                return (api.JobAction(action="download", model=model, target=device),)
            case "copy" | "move":
                return (api.JobAction(action=action, model=model, from_=self._holder_of(model), to=other),)
            case "serve":
                return (api.JobAction(action="serve", model=model, device=device),)
            case "stop_serve" | "delete":
                is_forced = action == "delete" and rng.random() < 0.2 and not model.startswith("local/")
                return (api.JobAction(action=action, model=model, device=device, force=is_forced),)
            case _:
                return self._graph(node, model, device, other)

    def _graph(self, node: str, model: str, device: str, other: str) -> tuple[api.JobAction, ...]:
        """Chains, fans and the diamond that everybody writes."""
        rng = self.world.rng
        shape = rng.choice(["diamond", "deep", "wide"])
        if shape == "diamond":
            return (
                self._step("a", "download", model, f"{node}:disk"),
                self._step("b", "download", model, other),
                self._step("c", "serve", model, device, "a", "b"),
                self._step("d", "health_check", model, device, "c"),
            )
        count = rng.randint(3, 14)
        steps = []
        for number in range(count):
            before = () if number == 0 or shape == "wide" else (f"s{number - 1}",)
            action = rng.choice(["download", "download", "download", "delete"]) if number else "download"
            steps.append(self._step(f"s{number}", action, self._model(), f"{self._node()}:disk", *before))
        return tuple(steps)

    def _step(self, name: str, action: str, model: str, device: str, *before: str) -> api.JobAction:
        return api.JobAction(
            action_id=name,
            action_type=action,  # type: ignore[arg-type]
            model_name=model,
            devices=(device,),
            dependencies=before,
        )

    def _holder_of(self, model: str) -> str:
        """A device with a ready copy where there is one, else any."""
        state = self.head.state
        ready = [state.copies[key].device for key in state.ready_by_model.get(model, {})]
        return self.world.rng.choice(ready or [f"{name}:disk" for name in self.nodes])

    def _cancel(self, request_id: str) -> None:
        answer = self.head.answers.get(request_id)
        if isinstance(answer, Reply) and answer.reference.startswith("job:"):
            self.submit(ev.CancelJobRequested, job=answer.reference.removeprefix("job:"))

    # services
    def _create_service(self) -> None:
        rng = self.world.rng
        name = f"svc{len(self.services)}" if rng.random() < 0.8 or not self.services else rng.choice(self.services)
        self.services.append(name)
        node = self._node()
        recipe = rng.choice(["", "sim-share", "sim-share", "sim-pair", "sim-cpu"])
        devices: tuple[str, ...] = ()
        if rng.random() < 0.3:
            devices = tuple(self._device(self._node()) for _ in range(rng.randint(1, 3)))
        body = api.CreateService(
            name,
            self._model(),
            recipe=recipe,
            replicas=rng.randint(1, 4),
            devices=devices,
            port=rng.choice([0, 0, 0, 9000, 9001]),
            labels={"zone": rng.choice("ab")} if rng.random() < 0.15 else {},
            on_unreachable=rng.choice(["keep", "replace", "replace"]),
        )
        fact = {f"service:{name}": "there"}
        if rng.random() < 0.5:
            self.insist(ev.CreateServiceRequested, fact, body=body, api_key=f"engine-{node}")
        else:
            self.submit(ev.CreateServiceRequested, fact, body=body, api_key=f"engine-{node}")
        if rng.random() < 0.3:
            self.world.after(rng.randint(5_000, 60_000), "change", lambda: self._change_service(name))

    def _change_service(self, name: str) -> None:
        """Somebody serves under the same name with other settings: a rollout."""
        service = self.head.state.services.get(name)
        if service is None or len(service.devices) > 1:
            return
        device = service.devices[0] if service.devices else f"{self._node()}:disk"
        config = {"name": name, "recipe": service.recipe, "args": [f"--try={self.asked}"]}
        action = api.JobAction(action="serve", model=service.model, device=device, config=config)
        self.submit(ev.CreateJobRequested, body=api.CreateJob("change", (action,)))

    def _delete_service(self) -> None:
        names = [name for name, service in self.head.state.services.items() if service.desired == "running"]
        if names:
            name = self.world.rng.choice(names)
            self.submit(ev.DeleteServiceRequested, {f"service:{name}": ANY}, service=name)

    # copies
    def _pin(self) -> None:
        rng = self.world.rng
        copies = [copy for copy in self.head.state.copies.values() if not copy.replica]
        if copies:
            copy = rng.choice(copies)
            body = api.Pin(copy.model, copy.device, name=rng.choice("xy"), ttl_s=rng.choice([0, 5, 60]))
            self.submit(ev.PinRequested, body=body)

    def _unpin(self) -> None:
        copies = [self.head.state.copies[key] for key in self.head.state.pinned_copies]
        if copies:
            copy = self.world.rng.choice(copies)
            self.submit(ev.UnpinRequested, body=api.Pin(copy.model, copy.device, name=copy.pins[0].name))

    # nodes
    def _cordon(self) -> None:
        node = self._node()
        self.submit(ev.CordonRequested, {f"cordon:{node}": "True"}, node=node, is_cordoned=True)
        self.world.after(self.world.rng.randint(5_000, 60_000), "uncordon", lambda: self.uncordon(node))

    def _drain(self) -> None:
        node = self._node()
        body = api.DrainNode(deadline_s=self.world.rng.choice([0, 20, 60]))
        self.submit(ev.DrainRequested, {f"drain:{node}": "True"}, node=node, body=body)
        self.world.after(90_000, "uncordon", lambda: self.uncordon(node))

    def uncordon(self, node: str) -> None:
        """Opens a node again; asked until answered."""
        facts = {f"cordon:{node}": "False", f"drain:{node}": "False"}
        request_id = self.submit(ev.CordonRequested, facts, node=node, is_cordoned=False)

        def look() -> None:
            answer = self.head.answers.get(request_id)
            if answer is None or (isinstance(answer, Refuse) and answer.error.code == "state_read_only"):
                self.uncordon(node)

        self.world.after(5_000, "uncordon", look)

    def _label(self) -> None:
        node, rng = self._node(), self.world.rng
        value = rng.choice(["a", "b", ""])
        body = api.UpdateNode({"zone": value or None})
        self.submit(ev.UpdateNodeRequested, {f"label:{node}/zone": value}, node=node, body=body)

    def _remove_node(self) -> None:
        node, rng = self._node(), self.world.rng
        self.remove(node, is_forced=rng.random() < 0.3)

    def remove(self, node: str, *, is_forced: bool) -> str:
        """Has a node forgotten. What was set of it may be gone from then on."""
        facts = {f"label:{node}/zone": ANY, f"cordon:{node}": ANY, f"drain:{node}": ANY}
        return self.submit(ev.RemoveNodeRequested, facts, node=node, force=is_forced)

    def remove_for_good(self, node: str) -> None:
        """The operator removes a machine that will not come back, until that is done."""
        if node in self.head.state.nodes or not self.head.is_up:
            self.remove(node, is_forced=True)
            self.world.after(3_000, "remove", lambda: self.remove_for_good(node))

    # keys
    def _key(self) -> None:
        name = f"key-{self.asked}"
        secret = hashlib.sha256(name.encode()).hexdigest()
        body = api.CreateKey(role="viewer", name=name)
        self.submit(ev.CreateKeyRequested, {f"key:{name}": "there"}, fresh_id=name, body=body, secret_sha256=secret)
        self.keys.append(name)

    def _revoke(self) -> None:
        if self.keys:
            name = self.world.rng.choice(self.keys)
            self.submit(ev.RevokeKeyRequested, {f"revoked:{name}": "True"}, key=name)

    # the same key for something else
    def _other_body(self) -> None:
        known = list(self.history.references)
        if not known:
            return
        key = self.world.rng.choice(known)
        self.asked += 1
        request_id = f"other-{self.asked}"
        if not self.head.is_up:
            return
        body = api.RegisterModel(f"other/m{self.asked}")
        event = ev.RegisterModelRequested(
            request_id=request_id, actor="sim", idempotency_key=key, request_sha256=f"other {self.asked}", body=body
        )
        self.history.mismatched.add(request_id)
        self.head.take(event)
