"""The agent as a whole: makes the parts, joins them, starts and stops them. Decides nothing.

Order of a start: own the state, read the ledger, start mover, holder and driver, then listen, then dial the head.
Order of an end: leave the head, stop the driver after its last commit, stop the mover at a checkpoint; engines and
the holder stay.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
from importlib import metadata
from pathlib import Path

from agent import procs
from agent.config import AgentConfig, is_loopback, posture
from agent.core import effects as fx
from agent.core import events as ev
from agent.core.state import State, load
from agent.driver import Driver
from agent.exporter import Exporter, Facts
from agent.holder_client import HolderClient
from agent.identity import node_secret
from agent.lease_note import LeaseNote
from agent.ledger import Ledger
from agent.link import Link
from agent.log_retention import Retention
from agent.log_sources import LogSources
from agent.logs import LogService
from agent.monitor.node import NodeReader, NodeSample
from agent.mover import protocol as mover_protocol
from agent.mover.config import MoverConfig, SshSettings
from agent.mover_client import MoverClient
from agent.probe.host import disk_budget_bytes, read_inventory
from agent.probe.nvml import Nvml, process_gpu_memory
from agent.probe.telemetry import read_telemetry
from agent.replicas import Replicas
from agent.run_files import RunFiles
from agent.runs.directory import RunDirectories
from agent.runs.service import Runs
from agent.runs.upload import Uploader
from agent.runtimes.registry import find_engines, make_runtimes
from common import ids, limits, wire
from common.clock import SystemClock, boottime_ms
from common.config import listen_error, read_secret
from common.errors import HerderError, InvalidConfig, InvalidDevice
from common.logs import own
from common.statedir import StateDir
from common.tasks import Supervisor
from common.telemetry import Notifier, calm_gc, fields, ticks

log = logging.getLogger(__name__)
TELEMETRY_S = 5.0
INVENTORY_MAX_AGE_MS = 60_000
TICK_S = 1.0
NODE_GROUPS = ("gpu", "cpu", "ram", "disk", "network", "pressure")  # what /metrics has beside telemetry
PCIE_EVERY_S = 30.0  # measuring takes 40 ms a card, where a card counts nothing itself


def version() -> str:
    """Herder's version."""
    try:
        return metadata.version("herder")
    except metadata.PackageNotFoundError:
        return "0+source"


