"""Which addresses an agent does not connect to for operators, whatever name or form they come in."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from agent import outbound
from agent.mover.http_client import HttpConnection
from agent.runtimes.health import GuardedResolver, check_outside
from common.errors import AddressRefused, SourceFailed

REFUSED = (
    "169.254.169.254",
    "169.254.0.1",
    "fe80::1",
    "fe80::1%eth0",
    "[fe80::1]",
    "fd00:ec2::254",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "::169.254.169.254",
    "100.100.100.200",
    "168.63.129.16",
)
TAKEN = ("127.0.0.1", "10.0.0.1", "169.253.0.1", "8.8.8.8", "::1", "2001:db8::1", "fd00::1", "models.example", "")


@pytest.mark.parametrize("address", REFUSED)
def test_link_local_and_metadata_are_refused(address: str) -> None:
    """In every form that leads to them."""
    with pytest.raises(AddressRefused) as refused:
        outbound.refuse(address)
    assert "allow_link_local" in refused.value.hint
    assert not refused.value.is_retryable


@pytest.mark.parametrize("address", TAKEN)
def test_others_are_not(address: str) -> None:
    """Private networks are where models come from."""
    try:
        outbound.refuse(address)
    except AddressRefused as error:
        pytest.fail(f"{address!r} was refused: {error}")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names that resolve to what a test says."""
    table: dict[str, list[str]] = {}
    genuine = socket.getaddrinfo

    def resolve(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in table:
            return genuine(host, port, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(port))) for address in table[host]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return table


@pytest.fixture
def listening() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_a_name_is_refused_for_what_it_resolves_to(names: dict[str, list[str]]) -> None:
    """One bad address among several is enough, before any is connected to."""
    names["sneaky.example"] = ["127.0.0.1", "169.254.169.254"]
    with pytest.raises(AddressRefused):
        outbound.connect(("sneaky.example", 80), 1.0)


@pytest.mark.parametrize("host", ["2852039166", "0xa9fea9fe", "169.254.43518", "0251.0376.0251.0376"])
def test_odd_forms_of_an_address_are_resolved_first(host: str) -> None:
    """What the resolver takes for 169.254.169.254 is refused as that."""
    with pytest.raises(AddressRefused):
        outbound.connect((host, 80), 1.0)


def test_the_next_address_is_tried(names: dict[str, list[str]], listening: int) -> None:
    """As everywhere: the first that takes the connection."""
    names["two.example"] = ["127.0.0.2", "127.0.0.1"]
    outbound.connect(("two.example", listening), 2.0).close()
    names["none.example"] = []
    with pytest.raises(OSError, match="no address"):
        outbound.connect(("none.example", listening), 2.0)


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "https://[fe80::1]/x", "http://sneaky.example/x"])
def test_sources_refuse(names: dict[str, list[str]], url: str) -> None:
    """A source's connection is not opened, with the code that says why; it stays refused."""
    names["sneaky.example"] = ["169.254.169.254"]
    connection = HttpConnection(connect_timeout_s=1.0, read_timeout_s=1.0)
    for _ in range(2):
        with pytest.raises(AddressRefused):
            connection.request(url, {})


def test_sources_may_be_allowed(names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the setting the connection is tried as any other."""
    tried: list[Any] = []

    def create(place: Any, *_: Any) -> socket.socket:
        tried.append(place)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", create)
    connection = HttpConnection(connect_timeout_s=1.0, read_timeout_s=1.0, allow_link_local=True)
    with pytest.raises(SourceFailed):
        connection.request("http://169.254.169.254/latest", {})
    assert tried == [("169.254.169.254", 80)]


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/",
        "http://[fe80::1]/",
        "http://2852039166/",
        "http://sneaky.example/",
        "tcp://169.254.169.254:80",
        "tcp://[fd00:ec2::254]:80",
        "tcp://sneaky.example:80",
    ],
)
async def test_health_checks_refuse(names: dict[str, list[str]], url: str) -> None:
    """Literal addresses, odd forms and names alike."""
    names["sneaky.example"] = ["169.254.169.254"]
    connector = aiohttp.TCPConnector(resolver=GuardedResolver(), use_dns_cache=False)
    async with aiohttp.ClientSession(connector=connector) as http:
        error = await check_outside(http, url, 2.0)
    assert error is not None
    assert error.code == "address_refused"


async def test_health_checks_of_others_go_on(names: dict[str, list[str]], listening: int) -> None:
    """A port that listens is well, one that does not is unhealthy, nonsense is told as such."""
    names["fine.example"] = ["127.0.0.1"]
    async with aiohttp.ClientSession() as http:
        assert await check_outside(http, f"tcp://fine.example:{listening}", 2.0) is None
        for url, code in (
            ("tcp://127.0.0.1:1", "unhealthy"),
            ("tcp://127.0.0.1", "invalid_value"),
            ("tcp://127.0.0.1:99999", "invalid_value"),
            ("http://127.0.0.1:1/", "unhealthy"),
        ):
            error = await check_outside(http, url, 2.0)
            assert error is not None
            assert error.code == code
