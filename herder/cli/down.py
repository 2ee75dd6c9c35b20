"""`herder down`: stop what `herder up` started on this machine."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from herder.cli import daemons, engines, output
from herder.cli.command import Globals, pass_globals, verb
from herder.errors import HerderError
from herder.settings import Settings, read_token_file, state_base_dir


@verb("down", examples=("herder down", "herder down --stop-engines", "herder down --state-dir ./state"))
@click.option("--state-dir", type=click.Path(path_type=Path), help="As given to `herder up` (HERDER_STATE_DIR).")
@click.option(
    "--stop-engines", is_flag=True, help="Also stop this node's engines (deletes their services) and its RAM tier."
)
@pass_globals
def command(options: Globals, state_dir: Path | None, stop_engines: bool) -> None:
    """Stop the head and the agent that `herder up` started. Engines keep running unless --stop-engines.

    Daemons that systemd started are systemd's: `systemctl stop herder-agent herder-head`.
    """
    base = (state_dir or state_base_dir()).expanduser().absolute()
    record = daemons.read_record(base)
    if record is None or not record.alive:
        (base / daemons.RECORD_FILE).unlink(missing_ok=True)
        released = daemons.release(base) if stop_engines else ""
        output.emit(options, {"stopped": []}, f"herder is not up in {base}", quiet="")
        if released:
            output.note(options, released)
        return
    running = _settle(options, base, record, is_stopping=stop_engines)
    names = record.alive
    if record.supervisor is not None and record.supervisor.is_alive:
        # The one in the foreground stops its two in order, and ends itself.
        record.supervisor.signal(signal.SIGTERM)
        limit_s = daemons.AGENT_STOP_S + daemons.HEAD_STOP_S + 15.0
        if not daemons.wait_until(lambda: not record.alive, limit_s):
            raise HerderError("timed_out", f"{' and '.join(record.alive)} did not end in time")
    else:
        for name, process, seconds in (
            ("agent", record.agent, daemons.AGENT_STOP_S),
            ("head", record.head, daemons.HEAD_STOP_S),
        ):
            if not daemons.stop_process(process, seconds):
                output.note(options, f"the {name} did not end in {seconds:g} s: killed")
    (base / daemons.RECORD_FILE).unlink(missing_ok=True)
    if stop_engines:
        daemons.release(base)
    output.emit(options, {"stopped": names}, f"stopped: {' and '.join(names)}", quiet="")
    if running:
        output.note(options, running)


def _settle(options: Globals, base: Path, record: daemons.Record, *, is_stopping: bool) -> str:
    from herder.client_sync import Client

    try:
        token = read_token_file(base / "head" / "admin.token")
        with Client(
            settings=Settings(url=record.url, token=token, ca_file=options.ca_file or ""), attempts=2
        ) as client:
            return engines.settle(options, client, record.node, is_stopping=is_stopping)
    except HerderError as error:
        if is_stopping:
            raise HerderError(
                error.code,
                f"the engines could not be stopped, nothing was: {error.message}",
                hint="without --stop-engines the daemons stop all the same",
            ) from None
        return ""
