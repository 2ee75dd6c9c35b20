"""The monitor as a whole: makes the parts, takes a sample at each tick, ends in order. Decides nothing else.

The tick does nothing that can wait: it reads /proc and asks the GPUs with a limit of half an interval. Files are
written, engines asked, scrapes answered and pushes made by threads beside it. What goes wrong there is counted, said
once and survived; only what cannot work from the start (a port that is taken, a folder that is not there) is an error.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.monitor.columns import NodeTable
from agent.monitor.engines import EngineSample, EngineWatch, Target, watches
from agent.monitor.files import KEEP, EngineLog, ProcessSink, Sink, make_sink
from agent.monitor.node import GROUPS, NodeReader, NodeSample
from agent.monitor.schedule import Schedule
from agent.monitor.writer import Writer
from agent.probe.host import memory_available_bytes, memory_bytes

log = logging.getLogger(__name__)
GPU_SHARE = 0.5  # of an interval, that the GPUs may take
GPU_TIMEOUT_MAX_S = 2.0
JOB = "herder-monitor"
ENGINE_END_S = 0.5
_SELECT_MAX_FD = 1024


class Settings(msgspec.Struct, frozen=True):
    """What to watch and where to put it."""

    interval_s: float = 1.0
    groups: tuple[str, ...] = GROUPS
    has_cores: bool = False
    outputs: tuple[str, ...] = ()  # .csv, .jsonl, .parquet; "-" is CSV on the standard output
    process_output: str = ""
    engine_output: str = ""
    limit_bytes: int = 0  # of a file, before it becomes FILE.1
    keep: int = KEEP
    is_resumed: bool = False
    engines: tuple[Target, ...] = ()
    listen: tuple[str, int] | None = None
    token: str = ""
    pushgateway: str = ""
    push_interval_s: float = 15.0
    job: str = JOB
    instance: str = ""  # else the host's name
    grouping: dict[str, str] = {}  # more labels of pushed metrics
    has_seed_names: bool = False
    stop_after_s: float = 0.0


def _files(settings: Settings) -> list[str]:
    return [file for file in (*settings.outputs, settings.process_output, settings.engine_output) if file]


class Stop:
    """A flag that a signal handler may raise and a loop can wait for: no lock, so no deadlock in a handler."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.is_set = False

    def set(self) -> None:
        """Raises the flag."""
        if not self.is_set:
            self.is_set = True
            os.eventfd_write(self._fd, 1)

    def wait(self, timeout_s: float) -> bool:
        """Waits that long; whether the flag is up."""
        if not self.is_set and timeout_s > 0:
            if self._fd < _SELECT_MAX_FD:
                select.select([self._fd], [], [], timeout_s)
            else:
                poll = select.poll()
                poll.register(self._fd, select.POLLIN)
                poll.poll(timeout_s * 1000)
        return self.is_set

    def __del__(self) -> None:
        os.close(self._fd)


