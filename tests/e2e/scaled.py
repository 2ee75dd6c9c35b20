"""Runs a daemon with shorter times: `python -P scaled.py MODULE '{"LIMIT": value}' ARGUMENTS...`.

The daemon is the real one; only the numbers of `common/limits.py` are others, so that a lease of 15 s and a settling
time of 60 s do not have to be waited for.
"""

from __future__ import annotations

import json
import runpy
import sys

from common import limits


def main() -> None:
    """Sets the limits and becomes the daemon."""
    module, values = sys.argv[1], json.loads(sys.argv[2])
    for name, value in values.items():
        assert hasattr(limits, name), name
        setattr(limits, name, value)
    sys.argv[:] = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
