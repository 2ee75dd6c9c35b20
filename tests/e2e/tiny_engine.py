"""An engine in a few lines, for clusters under test: `python tiny_engine.py PORT FOLDER`.

Answers /health and streamed chat requests of `max_tokens` words, one every 50 ms. Files in FOLDER change it:
`children` there at the start: it leaves behind a child in its group and a grandchild in a session of its own, and
notes their ids in `PORT.pids`; `hang`: chat answers nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(sys.argv[2])
WORD_S = 0.05


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """/health, and anything else as well."""
        self.answer({"status": "ok", "pid": os.getpid()})

    def do_POST(self) -> None:
        """A chat request."""
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        while (FOLDER / "hang").exists():
            time.sleep(0.02)
        count = int(asked.get("max_tokens", 3))
        print(f"chat of {count} words", flush=True)
        if not asked.get("stream"):
            text = " ".join(f"w{number}" for number in range(count))
            choice = {"index": 0, "message": {"content": text}, "finish_reason": "length"}
            self.answer({"object": "chat.completion", "choices": [choice], "usage": usage(count)})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(count):
            self.event(json.dumps({"choices": [{"index": 0, "delta": {"content": f"w{number} "}}]}))
            time.sleep(WORD_S)
        if (asked.get("stream_options") or {}).get("include_usage"):
            self.event(json.dumps({"choices": [], "usage": usage(count)}))
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data: str) -> None:
        """One event of a stream."""
        piece = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.flush()

    def answer(self, value: object) -> None:
        """A whole answer."""
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def usage(count: int) -> dict[str, int]:
    """As engines tell it."""
    return {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}


class Server(ThreadingHTTPServer):
    """Clients that go away are no news."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Quiet."""


def leave_children() -> None:
    """A child in our process group, and below it a grandchild that has left the group and the session."""
    child = subprocess.Popen(["sh", "-c", "setsid sleep 10000 & echo $!; exec sleep 10001"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    (FOLDER / f"{sys.argv[1]}.pids").write_text(f"{child.pid} {grandchild}")


if __name__ == "__main__":
    if (FOLDER / "children").exists():
        leave_children()
    server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
    print(f"tiny engine {os.getpid()} listens", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Event().wait()
