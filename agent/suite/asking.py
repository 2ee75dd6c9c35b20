"""One HTTP request with a deadline, on the standard library: no proxy of the environment stands between nodes."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

MAX_ANSWER = 64 << 20
MAX_AT_ONCE = 64
Item = TypeVar("Item")
Made = TypeVar("Made")


def url_of(endpoint: str) -> str:
    """`host:port` as a URL."""
    return (endpoint if "://" in endpoint else f"http://{endpoint}").rstrip("/")


def _open(url: str, timeout_s: float) -> tuple[http.client.HTTPConnection, str]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise OSError(f"{url}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OSError(f"{url!r} is not an http URL")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return kind(parts.hostname, port, timeout=timeout_s), path


def ask(
    method: str, url: str, *, body: Any = None, token: str | None = None, timeout_s: float = 10.0
) -> tuple[int, bytes]:
    """(status, answer). Raises: OSError for everything that is no answer."""
    connection, path = _open(url, timeout_s)
    headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None
    if body is not None:
        data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
    try:
        connection.request(method, path, body=data, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(MAX_ANSWER)
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from None
    finally:
        connection.close()


def ask_json(method: str, url: str, **rest: Any) -> tuple[int, dict[str, Any]]:
    """(status, the answer's object). Raises: OSError, also for an answer that is none."""
    status, data = ask(method, url, **rest)
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        raise OSError(f"{url} answered {status} with something that is not JSON") from None
    return status, found if isinstance(found, dict) else {"value": found}


def ask_lines(url: str, *, body: Any, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Objects of an answer of JSON lines, as they come; `timeout_s` is the longest silence. Raises: OSError."""
    connection, path = _open(url, timeout_s)
    try:
        connection.request("POST", path, body=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status >= 300:
            raise OSError(f"{url} answered {answer.status}: {answer.read(500).decode(errors='replace')}")
        while line := answer.readline(1 << 20):
            if line.strip():
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found
    except (http.client.HTTPException, ValueError, RecursionError) as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from None
    except TimeoutError:
        raise OSError(f"{url}: silent for {timeout_s:g} s") from None
    finally:
        connection.close()


def at_once(work: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
    """Does work for all items at the same time, MAX_AT_ONCE of them; the answers in order.

    The threads are left behind when the caller is interrupted: each has a deadline of its own. Raises: what work does.
    """
    made: dict[int, Made] = {}
    failed: list[BaseException] = []
    waiting = iter(list(enumerate(items)))
    lock = threading.Lock()

    def worker() -> None:
        while True:
            with lock:
                number, item = next(waiting, (-1, None))
            if number < 0 or failed:
                return
            try:
                made[number] = work(item)  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001  # told in the caller's thread
                failed.append(error)

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(min(len(items), MAX_AT_ONCE))]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)
    if failed:
        raise failed[0]
    return [made[number] for number in range(len(items))]


def reason(error: OSError) -> str:
    """A sentence for people."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, socket.gaierror):
        return "the name is not known"
    return str(error.strerror or error) or type(error).__name__
