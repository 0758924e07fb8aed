"""A picture from an http(s) address, bounded in bytes, time and redirects.

Built on httpcore, the part of httpx that opens connections, because two things must be ours: who resolves a host name
(so that a policy can refuse addresses, and the address that was checked is the one connected to), and a deadline that
no slow drip of bytes outlives. Proxies of the environment are not used, and uncompressed answers are asked for.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import httpcore
import httpx

from opsin.core.errors import FetchFailed, PictureTooLarge
from opsin.media.limits import check_bytes, show

if TYPE_CHECKING:
    from opsin.core.settings import MediaSettings

Resolver = Callable[[str, int], Sequence[str]]
"""Host and port in, the IP addresses that may be connected to out, best first; raises FetchFailed to refuse them."""

_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MOST_URL_CHARS = 8192
_ASK_SECONDS = 0.5
_HEADERS = [("User-Agent", "opsin"), ("Accept", "image/*"), ("Accept-Encoding", "identity")]


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


def fetch(
    url: str,
    settings: MediaSettings,
    resolve: Resolver = system_addresses,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> bytes:
    """Return the body at `url`, following at most `settings.fetch_redirects` redirects.

    The limit `settings.fetch_seconds` covers everything but the system's look-up of names, which has its own.
    `cancelled` is asked twice a second while a host is silent. Raises FetchFailed for an address that is not http(s),
    holds credentials, cannot be reached, answers with anything but 200, takes too long or was cancelled;
    PictureTooLarge over the limit on bytes, which is noticed while reading.
    """
    deadline = time.monotonic() + settings.fetch_seconds
    target = _checked(url)
    for _ in range(settings.fetch_redirects + 1):
        try:
            answer = _get(target, settings, _Wire(deadline, resolve, cancelled))
        except httpcore.TimeoutException as error:
            raise FetchFailed(
                f"{show_url(url)} did not answer whole within {settings.fetch_seconds:g} s; try again, or download it "
                "and give the file."
            ) from error
        except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError, OSError) as error:
            raise FetchFailed(
                f"{show_url(str(target))} cannot be reached ({_why(error)}); check the address and the network."
            ) from error
        if isinstance(answer, bytes):
            return answer
        target = _checked(str(answer))
    raise FetchFailed(
        f"{show_url(url)} was redirected more than {settings.fetch_redirects} times; give the address it leads to."
    )


def _why(error: Exception) -> str:
    """Say the innermost reason, without error numbers."""
    if isinstance(error, httpcore.ProtocolError):
        return "it does not speak HTTP as it should"
    inner: BaseException = error
    while inner.__context__ is not None:
        inner = inner.__context__
    if isinstance(inner, ssl.SSLError):
        return f"TLS: {show(getattr(inner, 'verify_message', '') or inner.reason or 'no secure connection')}"
    return show(getattr(inner, "strerror", None) or "no connection").lower()


def _checked(url: str) -> httpx.URL:
    if len(url) > _MOST_URL_CHARS:
        raise FetchFailed(f"The address of the picture is longer than {_MOST_URL_CHARS:,} characters; give the file.")
    try:
        parsed = httpx.URL(url)
        host = parsed.host
    except (httpx.InvalidURL, UnicodeError) as error:  # the second for names that are not IDNA
        raise FetchFailed("The address of the picture is not valid; check it for typing errors.") from error
    if parsed.scheme not in {"http", "https"} or not host:
        raise FetchFailed(
            f"The address {show_url(url)} is no whole http:// or https:// address; check it, or give a file."
        )
    if parsed.userinfo:
        raise FetchFailed(f"{show_url(url)} was given with a user name or password, which is not sent; remove it.")
    return parsed


def _get(url: httpx.URL, settings: MediaSettings, wire: _Wire) -> bytes | httpx.URL:
    """One request: the body, or where it is redirected to."""
    name = show_url(str(url))
    context = _tls() if url.scheme == "https" else None
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    with (
        httpcore.ConnectionPool(ssl_context=context, network_backend=wire) as pool,
        pool.stream("GET", target, headers=_HEADERS) as answer,
    ):
        headers = {key.lower(): value for key, value in answer.headers}
        if answer.status in _REDIRECTS and b"location" in headers:
            try:
                return url.join(headers[b"location"].decode("latin-1"))
            except httpx.InvalidURL as error:
                raise FetchFailed(f"{name} redirects to an address that is not valid; give another one.") from error
        if answer.status != http.client.OK:
            phrase = http.client.responses.get(answer.status)
            status = f"{answer.status} ({phrase})" if phrase else f"{answer.status}"
            raise FetchFailed(f"{name} answered {status} instead of a picture; check the address.")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise FetchFailed(f"{name} answered compressed, which was not asked for; download it and give the file.")
        announced = headers.get(b"content-length", b"")
        if announced.isdigit() and len(announced) < 20:
            check_bytes(int(announced), name, settings)
        body = bytearray()
        for chunk in answer.iter_stream():
            body += chunk
            if len(body) > settings.max_bytes:
                raise PictureTooLarge(
                    f"{name} is larger than the {settings.max_bytes:,} bytes a picture may have; give a smaller one."
                )
        check_bytes(len(body), name, settings)
        return bytes(body)


@functools.lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


class _Wire(httpcore.NetworkBackend):
    """Connects to the addresses that the resolver allows, and lets nothing last beyond the deadline."""

    def __init__(self, deadline: float, resolve: Resolver, cancelled: Callable[[], bool]) -> None:
        self._deadline = deadline
        self._resolve = resolve
        self._cancelled = cancelled
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - the deadline is stricter
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Try the host's addresses in order; if all fail, the last failure is raised."""
        failure: Exception = httpcore.ConnectError("no address")
        for address in self._resolve(host, port):
            left = _left(self._deadline, httpcore.ConnectTimeout)
            try:
                stream = self._sockets.connect_tcp(address, port, left, local_address, socket_options)
            except httpcore.ConnectError as error:
                failure = error
            else:
                return _Stream(stream, self._deadline, self._cancelled)
        raise failure


class _Stream(httpcore.NetworkStream):
    """A connection whose every wait ends at the deadline, or when the fetch is cancelled."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float, cancelled: Callable[[], bool]) -> None:
        self._stream = stream
        self._deadline = deadline
        self._cancelled = cancelled

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002 - the deadline is stricter
        while not self._cancelled():
            left = _left(self._deadline, httpcore.ReadTimeout)
            with contextlib.suppress(httpcore.ReadTimeout):
                return self._stream.read(max_bytes, min(left, _ASK_SECONDS))
        raise FetchFailed("The fetch of the picture was cancelled.")

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002 - the deadline is stricter
        self._stream.write(buffer, _left(self._deadline, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002 - the deadline is stricter
    ) -> httpcore.NetworkStream:
        left = _left(self._deadline, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._deadline, self._cancelled)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(deadline: float, late: type[httpcore.TimeoutException]) -> float:
    """Seconds until the deadline; raises `late` when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise late("deadline")
    return left
