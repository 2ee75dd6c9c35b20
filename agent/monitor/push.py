"""Pushes to a Prometheus Pushgateway, for nodes that Prometheus cannot reach; the group is deleted at the end.

A thread of its own: a gateway that hangs delays no sample. A push that fails is not repeated, since the next one
carries newer values; the deletion is tried a few times within a few seconds, as nobody comes after it. A group that
a killed monitor left behind is overwritten by its next start with the same labels.
"""

from __future__ import annotations

import base64
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from urllib.parse import quote

from agent.monitor.web import WebError, ask, checked_url

log = logging.getLogger(__name__)
TIMEOUT_S = 5.0
DELETE_TRIES = 3
DELETE_END_S = 10.0
DELETE_PAUSE_S = 0.5
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


def group_url(url: str, labels: Mapping[str, str]) -> str:
    """The address of the group with these labels, `job` among them. Raises: ValueError.

    Source: the Pushgateway's README: values with a slash, and empty ones, go in base64 ("=" for an empty one).
    """
    url = checked_url(url)
    path = ["/metrics"]
    for name in sorted(labels, key=lambda name: name != "job"):  # the job comes first
        value = labels[name]
        if not _LABEL.fullmatch(name) or name.startswith("__"):
            raise ValueError(f"{name!r} is no name of a label: letters, digits and _, with no digit at its begin")
        if name == "job" and not value:
            raise ValueError("the label job cannot be empty")
        if not value or "/" in value or value in (".", ".."):  # dots would be taken for steps of the path
            encoded = base64.urlsafe_b64encode(value.encode()).decode().rstrip("=") or "="
            path.append(f"{name}@base64/{encoded}")
        else:
            path.append(f"{name}/{quote(value, safe='')}")
    return url.rstrip("/") + "/".join(path)


class Pusher:
    """Pushes what `text` makes, at its own beat."""

    def __init__(self, url: str, labels: Mapping[str, str], text: Callable[[], bytes], *, interval_s: float) -> None:
        """Raises: ValueError for a URL that is none, or an interval below a second."""
        if not interval_s >= 1.0:
            raise ValueError("a push interval is at least a second")
        self.pushes = 0
        self.failures = 0
        self.error = ""
        self._url = group_url(url, labels)
        self._text = text
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor-push", daemon=True)

    def start(self) -> None:
        """Pushes at once, then at each interval."""
        self._thread.start()

    def close(self) -> None:
        """Ends, and deletes the group if it ever pushed; waits no longer than DELETE_END_S."""
        self._stop.set()
        if self._thread.ident is None:
            return
        deadline_s = time.monotonic() + DELETE_END_S
        if self._thread.is_alive():
            self._thread.join(TIMEOUT_S)
        for attempt in range(DELETE_TRIES):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            if self._ask("DELETE", b"", min(TIMEOUT_S, left_s)):
                return
            if attempt + 1 < DELETE_TRIES:
                threading.Event().wait(DELETE_PAUSE_S)
        log.error("the group is still at the Pushgateway: %s", self.error)

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._stop.wait(max(0.0, due_s - time.monotonic())):
            due_s = max(due_s + self._interval_s, time.monotonic())
            before = self.error
            if self._ask("PUT", self._text(), TIMEOUT_S):
                self.pushes += 1
                if before:
                    log.warning("the Pushgateway takes metrics again")
            else:
                self.failures += 1
                if not before:
                    log.error("the Pushgateway does not take metrics: %s", self.error)

    def _ask(self, method: str, body: bytes, timeout_s: float) -> bool:
        headers = {"Content-Type": "text/plain; version=0.0.4"} if body else {}
        try:
            status, answer = ask(method, self._url, headers=headers, body=body, timeout_s=timeout_s)
            if status in (200, 202):
                self.error = ""
                return True
            self.error = f"HTTP {status}: {answer[:200].decode(errors='replace').strip()}"
        except WebError as error:
            self.error = str(error)
        return False
