"""`herder`: the command line. This file knows every verb by one line of help and imports none before it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from herder import __version__
from herder.cli.command import Globals, LazyGroup, shared

_HERE = "herder.cli"
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Start and stop": {
        "up": (f"{_HERE}.up", "Run a head and an agent on this machine."),
        "down": (f"{_HERE}.down", "Stop what `herder up --detach` started."),
        "head": (f"{_HERE}.head", "Run a head only."),
        "agent": (f"{_HERE}.agent", "Run an agent that works for a head."),
    },
    "Models": {
        "models": (f"{_HERE}.models", "Register, list and show models."),
        "download": (f"{_HERE}.download", "Fetch a model from its source to a device."),
        "copy": (f"{_HERE}.copy", "Copy a model to another device."),
        "move": (f"{_HERE}.move", "Move a model to another device."),
        "delete": (f"{_HERE}.delete", "Remove a copy of a model from a device."),
        "pin": (f"{_HERE}.pin", "Keep a copy from eviction."),
        "unpin": (f"{_HERE}.unpin", "Let a copy be evicted again."),
    },
    "Serving": {
        "serve": (f"{_HERE}.serve", "Run an engine for a model on a device."),
        "chat": (f"{_HERE}.chat", "Ask a served model; the answer streams."),
        "stop": (f"{_HERE}.stop", "Stop the engine of a model."),
        "services": (f"{_HERE}.services", "Create, list, show and delete services."),
        "logs": (f"{_HERE}.logs", "Read, search and follow logs."),
        "health-check": (f"{_HERE}.health_check", "Ask an engine or a URL whether it is healthy."),
        "recipes": (f"{_HERE}.recipes", "List how engines can be run."),
    },
    "Machines": {
        "status": (f"{_HERE}.status", "The whole cluster at a glance."),
        "nodes": (f"{_HERE}.nodes", "List, show, cordon, drain, label and remove nodes."),
        "devices": (f"{_HERE}.devices", "List devices and what room they have."),
    },
    "Planning": {
        "plan": (f"{_HERE}.plan", "Plan training and serving: memory, time, cost, settings."),
    },
    "Benchmarks": {
        "bench": (f"{_HERE}.bench", "Put load on any URL and measure it."),
        "benchmarks": (f"{_HERE}.benchmarks", "Run, watch, compare and export benchmarks."),
        "monitor": (f"{_HERE}.monitor", "Watch this machine: GPUs, CPUs, memory, disks, engines."),
        "suite": (f"{_HERE}.suite", "Check, make and submit suites of benchmarks for Slurm."),
        "orchestrate": (f"{_HERE}.orchestrate", "Run a suite against servers and executors."),
        "executor": (f"{_HERE}.executor", "Send a suite's workload from a client node."),
    },
    "Jobs and reasons": {
        "job": (f"{_HERE}.job", "Run a job file."),
        "jobs": (f"{_HERE}.jobs", "List, show, follow and cancel jobs."),
        "events": (f"{_HERE}.events", "Follow every change."),
        "why": (f"{_HERE}.why", "Say why something is as it is."),
        "story": (f"{_HERE}.story", "Tell what happened to something."),
    },
    "Administration": {
        "keys": (f"{_HERE}.keys", "Create, list and revoke access tokens."),
        "backup": (f"{_HERE}.backup", "Save everything the head knows to a file."),
        "version": (f"{_HERE}.version", "Show the versions of client and head."),
        "completion": (f"{_HERE}.completion", "Print the shell's completion script."),
    },
}
EPILOG = (
    "herder up --file-root ~/models",
    "herder models add smollm2 --source file:///home/me/models/smollm2.gguf",
    "herder serve smollm2 $(hostname):dram",
    'herder chat smollm2 "Why is the sky blue?"',
)


@click.command(
    "herder",
    cls=LazyGroup,
    sections=SECTIONS,
    examples=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
)
@click.version_option(__version__, "-V", "--version", prog_name="herder", message="%(prog)s %(version)s")
def cli() -> None:
    """Store, serve, benchmark and tune models on GPU machines.

    Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 the head cannot be reached, 4 not allowed, 5 not found,
    6 timed out, 130 interrupted.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its code; no traceback leaves for anything that is expected to happen."""
    options = Globals()
    sys.exit(run(list(args) if args is not None else None, options))


def run(args: list[str] | None, options: Globals) -> int:
    """Runs one command and returns its exit code."""
    from herder.cli.output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, exit_code_of, hint_for, show_error
    from herder.errors import HerderError

    try:
        outcome = cli.main(args, prog_name="herder", standalone_mode=False, obj=options)
        if sys.stdout is not None:  # as it is where its descriptor was closed
            sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "herder"
        show_error("usage", error.format_message(), f"`{where} --help` shows how it is used, with examples")
        return EXIT_USAGE
    except click.ClickException as error:
        show_error("failed", error.format_message())
        return EXIT_FAILED
    except (click.Abort, KeyboardInterrupt):
        click.echo("\nInterrupted. What the head has begun goes on: `herder status`.", err=True)
        return EXIT_INTERRUPTED
    except HerderError as error:
        show_error(error.code, error.message, hint_for(error, options))
        return exit_code_of(error)
    except BrokenPipeError:
        # The reader of a pipe has left, as `| head` does: what remains goes nowhere, and Python's own flush is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        show_error("os_error", f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        return EXIT_FAILED
    return outcome if isinstance(outcome, int) else 0


__all__ = ["cli", "main", "run", "shared"]
