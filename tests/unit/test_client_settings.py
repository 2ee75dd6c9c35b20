"""Where a client finds the head's address and its token."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from herder.client import AsyncClient
from herder.client_sync import Client
from herder.errors import HerderConfigError
from herder.settings import check_url, discover, is_loopback


def secret(path: Path, text: str, mode: int = 0o600) -> Path:
    """A token file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment that knows nothing of this machine."""
    return {"HERDER_STATE_DIR": str(tmp_path / "state"), "HERDER_CONFIG": str(tmp_path / "config.yaml")}


def contexts(environ: dict[str, str], text: str) -> None:
    """Writes the file of contexts."""
    Path(environ["HERDER_CONFIG"]).write_text(text)


def test_the_default_is_this_machine(environ: dict[str, str], tmp_path: Path) -> None:
    """Without any setting: the local head, with the token that it left in its state directory."""
    secret(tmp_path / "state/head/admin.token", "hdr_admin_local\n")
    found = discover(environ=environ)
    assert (found.url, found.token) == ("http://127.0.0.1:8470", "hdr_admin_local")


def test_the_local_token_stays_on_this_machine(environ: dict[str, str], tmp_path: Path) -> None:
    """The local admin token is never sent to another machine."""
    secret(tmp_path / "state/head/admin.token", "hdr_admin_local\n")
    assert discover(url="http://elsewhere:8470", environ=environ).token == ""


def test_arguments_win(environ: dict[str, str], tmp_path: Path) -> None:
    """An argument wins over a file of the environment, which wins over a variable."""
    given = {**environ, "HERDER_TOKEN": "variable", "HERDER_URL": "http://a:1"}
    assert discover(environ=given).token == "variable"
    given["HERDER_TOKEN_FILE"] = str(secret(tmp_path / "b", "file\n"))
    assert discover(environ=given).token == "file"
    found = discover(token_file=secret(tmp_path / "c", "argument\n"), url="http://b:2/", environ=given)
    assert (found.token, found.url) == ("argument", "http://b:2")
    assert discover(token="text", environ=given).token == "text"


def test_a_context_brings_address_and_token(environ: dict[str, str], tmp_path: Path) -> None:
    """The current context, or the one that is named."""
    secret(tmp_path / "t", "of-lab\n")
    contexts(
        environ,
        f"current: lab\ncontexts:\n  lab: {{server: 'https://lab:8470', token_file: {tmp_path / 't'}}}\n  b: {{server: 'http://b:1'}}\n",
    )
    found = discover(environ=environ)
    assert (found.url, found.token) == ("https://lab:8470", "of-lab")
    assert discover(context="b", environ={**environ, "HERDER_URL": "http://c:1"}).url == "http://b:1"


def test_a_contexts_token_goes_to_its_server_only(environ: dict[str, str], tmp_path: Path) -> None:
    """With another address the context's token stays at home."""
    secret(tmp_path / "t", "of-lab\n")
    contexts(environ, f"current: lab\ncontexts:\n  lab: {{server: 'https://lab:8470', token_file: {tmp_path / 't'}}}\n")
    assert discover(url="https://evil:8470", environ=environ).token == ""


@pytest.mark.parametrize("text", ["contexts: [", "contexts: {a: {server: x, tokn: y}}", "- 1", "current: lab"])
def test_a_broken_context_file_is_an_error(environ: dict[str, str], text: str) -> None:
    """A file that cannot be understood is said, not skipped."""
    contexts(environ, text)
    with pytest.raises(HerderConfigError):
        discover(environ=environ)


def test_a_token_that_others_can_read_is_refused(environ: dict[str, str], tmp_path: Path) -> None:
    """A file open to others is refused with the cure."""
    path = secret(tmp_path / "t", "x\n", 0o644)
    with pytest.raises(HerderConfigError) as caught:
        discover(token_file=path, environ=environ)
    assert caught.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize("text", ["", "\n", None])
def test_a_missing_or_empty_token_file_is_an_error(environ: dict[str, str], tmp_path: Path, text: str | None) -> None:
    """A file that was named must be there and hold a token."""
    path = tmp_path / "t"
    if text is not None:
        secret(path, text)
    with pytest.raises(HerderConfigError):
        discover(token_file=path, environ=environ)


@pytest.mark.parametrize(
    "text", ["", "ftp://a", "http://", "http://a:99999", "http://u:p@a", "http://a?x=1", "http://[::1"]
)
def test_odd_addresses_are_refused(text: str) -> None:
    """What is no address of a head is refused before anything is sent."""
    with pytest.raises(HerderConfigError):
        check_url(text)


def test_short_addresses() -> None:
    """host:port means http, and a trailing slash is nothing."""
    assert check_url("head:8470") == "http://head:8470"
    assert check_url("https://head/") == "https://head"


@pytest.mark.parametrize(
    ("url", "is_local"),
    [
        ("http://127.0.0.9:1", True),
        ("http://[::1]:1", True),
        ("http://localhost", True),
        ("http://127.0.0.1.evil.example", False),
        ("http://10.0.0.1", False),
    ],
)
def test_loopback(url: str, is_local: bool) -> None:
    """Only addresses of this machine count as such."""
    assert is_loopback(url) is is_local


def test_both_clients_have_the_same_methods() -> None:
    """Each public method of AsyncClient is on Client, with its parameters and its documentation."""
    for name, method in inspect.getmembers(AsyncClient, inspect.isfunction):
        if name.startswith("_") or name == "aclose":
            continue
        twin = getattr(Client, name)
        assert list(inspect.signature(twin).parameters) == list(inspect.signature(method).parameters), name
        assert method.__doc__, name
        assert twin.__doc__, name
