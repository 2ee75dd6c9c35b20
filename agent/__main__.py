"""`herder-agent`: the daemon of one node.

Exit status: 0 ended in order; 1 a part failed; 2 the configuration or the state directory cannot be used.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click
import uvloop

import common
from agent.config import AgentConfig, load_agent_config, posture
from agent.daemon import Agent
from agent.release import release
from common.errors import HerderError, Internal
from common.logs.own import OwnLog
from common.statedir import StateDir
from common.telemetry import fields, setup_logging


@click.command()
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="YAML file.", envvar="HERDER_AGENT_CONFIG"
)
@click.option("--head", "head_url", help="URL of the head; overrides head_url.")
@click.option("--node-id", help="Overrides node_id.")
@click.option("--state-dir", help="Overrides state_dir.")
@click.option("--check-config", is_flag=True, help="Check the configuration, print the posture line, and end.")
@click.option("--release", "releases", is_flag=True, help="End engines, load and RAM tier of a stopped agent, and end.")
def main(
    config_path: Path | None,
    head_url: str | None,
    node_id: str | None,
    state_dir: str | None,
    check_config: bool,
    releases: bool,
) -> None:
    """Runs the agent of this node until SIGTERM; engines keep running."""
    overrides = {"head_url": head_url, "node_id": node_id, "state_dir": state_dir}
    try:
        _check_beside()
        if releases and state_dir:
            click.echo(release(Path(state_dir).absolute()))
            return
        config = load_agent_config(config_path, overrides=overrides)
        if check_config:
            click.echo(posture(config))
            return
        if releases:
            click.echo(release(config.state_path))
            return
        setup_logging(config.log_level, config.log_format)
        sys.exit(uvloop.run(_run(config)))
    except HerderError as error:
        hint = f" ({error.hint})" if error.hint else ""
        click.echo(f"herder-agent: {error.code}: {error.message}{hint}", err=True)
        sys.exit(2)


async def _run(config: AgentConfig) -> int:
    os.umask(0o077)
    state_dir = StateDir.open(config.state_path, daemon="herder-agent", allow_network_fs=config.allow_network_fs)
    try:
        agent = Agent(config, state_dir)
    except BaseException:
        state_dir.close()
        raise
    own = OwnLog.start(state_dir.path, bytes_max=config.logs.own_bytes_max, age_max_s=config.logs.age_max_s)
    try:
        logging.getLogger(__name__).info("starting", extra=fields(node=config.node, agent=agent.agent_id))
        return await agent.run()
    finally:
        own.close()


def _check_beside() -> None:
    """`common` is a flat name: another package of that name must not be taken for ours."""
    if Path(common.__file__ or "").resolve().parent.parent != Path(__file__).resolve().parent.parent:
        raise Internal(f"the package `common` was found at {common.__file__}, not beside the agent")


if __name__ == "__main__":
    main()
