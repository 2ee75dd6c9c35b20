"""`python -m agent.monitor --run DIR`: the monitor as a child of the agent. People use `herder monitor`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from agent.monitor.run import STATUS, StatusFile, make, perform, refuse
from common.errors import HerderError, InvalidConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the order of a folder until it ends or SIGTERM comes. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m agent.monitor", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the folder with order.json")
    folder: Path = parser.parse_args(arguments).run
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    status = StatusFile(folder / STATUS)
    try:
        monitor = make(folder, status)
    except HerderError as error:
        return refuse(status, error)
    except ValueError as error:
        return refuse(status, InvalidConfig(f"order.json: {error}"))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: monitor.stopping.set())
    return perform(monitor, status)


if __name__ == "__main__":
    sys.exit(main())
