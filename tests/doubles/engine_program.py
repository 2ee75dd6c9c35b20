"""An engine as a program, for agents under test: `python engine_program.py PORT FOLDER`.

It answers /health, one-token completions and a step counter; files in FOLDER change its manners while it runs:
`hang` (completions never answer), `busy` (nor do they, but the counter grows), `sick` (/health says 503).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(sys.argv[2])
STEPS = [0]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_GET(self) -> None:
        """/health and /metrics."""
        if self.path == "/metrics":
            STEPS[0] += (FOLDER / "busy").exists()
            self.answer(200, f"# HELP x\nllamacpp:n_decode_total {STEPS[0]}\n")
        else:
            self.answer(503 if (FOLDER / "sick").exists() else 200, "{}")

    def do_POST(self) -> None:
        """A completion."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        while (FOLDER / "hang").exists() or (FOLDER / "busy").exists():
            time.sleep(0.02)
        self.answer(200, '{"choices":[{"text":"a"}]}')

    def answer(self, status: int, text: str) -> None:
        """Sends an answer."""
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:
            pass  # the asker has gone

    def log_message(self, format: str, *args: object) -> None:
        """One line per request."""
        print(format % args, flush=True)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    server.daemon_threads = True
    print(f"listening, key {os.environ.get('ENGINE_WORD', '')}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Event().wait()
