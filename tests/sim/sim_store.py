"""The mover and the holder of a simulated node: small models that answer as their protocols say, and their faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from agent import holder_protocol as holder
from agent.core import events as ev
from agent.mover import protocol as mover
from common import errors
from common.errors import ErrorInfo, HerderError
from common.manifest import Manifest
from tests.sim.machine import GIB, Machine, held_copy, origin_manifest
from tests.sim.world import World


class Owner(Protocol):
    """The node that these models serve."""

    world: World
    machine: Machine
    name: str
    is_up: bool

    def take(self, event: ev.Event) -> None:
        """Tells the agent."""
        ...

    def later(self, delay_ms: int, name: str, action: Callable[[], None]) -> None:
        """Runs the action unless the agent's process ends before."""
        ...

    def peer(self, node: str) -> Machine | None:
        """The machine that serves copies under a node id, if it can be reached now."""
        ...


class MoverModel:
    """The mover process: owns the store, reserves, fetches from the first source that answers."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.is_up = False
        self._open: dict[str, mover.Request] = {}

    def reset(self) -> None:
        """The agent's process began anew; its mover went with the old one."""
        self.is_up = False
        self._open = {}

    def start(self) -> None:
        """A mover runs and says what the store holds."""
        self.is_up = True
        self.owner.take(ev.MoverReady(tuple(self.owner.machine.store.values())))

    def crash(self) -> None:
        """kill -9 of the mover: open requests are gone, parts stay."""
        if self.owner.is_up and self.is_up:
            self.owner.world.note(f"{self.owner.name} mover crashes")
            self.reset()
            self.owner.take(ev.MoverDied("killed"))
            self.owner.later(self.owner.world.rng.randint(100, 1000), "mover", self.start)

    def ask(self, request: mover.Request) -> None:
        """A request of the agent; nobody hears it while no mover runs."""
        if not self.is_up:
            return
        rng, later = self.owner.world.rng, self.owner.later
        match request:
            case mover.Configure():
                self._done(request, 1)
            case mover.Fetch():
                self._open[request.token] = request
                later(rng.randint(5, 60), "fetch", lambda: self._fetch(request))
            case mover.Drop():
                self._open[request.token] = request
                later(rng.randint(5, 100), "drop", lambda: self._dropped(request))
            case mover.Verify():
                self._open[request.token] = request
                later(rng.randint(50, 500), "verify", lambda: self._verified(request))
            case mover.Cancel():
                target = self._open.pop(request.target, None)
                if isinstance(target, mover.Fetch) and request.discard:
                    self.owner.machine.parts.pop((target.model, target.revision), None)
                self._done(request, 1)
                if target is not None:
                    self._done(target, 2, error=errors.Cancelled("cancelled"))
            case _:
                raise AssertionError(f"unexpected request {request}")

    def _done(
        self,
        request: mover.Request,
        delay_ms: int,
        *,
        error: HerderError | None = None,
        manifest: Manifest | None = None,
        copies: Sequence[mover.HeldCopy] = (),
    ) -> None:
        done = mover.Done(request.token, error.info() if error is not None else None, manifest, tuple(copies))
        self.owner.later(delay_ms, "mover done", lambda: self.owner.take(ev.MoverDone(done)) if self.is_up else None)

    def _is_open(self, request: mover.Request) -> bool:
        return self._open.get(request.token) is request

    def _fail(self, request: mover.Request, error: HerderError) -> None:
        del self._open[request.token]
        self._done(request, 1, error=error)

    def _fetch(self, request: mover.Fetch) -> None:
        if not self._is_open(request):
            return
        world, machine = self.owner.world, self.owner.machine
        key = (request.model, request.revision)
        manifest = request.manifest or origin_manifest(*key)
        others = sum(
            origin_manifest(ask.model, ask.revision).size_bytes
            for ask in self._open.values()
            if isinstance(ask, mover.Fetch) and ask is not request
        )
        free = machine.disk_bytes - machine.used_bytes - others
        if key not in machine.store and manifest.size_bytes > free:
            self._fail(request, errors.DiskFull("it does not fit", need=manifest.size_bytes, free=free))
        elif not request.sources:
            self._fail(request, errors.SourceFailed("no source"))
        elif world.chance(world.faults.source_fails):
            self._fail(request, errors.SourceFailed("the source died", source=request.sources[0].url))
        elif any(source.node for source in request.sources) and world.chance(world.faults.source_lies):
            lied = next(source for source in request.sources if source.node)
            self._fail(request, errors.DigestMismatch("the peer sent other bytes", source=lied.url))
        else:
            self._move(request, manifest)

    def _answers(self, request: mover.Fetch) -> bool:
        """Whether any of the sources gives bytes now."""
        for source in request.sources:
            peer = self.owner.peer(source.node) if source.node else None
            if not source.node or (peer is not None and (request.model, request.revision) in peer.store):
                return True
        return False

    def _move(self, request: mover.Fetch, manifest: Manifest) -> None:
        if not self._is_open(request):
            return
        machine = self.owner.machine
        key = (request.model, request.revision)
        if not self._answers(request):
            self._fail(request, errors.SourceFailed("no source answers", source=request.sources[0].url))
            return
        done = min(manifest.size_bytes, machine.parts.get(key, 0) + GIB)
        machine.parts[key] = done
        self.owner.take(ev.MoverMoved(mover.Moving(request.token, "fetching", done, manifest.size_bytes, 1e9)))
        if done < manifest.size_bytes:
            self.owner.later(self.owner.world.rng.randint(100, 900), "move", lambda: self._move(request, manifest))
            return
        if not self._is_open(request):
            return
        del self._open[request.token]
        del machine.parts[key]
        machine.store[key] = held_copy(manifest)
        self._done(request, 1, manifest=manifest, copies=(machine.store[key],))

    def _dropped(self, request: mover.Drop) -> None:
        if self._is_open(request):
            machine = self.owner.machine
            key = (request.model, request.revision)
            users = [
                engine.order.replica
                for engine in machine.engines.values()
                if (engine.order.model, engine.order.revision) == key and not engine.leaks_until_ms
            ]
            assert not users, f"{self.owner.name}: the store drops {key} under running engines {users}"
            del self._open[request.token]
            machine.store.pop(key, None)
            machine.parts.pop(key, None)
            self._done(request, 1)

    def _verified(self, request: mover.Verify) -> None:
        if self._is_open(request):
            del self._open[request.token]
            held = self.owner.machine.store.get((request.model, request.revision))
            if held is None:
                self._done(request, 1, error=errors.CopyNotFound("gone"))
            else:
                self._done(request, 1, manifest=held.manifest, copies=(held,))


