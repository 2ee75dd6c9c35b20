"""The `herder` command as a process of this tree's code."""

from __future__ import annotations

import sys

HERDER = (sys.executable, "-P", "-c", "from herder.cli.main import main; main()")
"""What its arguments follow."""
