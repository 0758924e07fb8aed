"""Fetching from a server on this machine that answers well, badly, slowly, endlessly and not at all."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from image_samples import encode, scene

from opsin.core.errors import BadImage, FetchFailed, ImageTooLarge, ImageUnsupported
from opsin.core.settings import ImageSettings
from opsin.images import load_image
from opsin.images.fetch import fetch, show_url, system_addresses

pytestmark = pytest.mark.slow  # together they take seconds, so `make check` leaves them out

PNG = encode(scene(), "PNG")
SHA = load_image(PNG, ImageSettings()).sha256
LIMITS = ImageSettings(fetch=True, fetch_seconds=10, fetch_redirects=2, max_bytes=50_000)


class Answers(BaseHTTPRequestHandler):
    """One answer a path; `seen` keeps what was asked."""

    seen: list[tuple[str, dict[str, str]]]
    release: threading.Event

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.seen.append((self.path, dict(self.headers)))
        name, _, rest = self.path.removeprefix("/").partition("?")[0].partition("/")
        with contextlib.suppress(OSError):
            getattr(self, f"give_{name}")(rest)

    def give_ok(self, _: str) -> None:
        self.reply(200, PNG)

    def give_html(self, _: str) -> None:
        self.reply(200, b"<!doctype html><html></html>")

    def give_status(self, code: str) -> None:
        self.reply(int(code))

    def give_hop(self, rest: str) -> None:
        self.reply(302, Location="/ok" if rest == "1" else f"/hop/{int(rest) - 1}")

    def give_loop(self, _: str) -> None:
        self.reply(307, Location="/loop")

    def give_away(self, rest: str) -> None:
        places = {
            "file": "file:///etc/passwd",
            "secret": "http://me:pass@127.0.0.1/ok",
            "bad": "http://[zz]/",
            "long": "/" + "x" * 9000,
        }
        self.reply(302, Location=places[rest])

    def give_announced(self, _: str) -> None:
        self.reply(200, b"", Content_Length=str(2**40))

    def give_endless(self, _: str) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(bytes(8192))

    def give_gzip(self, _: str) -> None:
        self.reply(200, PNG, Content_Encoding="gzip")

    def give_short(self, _: str) -> None:
        self.reply(200, PNG[:50], Content_Length=str(len(PNG)))

    def give_silence(self, _: str) -> None:
        self.release.wait(20)

    def give_drip(self, _: str) -> None:
        """A byte of the body now and then: each wait is short, the whole is not."""
        self.send_response(200)
        self.end_headers()
        while not self.release.wait(0.05):
            self.wfile.write(b"x")
            self.wfile.flush()

    def give_drips(self, _: str) -> None:
        """The same inside the headers, where no chunk of the body ever comes."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not self.release.wait(0.05):
            self.wfile.write(b"x")
            self.wfile.flush()

    def give_junk(self, _: str) -> None:
        self.wfile.write(b"\x00\x01not http at all\r\n\r\n")


class Site:
    def __init__(self, server: ThreadingHTTPServer, answers: Any) -> None:
        self.url = f"http://127.0.0.1:{server.server_port}"
        self.port = server.server_port
        self.seen: list[tuple[str, dict[str, str]]] = answers.seen


