"""`herder status`: the whole cluster at a glance."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from herder import types
from herder.cli import output, text, views
from herder.cli.command import Globals, pass_globals, verb
from herder.cli.table import Column

ROWS = 20  # of each table; the lists show all


class Status(msgspec.Struct, frozen=True):
    """What -o json prints: the API's own types."""

    health: types.Health
    nodes: list[types.NodeView]
    services: list[types.ServiceView]
    jobs: list[types.JobView]


@verb("status", examples=("herder status", "herder status -o json"))
@pass_globals
def command(options: Globals) -> None:
    """Show the head's health, nodes, services and running jobs."""
    with options.connect() as client:
        status = Status(
            health=client.health(),
            nodes=client.nodes().all(),
            services=client.services().all(),
            jobs=client.jobs(status="running").all(),
        )
        where = client.settings.url
    output.emit(options, status, _shown(options, status, where), quiet=status.health.status)


def _shown(options: Globals, status: Status, where: str) -> str:
    now_ms = int(time.time() * 1000)
    parts = [health_fields(options, status.health, where)]
    if status.nodes:
        rows = [views.node_row(node, now_ms) for node in status.nodes]
        parts.append(_table(options, views.NODES, rows, "nodes"))
    else:
        parts.append("no nodes; `herder agent HEAD_URL` on a machine adds it")
    if status.services:
        parts.append(_table(options, views.SERVICES, [views.service_row(one) for one in status.services], "services"))
    if status.jobs:
        parts.append(_table(options, views.JOBS, [views.job_row(job, now_ms) for job in status.jobs], "jobs"))
    return "\n\n".join(parts)


def health_fields(options: Globals, health: types.Health, where: str) -> str:
    """The head in a few lines."""
    states: list[str] = [health.status]
    if health.is_settling:
        states.append("settling after its start")
    if health.is_read_only:
        states.append("READ ONLY: the journal cannot be written")
    return output.fields(
        options,
        [
            ("head", f"{where} ({health.version}, up {text.duration(health.uptime_s)})"),
            ("state", ", ".join(states)),
            ("nodes", f"{health.nodes_online} of {health.nodes} online"),
            ("holds", f"{text.plural(health.models, 'model')}, {text.plural(health.services, 'service')}"),
            ("jobs", f"{health.jobs_running} running"),
            *(("alarm", alarm) for alarm in health.alarms),
        ],
    )


def _table(options: Globals, columns: Sequence[Column], rows: views.Rows, what: str) -> str:
    shown = output.table(options, columns, rows[:ROWS], empty="")
    return shown if len(rows) <= ROWS else f"{shown}\n… and {len(rows) - ROWS} more; `herder {what}` lists all"
