"""The doors, knocked at from everywhere: what comes in, what is refused, and with which words."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_driver import CHAT, QUESTION, data_url, run, world
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from opsin.core.errors import BadParameter
from opsin.core.settings import ServerSettings
from opsin.server.listener import check_binding, read_keys
from opsin.server.middleware import SecurityMiddleware, read_origin

pytestmark = pytest.mark.slow

KEY, OTHER = "sk-first-key", "sk-second-key"
JSON = {"content-type": "application/json"}


class Inside:
    """What lies behind the doors: it reads the body and tells what it got."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(scope["path"])
        size, more = 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        body = json.dumps({"size": size, "key": scope["state"]["key"]}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})


def ask(
    method: str = "POST",
    path: str = "/v1/chat/completions",
    *,
    headers: dict[str, str] | list[tuple[str, str]] = JSON,
    content: bytes = b"{}",
    keys: tuple[str, ...] = (),
    inside: Any = None,
    at: str = "http://127.0.0.1:8000",
    **settings: Any,
) -> httpx.Response:
    app = SecurityMiddleware(inside or Inside(), ServerSettings(**settings), keys)

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=at) as client:
            return await client.request(method, path, headers=headers, content=None if method == "GET" else content)

    return asyncio.run(go())


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "127.9.9.9", "[::1]:8000", "localhost.", "mine.example", "10.1.2.3"],
)
def test_its_own_names_are_answered(host: str) -> None:
    answer = ask(headers={**JSON, "host": host}, allowed_hosts=("Mine.example",), host="10.1.2.3", keys=())
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example:8000",
        "user@localhost",
        "localhost/",
        "localhost#x",
        "10.1.2.3",
        "[::2]",
        "[::1",
        "127.0.0.1:x",
        "",
        "2130706433",
        "127.1",
    ],
)
def test_other_names_are_refused_before_anything_is_done(host: str) -> None:
    """DNS rebinding: the browser believes it speaks with evil.example, whose name was turned to 127.0.0.1."""
    inside = Inside()
    for method in ("GET", "POST", "OPTIONS"):
        assert code(ask(method, headers={**JSON, "host": host}, inside=inside)) == (421, "wrong_host")
    assert inside.asked == []


def test_the_address_that_was_connected_to_is_its_own() -> None:
    open_wide: dict[str, Any] = {"host": "0.0.0.0", "keys": (KEY,)}
    key = {**JSON, "authorization": f"Bearer {KEY}"}
    assert ask(at="http://192.168.7.7:8000", headers=key, **open_wide).status_code == 200
    assert code(ask(at="http://192.168.7.7:8000", headers={**key, "host": "192.168.7.8"}, **open_wide))[0] == 421


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "https://127.0.0.1:8000", "https://app.example"])
def test_its_own_page_and_named_origins_may_ask(origin: str) -> None:
    answer = ask(headers={**JSON, "origin": origin}, cors_origins=("https://app.example",))
    assert answer.status_code == 200
    named = origin == "https://app.example"
    assert answer.headers.get("access-control-allow-origin") == (origin if named else None)
    assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "",
        "http://127.0.0.1",
        "http://127.0.0.1:8001",
        "http://localhost:8000",
        "https://app.example.evil.example",
        "http://app.example",
        "https://app.example:444",
        "file://",
        "http://[",
    ],
)
def test_pages_from_elsewhere_may_not_post(origin: str) -> None:
    inside = Inside()
    settings: dict[str, Any] = {"cors_origins": ("https://app.example",), "inside": inside}
    answer = ask(headers={**JSON, "origin": origin}, **settings)
    assert code(answer) == (403, "wrong_origin")
    assert "access-control-allow-origin" not in answer.headers
    asked = {"origin": origin, "access-control-request-method": "POST"}
    assert code(ask("OPTIONS", headers=asked, **settings)) == (403, "wrong_origin")
    assert inside.asked == []
    # what it gets, the browser does not show it
    assert "access-control-allow-origin" not in ask("GET", "/v1/models", headers={"origin": origin}, **settings).headers


