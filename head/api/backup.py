"""/backup: the whole journal, consistent, while everything goes on. It holds key hashes and engine keys: for admins."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from aiohttp import web

from common import limits
from common.errors import TooMany
from head.api.call import Call
from head.api.routes import PREFIX, Media, Route

TAG = "head"
CHUNK_BYTES = 1_048_576


async def backup(call: Call) -> web.StreamResponse:
    """Writes a copy beside the journal, streams it and deletes it. One at a time."""
    if call.shared.backup_gate.locked():
        raise TooMany("a backup is being made already", hint="wait until it is done", retry_after_s=5)
    async with call.shared.backup_gate:
        await call.read()
        target = call.context.config.state_path / f"backup-{call.request_id}.sqlite"
        try:
            await call.context.journal.backup(target)
            return await _send(call, target)
        finally:
            await asyncio.to_thread(target.unlink, missing_ok=True)


async def _send(call: Call, path: Path) -> web.StreamResponse:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(call.now_ms / 1000))
    size = (await asyncio.to_thread(path.stat)).st_size
    response = web.StreamResponse(
        headers={
            "Content-Type": "application/vnd.sqlite3",
            "Content-Length": str(size),
            "Content-Disposition": f'attachment; filename="herder-{stamp}.sqlite"',
        }
    )
    await response.prepare(call.request)
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            async with asyncio.timeout(limits.STREAM_WRITE_S):
                await response.write(chunk)
    finally:
        await asyncio.to_thread(file.close)
    return response


def remove_leftovers(state_path: Path) -> None:
    """Deletes backups that a crash left behind; at start-up."""
    for path in (*state_path.glob("backup-req-*.sqlite"), *state_path.glob(".backup-req-*.part")):
        path.unlink(missing_ok=True)


ROUTES = (
    Route(
        "GET",
        f"{PREFIX}/backup",
        backup,
        "admin",
        TAG,
        "Download a backup",
        Media("application/vnd.sqlite3", "A SQLite file that `herder-head --restore` takes.", is_binary=True),
        codes=("too_many", "disk_full", "state_read_only"),
        description="A consistent copy of everything the head knows, made while it goes on working. "
        "It holds key hashes and engine keys: keep it as you keep tokens.",
    ),
)
