"""PostgreSQL's wire protocol, as far as a prepared query needs it: logging in, a statement, its answers.

A connection logs in (trust, MD5, SCRAM-SHA-256; a clear password only over TLS), prepares the run's statement, and then
each request is one write: Bind, Execute, Sync. The answer is over with ReadyForQuery.
Source: PostgreSQL documentation, "Frontend/Backend Protocol" 3.0; RFC 5802 and 7677 (SCRAM).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import os
import ssl
import struct
import unicodedata
from dataclasses import replace

from agent.loadgen.connection import Call, Connection, Endpoint, Owner
from agent.loadgen.http1 import ProtocolError
from agent.loadgen.login import Login

MAX_MESSAGE = 16 << 20
MAX_ITERATIONS = 100_000  # of SCRAM; servers ask for 4,096
STATEMENT = b"herder"
_HEAD = struct.Struct("!BI")
_INT = struct.Struct("!I")
_TLS_REQUEST = struct.pack("!II", 8, 80_877_103)
_ERROR, _ROW, _READY, _AUTH = b"EDZR"
_ASIDE = b"NSAK1vI"  # notices, parameters, notifications, the backend's key, parsed, protocol versions, empty queries


class PgError(Exception):
    """What the server refused, in its words."""


def message(kind: bytes, body: bytes) -> bytes:
    """One message."""
    return kind + _INT.pack(len(body) + 4) + body


def split(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """([(kind, body) of each whole message], the rest). Raises: ProtocolError."""
    found: list[tuple[int, bytes]] = []
    at, end = 0, len(data)
    while end - at >= 5:
        kind, length = _HEAD.unpack_from(data, at)
        if not 4 <= length <= MAX_MESSAGE:
            raise ProtocolError("not a message of PostgreSQL")
        if at + 1 + length > end:
            break
        found.append((kind, data[at + 5 : at + 1 + length]))
        at += 1 + length
    return found, data[at:]


def query(value: str) -> bytes:
    """A request: the prepared statement with one parameter, written as text."""
    text = value.encode()
    bind = b"\0" + STATEMENT + b"\0" + struct.pack("!HHI", 0, 1, len(text)) + text + struct.pack("!H", 0)
    return message(b"B", bind) + message(b"E", b"\0" + _INT.pack(0)) + message(b"S", b"")


def error_text(body: bytes) -> str:
    """What an error says: its code and its message."""
    fields = {part[:1]: part[1:].decode(errors="replace") for part in body.split(b"\0") if part}
    return f"{fields.get(b'C', '')} {fields.get(b'M', 'an error without words')}".strip()[:300]


@functools.lru_cache(maxsize=64)
def _salted(password: bytes, salt: bytes, iterations: int) -> bytes:
    """Kept, because every connection of a run has the same."""
    return hashlib.pbkdf2_hmac("sha256", password, salt, iterations)


class Startup:
    """The conversation until the first query can be sent."""

    def __init__(self, login: Login, *, is_private: bool) -> None:
        """is_private: over TLS, so that a password may be told."""
        self.login, self.is_private = login, is_private
        self.is_done = False
        self._nonce = base64.b64encode(os.urandom(18)).decode()
        self._proof = b""  # what the server must know to have the password, too
        self._is_in_scram = False
        self._has_prepared = False

    def first(self) -> bytes:
        """The first message."""
        login = self.login
        named = {"user": login.user, "database": login.database, "application_name": "herder-bench"}
        pairs = (named | dict(login.settings)).items()
        body = _INT.pack(196_608) + b"".join(f"{name}\0{value}\0".encode() for name, value in pairs) + b"\0"
        return _INT.pack(len(body) + 4) + body

    def take(self, kind: int, body: bytes) -> bytes:
        """What is said to a message of the server. Raises: PgError."""
        if kind == _AUTH:
            return self._authenticate(body)
        if kind == _ERROR:
            raise PgError(error_text(body))
        if kind == _READY:
            if self._is_in_scram:
                raise PgError("the server did not prove that it knows the password")
            if not self.login.statement or self._has_prepared:
                self.is_done = True
                return b""
            self._has_prepared = True
            parse = STATEMENT + b"\0" + self.login.statement.encode() + b"\0" + struct.pack("!H", 0)
            return message(b"P", parse) + message(b"S", b"")
        if kind not in _ASIDE:
            raise PgError(f"an unexpected message {chr(kind)!r}")
        return b""

    def _authenticate(self, body: bytes) -> bytes:
        if len(body) < 4:
            raise PgError("an empty authentication request")
        (code,) = _INT.unpack_from(body)
        rest = body[4:]
        match code:
            case 0:
                return b""
            case 3 if self.is_private:
                return message(b"p", self._password() + b"\0")
            case 3:
                raise PgError("the server wants the password in the clear; not without TLS (sslmode=require)")
            case 5:
                inner = hashlib.md5(self._password() + self.login.user.encode(), usedforsecurity=False).hexdigest()
                outer = hashlib.md5(inner.encode() + rest[:4], usedforsecurity=False).hexdigest()
                return message(b"p", b"md5" + outer.encode() + b"\0")
            case 10 if b"SCRAM-SHA-256" in rest.split(b"\0"):
                self._is_in_scram = True
                said = f"n,,n=,r={self._nonce}".encode()
                return message(b"p", b"SCRAM-SHA-256\0" + _INT.pack(len(said)) + said)
            case 11:
                return message(b"p", self._prove(rest.decode("ascii", "replace")))
            case 12:
                if not self._proof or not hmac.compare_digest(rest.split(b",")[0], b"v=" + self._proof):
                    raise PgError("the server did not prove that it knows the password")
                self._is_in_scram = False
                return b""
        raise PgError(f"the server wants an authentication that is not known here ({code})")

    def _prove(self, challenge: str) -> bytes:
        """The last message of SCRAM."""
        fields = {part[:2]: part[2:] for part in challenge.split(",")}
        nonce, salt, rounds = fields.get("r=", ""), fields.get("s=", ""), fields.get("i=", "")
        if not nonce.startswith(self._nonce) or len(nonce) == len(self._nonce) or not rounds.isdecimal():
            raise PgError("a challenge that is not one of SCRAM")
        if not 1 <= int(rounds) <= MAX_ITERATIONS:
            raise PgError(f"a challenge of {rounds} rounds; at most {MAX_ITERATIONS:,}")
        salted = _salted(self._password(), base64.b64decode(salt), int(rounds))
        client, server = (hmac.digest(salted, name, "sha256") for name in (b"Client Key", b"Server Key"))
        bare = f"c=biws,r={nonce}"
        signed = f"n=,r={self._nonce},{challenge},{bare}".encode()
        signature = hmac.digest(hashlib.sha256(client).digest(), signed, "sha256")
        self._proof = base64.b64encode(hmac.digest(server, signed, "sha256"))
        proof = bytes(one ^ other for one, other in zip(client, signature, strict=True))
        return f"{bare},p={base64.b64encode(proof).decode()}".encode()

    def _password(self) -> bytes:
        if self.login.password is None:
            raise PgError("the server wants a password; --password-file names a file with it")
        return unicodedata.normalize("NFKC", self.login.password).encode()


class PgConnection(Connection):
    """A connection that is logged in and has prepared the statement."""

    __slots__ = ("_context", "_host", "_login", "_rest", "_startup")

    def __init__(self, owner: Owner, there: Endpoint, endpoint: int = 0) -> None:
        assert there.login is not None
        self._context: ssl.SSLContext | None = there.tls
        self._host, self._login = there.host, there.login
        self._startup: Startup | None = None
        self._rest = b""
        super().__init__(owner, replace(there, tls=None), endpoint)

    def on_data(self, data: bytes, at: int) -> None:
        """Bytes of the server, stamped."""
        if self._startup is None:
            self._begin_tls(data)
            return
        try:
            found, self._rest = split(self._rest + data if self._rest else data)
            if not self.is_open:
                self._log_in(found)
            else:
                self._take(found, len(data), at)
        except ProtocolError as error:
            self._fail("protocol", str(error))
        except PgError as error:
            self._fail("connect", str(error))
        except (ValueError, struct.error):
            self._fail("protocol", "an answer that PostgreSQL does not give")

    def _greet(self) -> None:
        if self._context is not None:
            self._write(memoryview(_TLS_REQUEST))
        else:
            self._open()

    def _begin_tls(self, data: bytes) -> None:
        # Exactly one byte: what came behind it in the clear could be anybody's.
        if data != b"S":
            self._fail("tls", "the server has no TLS")
            return
        assert self._context is not None
        self._tls = self._context.wrap_bio(*self._bios, server_hostname=self._host)
        self._handshake()

    def _open(self) -> None:
        """The way is free: logs in first, and is open after that."""
        if self._startup is None:
            self._is_shaking = False
            self._startup = Startup(self._login, is_private=self._tls is not None)
            self._say(self._startup.first())
        else:
            super()._open()

    def _log_in(self, found: list[tuple[int, bytes]]) -> None:
        assert self._startup is not None
        for kind, body in found:
            reply = self._startup.take(kind, body)
            if reply:
                self._say(reply)
        if self._startup.is_done:
            self._open()

    def _take(self, found: list[tuple[int, bytes]], size: int, at: int) -> None:
        call = self.call
        if call is None:
            # A server that shuts down says so to idle connections, and then closes them.
            if any(kind not in _ASIDE and kind != _ERROR for kind, _ in found):
                raise ProtocolError("the server spoke without being asked")
            return
        call.heard = at
        call.bytes += size
        for kind, body in found:
            if kind == _ROW:
                call.answer.is_finished = True
            elif kind == _ERROR:
                call.answer.error = error_text(body)
            elif kind == _READY:
                self._answered(call, at)
                return

    def _answered(self, call: Call, at: int) -> None:
        if call.answer.error is None and not call.answer.is_finished:
            call.answer.error = "no rows"
        self.reader.status = 200
        self._finish(call, at)

    def _ended(self, at: int) -> None:
        if not self.is_open:
            self._fail("connect", "closed before the login was over")
        elif self.call is not None and self.call.answer.error is not None:
            self._fail("query_error", self.call.answer.error)
        else:
            super()._ended(at)

    def _say(self, data: bytes) -> None:
        if self._tls is None:
            self._write(memoryview(data))
        else:
            self._tls.write(data)
            self._flush_tls()
