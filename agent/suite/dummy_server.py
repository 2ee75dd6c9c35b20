"""A server that is known exactly, to try a suite without an engine: it answers after a fixed time, with as many tokens
as are asked for, at a fixed pace. `python -m agent.suite.dummy_server`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from typing import Any

from aiohttp import web


class Dummy:
    """Its times."""

    def __init__(self, first_s: float, token_s: float, model: str) -> None:
        self.first_s, self.token_s, self.model = first_s, token_s, model
        self.requests = 0

    def application(self) -> web.Application:
        """The routes: /health, and OpenAI's chat, completions and models."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.post("/v1/completions", self._complete),
                web.post("/v1/chat/completions", self._complete),
            ]
        )
        return app

    async def _health(self, request: web.Request) -> web.Response:
        self.requests += 1
        return web.json_response({"status": "ok", "requests": self.requests})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        asked = await request.json()
        is_chat = request.path.endswith("chat/completions")
        count = max(1, min(int(asked.get("max_tokens") or 16), 100_000))
        prompt = json.dumps(asked.get("messages") or asked.get("prompt") or "")
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": count}
        if not asked.get("stream"):
            await asyncio.sleep(self.first_s + self.token_s * (count - 1))
            return web.json_response({"choices": [_piece(is_chat, "w " * count, whole=True)], "usage": usage})
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        begun = asyncio.get_running_loop().time()
        for number in range(count):
            due = begun + self.first_s + self.token_s * number
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            piece = _piece(is_chat, "w ") | {"finish_reason": "length" if number == count - 1 else None}
            await answer.write(b"data: " + json.dumps({"choices": [piece]}).encode() + b"\n\n")
        await answer.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
        await answer.write_eof()
        return answer


def _piece(is_chat: bool, text: str, *, whole: bool = False) -> dict[str, Any]:
    base: dict[str, Any] = {"index": 0} | ({"finish_reason": "length"} if whole else {})
    if not is_chat:
        return base | {"text": text}
    return base | {"message" if whole else "delta": {"role": "assistant", "content": text}}


def main(arguments: list[str] | None = None) -> None:
    """Serves until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="dummy-server", description="A server that is known exactly.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default="dummy")
    parser.add_argument("--first-ms", type=float, default=10.0, help="until the first token")
    parser.add_argument("--token-ms", type=float, default=1.0, help="between tokens")
    given = parser.parse_args(arguments)
    dummy = Dummy(given.first_ms / 1000, given.token_ms / 1000, given.model)
    asyncio.run(_serve(dummy, given.host, given.port))


async def _serve(dummy: Dummy, host: str, port: int) -> None:
    runner = web.AppRunner(dummy.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    site = web.TCPSite(runner, host, port)
    await site.start()
    sys.stdout.write(f"http://{host}:{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await stopped.wait()
    await runner.cleanup()


if __name__ == "__main__":
    main()