def test_a_named_origin_is_given_leave_without_a_key_but_answers_only_with_one() -> None:
    page = {"origin": "https://app.example"}
    asked = {**page, "access-control-request-method": "POST", "access-control-request-headers": "Authorization, x-evil"}
    settings: dict[str, Any] = {"cors_origins": ("https://app.example",), "keys": (KEY,)}
    leave = ask("OPTIONS", headers=asked, **settings)
    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in leave.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in leave.headers
    refused = ask(headers={**JSON, **page}, **settings)
    assert code(refused) == (401, "invalid_api_key")
    assert refused.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize("key", [KEY, OTHER])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_each_key_opens_and_is_told_by_its_label(key: str, scheme: str) -> None:
    answer = ask(headers={**JSON, "authorization": f"{scheme} {key}"}, keys=(KEY, OTHER))
    assert answer.json()["key"] == hashlib.sha256(key.encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", ["x-api-key", "api-key", "X-API-Key"])
def test_a_key_may_come_as_other_clients_send_it(name: str) -> None:
    assert code(ask(headers={**JSON, name: f"{KEY}x"}, keys=(KEY,))) == (401, "invalid_api_key")
    assert ask(headers={**JSON, name: KEY}, keys=(KEY,)).json()["key"]
    # What a browser's login left behind does not hide it.
    assert ask(headers={**JSON, "authorization": "Basic eDp4", name: KEY}, keys=(KEY,)).json()["key"]


@pytest.mark.parametrize("origin", ["chrome-extension://abcdefghijklmnop", "app://obsidian.md", "tauri://localhost"])
def test_an_extension_or_app_may_be_named(origin: str) -> None:
    assert ask(headers={**JSON, "origin": origin}, cors_origins=(origin,)).status_code == 200
    assert code(ask(headers={**JSON, "origin": origin})) == (403, "wrong_origin")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("http://localhost:5173/", "http://localhost:5173"),
        ("HTTPS://App.example", "https://app.example"),
        ("app.example", "https://example.org"),
    ],
)
def test_the_hint_about_an_origin_is_the_origin_itself(wrong: str, right: str) -> None:
    with pytest.raises(BadParameter, match=f"write {right},"):
        read_origin(wrong)


@pytest.mark.parametrize(
    "given",
    [
        [],
        [f"Bearer {KEY}x"],
        [f"Bearer {KEY[:-1]}"],
        ["Bearer "],
        ["Bearer"],
        [KEY],
        [f"Basic {KEY}"],
        [f"Bearer {KEY},{OTHER}"],
        ["Bearer \xfc"],
    ],
)
def test_without_a_key_nothing_but_health_and_the_page_is_shown(given: list[str]) -> None:
    headers = [("authorization", one.encode("latin-1")) for one in given]
    for path in ("/v1/models", "/metrics", "/props", "/v1/chat/completions", "/openapi.json", "/pagex", "/health/"):
        inside = Inside()
        answer = ask("GET", path, headers=headers, keys=(KEY, OTHER), inside=inside)  # type: ignore[arg-type]
        assert code(answer) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert KEY not in answer.text
        assert inside.asked == []
    for path in ("/", "/health", "/ready", "/page/page.js"):
        assert ask("GET", path, headers=headers, keys=(KEY, OTHER)).json()["key"] == ""  # type: ignore[arg-type]


def test_without_keys_everybody_is_nobody() -> None:
    assert ask(headers={**JSON, "authorization": f"Bearer {KEY}"}).json()["key"] == ""


def test_keys_come_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n  {OTHER}  \n{KEY}\n")
    settings = ServerSettings(api_key_file=file)
    assert read_keys(settings, {}) == (KEY, OTHER)
    assert read_keys(settings, {"OPSIN_API_KEY": "third"}) == (KEY, OTHER, "third")
    assert read_keys(ServerSettings(), {}) == ()


