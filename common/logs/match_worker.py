"""Searches lines by a regular expression, as a process of its own: `python -I -S match_worker.py`. Stdlib only.

Some expressions need longer for a line than anybody has time for, and Python's `re` can neither be interrupted nor
shared with a loop. Here it may: an alarm ends the process in the middle of a match. Frames both ways are a length of
four bytes and JSON. First {"pattern", "ignore_case", "limit_s"}, answered {} or {"error"}; then lists of lines, each
answered with the list of the positions of those that match.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from typing import Any

MEMORY_BYTES = 512 << 20


def read() -> Any:
    """The next frame; ends the process when there is none."""
    head = sys.stdin.buffer.read(4)
    if len(head) < 4:
        sys.exit(0)
    return json.loads(sys.stdin.buffer.read(int.from_bytes(head, "big")))


def write(value: Any) -> None:
    """Answers."""
    data = json.dumps(value).encode()
    sys.stdout.buffer.write(len(data).to_bytes(4, "big") + data)
    sys.stdout.buffer.flush()


def main() -> None:
    """Answers until nobody asks."""
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    order = read()
    limit_s = float(order["limit_s"])
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        search = re.compile(order["pattern"], re.IGNORECASE if order["ignore_case"] else 0).search
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        write({"error": str(error)[:200]})
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    write({})
    while True:
        lines = read()
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        found = [number for number, line in enumerate(lines) if search(line)]
        signal.setitimer(signal.ITIMER_REAL, 0)
        write(found)


if __name__ == "__main__":
    main()
