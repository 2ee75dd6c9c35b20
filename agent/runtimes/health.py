"""Asks an engine whether it is well: its health path, then one token, and why a late token may be no illness.

A canary that times out is excused when the engine's own step counter has grown meanwhile: a busy engine works, a
hung one does not. Nothing here raises for what the engine does; the answer is an error or None.
"""

from __future__ import annotations

import asyncio
import re
import socket
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import ResolveResult
from aiohttp.resolver import ThreadedResolver

from agent import outbound
from agent.runtimes.base import Runtime
from common import errors, wire
from common.errors import ErrorInfo

ANSWER_BYTES = 4 * 1024 * 1024
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


class GuardedResolver(ThreadedResolver):
    """Names as aiohttp resolves them, except to addresses that are refused. Literal addresses never get here."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        for result in found:
            outbound.refuse(result["host"])
        return found


def base_url(host: str, port: int) -> str:
    """Where this node reaches an engine that listens on `host`."""
    address = WILDCARDS.get(host, host)
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


async def probe(
    http: aiohttp.ClientSession,
    runtime: Runtime | None,
    order: wire.EnsureReplica,
    host: str,
    port: int,
    *,
    with_canary: bool,
) -> ErrorInfo | None:
    """None when the engine is well."""
    health = order.health
    error = await check_port(WILDCARDS.get(host, host), port, health.timeout_s) if not health.path else None
    if health.path:
        error = await check_url(http, base_url(host, port) + health.path, health.timeout_s, order.api_key)
    if error is not None or not with_canary:
        return error
    return await _canary(http, runtime, order, base_url(host, port))


async def check_url(http: aiohttp.ClientSession, url: str, timeout_s: float, api_key: str = "") -> ErrorInfo | None:
    """None when a GET answers 2xx within the time. Redirects are not followed."""
    try:
        async with asyncio.timeout(timeout_s):
            async with http.get(url, headers=_headers(api_key), allow_redirects=False) as response:
                if 200 <= response.status < 300:
                    return None
                text = (await response.content.read(200)).decode(errors="replace")
                return errors.Unhealthy(f"answered {response.status}: {text}", status=response.status).info()
    except TimeoutError:
        return errors.Unhealthy(f"no answer within {timeout_s:g} s").info()
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return errors.Unhealthy(f"cannot be reached: {error}"[:300]).info()


async def check_outside(
    http: aiohttp.ClientSession, url: str, timeout_s: float, *, allow_link_local: bool = False
) -> ErrorInfo | None:
    """As `check_url`, and `check_port` for tcp://HOST:PORT, for an address that a person named.

    The session's connector has to use a `GuardedResolver` unless link-local addresses are allowed.
    """
    try:
        if not url.startswith("tcp://"):
            if not allow_link_local:
                # aiohttp takes whatever is made of digits for an address and asks no resolver: 2852039166 is one, too
                async with asyncio.timeout(timeout_s):
                    await _resolved(urlsplit(url).hostname or "", 0)
            return await check_url(http, url, timeout_s)
        host, _, port = url.removeprefix("tcp://").rpartition(":")
        if not port.isdigit() or int(port) >= 65_536:
            return errors.InvalidValue(f"{url[:80]!r} has no port").info()
        host = host.strip("[]")
        if not allow_link_local:
            async with asyncio.timeout(timeout_s):
                host = await _resolved(host, int(port))
        return await check_port(host, int(port), timeout_s)
    except errors.AddressRefused as error:
        return error.info()
    except TimeoutError:
        return errors.Unhealthy(f"its name was not resolved within {timeout_s:g} s").info()
    except (OSError, ValueError) as error:
        return errors.Unhealthy(f"cannot be reached: {error}"[:300]).info()


async def _resolved(host: str, port: int) -> str:
    """An address of the host, when none of its addresses is refused. Raises: AddressRefused, OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(address[0]) for *_, address in found]
    for address in addresses:
        outbound.refuse(address)
    return addresses[0]


async def check_port(host: str, port: int, timeout_s: float) -> ErrorInfo | None:
    """None when the port accepts a connection within the time."""
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
    except TimeoutError:
        return errors.Unhealthy(f"no connection within {timeout_s:g} s").info()
    except OSError as error:
        return errors.Unhealthy(f"cannot be reached: {error}"[:300]).info()
    return None


async def _canary(
    http: aiohttp.ClientSession, runtime: Runtime | None, order: wire.EnsureReplica, url: str
) -> ErrorInfo | None:
    health = order.health
    steps_before = await steps(http, runtime, order, url)
    try:
        async with asyncio.timeout(health.timeout_s):
            async with http.post(
                url + (health.canary_path or "/v1/completions"),
                json=health.canary,
                headers=_headers(order.api_key),
                allow_redirects=False,
            ) as response:
                body = await response.content.read(ANSWER_BYTES)
                if 200 <= response.status < 300:
                    return None
                said = body[:200].decode(errors="replace")
                return errors.Unhealthy(f"the canary was answered {response.status}: {said}").info()
    except TimeoutError:
        steps_after = await steps(http, runtime, order, url)
        if steps_before is not None and steps_after is not None and steps_after > steps_before:
            return None
        return errors.Unhealthy(f"healthy by its own word, but no token within {health.timeout_s:g} s").info()
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return errors.Unhealthy(f"the canary failed: {error}"[:300]).info()


async def steps(
    http: aiohttp.ClientSession, runtime: Runtime | None, order: wire.EnsureReplica, url: str
) -> float | None:
    """The engine's own step counter, None where it has none or does not say."""
    path, counter = runtime.steps_path() if runtime is not None else ("", "")
    if not path:
        return None
    try:
        async with asyncio.timeout(order.health.timeout_s):
            async with http.get(url + path, headers=_headers(order.api_key), allow_redirects=False) as response:
                if response.status != 200:
                    return None
                text = (await response.content.read(ANSWER_BYTES)).decode(errors="replace")
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
        return None
    match = re.search(rf"^{re.escape(counter)}(?:\{{[^}}]*\}})? (\S+)", text, re.MULTILINE)
    try:
        return float(match[1]) if match is not None else None
    except ValueError:
        return None


def _headers(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
