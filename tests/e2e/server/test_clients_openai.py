"""The `openai` package against a running server, as its users use it."""

import base64
import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

openai = pytest.importorskip("openai", reason="the clients are tested where they are installed")
pytestmark = pytest.mark.slow

DEMO = Path(str(files("opsin.models"))) / "demo"
IMAGE = "data:image/png;base64," + base64.b64encode((DEMO / "shapes.png").read_bytes()).decode()
# One of the examples that the demo model is shipped with.
QUESTION, ANSWER = "What do you see at the top left?", "a small pink ring."
MESSAGES: Any = [
    {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": QUESTION}],
    }
]
COLOUR = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}


@pytest.fixture
def client(server: Any) -> Any:
    with openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_an_image_is_asked_about(client: Any) -> None:
    answer = client.chat.completions.create(model="any", messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.image_tokens == 36
    assert answer.stages["total_ms"] > 0
    assert answer.images[0]["width"] == 448


def test_an_answer_streams(client: Any) -> None:
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="any", messages=MESSAGES, temperature=0, stream=True, stream_options=options
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ANSWER
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 1
    assert chunks[-1].usage.completion_tokens > 0
    assert chunks[-2].timings["predicted_n"] == chunks[-1].usage.completion_tokens


def test_the_helper_for_streams_reads_it_too(client: Any) -> None:
    with client.chat.completions.stream(model="any", messages=MESSAGES, temperature=0) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_log_probabilities_and_choices(client: Any) -> None:
    answer = client.chat.completions.create(
        model="any", messages=MESSAGES, temperature=0, n=2, logprobs=True, top_logprobs=3
    )
    assert [choice.message.content.strip() for choice in answer.choices] == [ANSWER] * 2
    for choice in answer.choices:
        tokens = choice.logprobs.content
        assert bytes(byte for token in tokens for byte in token.bytes or ()).decode() == choice.message.content
        assert all(len(token.top_logprobs) == 3 for token in tokens)
        assert all(token.logprob <= 0 for token in tokens)


def test_a_schema_is_kept_to(client: Any) -> None:
    answer = client.chat.completions.create(
        model="any",
        messages=MESSAGES,
        response_format={"type": "json_schema", "json_schema": {"name": "colour", "schema": COLOUR, "strict": True}},
    )
    assert json.loads(answer.choices[0].message.content)["colour"] in {"red", "blue"}


def test_a_pydantic_model_comes_back(client: Any) -> None:
    from pydantic import BaseModel

    class Seen(BaseModel):
        round: bool

    answer = client.chat.completions.parse(model="any", messages=MESSAGES, response_format=Seen)
    assert isinstance(answer.choices[0].message.parsed, Seen)


TOOL: Any = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": COLOUR}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_tool_is_called(client: Any, choice: Any) -> None:
    asked = {"model": "any", "messages": MESSAGES, "tools": [TOOL], "tool_choice": choice, "max_tokens": 200}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in {"red", "blue"}
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in streamed if call.function.name] == ["paint"]
    arguments = "".join(call.function.arguments for call in streamed)
    assert json.loads(arguments)["colour"] in {"red", "blue"}


def test_responses(client: Any) -> None:
    asked: Any = [
        {
            "role": "user",
            "content": [{"type": "input_image", "image_url": IMAGE}, {"type": "input_text", "text": QUESTION}],
        }
    ]
    answer = client.responses.create(model="any", input=asked, temperature=0)
    assert (answer.output_text, answer.status) == (ANSWER, "completed")
    again = [*asked, *(item.model_dump(exclude_none=True) for item in answer.output), *asked]
    assert client.responses.create(model="any", input=again, temperature=0, max_output_tokens=5).status == "incomplete"
    events = list(client.responses.create(model="any", input=asked, temperature=0, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert events[-1].response.output_text == ANSWER
    with client.responses.stream(model="any", input=asked, temperature=0) as stream:
        assert stream.get_final_response().output_text == ANSWER


def test_completions(client: Any) -> None:
    answer = client.completions.create(model="any", prompt="a red", max_tokens=3, temperature=0)
    assert answer.choices[0].text
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model="any", prompt="a red", max_tokens=3, temperature=0, stream=True)
    )
    assert text == answer.choices[0].text


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_errors_are_the_clients_own(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="any", messages=[])
    assert caught.value.param == "messages"
    file: Any = [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}]
    with pytest.raises(openai.BadRequestError, match="file_data"):
        client.chat.completions.create(model="any", messages=file)
    broken: Any = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
    ]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="any", messages=broken)
    assert caught.value.code == "bad_image"


def test_a_client_that_stops_reading_frees_its_answer(client: Any, server: Any) -> None:
    asked = {
        "model": "any",
        "messages": MESSAGES,
        "max_tokens": 8000,
        "extra_body": {"ignore_eos": True, "guard": False},
    }
    with client.chat.completions.create(**asked, stream=True) as stream:
        next(iter(stream))
    # The next one finds the engine free: behind the whole answer it would wait for seconds.
    answer = client.chat.completions.create(model="any", messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == ANSWER
    end = time.monotonic() + 10
    while "opsin:num_requests_running 0.0" not in httpx.get(f"{server.base_url}/metrics").text:
        assert time.monotonic() < end, "an answer that nobody reads still runs"
