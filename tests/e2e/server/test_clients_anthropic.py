"""The `anthropic` package against a running server, as its users and Claude-style agents use it."""

import asyncio
import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from conftest import Server, start_server

anthropic = pytest.importorskip("anthropic", reason="the clients are tested where they are installed")
pytestmark = pytest.mark.slow

DEMO = Path(str(files("opsin.models"))) / "demo"
DATA = base64.b64encode((DEMO / "shapes.png").read_bytes()).decode()
IMAGE: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}
# One of the examples that the demo model is shipped with.
QUESTION, ANSWER = "What do you see at the top left?", "a small pink ring."
MESSAGES: Any = [{"role": "user", "content": [IMAGE, {"type": "text", "text": QUESTION}]}]
COLOUR: Any = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
PAINT: Any = {"name": "paint", "description": "Paints.", "input_schema": COLOUR}
ASKED: Any = {"model": "claude-sonnet", "max_tokens": 200, "messages": MESSAGES, "extra_body": {"temperature": 0}}


@pytest.fixture
def client(server: Server) -> Any:
    with anthropic.Anthropic(base_url=server.base_url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def prompt_tokens(usage: Any) -> int:
    """All tokens of the prompt."""
    return int(usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens)


def test_an_image_is_asked_about(client: Any) -> None:
    answer = client.messages.create(**ASKED)
    assert answer.content[0].text == ANSWER
    assert (answer.stop_reason, answer.role, answer.type) == ("end_turn", "assistant", "message")
    assert answer.images[0]["tokens"] == 36
    assert answer._request_id
    assert client.messages.create(**ASKED).usage.cache_read_input_tokens > 0


def test_an_answer_streams(client: Any) -> None:
    kinds = [event.type for event in client.messages.create(**ASKED, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds.count("content_block_delta") > 1
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    with client.messages.stream(**ASKED) as stream:
        assert "".join(stream.text_stream) == ANSWER
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == (ANSWER, "end_turn")
    assert prompt_tokens(final.usage) == client.messages.count_tokens(model="any", messages=MESSAGES).input_tokens


def test_the_client_for_event_loops(server: Server) -> None:
    async def work() -> None:
        async with anthropic.AsyncAnthropic(base_url=server.base_url, auth_token="none", timeout=60) as client:
            one, two = await asyncio.gather(client.messages.create(**ASKED), client.messages.create(**ASKED))
            assert one.content[0].text == two.content[0].text == ANSWER
            async with client.messages.stream(**ASKED) as stream:
                assert "".join([text async for text in stream.text_stream]) == ANSWER
                assert (await stream.get_final_message()).usage.output_tokens > 0
            counted = await client.messages.count_tokens(model="any", messages=MESSAGES)
            assert counted.input_tokens == prompt_tokens(one.usage)

    asyncio.run(work())


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "paint"}])
def test_a_tool_is_called_and_its_result_sent_back(client: Any, choice: Any) -> None:
    asked = {**ASKED, "tools": [PAINT], "tool_choice": choice}
    answer = client.messages.create(**asked)
    (call,) = answer.content
    assert (call.type, call.name, answer.stop_reason) == ("tool_use", "paint", "tool_use")
    assert call.input["colour"] in {"red", "blue"}
    with client.messages.stream(**asked) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(pieces)) == final.content[0].input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "see:"}, IMAGE]}
    turns = [
        {"role": "user", "content": "Paint."},
        answer.to_param() if hasattr(answer, "to_param") else {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result, {"type": "text", "text": QUESTION}]},
    ]
    system = [{"type": "text", "text": one, "cache_control": {"type": "ephemeral"}} for one in ("Be an agent.", "Go.")]
    after = client.messages.create(**{**asked, "messages": turns, "system": system, "tool_choice": {"type": "auto"}})
    assert after.stop_reason == "end_turn"
    assert after.images[0]["tokens"] == 36


COUNTED: list[Any] = [
    {"messages": [{"role": "user", "content": "What is a ring?"}]},
    {"messages": MESSAGES, "system": "Be brief."},
    {"messages": [{"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": QUESTION}]}]},
    {"messages": MESSAGES, "tools": [PAINT]},
]


@pytest.mark.parametrize("body", COUNTED)
def test_a_count_is_what_the_answer_costs(client: Any, body: Any) -> None:
    counted = client.messages.count_tokens(model="any", **body).input_tokens
    assert counted == prompt_tokens(client.messages.create(**{**ASKED, **body, "max_tokens": 1}).usage)


def test_stop_sequences_formats_and_betas(client: Any) -> None:
    answer = client.messages.create(**ASKED, stop_sequences=["pink"])
    assert (answer.stop_reason, answer.stop_sequence, answer.content[0].text) == ("stop_sequence", "pink", "a small ")
    assert client.messages.create(**{**ASKED, "max_tokens": 2}).stop_reason == "max_tokens"
    config = {"format": {"type": "json_schema", "schema": COLOUR}}
    answer = client.beta.messages.create(**ASKED, output_config=config, betas=["some-beta-2026-01-01"])
    assert json.loads(answer.content[0].text)["colour"] in {"red", "blue"}
    begun = [*MESSAGES, {"role": "assistant", "content": "a small"}]
    assert client.messages.create(**{**ASKED, "messages": begun}).content[0].text == " pink ring."


def test_a_pydantic_model_comes_back(client: Any) -> None:
    from pydantic import BaseModel

    class Seen(BaseModel):
        round: bool

    answer = client.messages.parse(**ASKED, output_format=Seen)
    assert isinstance(answer.parsed_output, Seen)


def test_errors_are_the_clients_own(client: Any, server: Server) -> None:
    with pytest.raises(anthropic.BadRequestError, match="messages") as caught:
        client.messages.create(**{**ASKED, "messages": []})
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert caught.value.request_id == caught.value.body["request_id"]
    broken = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**{**ASKED, "messages": [{"role": "user", "content": [broken]}]})
    with pytest.raises(anthropic.NotFoundError, match="base URL"):
        client.with_options(base_url=server.v1).messages.create(**ASKED)
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("claude-sonnet")
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).display_name == model.id
    with pytest.raises(anthropic.APITimeoutError):
        client.with_options(timeout=0.05).messages.create(
            **{**ASKED, "max_tokens": 8000, "extra_body": {"ignore_eos": True, "guard": False}}
        )


def test_keys_and_models_are_checked(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    server = start_server(
        tmp_path / "home", "--api-key-file", str(tmp_path / "keys"), "--strict-model", "--requests-per-minute", "3"
    )
    try:
        with anthropic.Anthropic(base_url=server.base_url, api_key="wrong", max_retries=0, timeout=60) as client:
            with pytest.raises(anthropic.AuthenticationError):
                client.messages.create(**ASKED)
            known = client.with_options(api_key="secret")
            with pytest.raises(anthropic.NotFoundError, match="claude-sonnet"):
                known.messages.create(**ASKED)
            name = known.models.list().data[0].id
            for _ in range(2):
                assert known.messages.create(**{**ASKED, "model": name}).content[0].text == ANSWER
            with pytest.raises(anthropic.RateLimitError) as caught:
                known.messages.create(**{**ASKED, "model": name})
            assert int(caught.value.response.headers["retry-after"]) > 0
    finally:
        assert server.stop() == 0
