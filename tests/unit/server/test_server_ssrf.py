"""With --fetch-images on, through the whole application: what must not be fetched or read is refused, every one."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
from local_engine import LocalEngine
from PIL import Image

from opsin.core.backend import BackendLimits
from opsin.core.errors import BadParameter, FetchFailed
from opsin.core.settings import ServerSettings
from opsin.engine import Engine
from opsin.images.fetch import AddressPolicy, is_public, system_addresses
from opsin.prompt import TemplateSource
from opsin.server.app import create_app
from opsin.server.handler import ModelManager
from opsin.server.images import ImageLoader
from opsin.server.middleware import image_host
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import N_VOCAB, TURN_TEXT

pytestmark = pytest.mark.slow

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}" + TURN_TEXT
JSON = {"content-type": "application/json"}
PUBLIC = "93.184.215.14"


def png(size: tuple[int, int] = (8, 6)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, "teal").save(file, "PNG")
    return file.getvalue()


PNG = png()
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.fixture(scope="module")
def model() -> Iterator[LocalEngine]:
    limits = BackendLimits(n_ctx=512, n_ubatch=64, n_seq_max=8, n_vocab=N_VOCAB, n_embd=4, n_ctx_seq=512)
    engine = Engine(lambda: FakeBackend(limits=limits))
    yield LocalEngine(engine, TemplateSource(TEMPLATE, "fake", "fake", None, "", "", frozenset({TURN_TEXT})))
    engine.close()


def ask(model: LocalEngine, url: str, resolve: Any = None, **settings: Any) -> httpx.Response:
    """A question about the image at `url`, through the whole application."""

    async def go() -> httpx.Response:
        asked = ServerSettings(**{"fetch_images": True, **settings})
        gate = ImageLoader(asked, resolve=resolve)
        app = create_app(ModelManager(asked, model), gate)
        part = {"type": "image_url", "image_url": {"url": url}}
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 4}
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                return await client.post("/v1/chat/completions", content=json.dumps(body), headers=JSON)
        finally:
            gate.close()

    return asyncio.run(go())


def check_refused(answer: httpx.Response) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "fetch_failed"), answer.text
    assert error["message"].endswith(".")
    assert "Traceback" not in answer.text


class Wire:
    """Which addresses were connected to; none is reached but the test's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[tuple[str, int]] = []
        self.own: set[tuple[str, int]] = set()
        connect = httpcore.AnyIOBackend.connect_tcp

        async def recording(backend: Any, host: str, port: int, *args: Any, **more: Any) -> Any:
            if (host, port) in self.own:
                return await connect(backend, host, port, *args, **more)
            self.tried.append((host, port))
            raise httpcore.ConnectError("no way")

        monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", recording)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


# Addresses as such, in every form that a resolver takes; the system's own is asked.
LITERALS = """
127.0.0.1 127.0.0.2 127.255.255.254 0.0.0.0 0.0.0.1 10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.0.1
169.254.169.254 169.254.170.2 169.254.1.1 100.64.0.1 100.100.100.200 100.127.255.255 168.63.129.16 192.0.0.192
192.0.0.8 192.0.2.1 198.51.100.1 203.0.113.1 198.18.0.1 198.19.255.255 192.88.99.1 224.0.0.1 224.0.1.1
239.255.255.250 240.0.0.1 255.255.255.255
[::1] [::] [fe80::1] [febf::1] [fc00::1] [fd00:ec2::254] [fec0::1] [ff02::1] [ff0e::1] [::ffff:127.0.0.1]
[::ffff:169.254.169.254] [::ffff:10.0.0.1] [::ffff:a9fe:a9fe] [::ffff:8.8.8.8] [::127.0.0.1] [::a00:1] [64:ff9b::7f00:1]
[64:ff9b::169.254.169.254] [64:ff9b:1::a00:1] [2002:7f00:1::] [2002:a9fe:a9fe::1] [2001:0:4136:e378:8000:63bf:3fff:fdd2]
[2001:db8::1] [3fff::1] [2001:2::1] [2001:20::1] [100::1] [5f00::1] [2606:4700::5efe:a00:1] [2606:4700::200:5efe:7f00:1]
2130706433 0x7f000001 0x7f.0x0.0x0.0x1 0177.0.0.1 017700000001 0x7f.1 127.1 127.0.1 0 0x0 2852039166 0xa9fea9fe
0xa9.254.0251.254 169.16689662 3232235521 0300.0250.0.1 10.1 012.1 00000177.0.0.1 127.0.0.1. localhost localhost.
LOCALHOST １２７.０.０.１ ⑯⑨.254.169.254 127。0。0。1
""".split()  # noqa: SIM905 - a table is easier to read


