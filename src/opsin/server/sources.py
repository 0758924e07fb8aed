"""Where images may be read besides `data:` addresses: a folder, and hosts of the web, if the settings name them."""

from __future__ import annotations

import ipaddress
import os
import stat
import tomllib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from opsin.core.errors import BadParameter, FetchFailed
from opsin.core.settings import ImageSettings
from opsin.images.fetch import Resolver, system_addresses
from opsin.images.source import check_bytes
from opsin.server.middleware import parse_host

INSTEAD = "or send the image as a data: address."


class ImageFolder:
    """Reads files in a folder and below, and nothing else, wherever links lead and whatever is moved meanwhile.

    Links are resolved first; then the file is opened from the folder's descriptor downwards, name by name, and links
    are no longer followed. Raises BadParameter if the path is not a folder that can be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._root = path.resolve(strict=True)
            os.close(self._open(Path()))
        except (OSError, RuntimeError):
            raise BadParameter(f"--media-path {path} is not a readable folder: give an existing one.") from None

    def read(self, url: str, limits: ImageSettings) -> bytes:
        """Return the bytes of the file at `file:///…`, up to the limit.

        Raises FetchFailed with the same sentence for everything outside, whether it exists or not; ImageTooLarge.
        """
        try:
            parts = urlsplit(url)
            path = unquote(parts.path, errors="strict")
            if parts.netloc.lower() not in {"", "localhost"} or parts.query or parts.fragment or path[:1] != "/":
                raise FetchFailed("A file: address has the form file:///folder/image.png: write it like this.")
            descriptor = self._open(Path(os.path.realpath(path)).relative_to(self._root))
        except (OSError, ValueError):
            raise FetchFailed(
                "There is no such image in the folder that file: addresses may name (--media-path): "
                f"check the address, {INSTEAD}"
            ) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FetchFailed("The file: address names a folder or a device, not an image: give a file.")
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(limits.max_bytes + 1)
        check_bytes(len(data), "The image", limits)
        return data

    def _open(self, below: Path) -> int:
        """Open what `below` leads to from the folder: a file, or a folder too."""
        here = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # A link is not followed, and a pipe that nobody writes to is not waited for.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        for name in below.parts:
            try:
                inner = os.open(name, flags, dir_fd=here)
            finally:
                os.close(here)
            here = inner
        return here


_WEB_PORTS = frozenset((80, 443))
_UNICAST_6 = ipaddress.IPv6Network("2000::/3")
_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
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
    difference how an address is written, nor what a name leads to a moment later. `hosts` are names like
    `example.org`, `example.org:8443` or `*.example.org` (its subdomains); without any, every public host is allowed on
    ports 80 and 443. `lookup` is for tests. Raises BadParameter for a host that is written in another way.
    """

    def __init__(self, hosts: Sequence[str] = (), *, lookup: Resolver = system_addresses) -> None:
        named = [pair for host in hosts for pair in _read_host(host)]
        self._hosts = frozenset(named or [("*", port) for port in _WEB_PORTS])
        self._lookup = lookup

    def __call__(self, host: str, port: int) -> Sequence[str]:
        """The host's addresses; raises FetchFailed unless it is allowed and all of them are public."""
        name = host.lower().rstrip(".")
        parents = ("*." + name.split(".", cut)[cut] for cut in range(1, name.count(".") + 1))
        if not any((known, port) in self._hosts for known in ("*", name, *parents)):
            raise FetchFailed(
                "Images are fetched from the hosts and ports that --image-hosts names, or else from the ports 80 and "
                f"443 of any: give an address there, {INSTEAD}"
            )
        try:
            addresses = self._lookup(host, port)
        except FetchFailed:
            addresses = ()
        if not addresses or not all(map(is_public, addresses)):
            # One sentence for both cases: which names an inner network knows is nobody's business.
            raise FetchFailed(
                "The host of the image's address is not known or not public, so nothing is fetched from it: "
                f"check the address, {INSTEAD}"
            )
        return addresses


def _read_host(host: str) -> list[tuple[str, int]]:
    """The name and the ports of an entry of --image-hosts."""
    name, port = parse_host(host.removeprefix("*."))
    if not name:
        raise BadParameter(
            f"{host!r} is not a host that images can be fetched from: write example.org, example.org:8443 "
            "or *.example.org."
        )
    star = "*." if host.startswith("*.") else ""
    return [(star + name, one) for one in (_WEB_PORTS if port is None else (port,))]
