"""What the server tells of itself, and how errors leave it."""

import json
import re
from typing import Any

import pytest
from api_driver import CHAT, QUESTION, run, world

from opsin.core.errors import EngineDied, ModelUnreadable
from opsin.engine import Engine

pytestmark = pytest.mark.slow


def test_models_and_props_tell_of_the_model() -> None:
    async def work() -> None:
        async with world() as w:
            listed = (await w.client.get("/v1/models")).json()
            assert [card["id"] for card in listed["data"]] == ["fake"]
            assert (await w.client.get("/v1/models/fake")).json() == listed["data"][0]
            missing = await w.client.get("/v1/models/gpt-4o")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
            props = (await w.client.get("/props")).json()
            assert props["default_generation_settings"]["n_ctx"] == 512
            assert props["total_slots"] == props["parallel"] == 8
            assert props["modalities"] == {"vision": True, "audio": False}
            assert (props["max_images"], props["max_body_bytes"]) == (16, 64 * 2**20)
            assert props["model"]["llm_file"] == "fake.gguf"
            assert "messages" in props["chat_template"]

    run(work())


def test_looking_at_an_unloaded_model_does_not_load_it() -> None:
    async def work() -> None:
        async with world() as w:
            before = (await w.client.get("/props")).json()
            w.engine.state = "unloaded"
            assert (await w.client.get("/props")).json() == before
            assert (await w.client.get("/v1/models/fake")).status_code == 200
            assert (await w.client.get("/ready")).status_code == 200
            assert w.engine.state == "unloaded"

    run(work())


def test_paths_of_strangers_do_not_get_into_the_log() -> None:
    async def work() -> None:
        async with world() as w:
            assert (await w.post("/v1/x%0aline")).status_code == 404
            assert [record.route for record in w.records] == ["other"]

    run(work())


def test_alive_is_not_ready() -> None:
    async def work() -> None:
        async with world(start=False) as w:
            assert (await w.client.get("/health")).status_code == 200
            reply = await w.client.get("/ready")
            assert (reply.status_code, reply.json()) == (503, {"status": "loading", "progress": 0.0})
            assert (await w.client.get("/props")).status_code == 503
            w.engine.state = "ready"
            assert (await w.client.get("/ready")).json() == {"status": "ready"}
            w.engine.state = "failed"
            assert (await w.client.get("/health")).status_code == 503

    run(work())


def test_wrong_addresses_and_methods_have_the_error_body() -> None:
    async def work() -> None:
        async with world() as w:
            for method, path, status in (
                ("GET", "/v1/nothing", 404),
                ("GET", CHAT, 405),
                ("DELETE", "/v1/models", 405),
            ):
                headers = {"content-type": "application/json"}
                reply = await w.client.request(method, path, headers=headers)
                assert reply.status_code == status
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

    run(work())


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/props", "/metrics", "/"])
def test_get_answers_are_there_for_head_and_with_a_slash_too(path: str) -> None:
    async def work() -> None:
        async with world() as w:
            for asked in (path, f"{path.rstrip('/')}/"):
                assert (await w.client.request("HEAD", asked)).status_code == 200, asked
                assert (await w.client.get(asked)).status_code == 200, asked

    run(work())


def test_a_post_with_a_slash_at_the_end_is_answered() -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.post(f"{CHAT}/", messages=[{"role": "user", "content": "what?"}])
            assert reply.status_code == 200, reply.text
            assert w.records[-1].route == CHAT

    run(work())


@pytest.mark.parametrize(
    "path", ["/chat/completions", "/models", "/v1/v1/chat/completions", "/v1/v1/models", "/responses"]
)
def test_an_address_without_the_base_or_with_two_is_told_the_base(path: str) -> None:
    async def work() -> None:
        async with world() as w:
            for method in ("GET", "POST"):
                reply = await w.client.request(method, path, json={})
                assert reply.status_code == 404
                assert "http://127.0.0.1:8000/v1" in reply.json()["error"]["message"]

    run(work())


