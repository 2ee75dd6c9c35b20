"""Files of runs on their way to a head: over TLS, in pieces, nowhere else, and not for ever."""

from __future__ import annotations

import hashlib
import os
import random
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from agent.runs.upload import PIECE_BYTES, Uploader
from agent.tls import TlsConfig
from common import limits
from common.errors import BodyTooLarge, HerderError, RunFailed, TimedOut
from tests.doubles.certificates import Authority


class Taker:
    """A head that takes files, over TLS where it has a context."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.port = 0
        self.taken: list[tuple[str, str, str]] = []  # path, token, digest of what came
        self.pieces = 0
        self.answer: Callable[[], web.Response] = lambda: web.json_response({})

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    async def _put(self, request: web.Request) -> web.Response:
        made = hashlib.sha256()
        async for piece in request.content.iter_any():
            made.update(piece)
            self.pieces += 1
        assert made.hexdigest() == request.headers["X-Content-SHA256"]
        self.taken.append((request.path, request.headers["Authorization"], made.hexdigest()))
        return self.answer()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Taker]:
        """Listens."""
        app = web.Application(client_max_size=1 << 30)
        app.router.add_put("/{tail:.*}", self._put)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self.tls)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()


def uploader(head: Taker, tls: TlsConfig | None = None, give_up_s: float = 0.0) -> Uploader:
    """Who sends; gives up after its first attempt."""
    return Uploader(head.url, lambda: "t0ken", tls=tls, rng=random.Random(1), give_up_s=give_up_s)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of several pieces."""
    path = tmp_path / "load.bin"
    path.write_bytes(os.urandom(3 * PIECE_BYTES + 17))
    return path


async def test_in_pieces(file: Path) -> None:
    """A file of several pieces arrives whole, under its own name, with the agent's token."""
    async with Taker().serving() as head:
        await uploader(head).send("b1.0.0", file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()  # noqa: ASYNC240 - a small one
        assert head.taken == [("/api/v1/agent/runs/b1.0.0/artifacts/load.bin", "Bearer t0ken", digest)]
        assert head.pieces > 3


async def test_empty_file(tmp_path: Path) -> None:
    """A file without a byte is a file."""
    path = tmp_path / "generator.log"
    path.touch()
    async with Taker().serving() as head:
        await uploader(head).send("r", path)
        assert len(head.taken) == 1


async def test_too_large(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no head takes is not sent."""
    monkeypatch.setattr(limits, "ARTIFACT_BYTES", 1_000)
    async with Taker().serving() as head:
        with pytest.raises(BodyTooLarge):
            await uploader(head).send("r", file)
        assert head.taken == []


async def test_redirects_are_not_followed(file: Path) -> None:
    """The token goes to the head and nowhere else, whatever the head says."""
    async with Taker().serving() as other, Taker().serving() as head:
        head.answer = lambda: web.Response(status=307, headers={"Location": f"{other.url}/x"})
        with pytest.raises(TimedOut, match="307"):
            await uploader(head).send("r", file)
        assert other.taken == []


async def test_a_full_head_is_told_in_its_words(file: Path) -> None:
    """What passes is tried again, and the reason says what is wrong there."""
    async with Taker().serving() as head:
        error = {"error": {"code": "disk_full", "message": "no room for load.bin"}}
        head.answer = lambda: web.json_response(error, status=507)
        with pytest.raises(TimedOut, match=r"the head answered 507 \(disk_full: no room for load.bin\)"):
            await uploader(head).send("r", file)


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ({"error": {"code": "forbidden", "message": "not your run"}}, HerderError, "not your run"),
        ({"error": {"code": "a_later_code", "message": "of a later version"}}, RunFailed, "of a later version"),
        ("<html>", RunFailed, "the head answered 403"),
    ],
)
async def test_refusals(file: Path, body: object, kind: type[HerderError], words: str) -> None:
    """A refusal ends it, in the head's words where it has any."""
    async with Taker().serving() as head:
        head.answer = lambda: web.json_response(body, status=403)
        with pytest.raises(kind, match=words):
            await uploader(head, give_up_s=60).send("r", file)
        assert len(head.taken) == 1


async def test_gives_up_in_the_end(file: Path) -> None:
    """A head that is never there is not waited for for ever."""
    head = Taker()
    head.port = 1
    with pytest.raises(TimedOut, match=r"load\.bin"):
        await uploader(head).send("r", file)


class TestTls:
    """As the session with the head."""

    @pytest.fixture
    def authority(self, tmp_path: Path) -> Authority:
        """A CA."""
        return Authority(tmp_path, "ca")

    @pytest.fixture
    def context(self, authority: Authority) -> ssl.SSLContext:
        """A head that asks for client certificates."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(*authority.sign("head"))
        made.load_verify_locations(authority.certificate)
        made.verify_mode = ssl.CERT_REQUIRED
        return made

    async def test_client_certificate(self, authority: Authority, context: ssl.SSLContext, file: Path) -> None:
        """The agent's settings let it through."""
        certificate, key = authority.sign("agent")
        tls = TlsConfig(ca=str(authority.certificate), cert=str(certificate), key=str(key))
        async with Taker(context).serving() as head:
            await uploader(head, tls).send("r", file)
            assert len(head.taken) == 1

    async def test_unknown_head(
        self, authority: Authority, context: ssl.SSLContext, file: Path, tmp_path: Path
    ) -> None:
        """A head of another CA gets no byte and no token."""
        (tmp_path / "other").mkdir()
        other = Authority(tmp_path / "other", "ca")
        async with Taker(context).serving() as head:
            with pytest.raises(TimedOut, match="certificate"):
                await uploader(head, TlsConfig(ca=str(other.certificate))).send("r", file)
            assert head.taken == []