@pytest.mark.parametrize("host", LITERALS)
def test_an_address_that_is_not_public_is_refused_in_every_form(model: LocalEngine, wire: Wire, host: str) -> None:
    check_refused(ask(model, f"http://{host}/latest/meta-data/"))
    assert wire.tried == []


# What a name may lead to; one bad address among good ones spoils them all.
NAMES: dict[str, list[str]] = {
    "localhost.example": ["127.0.0.1"],
    "metadata.google.internal": ["169.254.169.254"],
    "127.0.0.1.nip.example": ["127.0.0.1"],
    "inner.example": ["10.1.2.3"],
    "six.example": ["::1"],
    "mapped.example": ["::ffff:10.0.0.1"],
    "scoped.example": ["fe80::1%eth0"],
    "nat.example": ["64:ff9b::a00:1"],
    "mixed.example": [PUBLIC, "192.168.1.1"],
    "mixed-six.example": ["2606:4700::1", "fd00::1"],
    "shared.example": ["100.64.1.1"],
    "nothing.example": [],
    "odd.example": ["not an address"],
}


@pytest.mark.parametrize("host", NAMES)
def test_a_name_that_leads_inside_is_refused(model: LocalEngine, wire: Wire, host: str) -> None:
    policy = AddressPolicy(lookup=lambda name, port: NAMES[name])
    check_refused(ask(model, f"http://{host}/x.png", policy))
    assert wire.tried == []


@pytest.mark.parametrize(
    "url",
    [
        f"http://me:pass@{PUBLIC}/x.png",
        f"http://me@{PUBLIC}/x.png",
        f"http://{PUBLIC}@127.0.0.1/x.png",
        f"http://127.0.0.1#@{PUBLIC}/x.png",
        f"http://127.0.0.1\\@{PUBLIC}/x.png",
        f"http://:@{PUBLIC}/x.png",
        f"http://{PUBLIC}:22/x.png",
        f"http://{PUBLIC}:6379/x.png",
        f"https://{PUBLIC}:8443/x.png",
        f"http://{PUBLIC}:99999/x.png",
        "http:///x.png",
        "http://",
        "http:/127.0.0.1/x.png",
        "http:127.0.0.1/x.png",
        "//127.0.0.1/x.png",
        "http://[::1/x.png",
        "http://127.0.0.1%00.example/x.png",
        "http://exa mple/x.png",
        "http://xn--/x",
        "http://xn--a/x",
        " http://127.0.0.1/x.png",
        "http://127.0.0.1\r\nHost: example.org/x.png",
        "http://127.0.0.1\t/x.png",
        "ftp://example.org/x.png",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "dict://127.0.0.1:11211/stats",
        "ldap://127.0.0.1/x",
        "jar:http://example.org/x.jar!/x.png",
        "blob:http://127.0.0.1/1",
        "unix:///var/run/docker.sock",
        "s3://bucket/x.png",
        "javascript:alert(1)",
        "about:blank",
        "view-source:http://127.0.0.1/",
        "netdoc:///etc/passwd",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "file:/etc/passwd",
        "/etc/passwd",
        "./x.png",
        "x.png",
        "\\\\server\\share\\x.png",
        "C:\\x.png",
    ],
)
def test_addresses_that_are_no_plain_public_ones_are_refused(model: LocalEngine, wire: Wire, url: str) -> None:
    check_refused(ask(model, url))
    assert wire.tried == []


@pytest.mark.parametrize("url", ["file://" + "/." * 800_000, "http://example.org/" + "x" * 9_000, "x" * 9_000])
def test_long_addresses_are_refused_before_anything_is_done_with_them(model: LocalEngine, url: str) -> None:
    began = time.process_time()
    answer = ask(model, url)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[0].image_url"
    assert time.process_time() - began < 0.5


def test_nothing_is_fetched_or_read_unless_switched_on(model: LocalEngine, wire: Wire) -> None:
    check_refused(ask(model, f"http://{PUBLIC}/x.png", fetch_images=False))
    check_refused(ask(model, "file:///etc/hostname", fetch_images=False))
    assert wire.tried == []
    assert ask(model, DATA_URL, fetch_images=False).status_code == 200


def test_a_name_that_changes_between_look_ups_is_connected_to_as_it_was_checked(model: LocalEngine, wire: Wire) -> None:
    """DNS rebinding: public when it is checked, 127.0.0.1 a moment later. It is looked up once."""
    answers = [[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]]
    check_refused(ask(model, "http://turning.example/x.png", AddressPolicy(lookup=lambda name, port: answers.pop(0))))
    assert wire.tried == [(PUBLIC, 80)]
    assert len(answers) == 2


