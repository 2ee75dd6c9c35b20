"""A local double of the parts of the Hugging Face Hub that huggingface_hub and the mover call.

GET /api/models/ORG/NAME[/revision/REV]?blobs=true answers as the hub does (siblings with size, blobId and lfs);
GET /ORG/NAME/resolve/COMMIT/PATH gives small files itself and redirects LFS files to a second host, the CDN.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from typing import Any

from aiohttp import web

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Runs in a thread; use as a context manager. `files` maps path to bytes of the one repository."""

    def __init__(self, repo: str, files: dict[str, bytes], *, cdn: str = "", token: str = "", gated: bool = False):
        self.repo, self.files, self.cdn, self.token, self.gated = repo, files, cdn, token, gated
        self.requests: list[tuple[str, str]] = []  # path, authorization
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        runner = self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/api/models/{repo:.+?}/revision/{revision}", self._info)
        app.router.add_get("/api/models/{repo:.+}", self._info)
        app.router.add_get("/{repo:.+?}/resolve/{revision}/{path:.+}", self._resolve)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        return runner

    def _refusal(self, request: web.Request) -> web.Response | None:
        given = request.headers.get("Authorization", "")
        self.requests.append((request.path, given))
        if self.gated:
            return web.json_response({}, status=403, headers={"X-Error-Code": "GatedRepo"})
        if request.match_info["repo"] != self.repo or (self.token and given != f"Bearer {self.token}"):
            return web.json_response({}, status=404, headers={"X-Error-Code": "RepoNotFound"})
        if request.match_info.get("revision", "main") not in ("main", COMMIT):
            return web.json_response({}, status=404, headers={"X-Error-Code": "RevisionNotFound"})
        return None

    async def _info(self, request: web.Request) -> web.Response:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        siblings: list[dict[str, Any]] = []
        for path, body in self.files.items():
            row: dict[str, Any] = {"rfilename": path, "size": len(body), "blobId": hashlib.sha1(body).hexdigest()}
            if is_lfs(path):
                row["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 135}
            siblings.append(row)
        return web.json_response({"id": self.repo, "modelId": self.repo, "sha": COMMIT, "siblings": siblings})

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        path = request.match_info["path"]
        if path not in self.files:
            return web.json_response({}, status=404, headers={"X-Error-Code": "EntryNotFound"})
        if is_lfs(path) and self.cdn:
            raise web.HTTPFound(f"{self.cdn}/{path}?signature=abc")
        return web.Response(body=self.files[path], headers={"ETag": f'"{hashlib.sha1(self.files[path]).hexdigest()}"'})


def is_lfs(path: str) -> bool:
    """Whether the hub keeps such a file as LFS."""
    return path.endswith((".safetensors", ".bin", ".gguf"))
