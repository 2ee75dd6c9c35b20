"""Addresses that nothing is fetched from and nobody is asked at, unless the agent's settings allow it.

Operators name the URLs of sources and health checks; what answers at a link-local address is this machine's own affair
(a cloud's metadata service gives out credentials there). What counts is the address that is connected to, looked at
after its name was resolved and before the connection is opened, at every connection and for every redirect.
"""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from common.errors import AddressRefused

_REFUSED = tuple(
    map(
        ip_network,
        (
            "169.254.0.0/16",  # link-local; metadata of most clouds
            "fe80::/10",
            "fd00:ec2::/32",  # metadata of Amazon's
            "fd20:ce::254/128",  # of Google's
            "100.100.100.200/32",  # of Alibaba's
            "168.63.129.16/32",  # Azure's platform
        ),
    )
)
_NAT64 = ip_network("64:ff9b::/96")


def refuse(address: str) -> None:
    """Raises: AddressRefused for a link-local or metadata address; what is no address passes."""
    try:
        parsed = ip_address(address.strip("[]").partition("%")[0])
    except ValueError:
        return
    if any(form in network for form in _forms(parsed) for network in _REFUSED if form.version == network.version):
        raise AddressRefused(
            f"{parsed} is link-local or a cloud's metadata service",
            hint="the agent's setting allow_link_local lets its node fetch from there",
            address=str(parsed),
        )


def connect(
    place: tuple[str, int], timeout_s: float | None, source_address: tuple[str, int] | None = None
) -> socket.socket:
    """As `socket.create_connection`, to addresses that are not refused. Raises: AddressRefused, OSError."""
    found = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)
    for *_, address in found:
        refuse(str(address[0]))
    error: OSError | None = None
    for family, kind, protocol, _, address in found:
        opened = socket.socket(family, kind, protocol)
        try:
            opened.settimeout(timeout_s)
            if source_address:
                opened.bind(source_address)
            opened.connect(address)
        except OSError as failure:
            opened.close()
            error = failure
        else:
            return opened
    raise error or OSError(f"{place[0]} has no address")


def _forms(address: IPv4Address | IPv6Address) -> list[IPv4Address | IPv6Address]:
    """The address, and the IPv4 one that it stands for."""
    if isinstance(address, IPv4Address):
        return [address]
    inner = [address.ipv4_mapped, address.sixtofour]
    if address in _NAT64:
        inner.append(IPv4Address(int(address) & 0xFFFF_FFFF))
    if int(address) >> 32 == 0:  # the old "compatible" form
        inner.append(IPv4Address(int(address)))
    return [address, *(form for form in inner if form is not None)]
