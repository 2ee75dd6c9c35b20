"""Addresses as people have them: one of IPv4, a /64 of IPv6."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address


def network(address: str | None) -> str:
    """The address, or its /64 for IPv6, of which one person has many; "unknown" for what is none."""
    try:
        parsed = ip_address((address or "").partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(IPv6Address(int(parsed) >> 64 << 64))
    return str(parsed)