@pytest.mark.parametrize(
    "content", [None, b"", b"# nothing\n", b"\xff\xfe", "schlüssel-geheim\n".encode(), b"secret a\n"]
)
def test_a_file_without_good_keys_is_refused_and_never_quoted(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadParameter) as refused:
        read_keys(ServerSettings(api_key_file=file), {})
    assert str(refused.value).endswith(".")
    assert "secret" not in str(refused.value)
    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize("value", ["", "  ", "a b", "a\nb"])
def test_a_variable_that_protects_nothing_is_refused(value: str) -> None:
    with pytest.raises(BadParameter):
        read_keys(ServerSettings(), {"OPSIN_API_KEY": value})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "10.0.0.1", "machine.example", "fe80::1"])
def test_listening_for_others_needs_a_key(host: str) -> None:
    with pytest.raises(BadParameter, match="API key is needed"):
        check_binding(ServerSettings(host=host), ())
    check_binding(ServerSettings(host=host), (KEY,))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_listening_for_oneself_needs_none(host: str) -> None:
    check_binding(ServerSettings(host=host), ())


@pytest.mark.parametrize(
    "wrong",
    [
        {"allowed_hosts": ("*",)},
        {"allowed_hosts": ("http://mine.example",)},
        {"allowed_hosts": ("",)},
        {"host": ""},
        {"cors_origins": ("*",)},
        {"cors_origins": ("app.example",)},
        {"cors_origins": ("https://app.example/",)},
        {"cors_origins": ("https://*.example",)},
        {"cors_origins": ("https://me@app.example",)},
        {"cors_origins": ("HTTPS://App.example",)},
        {"cors_origins": ("null",)},
        {"cors_origins": ("https://app.example:x",)},
    ],
)
def test_names_that_are_none_are_refused_at_start(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadParameter) as refused:
        check_binding(ServerSettings(**wrong), (KEY,))
    assert str(refused.value).endswith(".")


def test_every_address_of_the_application_needs_the_key_but_health_and_the_page() -> None:
    async def go() -> None:
        async with world(keys=(KEY,)) as here:
            document = here.app.openapi()["paths"]
            paths = {"/metrics", "/openapi.json", *document} | {r.path for r in here.app.routes if isinstance(r, Route)}
            assert {"/v1/models", "/props", "/health", CHAT} <= paths
            for path in sorted(paths):
                method = "POST" if "post" in document.get(path, {}) else "GET"
                answer = await here.client.request(method, path, json={} if method == "POST" else None)
                is_open = path in {"/", "/health", "/ready"} or path.startswith("/page/")
                assert (answer.status_code == 401) is not is_open, (path, answer.status_code)
                key = {"authorization": f"Bearer {KEY}"}
                answer = await here.client.request(method, path, headers=key, json={} if method == "POST" else None)
                assert answer.status_code != 401

    run(go())


def test_what_is_remembered_is_kept_apart_for_each_key() -> None:
    """Else an answer's speed would tell one key what another has asked."""

    async def go() -> None:
        async with world(keys=(KEY, OTHER)) as here:
            image = {"type": "image_url", "image_url": {"url": data_url()}}
            messages = [
                {"role": "user", "content": [image, {"type": "text", "text": "is this a secret?"}]},
                *QUESTION,
            ]

            async def remembered(key: str) -> tuple[bool, int]:
                answer = await here.post(headers={"authorization": f"Bearer {key}"}, messages=messages, max_tokens=4)
                assert answer.status_code == 200, answer.text
                cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                return cached > 0, len(here.backend.encoded)

            before = len(here.backend.encoded)
            assert await remembered(KEY) == (False, before + 1)
            assert await remembered(KEY) == (True, before + 1)
            assert await remembered(OTHER) == (False, before + 2)

    run(go())


@pytest.mark.parametrize(("version", "status"), [("1.0", 200), ("1.1", 200), ("9.9", 505), ("2.0", 505)])
def test_versions_of_http_that_are_not_spoken_are_told_so(version: str, status: int) -> None:
    answers: list[Message] = []

    async def body() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def keep(message: Message) -> None:
        answers.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    app = SecurityMiddleware(Inside(), ServerSettings())
    asyncio.run(app({**scope, "http_version": version}, body, keep))
    assert answers[0]["status"] == status
