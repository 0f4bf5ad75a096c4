"""What stands between this process and a server, as far as the two ends of a connection tell."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from .base import looked_at

if TYPE_CHECKING:
    from .base import Driver

Address = tuple[str, int] | None  # None: a unix socket


class Relay(NamedTuple):
    """What stands between. Without words nothing does, or nothing that can be told."""

    words: str | None = None
    is_pooled: bool = False


def relay_between(
    driver: Driver | None, handle: Any, *, session_id: int, seen_address: Address
) -> Relay:
    """Return what stands between, from the session and the client's address as the server has them.

    Whoever passes the bytes on has a connection of his own to the server, with another address; a
    pooler speaks the protocol as well, and has told the driver of a session of its own.
    """
    if driver is None:
        return Relay()
    told = driver.session_id(handle)
    if told != session_id:
        return Relay(
            f"A pooler: the server calls this session {session_id}, the driver was told {told}.",
            is_pooled=True,
        )
    descriptor = driver.descriptor(handle)
    address = None if descriptor is None else own_address(descriptor)
    if descriptor is None or _is_same(address, seen_address):
        return Relay()
    return Relay(
        f"A proxy, a tunnel or a NAT: this connection leaves from {_in_words(address)}, and the "
        f"server sees it come from {_in_words(seen_address)}."
    )


def own_address(descriptor: int) -> Address:
    """Return this process's end of a socket."""
    with looked_at(descriptor) as near:
        if near.family == socket.AF_UNIX:
            return None
        host, port = near.getsockname()[:2]
        return host, port


def _is_same(own: Address, seen: Address) -> bool:
    if own is None or seen is None:
        return own is seen
    hosts = _ip(own[0]), _ip(seen[0])
    # A server that looks names up says "localhost".
    return own[1] == seen[1] and (None in hosts or hosts[0] == hosts[1])


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _in_words(address: Address) -> str:
    return "a unix socket" if address is None else f"{address[0]}, port {address[1]}"
