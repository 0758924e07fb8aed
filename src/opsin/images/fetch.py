"""An image from an http(s) address, bounded in bytes, time and redirects, without the environment's proxies.

A host name is resolved once a request, a policy may refuse its addresses, and the one checked is connected to.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import ssl
from collections.abc import Callable, Sequence

import httpx
from anyio.to_thread import run_sync

from opsin.core.errors import FetchFailed
from opsin.core.settings import ImageSettings
from opsin.images.source import check_bytes, show

Resolver = Callable[[str, int], Sequence[str]]
"""Host and port in, the IP addresses that may be connected to out, best first; raises FetchFailed to refuse them."""

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
