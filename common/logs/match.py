"""Which lines a search wants: those that hold a text, or match a regular expression in a process that can be ended."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from common import limits
from common.errors import InvalidValue, TooMany
from common.logs.lines import Line

WORKER = Path(__file__).with_name("match_worker.py")
START_S = 20.0  # for the process to come up on a busy machine
_running: set[int] = set()  # ids of the searches of this process that run


class Search(Protocol):
    """Chooses lines."""

    async def choose(self, lines: Sequence[Line]) -> list[Line]:
        """Those that are wanted, in order. Raises: HerderError."""
        ...

    async def close(self) -> None:
        """Ends what it needs."""
        ...


class Everything:
    """No search."""

    async def choose(self, lines: Sequence[Line]) -> list[Line]:
        return list(lines)

    async def close(self) -> None:
        """Nothing to end."""


class Text:
    """Lines that hold a text."""

    def __init__(self, text: str, *, ignore_case: bool) -> None:
        self._text = text.casefold() if ignore_case else text
        self._ignore_case = ignore_case

    async def choose(self, lines: Sequence[Line]) -> list[Line]:
        wanted = self._text
        if self._ignore_case:
            return [line for line in lines if wanted in line.text.casefold()]
        return [line for line in lines if wanted in line.text]

    async def close(self) -> None:
        """Nothing to end."""


class Regex:
    """Lines that match a regular expression of Python, in a process that is killed when it takes too long."""

    def __init__(self, pattern: str, *, ignore_case: bool, limit_s: float = limits.LOG_REGEX_S) -> None:
        self._order = {"pattern": pattern, "ignore_case": ignore_case, "limit_s": limit_s}
        self._limit_s = limit_s
        self._process: asyncio.subprocess.Process | None = None

    async def choose(self, lines: Sequence[Line]) -> list[Line]:
        if not lines:
            return []
        if self._process is None:
            await self._start()
        found = await self._ask([line.text for line in lines], self._limit_s + START_S)
        return [lines[number] for number in found]

    async def close(self) -> None:
        """Ends the process."""
        _running.discard(id(self))
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            try:
                process.kill()
            except ProcessLookupError:
                pass  # it has just ended
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()

    async def _start(self) -> None:
        if len(_running) >= limits.LOG_REGEX_PROCESSES:
            raise TooMany(
                f"{limits.LOG_REGEX_PROCESSES} searches by regular expression are running here",
                hint="search for a plain text, or wait for one of them",
            )
        _running.add(id(self))
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(WORKER)),
                env={"PATH": os.defpath},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
            answer = await self._ask(self._order, self._limit_s + START_S)
        except BaseException:
            await asyncio.shield(self.close())
            raise
        if answer.get("error"):
            await self.close()
            raise InvalidValue(f"not a regular expression: {answer['error']}", hint="without regex it is a plain text")

    async def _ask(self, value: Any, timeout_s: float) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        data = json.dumps(value).encode()
        try:
            async with asyncio.timeout(timeout_s):
                process.stdin.write(len(data).to_bytes(4, "big") + data)
                await process.stdin.drain()
                size = int.from_bytes(await process.stdout.readexactly(4), "big")
                return json.loads(await process.stdout.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            raise InvalidValue(
                f"the regular expression needs more than {self._limit_s:g} s for a piece of the log",
                hint="make it simpler: no repeats inside repeats, as (a+)+",
            ) from None


def search_of(pattern: str, *, is_regex: bool, ignore_case: bool) -> Search:
    """The search that a request wants. Raises: InvalidValue for one that is too long."""
    if len(pattern) > limits.LOG_PATTERN_CHARS:
        raise InvalidValue(f"a search of more than {limits.LOG_PATTERN_CHARS} characters")
    if not pattern:
        return Everything()
    return Regex(pattern, ignore_case=ignore_case) if is_regex else Text(pattern, ignore_case=ignore_case)
