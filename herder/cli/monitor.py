"""`herder monitor`: what this machine does, on the terminal, in files, for Prometheus. Needs no head."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herder.cli import output, text
from herder.cli.command import Duration, Globals, KeyValue, pass_globals, verb

if TYPE_CHECKING:
    from agent.monitor.monitor import Monitor, Settings

EXAMPLES = (
    "herder monitor",
    "herder monitor --interval 0.1s --save node.csv --duration 10m",
    "herder monitor --save node.parquet --engine llama=http://127.0.0.1:8000 --engine-save e.csv",
    "herder monitor --listen 9100",
    "herder monitor --pushgateway http://gateway:9091 --label cluster=west",
    "herder monitor -o json | jq .host.cpu.busy",
)
DRAW_S = 0.5
IDLE_S = 3_600.0  # nothing to do here until a signal or the monitor's own end
_SIZE = re.compile(r"(\d+)\s*(?:([KMG])i?B?|B)?", re.IGNORECASE)
_SHIFTS = {"": 0, "k": 10, "m": 20, "g": 30}


@verb("monitor", examples=EXAMPLES)
@click.option("--interval", type=Duration(), default="1s", show_default=True, help="Between samples; at least 0.05s.")
@click.option("--duration", type=Duration(), default=0.0, help="How long; default until Ctrl-C or SIGTERM.")
@click.option("--metrics", help="Of gpu,cpu,ram,disk,network,pressure,processes; default all.")
@click.option("--cores", is_flag=True, help="With a column for every CPU.")
@click.option(
    "--save", multiple=True, metavar="FILE", help=".csv, .jsonl or .parquet (needs herder[monitor]); - prints CSV."
)
@click.option("--process-save", metavar="FILE", help="A CSV with a line per process on a GPU.")
@click.option("--rotate", metavar="SIZE", help="Begin a file anew at so many bytes, as 100M; the old is FILE.1.")
@click.option("--keep", type=click.IntRange(1, 1000), default=5, show_default=True, help="How many old files to keep.")
@click.option("--engine", "engines", multiple=True, metavar="[NAME=]URL", help="An engine to ask for its metrics.")
@click.option("--engine-key-file", type=click.Path(), help="The engines' API key.")
@click.option("--engine-save", metavar="FILE", help="A CSV with a line per engine and second.")
@click.option("--listen", metavar="[HOST:]PORT", help="Serve /metrics, on 127.0.0.1 when no host is given.")
@click.option("--metrics-token-file", type=click.Path(), help="Token for /metrics; needed beyond loopback.")
@click.option("--pushgateway", metavar="URL", help="Push to a Prometheus Pushgateway; deleted there at the end.")
@click.option("--push-interval", type=Duration(), default="15s", show_default=True, help="Between pushes.")
@click.option("--job", default="herder-monitor", show_default=True, help="The label job of what is pushed.")
@click.option("--instance", default="", help="The label instance of what is pushed; default the host's name.")
@click.option("--label", "labels", type=KeyValue(), multiple=True, help="Another label of what is pushed.")
@click.option("--seed-names", is_flag=True, help="Also cpu_usage_percent, gpu_utilization_percent and their kin.")
@pass_globals
def command(options: Globals, /, **given: Any) -> int:
    """Watch this machine: GPUs, CPUs, memory, disks, network, engines.

    On a terminal a table is drawn; elsewhere, when nothing else is asked for, CSV is printed (JSON lines with
    -o json). A file that is there already is kept as FILE.1. Ends with its files complete on Ctrl-C and SIGTERM.
    """
    from common.errors import HerderError

    try:
        monitor = _monitor(options, given)
        return _run(options, monitor, _is_drawn(options, given))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except HerderError as error:
        output.show_error(error.code, error.message, error.hint)
        return output.EXIT_FAILED
    except OSError as error:
        output.show_error("failed", f"{error.filename or 'a file'}: {error.strerror}")
        return output.EXIT_FAILED


def _is_drawn(options: Globals, given: dict[str, Any]) -> bool:
    is_printed = "-" in given["save"] or options.output != "table"
    return sys.stdout.isatty() and not options.is_quiet and not is_printed


def _monitor(options: Globals, given: dict[str, Any]) -> Monitor:
    """Raises: ValueError, HerderError, OSError."""
    from agent.monitor.files import JsonSink
    from agent.monitor.monitor import Monitor

    settings = _settings(options, given)
    sinks = [JsonSink(Path("-"))] if options.output == "json" else []
    return Monitor(settings, sinks=sinks)


def _settings(options: Globals, given: dict[str, Any]) -> Settings:
    """The settings that the options make. Raises: ValueError, HerderError."""
    from agent.monitor.files import SUFFIXES
    from agent.monitor.monitor import Settings
    from agent.monitor.node import GROUPS
    from agent.monitor.server import address_of
    from common.config import read_secret

    if options.output == "yaml":
        raise ValueError("samples are printed as CSV or, with -o json, as JSON lines")
    saves = tuple(given["save"])
    printed = [name for name in (*saves, given["process_save"], given["engine_save"]) if name == "-"]
    if printed and options.output == "json":
        raise ValueError("-o json prints JSON lines where - would print CSV: leave one of them out")
    has_door = given["listen"] or given["pushgateway"] or given["engine_save"] or given["process_save"]
    if not saves and not has_door and options.output == "table" and not sys.stdout.isatty():
        saves = ("-",)
    for name in saves:
        if name != "-" and Path(name).suffix not in SUFFIXES and (not Path(name).exists() or Path(name).is_file()):
            raise ValueError(f"--save {name}: the ending says the form: {', '.join(SUFFIXES)}")
    key = read_secret(Path(given["engine_key_file"])) if given["engine_key_file"] else ""
    return Settings(
        interval_s=given["interval"],
        groups=tuple(given["metrics"].split(",")) if given["metrics"] else GROUPS,
        has_cores=given["cores"],
        outputs=saves,
        process_output=given["process_save"] or "",
        engine_output=given["engine_save"] or "",
        limit_bytes=_bytes(given["rotate"]) if given["rotate"] else 0,
        keep=given["keep"],
        engines=tuple(_target(text, key) for text in given["engines"]),
        listen=address_of(given["listen"]) if given["listen"] else None,
        token=read_secret(Path(given["metrics_token_file"])) if given["metrics_token_file"] else "",
        pushgateway=given["pushgateway"] or "",
        push_interval_s=given["push_interval"],
        job=given["job"],
        instance=given["instance"],
        grouping={name: str(value) for name, value in given["labels"]},
        has_seed_names=given["seed_names"],
        stop_after_s=given["duration"],
    )


def _target(text: str, key: str) -> Any:
    """NAME=URL, or a URL alone, which may hold a "=" itself."""
    from agent.monitor.engines import Target

    name, sign, url = text.partition("=")
    if not sign or "/" in name or ":" in name:
        name, url = "", text
    return Target(url, name, key)


def _bytes(text: str) -> int:
    """Raises: ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if not match or not int(match[1]):
        raise ValueError(f"{text!r} is not a size; write 500K, 100M or 2G")
    return int(match[1]) << _SHIFTS[(match[2] or "").lower()]


def _run(options: Globals, monitor: Monitor, is_drawn: bool) -> int:
    """Runs until it is told to end. Raises: HerderError, OSError, ValueError."""
    from herder.cli.monitor_view import View

    kept = {
        number: signal.signal(number, lambda *_: monitor.stopping.set())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    view = View(options, monitor) if is_drawn else None
    try:
        monitor.start()
        if monitor.server is not None:
            output.note(options, f"/metrics on port {monitor.server.port}")
        while not monitor.stopping.wait(DRAW_S if view else IDLE_S):
            if view:
                view.draw()
    finally:
        monitor.stop()
        for number, handler in kept.items():
            signal.signal(number, handler)
    if monitor.error:
        output.note(options, monitor.error)
    if monitor.settings.outputs or view:
        is_short = monitor.rows_lost and not monitor.writer.is_unread
        lost = f", {text.plural(monitor.rows_lost, 'row')} lost" if is_short else ""
        output.note(options, f"{monitor.samples} samples, {monitor.schedule.missed} ticks missed{lost}")
    return output.EXIT_FAILED if monitor.rows_lost and not monitor.writer.is_unread else output.EXIT_OK
