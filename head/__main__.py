"""`herder-head`: starts the head, checks its configuration, or restores a backup.

Exit codes: 0 stopped cleanly, 1 could not start or failed, 2 the configuration is wrong, 3 another head owns the state.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from pathlib import Path
from typing import Any

import click
import uvloop

from common.errors import HerderError, InvalidConfig, InvalidRecipe, StateLocked
from common.telemetry import setup_logging
from head import config
from head.config import HeadConfig

EXIT_FAILED, EXIT_CONFIG, EXIT_LOCKED = 1, 2, 3


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), envvar="HERDER_HEAD_CONFIG", help="YAML file."
)
@click.option("--host", help="Address to listen on (127.0.0.1).")
@click.option("--port", type=int, help="Port to listen on (8470).")
@click.option("--state-dir", help="Where the head keeps its state.")
@click.option("--log-level", help="debug, info, warning or error.")
@click.option("--check-config", is_flag=True, help="Check the configuration and the recipes, and exit.")
@click.option(
    "--restore", type=click.Path(path_type=Path), help="Put this backup in the place of the journal, and exit."
)
@click.option("--force", is_flag=True, help="With --restore: set an existing journal aside.")
@click.option("--new-admin-token", is_flag=True, help="Make one more admin key; its token goes to admin.token.")
@click.version_option(package_name="herder", prog_name="herder-head")
def main(
    config_file: Path | None,
    check_config: bool,
    restore: Path | None,
    force: bool,
    new_admin_token: bool,
    **overrides: Any,
) -> None:
    """The deciding daemon of a Herder cluster."""
    os.umask(0o077)
    try:
        settings = config.load(config_file, overrides=overrides)
        setup_logging(settings.log_level, settings.log_format)
        if restore is not None:
            _restore(settings, restore, is_forced=force)
        elif check_config:
            _check(settings)
        else:
            sys.exit(_serve(settings, needs_new_admin=new_admin_token))
    except HerderError as error:
        _fail(error)


def _serve(settings: HeadConfig, *, needs_new_admin: bool) -> int:
    from head.daemon import Daemon  # --check-config and --restore need none of it

    async def run() -> int:
        return await Daemon(settings, needs_new_admin=needs_new_admin).run()

    # Each agent and each client is a descriptor; the soft limit of a login shell (1,024) is for programs without many.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def _check(settings: HeadConfig) -> None:
    from head.daemon import read_recipes

    recipes, _ = read_recipes(settings)
    click.echo(f"configuration is good: {settings.url}, state in {settings.state_path}, {len(recipes)} recipes")


def _restore(settings: HeadConfig, backup: Path, *, is_forced: bool) -> None:
    from head.restore import restore

    done = restore(backup, settings.state_path, is_forced=is_forced, allow_network_fs=settings.allow_network_fs)
    kept = f"; the former journal is kept as {done.kept}" if done.kept else ""
    click.echo(f"restored cluster {done.cluster_id}, next epoch {done.head_epoch + 1}{kept}")


def _fail(error: HerderError) -> None:
    hint = f"; {error.hint}" if error.hint else ""
    click.echo(f"herder-head: {error.message}{hint}", err=True)
    if isinstance(error, StateLocked):
        sys.exit(EXIT_LOCKED)
    sys.exit(EXIT_CONFIG if isinstance(error, InvalidConfig | InvalidRecipe) else EXIT_FAILED)


if __name__ == "__main__":
    main()
