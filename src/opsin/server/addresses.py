"""Which machines a server may fetch pictures from: public ones on the ports of the web, and only those.

A name is looked up once; every address it has must be public, and exactly these are connected to. So it makes no
difference how an address is written, nor what a name leads to a moment later.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence

import httpx

from opsin.core.errors import BadParameter, FetchFailed
from opsin.media.fetch import Resolver, system_addresses

_WEB_PORTS = frozenset((80, 443))
_NETWORK_4 = ipaddress.IPv4Network
_NETWORK_6 = ipaddress.IPv6Network
# Routed like public ones, but they lead back inside: clouds' metadata, and gateways between the two kinds of addresses.
_NOT_FOR_US_4 = (
    _NETWORK_4("192.0.0.0/24"),  # protocol assignments, Oracle's metadata among them
    _NETWORK_4("192.88.99.0/24"),  # 6to4 relays
    _NETWORK_4("168.63.129.16/32"),  # Azure's own services
)
_UNICAST_6 = _NETWORK_6("2000::/3")
_NOT_FOR_US_6 = (
    _NETWORK_6("2001::/23"),  # protocol assignments: Teredo, ORCHID, benchmarks
    _NETWORK_6("2001:db8::/32"),  # documentation
    _NETWORK_6("2002::/16"),  # 6to4: holds any IPv4 address
    _NETWORK_6("3fff::/20"),  # documentation
)
_NAME = re.compile(r"[a-z0-9_.-]+|[0-9a-f:.]+")
_ISATAP = frozenset((0x0000_5EFE, 0x0200_5EFE))


def is_public(address: str) -> bool:
    """Whether `address` is one machine's on the public internet; False for whatever is no address.

    IPv6 addresses that hold an IPv4 one (mapped, 6to4, NAT64, Teredo, ISATAP) are none, whichever it is.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NOT_FOR_US_4)
    if ip not in _UNICAST_6 or any(ip in network for network in _NOT_FOR_US_6):
        return False
    return ip.is_global and int(ip) >> 32 & 0xFFFF_FFFF not in _ISATAP


class AddressPolicy:
    """Says for a host and port which addresses may be connected to; see `opsin.media.fetch.Resolver`.

    `hosts` are names as `example.org`, `example.org:8443` or `*.example.org` (its subdomains); none: every public host.
    Ports other than 80 and 443 must be named. A name never makes an address public. `lookup` and `public` are for
    tests. Raises BadParameter for a host that is not written so.
    """

    def __init__(
        self,
        hosts: Sequence[str] = (),
        *,
        lookup: Resolver = system_addresses,
        public: Callable[[str], bool] = is_public,
    ) -> None:
        self._hosts = frozenset(pair for host in hosts for pair in _read_host(host))
        self._lookup = lookup
        self._public = public

    def __call__(self, host: str, port: int) -> Sequence[str]:
        """The host's addresses; raises FetchFailed unless it is allowed and all of them are public."""
        name = host.lower().rstrip(".")
        if not self._hosts and port not in _WEB_PORTS:
            raise FetchFailed("Pictures are fetched from the ports 80 and 443 only; give an address there.")
        if self._hosts and not self._is_named(name, port):
            raise FetchFailed(
                "Pictures are not fetched from this host and port; use one the server was told of (--image-hosts), "
                "or send the picture itself as a data: address."
            )
        # One sentence for both: which names an inner network knows is nobody's business.
        refusal = FetchFailed(
            "The host of the picture's address is not known or not public, so nothing is fetched from it; "
            "check the address, or send the picture itself as a data: address."
        )
        try:
            addresses = self._lookup(host, port)
        except FetchFailed:
            raise refusal from None
        if not addresses or not all(map(self._public, addresses)):
            raise refusal
        return addresses

    def _is_named(self, name: str, port: int) -> bool:
        parents = ("*." + name.split(".", cut)[cut] for cut in range(1, name.count(".") + 1))
        return any((known, port) in self._hosts for known in (name, *parents))


def _read_host(host: str) -> list[tuple[str, int]]:
    """The name and the ports of an entry of --image-hosts."""
    star, bare = ("*.", host[2:]) if host.startswith("*.") else ("", host)
    try:
        url = httpx.URL(f"ftp://{bare}")  # a scheme whose usual port nobody means
    except httpx.InvalidURL:
        url = httpx.URL()
    name = url.raw_host.decode("ascii").lower().rstrip(".")
    if not _NAME.fullmatch(name) or url.userinfo or url.raw_path not in {b"", b"/"} or url.fragment or "?" in bare:
        raise BadParameter(
            f"{host!r} is no host that pictures can be fetched from; write example.org, example.org:8443 "
            "or *.example.org."
        )
    return [(star + name, port) for port in ((url.port,) if url.port is not None else _WEB_PORTS)]
