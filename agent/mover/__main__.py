"""The mover as a process: `python -P -m agent.mover --fd N --config FILE.json`.

The agent makes a socketpair, passes one end as file descriptor N (`pass_fds`), and writes the settings
(`agent.mover.config.MoverConfig` as JSON) to FILE. The mover recovers its store, starts its blob server, sends
`Ready{host, port, pid}` as its first frame and then answers requests (agent/mover/protocol.py). It ends when it is
told `Stop`, on SIGTERM, and when the agent's end of the socket closes; a fetch in progress stays on disk at its
last checkpoint and goes on when it is asked for again.

Exit status: 0 ended in order; 2 bad configuration; 3 another mover owns this store (state_locked); 4 the store
cannot be used. What went wrong is on stderr as one JSON line {code, message, hint, details}.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from pathlib import Path

import msgspec

from agent.mover.config import load
from agent.mover.process import Mover
from common.errors import HerderError, InvalidConfig, StateLocked

NICE = 5  # the agent, which has leases to keep, and engines that compute go before bulk copies


def main() -> int:
    """Runs a mover to its end and returns the exit status."""
    parser = argparse.ArgumentParser(prog="agent.mover")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the agent")
    parser.add_argument("--config", type=Path, required=True, help="settings, a JSON file")
    options = parser.parse_args()
    with contextlib.suppress(OSError):
        os.nice(NICE)
    try:
        config = load(options.config)
        channel = socket.socket(fileno=options.fd)
        Mover(config, channel).run()
    except HerderError as error:
        sys.stderr.write(msgspec.json.encode(error.info()).decode() + "\n")
        return 2 if isinstance(error, InvalidConfig) else 3 if isinstance(error, StateLocked) else 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
