"""The page as files: what it is served with, and what it must not hold."""

import re
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import opsin.server
from opsin.core.answer import Stages
from opsin.images import ENDINGS
from opsin.server.app import router

TEXTS = {path.name: path.read_text() for path in (Path(opsin.server.__path__[0]) / "page").iterdir()}
FILES = {*TEXTS, "example.png"}


@pytest.fixture(name="client", scope="module")
def make_client() -> TestClient:
    app = FastAPI()
    app.include_router(router)
    return TestClient(app)


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in sorted(FILES))])
def test_every_file_is_served_under_a_strict_policy(client: TestClient, path: str) -> None:
    reply = client.get(path)
    assert reply.status_code == 200
    policy = {part.split()[0]: part.split()[1:] for part in reply.headers["content-security-policy"].split(";")}
    assert (
        policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == ["'none'"]
    )
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == ["'self'"]
    assert policy["img-src"] == ["'self'", "blob:", "data:"]
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert client.head(path).headers["content-length"] == str(len(reply.content))


def test_browsers_are_told_the_type_of_each_file(client: TestClient) -> None:
    """With nosniff a module of another type would not run."""
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
    assert client.get("/page/page.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert client.get("/page/page.css").headers["content-type"] == "text/css; charset=utf-8"
    assert client.get("/page/icon.svg").headers["content-type"] == "image/svg+xml"


def test_an_unchanged_file_is_not_sent_again(client: TestClient) -> None:
    tag = client.get("/page/page.js").headers["etag"]
    again = client.get("/page/page.js", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/page.js", headers={"If-None-Match": '"another"'}).status_code == 200


@pytest.mark.parametrize("name", ["missing.js", "..%2fpage.py", "%2e%2e/page.py", "..%5cpage.py", ""])
def test_only_the_pages_own_files_are_served(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}").status_code == 404


class Markup(HTMLParser):
    """Collects what a strict policy would stop, and every address."""

    def __init__(self) -> None:
        super().__init__()
        self.inline: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self._script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._script = tag in {"script", "style"}
        for name, value in attrs:
            if name.startswith("on") or name == "style":
                self.inline.append(f"{tag} {name}")
            elif name in {"src", "href", "action"}:
                self.addresses.append(value or "")
            elif name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._script and data.strip():
            self.inline.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._script = False


def test_the_markup_holds_no_script_no_style_and_no_outside_address() -> None:
    markup = Markup()
    markup.feed(TEXTS["index.html"])
    assert markup.inline == []
    assert markup.addresses
    assert {address for address in markup.addresses if address.removeprefix("page/") not in FILES} == set()


def test_scripts_find_every_element_that_they_ask_for() -> None:
    markup = Markup()
    markup.feed(TEXTS["index.html"])
    asked = {
        name for file, text in TEXTS.items() if file.endswith(".js") for name in re.findall(r'byId\("([\w-]+)"\)', text)
    }
    assert asked
    assert asked <= set(markup.ids)


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith((".js", ".css"))])
def test_text_can_never_become_markup_and_nothing_comes_from_elsewhere(name: str) -> None:
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|srcdoc|localStorage"
    )
    assert re.findall(forbidden, TEXTS[name]) == []
    assert re.findall(r"https?://|@import|url\(", TEXTS[name]) == []
    assert len(TEXTS[name].splitlines()) <= 450


def test_modules_import_only_files_that_are_there() -> None:
    for name, text in TEXTS.items():
        if name.endswith(".js"):
            assert set(re.findall(r'from "\./([^"]+)"', text)) <= set(TEXTS)


def test_the_waterfall_knows_every_stage_of_the_engine() -> None:
    drawn = re.findall(r'\["(\w+_ms)", "[^"]+", "(?:wait|see|say)"\]', TEXTS["waterfall.js"])
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == {field.name for field in fields(Stages)} - {"total_ms"}


def test_the_page_knows_the_endings_that_all_rooms_know() -> None:
    (accepted,) = re.findall(r'accept="image/\*,([^"]+)"', TEXTS["index.html"])
    (named,) = re.findall(r"NAMES = /\\\.\(([^)]+)\)", TEXTS["images.js"])
    assert tuple(accepted.split(",")) == ENDINGS
    assert tuple(f".{name}" for name in named.split("|")) == ENDINGS