class HolderModel:
    """The holder process: outlives the agent, keeps the RAM tier."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self._open: dict[str, holder.Request] = {}

    def reset(self) -> None:
        """The agent's process began anew: nobody waits for what the old one asked."""
        self._open = {}

    def start(self) -> None:
        """Connected; it says what it holds."""
        self.owner.machine.is_holder_up = True
        self.owner.take(ev.HolderReady(tuple(self.owner.machine.holdings.values())))

    def crash(self) -> None:
        """kill -9 of the holder: the RAM tier is empty."""
        machine = self.owner.machine
        if self.owner.is_up and machine.is_holder_up:
            self.owner.world.note(f"{self.owner.name} holder crashes")
            machine.is_holder_up = False
            machine.holdings = {}
            self._open = {}
            self.owner.take(ev.HolderDied("killed"))
            self.owner.later(self.owner.world.rng.randint(100, 1000), "holder", self.start)

    def ask(self, request: holder.Request) -> None:
        """A request of the agent; nobody hears it while no holder runs."""
        if not self.owner.machine.is_holder_up:
            return
        rng, later = self.owner.world.rng, self.owner.later
        match request:
            case holder.Hold():
                self._open[request.token] = request
                later(rng.randint(50, 1500), "hold", lambda: self._held(request))
            case holder.Release():
                self._open[request.token] = request
                later(rng.randint(1, 50), "release", lambda: self._released(request))
            case holder.Cancel():
                target = self._open.pop(request.target, None)
                self._done(request)
                if target is not None:
                    self._done(target, errors.Cancelled("cancelled").info())
            case _:
                raise AssertionError(f"unexpected request {request}")

    def _done(self, request: holder.Request, error: ErrorInfo | None = None) -> None:
        holdings = tuple(self.owner.machine.holdings.values())
        self.owner.later(1, "holder done", lambda: self._said(holder.Done(request.token, error, holdings)))

    def _said(self, done: holder.Done) -> None:
        if self.owner.machine.is_holder_up:
            self.owner.take(ev.HolderDone(done))

    def _held(self, request: holder.Hold) -> None:
        if self._open.get(request.token) is not request:
            return
        del self._open[request.token]
        machine = self.owner.machine
        copy = next((held for held in machine.store.values() if held.directory == request.directory), None)
        used = sum(holding.bytes for key, holding in machine.holdings.items() if key != request.key)
        if copy is None:
            self._done(request, errors.NotFound("no such directory").info())
        elif used + copy.size_bytes > machine.dram_bytes:
            free = machine.dram_bytes - used
            self._done(request, errors.MemoryFull("full", need=copy.size_bytes, free=free).info())
        else:
            size = copy.size_bytes
            machine.holdings[request.key] = holder.Holding(request.key, request.directory, size, size, True)
            self._done(request)

    def _released(self, request: holder.Release) -> None:
        if self._open.get(request.token) is request:
            del self._open[request.token]
            self.owner.machine.holdings.pop(request.key, None)
            self._done(request)
