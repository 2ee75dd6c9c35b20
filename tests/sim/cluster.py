"""A whole cluster in the simulator: one head, many nodes, a hostile world, people who use it, and what must hold.

`Cluster(seed, ...).run()` lets faults happen until `faults.until_ms`, then lets the cluster come to rest, and then
checks that what is desired is what is there (`rest.py`). While it runs, `history.py` watches every answer and every
record, and the machines themselves are asked whether anything is there that must never be.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from common import limits
from common.errors import ErrorInfo
from common.recipe import Health, Recipe, Resources, load_recipes
from head.core.objects import Job
from tests.sim.machine import GIB, held_copy, origin_manifest
from tests.sim.measurers import Measurers
from tests.sim.people import People
from tests.sim.rest import Rest
from tests.sim.sim_head import MemoryJournal, SimHead
from tests.sim.sim_node import SimNode
from tests.sim.world import Faults, World

_HEALTH = Health(ready_timeout_s=60.0)


def _recipe(name: str, **resources: int) -> Recipe:
    return Recipe(
        name,
        "simulated",
        "command",
        command=("engine", "{port}"),
        resources=Resources(**resources),
        health=_HEALTH,
        config={"gpu_memory_bytes": resources.get("gpu_memory_bytes", 0)},
        max_restarts=2,
        needs_model=name != "sim-cpu",
    )


RECIPES = {name: recipe for name, (recipe, _) in load_recipes(Path(__file__).parents[2] / "recipes").items()}
RECIPES |= {
    recipe.name: recipe
    for recipe in (
        _recipe("sim-share", gpus=1, gpu_memory_bytes=30 * GIB),
        _recipe("sim-pair", gpus=2),
        _recipe("sim-cpu", memory_bytes=GIB),
    )
}
EXCUSED_MS = 300_000  # the books were thrown away by an operator: what runs there is found again and stopped in time
REST_MS = 1_300_000  # to come to rest after the last fault: longer than an engine may take to be ready (900 s)


class Cluster:
    """One run."""

    def __init__(
        self,
        seed: int,
        *,
        nodes: int,
        models: int,
        faults: Faults,
        requests: int,
        benchmarks: int = 0,
        rest_ms: int = REST_MS,
    ) -> None:
        self.world = World(seed, faults)
        self.head = SimHead(self.world, RECIPES)
        self.heads = [self.head]  # and old processes that still run
        self.nodes: dict[str, SimNode] = {}
        for index in range(nodes):
            name = f"n{index}"
            newer = (limits.PROTOCOL_MIN, limits.PROTOCOL + index % 2)
            self.nodes[name] = SimNode(self.world, self.heads, name, index % 3, self.nodes, protocols=newer)
        self.strangers = self._make_strangers()
        self.models = [f"org/m{index}" for index in range(models)] + [f"local/m{index}" for index in range(models // 3)]
        self.people = People(self.world, self.head, self.nodes, self.models)
        self.measurers = Measurers(self.people)
        self.head.judge.nodes, self.head.judge.strangers = self.nodes, self.strangers
        self.requests = requests
        self.benchmarks = benchmarks
        self.rest_ms = rest_ms
        self.head.check_every = max(1, nodes // 10)
        self.backup: MemoryJournal | None = None
        self._doubted_ms = -EXCUSED_MS  # since when the head's books may be wrong

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

    def _make_strangers(self) -> list[SimNode]:
        """Agents that the head must refuse, or that use a node id in use."""
        if not self.world.chance(self.world.faults.strangers):
            return []
        above = limits.PROTOCOL + 1
        twin = SimNode(self.world, self.heads, "twin", 1, self.nodes, node_id="n1")
        foreign = SimNode(self.world, self.heads, "foreign", 1, self.nodes)
        foreign.state.meta = type(foreign.state.meta)("", "another-cluster", 1)
        foreign.machine.ledger[("meta", "agent")] = foreign.state.meta
        newer = SimNode(self.world, self.heads, "newer", 1, self.nodes, protocols=(above, above + 1))
        return [foreign, newer, twin]

    def _run(self) -> None:
        world, rng = self.world, self.world.rng
        world.after(0, "head", self.head.start)
        for node in self.nodes.values():
            world.after(rng.randint(0, 3000), "agent", node.start)
        for stranger in self.strangers:
            world.after(rng.randint(10_000, 100_000), "stranger", stranger.start)
            world.after(rng.randint(120_000, 150_000), "stranger leaves", stranger.power_off)
        for model in self.models:
            self._give(model)
            if world.chance(world.faults.models_broken):
                world.broken_models[model] = rng.choice(["dies", "never ready"])
            world.after(rng.randint(4000, 8000), "register", partial(self.people.register, model))
        spread = max(1, world.faults.until_ms - 12_000)
        for _ in range(self.requests):
            world.after(12_000 + rng.randint(0, spread), "request", self.people.random_request)
        for _ in range(self.benchmarks):
            world.after(20_000 + rng.randint(0, spread), "benchmark", self.measurers.random_request)
        world.after(1000, "faults", self._hurt)
        world.after(500, "look", self._look)
        if world.chance(world.faults.head_restored):
            self._plan_restore()
        if world.chance(world.faults.node_vanishes):
            name = rng.choice(list(self.nodes)[1:])
            at_ms = rng.randint(60_000, max(60_001, world.faults.until_ms - 60_000))
            world.after(at_ms, "vanish", self.nodes[name].power_off)
            world.after(at_ms + 90_000, "remove", lambda: self.people.remove_for_good(name))
        world.run_until(world.faults.until_ms)
        self._heal()
        world.run_until(world.now_ms + self.rest_ms)
        self.check()

    def _give(self, model: str) -> None:
        """A model without a source lies on somebody's disk from the beginning."""
        if model.startswith("local/"):
            copy = held_copy(origin_manifest(model, "main"))
            node = self.nodes[list(self.nodes)[self.models.index(model) % len(self.nodes)]]
            node.machine.store[(model, "main")] = copy

    def _heal(self) -> None:
        """The faults end: what is down is started, what was closed is opened."""
        world = self.world
        for old in self.heads[1:]:
            old.end()
        self.head.start_again()
        for node in self.nodes.values():
            node.to_head_cut_until_ms = node.from_head_cut_until_ms = node.ledger_full_until_ms = 0
            if not node.is_up:
                node.start()
            if node.is_gone:
                world.after(120_000, "remove", partial(self.people.remove_for_good, node.name))
            else:
                world.after(90_000, "uncordon", partial(self.people.uncordon, node.name))
        world.note("faults end")

    # the world
    def _hurt(self) -> None:
        world, faults, rng = self.world, self.world.faults, self.world.rng
        if not world.is_hostile:
            return
        if self.head.is_up and world.chance(faults.head_crash_per_s):
            self.head.crash()
            world.after(rng.randint(500, 20_000), "head", self.head.start_again)
        if self.head.is_up and world.chance(faults.head_clones_per_s):
            self._clone()
        if world.chance(faults.head_stall_per_s):
            self.head.stall(rng.randint(500, 12_000))
        if world.chance(faults.head_disk_full_per_s):
            world.note("head's disk is full")
            self.head.disk_full_until_ms = world.now_ms + rng.randint(500, 20_000)
        for node in self.nodes.values():
            if not node.is_gone:
                self._hurt_node(node)
        world.after(1000, "faults", self._hurt)

    def _clone(self) -> None:
        """The head is started elsewhere, and its old process goes on upon its own copy of the state, for a while."""
        old = self.head.clone()
        self.head.crash()
        self.world.note("an old head goes on")
        self.heads.append(old)
        self._doubted_ms = self.world.now_ms  # agents that never saw the new head cannot know which is the old one
        old.start()
        self.world.after(self.world.rng.randint(2_000, 30_000), "old head", old.end)
        self.world.after(self.world.rng.randint(500, 5_000), "head", self.head.start_again)

    def _plan_restore(self) -> None:
        rng, until_ms = self.world.rng, self.world.faults.until_ms
        saved_ms = rng.randint(20_000, until_ms // 2)
        restored_ms = rng.randint(saved_ms + 1_000, until_ms - 20_000)

        def save() -> None:
            self.backup = self.head.journal.copied()

        def restore() -> None:
            assert self.backup is not None
            if self.head.is_up:
                self.head.crash()
            if ("meta", "cluster") in self.backup.objects:
                self.people.history.restored(self.backup)
                self._doubted_ms = self.world.now_ms
                self.head.restore(self.backup)
            self.world.after(rng.randint(500, 5_000), "head", self.head.start_again)

        self.world.after(saved_ms, "save", save)
        self.world.after(restored_ms, "restore", restore)

    def _hurt_node(self, node: SimNode) -> None:
        world, faults, rng = self.world, self.world.faults, self.world.rng
        if world.chance(faults.partition_per_s):
            until_ms = world.now_ms + rng.randint(1000, 60_000) * rng.choice([1, 1, 4])
            way = rng.choice(["to", "from", "both"])
            world.note(f"{node.name} partitioned ({way}) until {until_ms}")
            if way != "from":
                node.to_head_cut_until_ms = until_ms
            if way != "to":
                node.from_head_cut_until_ms = until_ms
        if world.chance(faults.peer_cut_per_s):
            other = rng.choice(list(self.nodes))
            world.cuts[frozenset((node.name, other))] = world.now_ms + rng.randint(1000, 60_000)
        if world.chance(faults.disconnect_per_s):
            node.disconnect()
        if node.is_up and world.chance(faults.agent_crash_per_s):
            node.crash()
            world.after(rng.randint(100, faults.agent_away_ms), "agent", lambda: self._start_node(node))
        if world.chance(faults.reboot_per_s):
            node.reboot()
            world.after(rng.randint(5000, 60_000), "agent", lambda: self._start_node(node))
        if world.chance(faults.agent_disk_full_per_s):
            node.ledger_full_until_ms = world.now_ms + rng.randint(500, faults.agent_disk_full_ms)
        if world.chance(faults.mover_crash_per_s):
            node.mover.crash()
        if world.chance(faults.holder_crash_per_s):
            node.holder.crash()
        for engine in list(node.machine.engines.values()):
            if world.chance(faults.engine_crash_per_s):
                node.engines.end(engine, 139)
            elif world.chance(faults.engine_hang_per_s):
                engine.is_hung = True
        if node.is_up and world.chance(faults.leaving_per_s):
            node.leave(rng.randint(1_000, 40_000))

    def _start_node(self, node: SimNode) -> None:
        if not node.is_up:
            node.start()

    # what must hold at every moment
    def _look(self) -> None:
        for node in (*self.nodes.values(), *self.strangers):
            node.engines.watch_leases()
        if self.world.now_ms - self._doubted_ms >= EXCUSED_MS:
            sound = {name: node for name, node in self.nodes.items() if not self._is_excused(name)}
            wrong = [fact for node in sound.values() for fact in node.machine.complaints()]
            wrong += [*_doubles(sound), *self.measurers.complaints()]
            assert not wrong, f"now: {wrong[:5]}"
        self.world.after(500, "look", self._look)

    def _is_excused(self, node: str) -> bool:
        if self.strangers and node == "n1":
            return True  # two machines use its id
        removed_ms = self.people.history.removed_ms.get(node, -EXCUSED_MS)
        return self.world.now_ms - removed_ms < EXCUSED_MS

    # what must hold at rest
    def check(self) -> None:
        """Raises AssertionError that names everything that is not as it should be."""
        wrong = [*Rest(self.head, self.nodes, self.people).wrong(), *self.measurers.wrong()]
        assert not wrong, "not at rest:\n  " + "\n  ".join(wrong[:20])

    def summary(self) -> dict[str, object]:
        """What happened, for people."""
        jobs: Counter[str] = Counter(job.state for job in self.head.state.jobs.values())
        codes: Counter[str] = Counter(_code(job) for job in self.head.state.jobs.values() if job.state == "failed")
        whats: Counter[str] = Counter(row.what for row in self.head.journal.history)
        return {
            "trace": self.world.trace,
            "virtual_s": self.world.now_ms / 1000,
            "head_starts": self.head.starts,
            "revision": self.head.journal.revision,
            "jobs": dict(jobs),
            "failed_with": dict(codes),
            "refused_with": dict(self.people.history.refusals),
            "copies": len(self.head.state.copies),
            "services": len(self.head.state.services),
            "benchmarks": dict(Counter(one.state for one in self.head.state.benchmarks.values())),
            "points": dict(Counter(one.state for one in self.head.state.points.values())),
            "engines": sum(len(node.machine.engines) for node in self.nodes.values()),
            "did": {what: whats[what] for what in ("copy_evicted", "replica_replaced", "replica_outdated")},
        }


def _doubles(nodes: dict[str, SimNode]) -> list[str]:
    """Engines of one slot on two machines."""
    where: dict[str, list[str]] = {}
    for name, node in nodes.items():
        for replica, engine in node.machine.engines.items():
            if not engine.leaks_until_ms:
                where.setdefault(replica, []).append(name)
    return [f"{replica} runs on {names}" for replica, names in where.items() if len(names) > 1]


def _code(job: Job) -> str:
    errors: list[ErrorInfo] = [step.error for step in job.steps if step.error is not None]
    return errors[0].code if errors else "?"
