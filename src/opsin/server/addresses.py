"""Which machines a server may fetch images from: public ones, on the ports of the web.

A name is looked up once; all of its addresses must be public, and exactly these are connected to. So it makes no
difference how an address is written, nor what a name leads to a moment later.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence

import httpx

from opsin.core.errors import BadParameter, FetchFailed
from opsin.images.fetch import Resolver, system_addresses

_WEB_PORTS = frozenset((80, 443))
_UNICAST_6 = ipaddress.IPv6Network("2000::/3")
# Routed like public ones, but they lead back inside: metadata of clouds, and gateways between IPv4 and IPv6.
_INSIDE = tuple(map(ipaddress.ip_network, (
    "192.0.0.0/24",  # protocol assignments, among them Oracle's metadata
    "192.88.99.0/24",  # 6to4 relays
    "168.63.129.16/32",  # Azure's own services
    "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarks
    "2001:db8::/32",  # documentation
    "2002::/16",  # 6to4: contains any IPv4 address
    "3fff::/20",  # documentation
)))  # fmt: skip
_NAME = re.compile(r"[a-z0-9_.-]+|[0-9a-f:.]+")
_ISATAP = frozenset((0x0000_5EFE, 0x0200_5EFE))


def is_public(address: str) -> bool:
    """Whether `address` belongs to one machine on the public internet; False for text that is not an address.

    IPv6 addresses that contain an IPv4 one (mapped, 6to4, NAT64, Teredo, ISATAP) are not public, whichever it is.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 6 and (ip not in _UNICAST_6 or int(ip) >> 32 & 0xFFFF_FFFF in _ISATAP):
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _INSIDE)


class AddressPolicy:
    """Says which addresses of a host and port may be connected to; see `opsin.images.fetch.Resolver`.

    `hosts` are names like `example.org`, `example.org:8443` or `*.example.org` (its subdomains); without any, every
    public host is allowed. Ports other than 80 and 443 must be named. A name never makes an address public. `lookup`
    and `public` are for tests. Raises BadParameter for a host that is written in another way.
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
            raise FetchFailed("Images are fetched from the ports 80 and 443 only: give an address there.")
        if self._hosts and not self._is_named(name, port):
            raise FetchFailed(
                "Images are not fetched from this host and port: use one that --image-hosts names, "
                "or send the image itself as a data: address."
            )
        # One sentence for both cases: which names an inner network knows is nobody's business.
        refusal = FetchFailed(
            "The host of the image's address is not known or not public, so nothing is fetched from it: "
            "check the address, or send the image itself as a data: address."
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
            f"{host!r} is not a host that images can be fetched from: write example.org, example.org:8443 "
            "or *.example.org."
        )
    return [(star + name, port) for port in ((url.port,) if url.port is not None else _WEB_PORTS)]