class Site(BaseHTTPRequestHandler):
    """`/ok` is an image, `/to?X` redirects to X."""

    asked: list[str]

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path, _, target = self.path.partition("?")
        self.send_response(302 if path == "/to" else 200)
        if path == "/to":
            self.send_header("Location", target)
        self.send_header("Content-Length", "0" if path == "/to" else str(len(PNG)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(b"" if path == "/to" else PNG)


class Running:
    """The site under the one name that the test lets in, beside the real policy for all others."""

    def __init__(self, port: int, asked: list[str]) -> None:
        self.url = f"http://images.test:{port}"
        self.port = port
        self.asked = asked
        self.looked_up: list[str] = []
        self.turning = [[PUBLIC], ["127.0.0.1"]]

    def __call__(self, host: str, port: int) -> Sequence[str]:
        if host == "images.test":
            return ["127.0.0.1"]
        return AddressPolicy(lookup=self._lookup)(host, port)

    def _lookup(self, host: str, port: int) -> Sequence[str]:
        self.looked_up.append(host)
        if host == "turning.example":
            return self.turning.pop(0)
        return NAMES[host] if host in NAMES else system_addresses(host, port)


@pytest.fixture
def site(wire: Wire) -> Iterator[Running]:
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Site,), {"asked": asked}))
    wire.own.add(("127.0.0.1", server.server_port))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Running(server.server_port, asked)
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_allowed_host_is_fetched_from_and_redirects_there_are_followed(model: LocalEngine, site: Running) -> None:
    for path in ("/ok", "/to?/ok", f"/to?{site.url}/ok"):
        answer = ask(model, site.url + path, site)
        assert answer.status_code == 200, answer.text
        assert answer.json()["images"][0]["width"] == 8


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1/",
        "http://127.0.0.1:PORT/ok",
        "http://localhost:PORT/ok",
        "http://[::1]/",
        "//127.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/",
        "http://2852039166/",
        "http://0x7f.1/",
        "http://10.0.0.1/",
        "https://192.168.0.1/",
        "http://inner.example/",
        "http://mixed.example/",
        "http://me:pass@images.test:PORT/ok",
        "http://images.test@127.0.0.1/",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "gopher://127.0.0.1/",
        "ftp://images.test/x",
        "http://[zz]/",
        "/to?/to?/to?/to?/ok",
    ],
)
def test_a_redirect_is_checked_like_an_address(model: LocalEngine, site: Running, wire: Wire, target: str) -> None:
    check_refused(ask(model, f"{site.url}/to?{target.replace('PORT', str(site.port))}", site))
    assert "/ok" not in site.asked
    assert wire.tried == []


def test_a_name_that_changes_between_redirects_is_checked_again(model: LocalEngine, site: Running, wire: Wire) -> None:
    first = "http://turning.example/x.png"
    check_refused(ask(model, f"{site.url}/to?{first}", site))
    assert wire.tried == [(PUBLIC, 80)]
    check_refused(ask(model, f"{site.url}/to?{first}", site))
    assert wire.tried == [(PUBLIC, 80)]
    assert site.looked_up == ["turning.example"] * 2


@pytest.mark.parametrize(
    ("url", "fits"),
    [
        ("http://cdn.example/x", True),
        ("https://cdn.example/x", True),
        ("http://CDN.example./x", True),
        ("http://cdn.example:8080/x", False),
        ("http://cdn.example.evil.example/x", False),
        ("http://evilcdn.example/x", False),
        ("http://a.cdn.example/x", False),
        ("http://files.example:8443/x", True),
        ("http://files.example/x", False),
        ("http://a.star.example/x", True),
        ("http://a.b.star.example/x", True),
        ("http://star.example/x", False),
        ("http://xn--bcher-kva.example/x", True),
        ("http://bücher.example/x", True),
        ("http://[2606:4700::9]:81/x", True),
    ],
)
def test_named_hosts_are_the_only_ones(model: LocalEngine, wire: Wire, url: str, fits: bool) -> None:
    hosts = ("cdn.example", "files.example:8443", "*.star.example", "Bücher.example", "[2606:4700::9]:81")
    check_refused(
        ask(
            model,
            url,
            AddressPolicy([pair for host in hosts for pair in image_host(host)], lookup=lambda name, port: [PUBLIC]),
        )
    )
    assert [host for host, _ in wire.tried] == ([PUBLIC] if fits else [])


def test_a_named_host_must_be_public_all_the_same(model: LocalEngine, wire: Wire) -> None:
    check_refused(ask(model, "http://127.0.0.1/x", image_hosts=("127.0.0.1",)))
    check_refused(ask(model, "http://localhost/x", image_hosts=("localhost",)))
    assert wire.tried == []


@pytest.mark.parametrize(
    "host", ["", "http://a.example", "a.example/x", "*", "a.*.example", "me@a.example", "a b", "a:x"]
)
def test_hosts_that_are_none_are_refused_at_start(host: str) -> None:
    with pytest.raises(BadParameter, match="not a host"):
        ImageLoader(ServerSettings(image_hosts=(host,)))