@pytest.mark.parametrize("prefix", ["", "/tools/opsin"])
def test_behind_a_proxy_everything_is_where_the_proxy_put_it(prefix: str) -> None:
    """Whether it cuts its own path off or not; the page itself is made of relative addresses."""

    async def work() -> None:
        async with world(root_path="/tools/opsin") as w:
            page = await w.client.get(f"{prefix}/")
            assert page.status_code == 200
            for address in re.findall(r'(?:href|src)="([^"]+)"', page.text):
                assert not address.startswith("/"), address
                assert (await w.client.get(f"{prefix}/{address}")).status_code == 200
            script = (await w.client.get(f"{prefix}/page/api.js")).text
            assert 'fetch("/' not in script
            assert (await w.client.get(f"{prefix}/v1/models")).status_code == 200
            reply = await w.post(f"{prefix}{CHAT}", messages=[{"role": "user", "content": "what?"}])
            assert (reply.status_code, w.records[-1].route) == (200, CHAT)
            hint = (await w.client.get(f"{prefix}/models")).json()["error"]["message"]
            assert "http://127.0.0.1:8000/tools/opsin/v1" in hint
            bare = await w.client.get("/tools/opsin", follow_redirects=False)
            assert (bare.status_code, bare.headers["location"]) == (307, "/tools/opsin/")

    run(work())


def test_a_models_card_tells_that_it_takes_images() -> None:
    async def work() -> None:
        async with world() as w:
            (card,) = (await w.client.get("/v1/models")).json()["data"]
            assert card["capabilities"] == ["completion", "multimodal"]
            assert card["architecture"]["input_modalities"] == ["text", "image"]

    run(work())


@pytest.mark.parametrize(
    "error", [RuntimeError("/secret/path"), ModelUnreadable("/secret/path"), EngineDied("died of /secret/path")]
)
def test_what_the_log_may_know_clients_do_not(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    async def work() -> None:
        async with world() as w:
            monkeypatch.setattr(Engine, "submit", fail)
            reply = await w.post(messages=QUESTION)
            assert reply.status_code in {500, 503}
            assert reply.json()["error"]["type"] == "server_error"
            assert "secret" not in reply.text
            assert "Traceback" not in reply.text
            assert w.records[-1].status == reply.status_code
            assert w.records[-1].refused == reply.json()["error"]["code"]

    run(work())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "\\ud800": 1}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
        json.dumps({"messages": QUESTION, "response_format": {"type": "json_object", "schema": {"a": "deep"}}})
        .replace('"deep"', "[" * 500 + "]" * 500)
        .encode(),
    ],
)
def test_broken_bodies_are_the_clients_fault(body: bytes) -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.client.post(CHAT, content=body, headers={"content-type": "application/json"})
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["message"].endswith(".")
            assert (await w.post(messages=QUESTION)).status_code == 200

    run(work())


def test_text_in_another_encoding_is_told_so() -> None:
    async def work() -> None:
        async with world() as w:
            body = '{"messages": [{"role": "user", "content": "un café"}]}'.encode("latin-1")
            reply = await w.client.post(CHAT, content=body, headers={"content-type": "application/json"})
            assert reply.status_code in {400, 415}
            assert "UTF-8" in reply.json()["error"]["message"]

    run(work())


def test_a_page_that_may_ask_may_send_the_headers_that_clients_send() -> None:
    names = ["http-referer", "x-title", "openai-organization", "openai-beta", "cache-control"]
    names += ["x-stainless-lang", "x-stainless-retry-count", "x-stainless-timeout"]

    async def work() -> None:
        async with world(cors_origins=("https://app.example",)) as w:
            asked = {
                "origin": "https://app.example",
                "access-control-request-method": "POST",
                "access-control-request-headers": ", ".join(names),
            }
            reply = await w.client.options(CHAT, headers=asked)
            assert reply.status_code == 200
            allowed = reply.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
            assert set(names) <= set(allowed)

    run(work())


def test_half_a_character_in_a_name_does_not_break_the_answer() -> None:
    async def work() -> None:
        async with world(strict_model=True) as w:
            body = b'{"messages": [{"role": "user", "content": "x"}], "model": "a\\ud800"}'
            reply = await w.client.post(CHAT, content=body, headers={"content-type": "application/json"})
            assert reply.status_code in {400, 404}

    run(work())


def test_the_openapi_document_tells_of_every_route_and_errors_shape() -> None:
    async def work() -> None:
        async with world() as w:
            document = (await w.client.get("/openapi.json")).json()
            assert {CHAT, "/v1/responses", "/v1/completions", "/v1/models", "/props", "/health", "/ready"} <= set(
                document["paths"]
            )
            content = document["components"]["schemas"]["MessageIn"]["properties"]["content"]
            assert {"type": "string"} in content["anyOf"]
            assert "422" not in json.dumps(document["paths"][CHAT]["post"]["responses"])

    run(work())