class Monitor:
    """Watches this node. One run only: `run` in this thread, or `start` and `stop` with one of its own."""

    def __init__(
        self, settings: Settings, *, on_sample: Callable[[NodeSample], None] | None = None, sinks: Sequence[Sink] = ()
    ) -> None:
        """sinks: more of them, closed with the rest. Raises: ValueError, InvalidConfig."""
        unknown = set(settings.groups) - set(GROUPS)
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: not one of {', '.join(GROUPS)}")
        files = [os.path.abspath(file) for file in _files(settings)]
        twice = sorted({file for file in files if files.count(file) > 1})
        if twice:
            raise ValueError(f"{os.path.basename(twice[0])}: two outputs cannot be one file")
        self.settings = settings
        self.samples = 0
        self.loop_s = 0.0
        self.loop_total_s = 0.0
        self.latest: NodeSample | None = None
        self.started_wall_ms = 0
        self.instance = settings.instance or socket.gethostname()
        self.reader = NodeReader(settings.groups, has_cores=settings.has_cores)
        self.schedule = Schedule(settings.interval_s)
        self.stopping = Stop()
        self.writer = Writer(())
        self.engine_log: EngineLog | None = None
        self.watches: tuple[EngineWatch, ...] = ()
        self.server: Any = None
        self.pusher: Any = None
        self._own_sinks = tuple(sinks)
        self._on_sample = on_sample
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._is_opened = False
        self._is_closed = False

    # life
    def open(self) -> None:
        """Brings everything up. Raises: HerderError, OSError, ValueError; RuntimeError the second time."""
        if self._is_opened:
            raise RuntimeError("a monitor runs once: make another")
        self._is_opened = True
        settings = self.settings
        try:
            self.reader.open()
            cores = (os.cpu_count() or 1) if settings.has_cores else 0
            table = NodeTable(self.reader, cores=cores)
            options: dict[str, Any] = {"limit_bytes": settings.limit_bytes, "keep": settings.keep}
            sinks: list[Sink] = []
            for output in settings.outputs:
                sinks.append(make_sink(Path(output), table, is_resumed=settings.is_resumed, **options))
            if settings.process_output:
                sinks.append(ProcessSink(Path(settings.process_output), is_resumed=settings.is_resumed, **options))
            self.writer = Writer([*sinks, *self._own_sinks], on_broken_pipe=self.stopping.set)
            if settings.engine_output:
                self.engine_log = EngineLog(Path(settings.engine_output), is_resumed=settings.is_resumed, **options)
            self.watches = watches(settings.engines, self._take_engine, interval_s=settings.interval_s)
            self._open_doors()
        except BaseException:
            self.close()
            raise

    def _open_doors(self) -> None:
        settings = self.settings
        if settings.listen is not None:
            from agent.monitor.server import Server

            self.server = Server(*settings.listen, self.exposition, token=settings.token)
            self.server.start()
        if settings.pushgateway:
            from agent.monitor.push import Pusher

            self.pusher = Pusher(
                settings.pushgateway, self.labels(), self.exposition, interval_s=settings.push_interval_s
            )

    def labels(self) -> dict[str, str]:
        """What pushed metrics are grouped by: job, instance, and slurm_job_id inside a Slurm job."""
        slurm = os.environ.get("SLURM_JOB_ID", "")
        own = {"job": self.settings.job, "instance": self.instance}
        return {**own, **({"slurm_job_id": slurm} if slurm else {}), **self.settings.grouping}

    def run(self) -> None:
        """Opens, samples until `stop` (or `stop_after_s`), closes. Raises: HerderError, OSError, ValueError."""
        self.open()
        try:
            self._sample_on()
        finally:
            self.close()

    def start(self) -> None:
        """Opens and samples in a thread. Raises: HerderError, OSError, ValueError."""
        self.open()
        self._thread = threading.Thread(target=self._run_thread, name="monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends what `start` began, with files complete; more calls do nothing. Raises: what the sampling failed of."""
        self.stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure

    @property
    def is_running(self) -> bool:
        """Whether the thread of `start` samples."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Ends everything in order: engines, files, then the doors; the pushed group goes last. Never raises."""
        if self._is_closed:
            return
        self._is_closed = True
        for watch in self.watches:
            watch.stop()
        for watch in self.watches:
            watch.join(ENGINE_END_S)
        self.writer.close()
        if self.engine_log is not None:
            try:
                self.engine_log.close()
            except OSError as error:
                log.error("the looks at engines are not complete: %s", error.strerror)
        if self.server is not None:
            self.server.close()
        if self.pusher is not None:
            self.pusher.close()
        self.reader.close()

    def _run_thread(self) -> None:
        try:
            self._sample_on()
        except Exception as error:
            self._failure = error
            log.exception("the monitor failed")
        finally:
            self.close()
            self.stopping.set()  # whoever waits for a signal beside us need not wait any more

    def _sample_on(self) -> None:
        settings = self.settings
        gpu_timeout_s = min(GPU_TIMEOUT_MAX_S, settings.interval_s * GPU_SHARE)
        self.started_wall_ms = time.time_ns() // 1_000_000
        self.writer.start()
        for watch in self.watches:
            watch.start()
        self.schedule.restart()
        end_s = time.monotonic() + settings.stop_after_s if settings.stop_after_s else None
        while not self.stopping.wait(self.schedule.wait_s()):
            began_s = time.monotonic()
            if end_s is not None and began_s >= end_s:
                return
            self.schedule.begin()
            sample = self.reader.read(gpu_timeout_s=gpu_timeout_s)
            sample.missed_ticks = self.schedule.missed
            sample.loop_s = self.loop_s
            is_first = self.latest is None
            self.latest = sample
            self.samples += 1
            self.writer.take(sample)
            if self._on_sample is not None:
                self._on_sample(sample)
            if is_first and self.pusher is not None:
                self.pusher.start()  # not before there is something to push
            self.loop_s = time.monotonic() - began_s
            self.loop_total_s += self.loop_s

    def _take_engine(self, sample: EngineSample) -> None:
        if self.engine_log is not None:
            self.engine_log.take(sample)

    # what others read
    @property
    def rows_lost(self) -> int:
        """Rows that are in no file."""
        return self.writer.lost + (self.engine_log.lost if self.engine_log else 0)

    @property
    def error(self) -> str:
        """What is wrong now; empty when all is well."""
        parts = (
            self.writer.error,
            self.engine_log.error if self.engine_log else "",
            f"Pushgateway: {self.pusher.error}" if self.pusher is not None and self.pusher.error else "",
        )
        return "; ".join(part for part in parts if part)

    def status(self) -> dict[str, Any]:
        """How the monitor itself fares, as JSON can hold it."""
        found = self.reader.inventory
        return {
            "samples": self.samples,
            "missed_ticks": self.schedule.missed,
            "rows_lost": self.rows_lost,
            "loop_ms": round(self.loop_s * 1000, 3),
            "interval_s": self.settings.interval_s,
            "started_wall_ms": self.started_wall_ms,
            "gpus": [{"index": gpu.index, "uuid": gpu.uuid, "name": gpu.name} for gpu in found.gpus],
            "gpu_reason": found.reason,
            "gpu_silent": self.reader.silent,
            "engines": [
                {
                    "replica": watch.target.replica,
                    "url": watch.target.url,
                    "looks": watch.looks,
                    "failures": watch.failures,
                    "error": watch.latest.error if watch.latest else "",
                }
                for watch in self.watches
            ],
            "trouble": self.error,
        }

    def exposition(self) -> bytes:
        """Prometheus' text of now."""
        from agent.monitor.series import exposition

        return exposition(self._series)

    def _series(self) -> Iterator[Any]:
        from agent.monitor import series

        sample = self.latest
        yield series.counter("herder_monitor_samples", "Samples taken.", self.samples)
        yield series.counter("herder_monitor_missed_ticks", "Ticks that passed unsampled.", self.schedule.missed)
        yield series.gauge("herder_monitor_loop_duration_seconds", "How long the last sample took.", self.loop_s)
        yield series.counter("herder_monitor_loop_seconds", "Time spent in samples.", self.loop_total_s)
        yield series.counter("herder_monitor_rows_lost", "Rows that are in no file.", self.rows_lost)
        yield series.counter(
            "herder_monitor_gpu_silences", "Samples in which the GPU driver did not answer.", self.reader.silent
        )
        if self.pusher is not None:
            yield series.counter("herder_monitor_pushes", "Pushes that the gateway took.", self.pusher.pushes)
            yield series.counter("herder_monitor_push_failures", "Pushes that failed.", self.pusher.failures)
        if self.watches:
            yield from series.engine_series([watch.latest for watch in self.watches if watch.latest])
        if sample is None:
            return
        yield from series.base_series(sample, memory_bytes(), memory_available_bytes())
        yield from series.host_series(sample.host)
        if "gpu" in self.reader.groups:
            names = {gpu.uuid: gpu.name for gpu in self.reader.inventory.gpus}
            yield from series.gpu_series(sample.gpus or (), names)
        if "processes" in self.reader.groups:
            yield from series.process_series(sample.processes)
        if self.settings.has_seed_names:
            labels = {"slurm_job_id": "", **self.labels()}
            yield from series.seed_series(sample, self.samples, self.loop_s, labels)