@pytest.mark.parametrize("address", ["8.8.8.8", PUBLIC, "1.1.1.1", "2606:4700::1", "2a00:1450::1", "2001:4860::8888"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)
    assert AddressPolicy(lookup=lambda name, port: [address])("x.example", 443) == [address]


def test_known_and_unknown_inner_names_are_not_told_apart() -> None:
    def unknown(host: str, port: int) -> list[str]:
        raise FetchFailed("The host db.corp is not known.")

    with pytest.raises(FetchFailed) as first:
        AddressPolicy(lookup=unknown)("db.corp", 80)
    with pytest.raises(FetchFailed) as second:
        AddressPolicy(lookup=lambda name, port: ["10.0.0.1"])("mail.corp", 80)
    assert str(first.value) == str(second.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A media folder with images, links in and out, and things that are no files; secrets lie around it."""
    media = tmp_path / "media"
    (media / "below").mkdir(parents=True)
    (tmp_path / "media-secret").mkdir()
    for place in ("media/a.png", "media/below/b c.png", "secret.png", "media-secret/a.png"):
        (tmp_path / place).write_bytes(PNG)
    (media / "within.png").symlink_to("below/b c.png")
    (media / "out.png").symlink_to(tmp_path / "secret.png")
    (media / "out").symlink_to(tmp_path)
    (media / "chain.png").symlink_to("out.png")
    (media / "ring.png").symlink_to("ring.png")
    (media / "lost.png").symlink_to("nowhere.png")
    (media / "device.png").symlink_to("/dev/zero")
    os.mkfifo(media / "pipe.png")
    return tmp_path


@pytest.mark.parametrize("path", ["media/a.png", "media/below/b%20c.png", "media/within.png", "media/below/../a.png"])
@pytest.mark.parametrize("start", ["file://", "file://localhost", "FILE://", "file:"])
def test_images_in_the_media_folder_are_read(model: LocalEngine, folder: Path, path: str, start: str) -> None:
    answer = ask(model, f"{start}{folder}/{path}", media_path=folder / "media", fetch_images=False)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "path",
    [
        "secret.png",
        "media/../secret.png",
        "media/%2e%2e/secret.png",
        "media/below/../../secret.png",
        "media/..%2fsecret.png",
        "media/%252e%252e/secret.png",
        "media/....//secret.png",
        "media/..\\secret.png",
        "media-secret/a.png",
        "media/../media-secret/a.png",
        "media/out.png",
        "media/chain.png",
        "media/out/secret.png",
        "media/out/media-secret/a.png",
        "media/ring.png",
        "media/lost.png",
        "media/device.png",
        "media/pipe.png",
        "media/below",
        "media",
        "media/",
        "media/none.png",
        "media/a.png/..",
        "media/a.png%00.jpg",
        "media/a.png?x",
        "media/a.png#x",
        "media/%ff.png",
        "media/" + "x" * 5000,
    ],
)
def test_a_file_elsewhere_is_refused(model: LocalEngine, folder: Path, path: str) -> None:
    answer = ask(model, f"file://{folder}/{path}", media_path=folder / "media")
    check_refused(answer)
    assert str(folder) not in answer.text


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file:///proc/self/environ",
        "file:///dev/zero",
        "file:a.png",
        "file:",
        "file://media/a.png",
    ],
)
def test_other_files_are_refused(model: LocalEngine, folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "media")
    check_refused(ask(model, url, media_path=folder / "media"))


def test_a_folder_on_another_machine_is_refused(model: LocalEngine, folder: Path) -> None:
    check_refused(ask(model, f"file://server{folder}/media/a.png", media_path=folder / "media"))


def test_what_lies_outside_is_not_told_apart_from_what_does_not_exist(model: LocalEngine, folder: Path) -> None:
    there, not_there = (
        ask(model, f"file://{folder}/{name}", media_path=folder / "media") for name in ("secret.png", "none.png")
    )
    assert there.json() == not_there.json()


def test_a_link_put_in_place_after_the_check_is_not_followed(
    model: LocalEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a path and its opening, somebody with access to the folder swaps it for a link."""
    resolve = os.path.realpath

    def then_swap(path: Any, **options: Any) -> str:
        found = resolve(path, **options)
        if str(found).endswith("a.png"):
            (folder / "media" / "a.png").unlink(missing_ok=True)
            (folder / "media" / "a.png").symlink_to(folder / "secret.png")
        return str(found)

    monkeypatch.setattr(os.path, "realpath", then_swap)
    check_refused(ask(model, f"file://{folder}/media/a.png", media_path=folder / "media"))


def test_a_media_folder_that_is_none_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("none", "file"):
        with pytest.raises(BadParameter, match="--media-path"):
            ImageLoader(ServerSettings(media_path=tmp_path / name))


def test_there_are_more_than_sixty_cases() -> None:
    assert len(set(LITERALS)) + len(NAMES) > 60