@pytest.fixture
def site() -> Iterator[Site]:
    answers = type("Answers", (Answers,), {"seen": [], "release": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Site(server, answers)
    answers.release.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_image_is_fetched_and_timed(site: Site) -> None:
    image = load_image(f"{site.url}/ok?token=1#part", LIMITS)
    assert image.sha256 == SHA
    assert image.fetch_ms > 0
    path, headers = site.seen[0]
    assert path == "/ok?token=1"
    assert headers["Accept-Encoding"] == "identity"
    assert headers["Host"] == f"127.0.0.1:{site.port}"
    assert "Authorization" not in headers


def test_redirects_are_followed_up_to_the_limit(site: Site) -> None:
    assert load_image(f"{site.url}/hop/2", LIMITS).sha256 == SHA
    with pytest.raises(FetchFailed, match="redirected more than 2 times"):
        load_image(f"{site.url}/hop/3", LIMITS)
    site.seen.clear()
    with pytest.raises(FetchFailed, match="redirected"):
        load_image(f"{site.url}/loop", LIMITS)
    assert len(site.seen) == 3


@pytest.mark.parametrize(
    ("path", "kind", "word"),
    [
        ("status/404", FetchFailed, "404 Not Found"),
        ("status/500", FetchFailed, "500"),
        ("status/204", FetchFailed, "204"),
        ("status/304", FetchFailed, "304"),
        ("status/599", FetchFailed, "599"),
        ("status/200", BadImage, "empty"),
        ("html", ImageUnsupported, "web page"),
        ("away/file", FetchFailed, "http"),
        ("away/secret", FetchFailed, "password"),
        ("away/bad", FetchFailed, "not valid"),
        ("away/long", FetchFailed, "longer than 8,192"),
        ("announced", ImageTooLarge, "50,000"),
        ("endless", ImageTooLarge, "50,000"),
        ("gzip", FetchFailed, "compressed"),
        ("short", FetchFailed, "cannot be reached|speak HTTP"),
        ("junk", FetchFailed, "speak HTTP"),
    ],
)
def test_answers_that_are_no_image_give_one_sentence(site: Site, path: str, kind: type, word: str) -> None:
    with pytest.raises(kind, match=word) as refused:
        load_image(f"{site.url}/{path}?token=hidden", LIMITS)
    text = str(refused.value)
    assert text.isprintable()
    assert text.endswith(".")
    assert "hidden" not in text
    assert "pass@" not in text


@pytest.mark.parametrize("path", ["silence", "drip", "drips"])
def test_no_slowness_outlives_the_time_limit(site: Site, path: str) -> None:
    """A limit on each wait alone would let a drip go on for ever."""
    begin = time.monotonic()
    with pytest.raises(FetchFailed, match=r"within 0\.4 s"):
        load_image(f"{site.url}/{path}", LIMITS.model_copy(update={"fetch_seconds": 0.4}))
    assert 0.3 < time.monotonic() - begin < 5


@pytest.mark.parametrize("path", ["silence", "drip"])
def test_a_cancelled_fetch_ends_long_before_its_time_limit(site: Site, path: str) -> None:
    """The client that asked has left: the next one has its place."""

    async def leave() -> None:
        fetching = asyncio.create_task(fetch(f"{site.url}/{path}", LIMITS))
        while not site.seen:  # noqa: ASYNC110 - the site is in another thread
            await asyncio.sleep(0.01)
        fetching.cancel()
        await asyncio.wait([fetching])

    begin = time.monotonic()
    asyncio.run(leave())
    assert time.monotonic() - begin < 5


def test_a_notebook_can_fetch_although_its_thread_runs_an_event_loop(site: Site) -> None:
    async def cell() -> str:
        return load_image(f"{site.url}/ok", LIMITS).sha256

    assert asyncio.run(cell()) == SHA


@pytest.mark.parametrize(
    "url",
    [
        "http://me:pw@127.0.0.1/x", "https://tok@127.0.0.1/x", "http:///x", "http://[::1/x", "http://127.0.0.1:x/",
        "http://xn--/x", "https://xn--a.example/", "http://127.0.0.1/" + "x" * 9000,
    ],
)  # fmt: skip
def test_addresses_that_are_wrong_are_refused_unasked(url: str) -> None:
    with pytest.raises(FetchFailed) as refused:
        load_image(url, LIMITS)
    assert "pw" not in str(refused.value)


def test_a_closed_port_says_so() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(FetchFailed, match="refused"):
        load_image(f"http://127.0.0.1:{port}/x", LIMITS)


def test_plain_http_behind_https_says_so(site: Site) -> None:
    with pytest.raises(FetchFailed, match="TLS"):
        load_image(f"https://127.0.0.1:{site.port}/ok", LIMITS)


def test_the_resolver_decides_where_to_connect(site: Site) -> None:
    """The place of a policy: it is asked at every hop, and the address it gives is the one connected to."""
    asked: list[tuple[str, int]] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["127.0.0.1"]

    assert asyncio.run(fetch(f"http://images.invalid:{site.port}/hop/1", LIMITS, resolve)) == PNG
    assert asked == [("images.invalid", site.port)] * 2
    assert site.seen[0][1]["Host"] == f"images.invalid:{site.port}"


def test_a_resolver_that_refuses_is_heard(site: Site) -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise FetchFailed("Not allowed.")

    with pytest.raises(FetchFailed, match="Not allowed"):
        asyncio.run(fetch(f"{site.url}/ok", LIMITS, resolve))
    assert site.seen == []


def test_the_next_address_is_tried_when_one_is_dead(site: Site) -> None:
    url = f"http://x.invalid:{site.port}/ok"
    assert asyncio.run(fetch(url, LIMITS, lambda host, port: ["127.0.0.2", "127.0.0.1"])) == PNG


def test_an_unknown_host_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(FetchFailed, match=r"host nowhere\.invalid is not known"):
        load_image("http://nowhere.invalid/x.png", LIMITS)


def test_system_addresses_are_addresses() -> None:
    assert "127.0.0.1" in system_addresses("localhost", 80) or "::1" in system_addresses("localhost", 80)


def test_shown_addresses_hide_what_may_be_secret() -> None:
    assert show_url("https://me:pw@host/a.png?key=1#x") == "https://host/a.png"
    assert show_url("http://[zz]/") == "The address"
