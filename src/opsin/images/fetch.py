"""An image from an http(s) address, bounded in bytes, time and redirects, without the environment's proxies.

A host name is resolved once a request, a policy may refuse its addresses, and the one checked is connected to. The
policy says which hosts of the web may be read from: public ones, or those that are named.
"""

import asyncio
import functools
import ipaddress
import os
import socket
import ssl
from collections.abc import Callable, Sequence

import httpx
from anyio.to_thread import run_sync

from opsin.core.errors import FetchFailed
from opsin.core.files import read_table
from opsin.core.settings import ImageSettings
from opsin.images.source import check_bytes, show

Resolver = Callable[[str, int], Sequence[str]]
"""Host and port in, the IP addresses that may be connected to out, best first; raises FetchFailed to refuse them."""

INSTEAD = "or send the image as a data: address."
_WHERE = "the hosts and ports that --image-hosts names, or else from the ports 80 and 443 of any"
WEB_PORTS = frozenset((80, 443))
_UNICAST_6 = ipaddress.IPv6Network("2000::/3")
_INSIDE = tuple(map(ipaddress.ip_network, read_table(__file__, "policy.toml")["inside"]))
_ISATAP = frozenset((0x0000_5EFE, 0x0200_5EFE))
_MAX_URL_CHARS = 8192
_tls = functools.cache(httpx.create_ssl_context)
_HEADERS = {"User-Agent": "opsin", "Accept": "image/*", "Accept-Encoding": "identity"}


def system_addresses(host: str, port: int) -> list[str]:
    """Ask the system's resolver for every address of `host`; raises FetchFailed when it knows none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchFailed(f"The host {show(host)} is not known; check the address and the network.") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def show_url(url: str) -> str:
    """Return the address without its query, fragment and credentials, which may be secrets, fit for one line."""
    try:
        parsed = httpx.URL(url)
        _ = parsed.host
    except (httpx.InvalidURL, UnicodeError):  # the second from the host's Punycode
        return "The address"
    return show(parsed.copy_with(query=None, fragment=None, userinfo=b""))


async def fetch(url: str, settings: ImageSettings, resolve: Resolver = system_addresses) -> bytes:
    """Return the body at `url`, following at most `settings.fetch_redirects` redirects.

    `settings.fetch_seconds` covers everything; `resolve` is called in a thread. Raises FetchFailed for an address that
    is not http(s), holds credentials, cannot be reached, answers with anything but 200, or takes too long;
    ImageTooLarge over the limit on bytes.
    """
    target = _checked(url)
    try:
        async with asyncio.timeout(settings.fetch_seconds):  # no slow drip of bytes lasts longer
            for _ in range(settings.fetch_redirects + 1):
                answer = await _get(target, settings, resolve)
                if isinstance(answer, bytes):
                    return answer
                target = _checked(answer, target)
    except TimeoutError:
        raise FetchFailed(
            f"{show_url(url)} did not answer whole within {settings.fetch_seconds:g} s; try again, or download it "
            "and give the file."
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise FetchFailed(
            f"{show_url(str(target))} cannot be reached ({_reason(error)}); check the address and the network."
        ) from error
    raise FetchFailed(
        f"{show_url(url)} was redirected more than {settings.fetch_redirects} times; give the address it leads to."
    )


async def _get(url: httpx.URL, settings: ImageSettings, resolve: Resolver) -> bytes | str:
    """One request: the body, or where it is redirected to."""
    name = show_url(str(url))
    # A new one for each request: a connection must not serve another host that has the same address.
    async with httpx.AsyncHTTPTransport(verify=await run_sync(_tls), trust_env=False) as transport:
        answer = await _connect(transport, url, resolve)
        if answer.has_redirect_location:
            return str(answer.headers["location"])
        if answer.status_code != httpx.codes.OK:
            status = f"{answer.status_code} {httpx.codes.get_reason_phrase(answer.status_code)}".rstrip()
            raise FetchFailed(f"{name} answered {status} instead of an image; check the address.")
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise FetchFailed(f"{name} answered compressed, which was not asked for; download it and give the file.")
        check_bytes(int(answer.headers.get("content-length", "1")), name, settings)
        body = bytearray()
        async for chunk in answer.aiter_raw():
            body += chunk
            check_bytes(len(body), name, settings)
        check_bytes(len(body), name, settings)
        return bytes(body)


async def _connect(transport: httpx.AsyncHTTPTransport, url: httpx.URL, resolve: Resolver) -> httpx.Response:
    """Ask the addresses that the resolver allows, in order; if none can be reached, the last failure is raised."""
    host = url.raw_host.decode("ascii")
    headers = {**_HEADERS, "Host": url.netloc.decode("ascii")}
    port = url.port if url.port is not None else {"http": 80, "https": 443}[url.scheme]
    failure = httpx.ConnectError("no address")
    for address in await run_sync(resolve, host, port, abandon_on_cancel=True):
        # The certificate is checked against the host, not against the address.
        request = httpx.Request("GET", url.copy_with(host=address), headers=headers, extensions={"sni_hostname": host})
        try:
            return await transport.handle_async_request(request)
        except httpx.ConnectError as error:
            failure = error
    raise failure


def _checked(url: str, base: httpx.URL | None = None) -> httpx.URL:
    """The address, or where a redirect from `base` leads; raises FetchFailed unless it can be fetched."""
    if len(url) > _MAX_URL_CHARS:
        raise FetchFailed(f"The address of the image is longer than {_MAX_URL_CHARS:,} characters; give the file.")
    try:
        parsed = base.join(url) if base else httpx.URL(url)
        shown, host = show_url(str(parsed)), parsed.host
    except (httpx.InvalidURL, UnicodeError) as error:  # the second for names that are not IDNA
        raise FetchFailed("The address of the image is not valid; check it for typing errors.") from error
    if parsed.scheme not in {"http", "https"} or not host:
        raise FetchFailed(f"The address {shown} is no whole http:// or https:// address; check it, or give a file.")
    if parsed.userinfo:
        raise FetchFailed(f"{shown} was given with a user name or password, which is not sent; remove it.")
    return parsed


def _reason(error: Exception) -> str:
    """Say the innermost reason, without error numbers."""
    if isinstance(error, httpx.ProtocolError):
        return "it does not speak HTTP as it should"
    inner: BaseException = error
    while (deeper := inner.__cause__ or inner.__context__) is not None:
        inner = deeper
    if isinstance(inner, ssl.SSLError):
        return f"TLS: {show(getattr(inner, 'verify_message', '') or inner.reason or 'no secure connection')}"
    number = getattr(inner, "errno", None)
    return os.strerror(number).lower() if number else "no connection"


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
    """Says which addresses of a host and port may be connected to; see `Resolver`.

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
