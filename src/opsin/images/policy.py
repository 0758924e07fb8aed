"""Which hosts of the web images may be read from: public ones, or those that are named."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from opsin.core.errors import FetchFailed
from opsin.core.files import read_table
from opsin.images.fetch import Resolver, system_addresses

INSTEAD = "or send the image as a data: address."
_WHERE = "the hosts and ports that --image-hosts names, or else from the ports 80 and 443 of any"
WEB_PORTS = frozenset((80, 443))
_UNICAST_6 = ipaddress.IPv6Network("2000::/3")
_TABLE = read_table(__file__, "policy.toml")
_INSIDE = tuple(map(ipaddress.ip_network, _TABLE["inside"]))
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

    A name is looked up once, all of its addresses must be public, and exactly these are connected to: so it makes no
    difference how an address is written, nor what a name leads to a moment later. `hosts` are names, as `example.org`
    or `*.example.org` (its subdomains), with a port; without any, every public host is allowed on ports 80 and 443.
    `where` and `instead` are pieces of its sentences, `lookup` is for tests.
    """

    def __init__(
        self,
        hosts: Sequence[tuple[str, int]] = (),
        *,
        lookup: Resolver = system_addresses,
        where: str = _WHERE,
        instead: str = INSTEAD,
    ) -> None:
        self._hosts = frozenset(hosts or [("*", port) for port in WEB_PORTS])
        self._lookup, self._where, self._instead = lookup, where, instead

    def __call__(self, host: str, port: int) -> Sequence[str]:
        """The host's addresses; raises FetchFailed unless it is allowed and all of them are public."""
        name = host.lower().rstrip(".")
        parents = ("*." + name.split(".", cut)[cut] for cut in range(1, name.count(".") + 1))
        if not any((known, port) in self._hosts for known in ("*", name, *parents)):
            raise FetchFailed(f"Images are fetched from {self._where}: give an address there, {self._instead}")
        try:
            addresses = self._lookup(host, port)
        except FetchFailed:
            addresses = ()
        if not addresses or not all(map(is_public, addresses)):
            # One sentence for both cases: which names an inner network knows is nobody's business.
            raise FetchFailed(
                "The host of the image's address is not known or not public, so nothing is fetched from it: "
                f"check the address, {self._instead}"
            )
        return addresses
