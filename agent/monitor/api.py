"""Seed 002's `Monitor` for Python programs: the same constructor, methods and CSV columns, over our monitor.

    monitor = Monitor(output_file="benchmark_metrics.csv", interval=1, metrics=("gpu", "cpu", "ram"))
    monitor.start()
    ...
    monitor.stop()

Metrics that are pushed carry seed 002's names beside ours, under the job `monitor`. Also taken are the parameters
that the code of seed 002 had beside its document (max_duration, prometheus_port, ...).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.monitor.columns import NodeTable
from agent.monitor.monitor import Monitor as _Monitor
from agent.monitor.monitor import Settings
from agent.monitor.node import NodeSample

log = logging.getLogger(__name__)
JOB = "monitor"
METRICS = ("gpu", "cpu", "ram")


class Monitor:
    """Collects this machine's metrics into a CSV file. One run per object."""

    def __init__(
        self,
        output_file: str | Path = "metrics.csv",
        interval: float = 1.0,
        metrics: Sequence[str] = METRICS,
        prometheus_pushgateway_url: str | None = None,
        prometheus_push_interval: float = 15,
        *,
        log_console: bool = False,
        export_json: str | Path | bool | None = None,
        max_duration: float | None = None,
        prometheus_port: int = 9100,
        prometheus_addr: str = "127.0.0.1",
        prometheus_grouping_labels: Mapping[str, str] | None = None,
        start_http_server: bool = False,
    ) -> None:
        """metrics: of gpu, cpu, ram, and ours: disk, network, pressure, processes.

        export_json: a file of JSON lines; True is the CSV's name with .jsonl. prometheus_addr: an address that others
        reach is refused, as it has no token here: `herder monitor --listen` takes one.
        Raises: ValueError for an interval below 0.05 s, a metric that is none, a push interval below a second.
        """
        outputs = [str(output_file)]
        if export_json:
            outputs.append(str(Path(output_file).with_suffix(".jsonl") if export_json is True else export_json))
        self._table: NodeTable | None = None
        self._monitor = _Monitor(
            Settings(
                interval_s=float(interval),
                groups=tuple(metrics),
                outputs=tuple(outputs),
                listen=(prometheus_addr, prometheus_port) if start_http_server else None,
                pushgateway=prometheus_pushgateway_url or "",
                push_interval_s=float(prometheus_push_interval),
                job=JOB,
                grouping=dict(prometheus_grouping_labels or {}),
                has_seed_names=True,
                stop_after_s=float(max_duration or 0.0),
            ),
            on_sample=self._log if log_console else None,
        )

    def start(self) -> None:
        """Begins to collect in the background. Raises: HerderError, OSError, ValueError."""
        self._monitor.start()

    def stop(self) -> None:
        """Ends: the file is complete and the pushed group deleted. Safe to call again."""
        self._monitor.stop()

    def run(self) -> None:
        """Collects in this thread until `stop` is called from another, or max_duration has passed."""
        self._monitor.run()

    def get_latest(self) -> dict[str, Any]:
        """The newest sample by column name; empty before the first."""
        sample = self._monitor.latest
        return {} if sample is None else self._cells(sample)

    @property
    def is_running(self) -> bool:
        """Whether it collects in the background."""
        return self._monitor.is_running

    def status(self) -> dict[str, Any]:
        """How the collecting itself fares: samples, missed ticks, rows lost, errors."""
        return self._monitor.status()

    def _cells(self, sample: NodeSample) -> dict[str, Any]:
        if self._table is None:
            self._table = NodeTable(self._monitor.reader)
        return dict(zip(self._table.names, self._table.row(sample), strict=True))

    def _log(self, sample: NodeSample) -> None:
        log.info("%s", json.dumps(self._cells(sample)))
