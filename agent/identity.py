"""What proves that this agent is the node that it says it is: a secret of its own, made before its first hello.

It stands in a 0600 file of the state directory, goes to the head with every hello, and the head keeps its sha256. So
another holder of the join token cannot take this node's place, and a node whose state directory was lost has to be
let in again by an admin.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from common.config import read_secret
from common.errors import InvalidConfig
from common.statedir import write_secret

FILE = "identity"


def node_secret(state_dir: Path) -> str:
    """The node's secret, made and synced where there is none. Raises: InvalidConfig.

    An unreadable file is an error and never replaced: the head would refuse the new secret.
    """
    path = state_dir / FILE
    if path.exists():
        return read_secret(path)
    secret = secrets.token_hex(32)
    try:
        write_secret(path, secret)
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}", hint="the state directory must be writable") from None
    return secret
