"""An engine whose log can be checked: `python counting_engine.py PORT FOLDER` prints "line 0", "line 1", ...

About 200 lines a second. Files in FOLDER change it: `hold` there: it prints nothing; `burst` there at the start: so
many longer lines come at once, before all others; `die`: it ends with code 3 and removes the file.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT, FOLDER = int(sys.argv[1]), Path(sys.argv[2])


class Handler(BaseHTTPRequestHandler):
    """Everything is fine."""

    def do_GET(self) -> None:
        """/health."""
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def count() -> None:
    """Prints for ever."""
    number = 0
    burst = FOLDER / "burst"
    if burst.exists():
        for number in range(int(burst.read_text())):
            print(f"line {number} {'x' * 80}")
        number += 1
    while True:
        if (FOLDER / "die").exists():
            (FOLDER / "die").unlink()
            print("the engine dies", flush=True)
            os._exit(3)
        if not (FOLDER / "hold").exists():
            print(f"line {number}", flush=True)
            number += 1
        time.sleep(0.005)


if __name__ == "__main__":
    threading.Thread(target=ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever, daemon=True).start()
    count()
