"""PostgreSQL's messages: whole and in pieces, logins that must be refused, noise."""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.loadgen.http1 import ProtocolError
from agent.loadgen.login import Login
from agent.loadgen.postgres import PgError, Startup, error_text, message, query, split

LOGIN = Login("me", "shop", "pencil", statement="SELECT $1")
ERROR = b"SERROR\0C42P01\0Mrelation does not exist\0\0"


def ask(startup: Startup, code: int, rest: bytes = b"") -> bytes:
    """What is answered to a request for authentication."""
    return startup.take(ord("R"), struct.pack("!I", code) + rest)


@given(st.lists(st.tuples(st.sampled_from([b"D", b"C", b"Z"]), st.binary(max_size=40))), st.integers(0, 200))
def test_messages_come_whole(sent: list[tuple[bytes, bytes]], cut: int) -> None:
    """However a stream is cut, the same messages come out of it."""
    data = b"".join(message(kind, body) for kind, body in sent)
    first, rest = split(data[:cut])
    second, left = split(rest + data[cut:])
    assert first + second == [(kind[0], body) for kind, body in sent]
    assert left == b""


@given(st.binary(max_size=60), st.sampled_from(b"RESKNZTDC1"))
def test_noise_is_refused_or_passed_over(noise: bytes, kind: int) -> None:
    """Never anything but our errors, and no login comes out of it that nobody asked for."""
    with suppress(ProtocolError):
        found, rest = split(noise)
        assert sum(5 + len(body) for _, body in found) + len(rest) == len(noise)
    startup = Startup(LOGIN, is_private=False)
    with suppress(PgError, ValueError):
        startup.take(kind, noise)
    assert not startup.is_done


def test_a_query_is_one_write() -> None:
    """Bind with one text parameter, Execute, Sync."""
    found, rest = split(query("[1,2]"))
    assert ([chr(kind) for kind, _ in found], rest) == (["B", "E", "S"], b"")
    assert found[0][1] == b"\0herder\0" + struct.pack("!HHI", 0, 1, 5) + b"[1,2]" + struct.pack("!H", 0)


def test_errors_say_code_and_message() -> None:
    """As the server worded them."""
    assert error_text(ERROR) == "42P01 relation does not exist"
    with pytest.raises(PgError, match="relation does not exist"):
        Startup(LOGIN, is_private=True).take(ord("E"), ERROR)


def challenge(startup: Startup, *, nonce: str = "", rounds: str = "4096") -> tuple[bytes, str]:
    """(our answer to SCRAM's challenge, the challenge)."""
    first = ask(startup, 10, b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0")
    ours = first.rpartition(b"r=")[2].decode()
    said = f"r={nonce or ours + 'server'},s={base64.b64encode(b'salt').decode()},i={rounds}"
    return ask(startup, 11, said.encode()), said


def test_scram_proves_both() -> None:
    """The server can check our proof with what it stores, and we check its signature before a query is sent."""
    startup = Startup(LOGIN, is_private=False)
    answer, said = challenge(startup)
    bare, _, proof = answer[5:].decode().rpartition(",p=")
    salted = hashlib.pbkdf2_hmac("sha256", b"pencil", b"salt", 4096)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    signed = f"n=,r={said.split(',')[0][2:].removesuffix('server')},{said},{bare}".encode()
    signature = hmac.digest(stored, signed, "sha256")
    key = bytes(one ^ other for one, other in zip(base64.b64decode(proof), signature, strict=True))
    assert hashlib.sha256(key).digest() == stored
    theirs = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), signed, "sha256")
    assert ask(startup, 12, b"v=" + base64.b64encode(theirs)) == b""
    assert ask(startup, 0) == b""
    assert startup.take(ord("Z"), b"I").startswith(b"P")
    assert startup.take(ord("Z"), b"I") == b""
    assert startup.is_done


def test_a_server_that_does_not_know_the_password() -> None:
    """A wrong signature, none at all, a nonce that is not ours, rounds without an end: refused."""
    startup = Startup(LOGIN, is_private=False)
    challenge(startup)
    with pytest.raises(PgError, match="did not prove"):
        ask(startup, 12, b"v=" + base64.b64encode(b"x" * 32))
    ask(startup, 0)
    with pytest.raises(PgError, match="did not prove"):
        startup.take(ord("Z"), b"I")
    with pytest.raises(PgError, match="challenge"):
        challenge(Startup(LOGIN, is_private=False), nonce="theirs")
    with pytest.raises(PgError, match="rounds"):
        challenge(Startup(LOGIN, is_private=False), rounds="100000000")


def test_passwords_are_told_to_nobody_in_the_clear() -> None:
    """Only over TLS; and without one it is said how to name it."""
    with pytest.raises(PgError, match="in the clear"):
        ask(Startup(LOGIN, is_private=False), 3)
    assert ask(Startup(LOGIN, is_private=True), 3) == message(b"p", b"pencil\0")
    with pytest.raises(PgError, match="--password-file"):
        ask(Startup(Login("me", "shop"), is_private=False), 5, b"salt")
    with pytest.raises(PgError, match="not known here"):
        ask(Startup(LOGIN, is_private=True), 7)
