"""What trouble costs in bytes: a receiver killed with kill -9 in the middle of a copy, and one bit flipped on the way.

    python -m benchmarks.recovery [--mib 1024] [--dir DIR]

Two real movers copy a file through a relay that counts every byte which the sender gives; one run is killed at half
and asked again, one run finds one bit of one byte changed. Fetched again is what was counted beyond the file's size
(and answers' heads, a few hundred bytes for each range). Bars: after kill -9 at most one checkpoint (1 GiB, or what
one second brings), after a flipped bit at most one chunk. The copies' bytes are compared with the source's.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path

from agent.mover import protocol
from benchmarks import disk
from common import limits
from common.wire import Source
from tests.doubles.mover_client import MoverClient, ticket

KEY = bytes(32)
PIECE = 1 << 20


class Relay:
    """Passes connections on to the sender; counts, and flips one bit of the byte at which the count is `flip_at`."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self.count, self.flip_at = 0, -1
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                threading.Thread(target=self._pass, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_counted: bool) -> None:
        buffer = memoryview(bytearray(PIECE))
        with contextlib.suppress(OSError):
            while count := source.recv_into(buffer):
                if is_counted:
                    self._account(buffer, count)
                target.sendall(buffer[:count])
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _account(self, buffer: memoryview, count: int) -> None:
        with self._lock:
            begin, self.count = self.count, self.count + count
            # a large piece of a body, never the head of an answer
            if 0 <= self.flip_at <= begin and count > PIECE // 4:
                buffer[count // 2] ^= 1
                self.flip_at = -1

    def close(self) -> None:
        """Takes no more connections."""
        self._listener.close()


class Bench:
    """A sender with a model, and the relay before it."""

    def __init__(self, place: Path, size: int) -> None:
        self.place, self.size = place, size
        (place / "source").mkdir()
        disk.make(place / "source" / "m.bin", size)
        self.sender = MoverClient(place / "one", file_roots=(str(place),))
        done = self.sender.fetch("m", f"file://{place / 'source'}", timeout_s=900)
        assert done.manifest is not None, done.error
        self.manifest = done.manifest
        self.sender.configure("n1", KEY)
        assert self.sender.ready is not None
        self.relay = Relay(self.sender.ready.host, self.sender.ready.port)
        self.source = Source(f"peer://127.0.0.1:{self.relay.port}", ticket=ticket(KEY, "n1", self.manifest.digest))

    def copy(self, *, kill_at: int = -1, flip_at: int = -1) -> tuple[int, float]:
        """(bytes that the sender gave, seconds) until the copy is published; checked, then removed."""
        self.relay.count, self.relay.flip_at = 0, flip_at
        store = self.place / "two"
        began = time.monotonic()
        receiver = MoverClient(store)
        if kill_at >= 0:
            receiver.start_fetch("m", self.source, manifest=self.manifest)
            while self.relay.count < kill_at:
                time.sleep(0.001)
            receiver.kill()
            receiver = MoverClient(store)
        done = receiver.fetch("m", self.source, timeout_s=900, manifest=self.manifest)
        elapsed = time.monotonic() - began
        assert done.error is None, done.error
        verified = receiver.ask(lambda token: protocol.Verify(token, "m", "r1"), timeout_s=900)
        assert verified.error is None, verified.error
        assert self.relay.flip_at < 0, "no bit was flipped"
        receiver.close()
        shutil.rmtree(store)
        return self.relay.count, elapsed


def main() -> None:
    """Runs the three copies and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--dir", type=Path, help="on the disk to use; default: the temporary directory")
    options = parser.parse_args()
    size = options.mib << 20
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        bench = Bench(Path(scratch), size)
        chunk = bench.manifest.files[0].chunk_bytes
        plain, seconds = bench.copy()
        killed, _ = bench.copy(kill_at=size // 2)
        flipped, _ = bench.copy(flip_at=size // 2)
        bench.relay.close()
        bench.sender.close()
    checkpoint = min(limits.CHECKPOINT_BYTES, int(size / seconds * limits.CHECKPOINT_S))
    print(f"{size} bytes in chunks of {chunk} through a counting relay; every copy verified afterwards")
    print(f"  {'undisturbed':24} {plain:12} bytes from the sender ({plain - size} of them heads of answers and lists)")
    print(f"  {'kill -9 at half':24} {killed:12} bytes, {killed - plain} fetched again (bar: {checkpoint})")
    print(f"  {'one bit flipped':24} {flipped:12} bytes, {flipped - plain} fetched again (bar: {chunk}, and one head)")


if __name__ == "__main__":
    main()