class Agent:
    """One agent process."""

    def __init__(self, config: AgentConfig, state_dir: StateDir, *, rng: random.Random | None = None) -> None:
        self.config = config
        self.state_dir = state_dir
        self.agent_id = ids.new_id("agent")
        self.boot_id = procs.boot_id()
        self.clock = SystemClock()
        self.rng = rng or random.Random()
        self.tasks = Supervisor("agent")
        self.nvml = Nvml()
        self.identity = node_secret(state_dir.path)
        self.ledger = Ledger(state_dir.path / "ledger.db")
        self.state = load(State(), self.ledger.load())
        self.driver = Driver(self.state, self.ledger, self.clock, self.release)
        self.runtimes = make_runtimes(config.engines)
        self.files = RunFiles(state_dir.path / "replicas", forgotten_kept_s=config.logs.age_max_s)
        self.inventory = wire.Inventory(hostname=config.node)
        self.telemetry = wire.Telemetry()
        self.node_reader = NodeReader(NODE_GROUPS, nvml=self.nvml, pcie_every_s=PCIE_EVERY_S)
        self.sample: NodeSample | None = None
        self.loop_lag_s = 0.0
        self._inventory_ms = -INVENTORY_MAX_AGE_MS
        self.lease_note = LeaseNote(self.files.lease_path, self.boot_id)
        self._has_noted_lease = False
        self.mover = MoverClient(_mover_config(config), state_dir.path, self.driver.post, rng=self.rng)
        self.holder: HolderClient | None = None
        self.replicas = Replicas(
            self.files,
            self.runtimes,
            self.driver.post,
            self.tasks,
            engine_host=config.engine_host,
            advertise=self.advertised,
            gpu_memory=lambda pids: process_gpu_memory(self.nvml, pids),
            rng=self.rng,
            pass_env=config.engines.pass_env,
            allow_link_local=config.allow_link_local,
        )
        self.link = Link(
            config.head_url,
            config.token,
            tls=config.tls if config.head_url.startswith("https:") else None,
            hello=self.hello,
            digest=lambda: self.state.digest,
            post=self._heard,
            on_log_request=self._log_requested,
            on_closed=self._link_closed,
            clock=self.clock,
            is_congested=lambda: self.driver.is_congested,
            rng=self.rng,
        )
        runs_root = state_dir.path / "runs"
        sources = LogSources(self.files, runs_root, state_dir.path / own.FOLDER, config.logs.roots)
        uploader = Uploader(
            config.head_url,
            config.token,
            tls=config.tls if config.head_url.startswith("https:") else None,
            rng=self.rng,
        )
        self.runs = Runs(
            RunDirectories(state_dir.path / "runs"),
            self.driver.post,
            self.tasks,
            uploader,
            send_tick=self.link.offer_tick,
            file_roots=config.sources.file_roots,
            allow_link_local=config.allow_link_local,
            tls=config.tls,
        )
        self.logs = LogService(self.tasks, self.files.find, self.link.send_log, sources.find)
        self.retention = Retention(
            self.files,
            runs_root,
            bytes_max=config.logs.bytes_max,
            age_max_s=config.logs.age_max_s,
            held_runs=lambda: set(self.state.runs),
        )
        token = read_secret(Path(config.http.token_file)) if config.http.token_file else ""
        is_open = config.http.metrics_open or is_loopback(config.http.host)
        self.exporter = Exporter(self.state, self.facts, token=token, is_open=is_open)
        self.notifier = Notifier()

    # effects
    def release(self, effect: fx.Effect) -> None:
        """Performs one effect; never raises."""
        match effect:
            case fx.SendMessage():
                self.link.send(effect)
            case fx.AskMover():
                self.mover.send(effect.request)
            case fx.AskHolder():
                if self.holder is not None:
                    self.holder.send(effect.request)
            case fx.SpawnReplica():
                self.replicas.spawn(effect)
            case fx.AttachReplica():
                self.replicas.attach(effect)
            case fx.SignalReplica():
                self.replicas.signal(effect)
            case fx.ProbeReplica():
                self.replicas.probe(effect)
            case fx.RunHealthCheck():
                self.replicas.check(effect)
            case fx.ForgetReplica():
                self.replicas.forget(effect)
            case fx.RunEffect():
                self.runs.perform(effect)
            case fx.CloseSession():
                self.link.close_session(effect)
            case fx.NoteLease():
                self._note_lease(effect.until_ms)
            case _:
                log.error("an effect that nobody performs", extra=fields(effect=type(effect).__name__))

    def _note_lease(self, until_ms: int) -> None:
        self._has_noted_lease = True
        try:
            self.lease_note.write(boottime_ms() + until_ms - self.clock.now_ms())
        except OSError as error:
            log.warning("the lease could not be noted", extra=fields(error=str(error)))

    def _noted_lease_ms(self) -> int:
        """End of the last noted lease in Herder time of this process; 0 when there is none of this boot."""
        noted_ms = self.lease_note.read()
        return noted_ms - boottime_ms() + self.clock.now_ms() if noted_ms else 0

    def _heard(self, event: ev.Event) -> None:
        """An event of the session. A ledger that cannot be written stops the core, but not the head's lease: the
        shims must hear of it, or they would end engines that the head counts on.
        """
        if isinstance(event, ev.LeaseAcked) and self.driver.is_ledger_stuck and self._has_noted_lease:
            self._note_lease(event.sent_ms + event.lease_ms)
        self.driver.post(event)

    # what others ask
    async def hello(self) -> wire.Hello:
        """The first frame of a session."""
        await self._read_inventory()
        config = self.config
        return wire.Hello(
            proto_min=limits.PROTOCOL_MIN,
            proto_max=limits.PROTOCOL,
            node_id=config.node,
            boot_id=self.boot_id,
            agent_id=self.agent_id,
            version=version(),
            inventory=self.inventory,
            cluster_id=self.state.meta.cluster_id,
            max_head_epoch=self.state.meta.max_head_epoch,
            labels=config.labels,
            advertise=self.advertised(),
            data_port=self.mover.data_port,
            http_port=self.exporter.port,
            launch_id=config.launch_id,
            identity=self.identity,
        )

    def advertised(self) -> str:
        """Under which address others reach this node."""
        if self.config.advertise:
            return self.config.advertise
        if is_loopback(self.config.data.host):
            return self.config.data.host
        return self.inventory.addresses[0] if self.inventory.addresses else ""

    async def _read_inventory(self) -> None:
        if boottime_ms() - self._inventory_ms < INVENTORY_MAX_AGE_MS:
            return
        config = self.config
        self.inventory = await asyncio.to_thread(
            read_inventory,
            config.store_path,
            self.nvml,
            find_engines=lambda: find_engines(self.runtimes),
            dram_budget_bytes=config.dram_budget_bytes,
            disk_budget_bytes=config.disk_budget_bytes,
        )
        self._inventory_ms = boottime_ms()

    def facts(self) -> Facts:
        """What /metrics shows beside the core's state."""
        return Facts(
            node=self.config.node,
            version=version(),
            has_session=self.link.session is not None,
            sessions=self.link.sessions,
            telemetry=self.telemetry,
            sample=self.sample,
            inventory=self.inventory,
            dram_budget_bytes=self.inventory.dram_budget_bytes,
            mover_starts=self.mover.starts,
            holder_starts=self.holder.starts if self.holder is not None else 0,
            events=self.driver.events_handled,
            records=self.driver.records_written,
            is_ledger_stuck=self.driver.is_ledger_stuck,
            loop_lag_s=self.loop_lag_s,
            load_sent=self.runs.totals.sent,
            load_failed=self.runs.totals.failed,
            load_in_flight=sum(self.runs.totals.in_flight.values()),
        )

    def _log_requested(self, request: wire.LogRequest) -> None:
        self.logs.received(request)

    def _link_closed(self) -> None:
        self.logs.close_all()

    # life
    async def start(self) -> None:
        """Brings everything up. Raises: HerderError."""
        for folder, mode in ((self.config.store_path, 0o755), (self.files.root, 0o700)):
            try:
                folder.mkdir(mode=mode, parents=True, exist_ok=True)
            except OSError as error:
                raise InvalidConfig(f"{folder} cannot be made: {error.strerror}") from None
        await self._read_inventory()
        await self.replicas.start()
        await self.replicas.kill_orphans(set(self.state.replicas))
        await self.runs.start(set(self.state.runs))
        models_dir = str(self.config.store_path / "models")
        self.driver.post(ev.AgentStarted(self.boot_id, models_dir, self._noted_lease_ms()))
        self.tasks.start("driver", self.driver.run(), is_critical=True)
        self.tasks.start("mover", self._keep_mover(), is_critical=True)
        if self.inventory.dram_budget_bytes <= 0:
            none = InvalidDevice("this node has no RAM tier", hint="dram_budget_bytes in its configuration is 0")
            self.driver.post(ev.HolderFailed(none.info()))
        else:
            self.holder = HolderClient(
                self.state_dir.path / "holder" / "holder.sock",
                self.driver.post,
                budget_bytes=self.inventory.dram_budget_bytes,
                tmpfs=self.config.dram_tmpfs,
                rng=self.rng,
            )
            self.tasks.start("holder", self.holder.run(), is_critical=True)
        try:
            await self.exporter.start(self.config.http.host, self.config.http.port)
        except OSError as error:
            raise listen_error(self.config.http.host, self.config.http.port, error, group="http.") from None
        await self._wait_for_mover()
        self.tasks.start("link", self.link.run(), is_critical=True)
        self.tasks.start("telemetry", self._read_telemetry(), is_critical=True)
        self.tasks.start("ticks", self._tick(), is_critical=True)
        self.tasks.start("retention", self.retention.run())

    async def _keep_mover(self) -> None:
        await self.mover.run()
        await asyncio.Event().wait()  # it was told to stop; the daemon is on its way down

    async def _wait_for_mover(self) -> None:
        """The head is told the mover's port in hello; a mover that does not come must not keep the node away."""
        try:
            async with asyncio.timeout(10.0):
                await self.mover.is_settled.wait()
        except TimeoutError:
            pass
        if not self.mover.is_ready.is_set():
            log.error("the mover is not ready yet", extra=fields(error=self.mover.last_error))

    async def _tick(self) -> None:
        async for late_ms in ticks(TICK_S):
            self.loop_lag_s = late_ms / 1000
            self.notifier.alive()

    async def _read_telemetry(self) -> None:
        await asyncio.to_thread(self.node_reader.open)
        while True:
            used, reserved = await self._store_bytes()
            self.telemetry = await asyncio.to_thread(
                read_telemetry,
                self.config.store_path,
                self.nvml,
                disk_used_bytes=used,
                disk_reserved_bytes=reserved,
                dram_used_bytes=self.holder.used_bytes if self.holder is not None else 0,
            )
            self.link.offer_telemetry(self.telemetry)
            self.sample = await asyncio.to_thread(self._read_node)
            await asyncio.sleep(TELEMETRY_S)

    def _read_node(self) -> NodeSample:
        self.node_reader.host.rescan()  # an agent outlives the disks and interfaces of its start
        return self.node_reader.read()

    async def _store_bytes(self) -> tuple[int, int]:
        try:
            done = await self.mover.ask(mover_protocol.Capacity)
        except HerderError:
            return self.telemetry.disk_used_bytes, self.telemetry.disk_reserved_bytes
        return int(done.detail.get("used_bytes", 0)), int(done.detail.get("reserved_bytes", 0))

    async def run(self) -> int:
        """Runs until SIGTERM or SIGINT, or until a part fails. Returns the exit status."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        try:
            await self.start()
            log.info(posture(self.config))
            calm_gc()
            self.notifier.ready(f"node {self.config.node}")
            failed = self.tasks.start("failed", self.tasks.failed())
            stopped = self.tasks.start("stopped", stop.wait())
            done, _ = await asyncio.wait({failed, stopped}, return_when=asyncio.FIRST_COMPLETED)
            has_failed = failed in done
            if has_failed:
                log.critical("a part of the agent has failed; it ends, engines keep running")
            return 1 if has_failed else 0
        finally:
            self.notifier.stopping()
            await self.close()

    async def close(self) -> None:
        """Ends in order; engines and the holder stay."""
        await self.exporter.close()
        await self.mover.stop()
        await self.tasks.close()
        await self.replicas.close()
        self.runs.close()
        self.driver.close()
        self.ledger.close()
        self.node_reader.close()
        self.nvml.close()
        self.state_dir.close()


def _mover_config(config: AgentConfig) -> MoverConfig:
    sources = config.sources
    return MoverConfig(
        store_dir=str(config.store_path),
        instance=config.node,
        disk_budget_bytes=disk_budget_bytes(config.store_path, config.disk_budget_bytes),
        reserve_bytes=config.disk_reserve_bytes,
        data_host=config.data.host,
        data_port=config.data.port,
        file_roots=sources.file_roots,
        hf_endpoint=sources.hf_endpoint,
        hf_token_file=sources.hf_token_file,
        http_token_files=sources.http_token_files,
        allow_link_local=config.allow_link_local,
        ssh=SshSettings(sources.ssh_key_files, sources.ssh_known_hosts),
    )
