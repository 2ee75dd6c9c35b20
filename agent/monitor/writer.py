"""The thread that writes samples, so that no disk, however slow, holds up the sampling.

Samples wait in a queue with a limit and are written once a second; when it is full the newest are lost, and
counted. A file that cannot be written is said once when that begins and once when it ends.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from agent.monitor.files import Sink
from agent.monitor.node import NodeSample

log = logging.getLogger(__name__)
EVERY_S = 1.0
QUEUE_MAX = 2_000  # samples; about 10 kB each with eight GPUs
END_S = 10.0


class Writer:
    """Hands samples to sinks."""

    def __init__(self, sinks: Sequence[Sink], *, on_broken_pipe: Callable[[], None] = lambda: None) -> None:
        """on_broken_pipe: nobody reads the standard output any more."""
        self._sinks = tuple(sinks)
        self._waiting: deque[NodeSample] = deque()
        self._dropped = 0
        self.is_unread = False  # nobody reads the standard output any more
        self._errors: dict[int, str] = {}
        self._on_broken_pipe = on_broken_pipe
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor-writer", daemon=True)

    @property
    def lost(self) -> int:
        """Rows that are in no file: not written, or not taken."""
        return self._dropped + sum(sink.lost for sink in self._sinks)

    @property
    def error(self) -> str:
        """Why something cannot be written now; empty when all is well."""
        return "; ".join(self._errors.values())

    def start(self) -> None:
        """Begins to write."""
        if self._sinks:
            self._thread.start()

    def take(self, sample: NodeSample) -> None:
        """Accepts a sample; never waits."""
        if not self._sinks:
            return
        if len(self._waiting) >= QUEUE_MAX:
            self._dropped += 1
            return
        self._waiting.append(sample)

    def close(self) -> None:
        """Writes what waits and completes the files; waits END_S for a disk that does not answer."""
        self._stop.set()
        if self._thread.ident is None:
            for number, sink in enumerate(self._sinks):
                self._guard(number, sink, sink.close)
        elif self._thread.is_alive():
            self._thread.join(END_S)
            if self._thread.is_alive():
                log.error("the files are not complete: a disk does not answer")

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stop.wait(EVERY_S)
            samples = [self._waiting.popleft() for _ in range(len(self._waiting))]
            for number, sink in enumerate(self._sinks):
                if samples:
                    self._guard(number, sink, partial(sink.write, samples))
                if is_last:
                    self._guard(number, sink, sink.close)

    def _guard(self, number: int, sink: Sink, work: Callable[[], None]) -> None:
        before = self._errors.get(number)
        try:
            work()
        except BrokenPipeError:
            self.is_unread = True
            self._on_broken_pipe()
        except OSError as error:
            said = f"{sink.name}: {error.strerror or error}"
            self._errors[number] = said
            if said != before:
                log.error("samples cannot be written and are lost: %s", said)
        else:
            if before is not None:
                del self._errors[number]
                log.warning("samples are written again; %d rows were lost", sink.lost)
