"""Clients that send an answer back whole, with all that they keep in it, and go on from there."""

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pytest

openai = pytest.importorskip("openai", reason="the clients are tested where they are installed")
from pydantic import BaseModel  # noqa: E402 - behind the question whether there are clients

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("leftovers")]

DEMO = Path(str(files("opsin.models"))) / "demo"
IMAGE = "data:image/png;base64," + base64.b64encode((DEMO / "shapes.png").read_bytes()).decode()
QUESTION, ANSWER = "What do you see at the top left?", "a small pink ring."
ASKED: Any = {
    "role": "user",
    "content": [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": QUESTION}],
}
AGAIN: Any = {"role": "user", "content": QUESTION}
PARAMETERS = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
PAINT: Any = {"type": "function", "function": {"name": "paint", "parameters": PARAMETERS, "strict": True}}


class Seen(BaseModel):
    """What a schema asks for."""

    colour: Literal["red", "blue"]


@pytest.fixture
def client(server: Any) -> Any:
    with openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def forms(message: Any) -> list[Any]:
    """A message as users put it into the next request."""
    return [message, message.model_dump(), message.model_dump(exclude_none=True), json.loads(message.model_dump_json())]


def test_openai_chat(client: Any) -> None:
    first = client.chat.completions.create(model="any", messages=[ASKED], temperature=0)
    for message in forms(first.choices[0].message):
        second = client.chat.completions.create(model="any", messages=[ASKED, message, AGAIN], temperature=0)
        assert second.choices[0].message.content
        assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_openai_parse_and_stream_helpers(client: Any) -> None:
    parsed = client.chat.completions.parse(
        model="any", messages=[ASKED], response_format=Seen, temperature=0, max_tokens=80
    )
    assert parsed.choices[0].message.parsed.colour in {"red", "blue"}
    with client.chat.completions.stream(
        model="any", messages=[ASKED], response_format=Seen, temperature=0, max_tokens=80
    ) as stream:
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.parsed.colour in {"red", "blue"}
    for message in [*forms(parsed.choices[0].message), *forms(streamed.choices[0].message)]:
        again = client.chat.completions.create(model="any", messages=[ASKED, message, AGAIN], temperature=0)
        assert again.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_openai_calls_and_their_results(client: Any, choice: Any) -> None:
    options: Any = {"model": "any", "messages": [ASKED], "tools": [PAINT], "tool_choice": choice, "temperature": 0}
    with client.chat.completions.stream(**options, max_tokens=80) as stream:
        events = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion()
    assert len(events) > 1, "arguments come as they are written"
    message = final.choices[0].message
    (call,) = message.tool_calls
    assert call.function.parsed_arguments["colour"] in {"red", "blue"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "painted"}
    for sent in forms(message):
        done = client.chat.completions.create(
            model="any", messages=[ASKED, sent, result], tools=[PAINT], temperature=0, max_tokens=30
        )
        assert done.choices[0].finish_reason in {"stop", "length", "tool_calls"}


def test_openai_offers_tools(client: Any) -> None:
    """The demo model's template knows no tools: an agent's first request, with the choice left open, is answered."""
    tools = [PAINT, {"type": "web_search"}]
    answer = client.chat.completions.create(model="any", messages=[ASKED], tools=tools, temperature=0, max_tokens=60)
    assert answer.choices[0].finish_reason in {"stop", "length", "tool_calls"}
    raw = client.chat.completions.with_raw_response.create(model="any", messages=[ASKED], user="me", temperature=0)
    assert raw.headers["opsin-ignored"] == "user"


def test_openai_responses(client: Any) -> None:
    content = [{"type": "input_image", "image_url": IMAGE}, {"type": "input_text", "text": QUESTION}]
    asked: Any = {"role": "user", "content": content}
    first = client.responses.create(
        model="any",
        input=[asked],
        temperature=0,
        include=["reasoning.encrypted_content"],
        truncation="auto",
        text={"verbosity": "low"},
        top_logprobs=0,
    )
    assert first.output_text == ANSWER
    second = client.responses.create(model="any", input=QUESTION, previous_response_id=first.id, temperature=0)
    assert second.output_text
    assert second.usage.input_tokens > first.usage.input_tokens
    for item in forms(first.output[0]):
        again = client.responses.create(model="any", input=[asked, item, AGAIN], temperature=0)
        assert again.output_text == second.output_text
    parsed = client.responses.parse(model="any", input=[asked], text_format=Seen, temperature=0, max_output_tokens=80)
    assert parsed.output_parsed.colour in {"red", "blue"}
    again = client.responses.create(model="any", input=[asked, *parsed.output, AGAIN], temperature=0)
    assert again.output_text


def test_openai_responses_calls(client: Any) -> None:
    tool: Any = {"type": "function", "name": "paint", "parameters": PARAMETERS, "strict": True}
    options: Any = {"model": "any", "tools": [tool], "temperature": 0, "max_output_tokens": 80}
    with client.responses.stream(input="Paint.", tool_choice="required", **options) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    (call,) = final.output
    assert len(pieces) > 1
    assert "".join(pieces) == call.arguments
    assert json.loads(call.arguments)["colour"] in {"red", "blue"}
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "painted"}
    for sent in ([{"role": "user", "content": "Paint."}, *final.output, result], [result]):
        more = {"previous_response_id": final.id} if len(sent) == 1 else {}
        assert client.responses.create(input=sent, **options, **more).status in {"completed", "incomplete"}


def test_langchain(server: Any) -> None:
    langchain_openai = pytest.importorskip("langchain_openai", reason="tested where it is installed")
    from langchain_core.messages import HumanMessage, ToolMessage

    def paint(colour: Literal["red", "blue"]) -> str:
        """Paint in a colour."""
        return colour

    asked = HumanMessage(content=ASKED["content"])
    for responses in (False, True):
        chat = langchain_openai.ChatOpenAI(
            base_url=server.v1, api_key="none", model="any", temperature=0, max_retries=0, use_responses_api=responses
        )
        first = chat.invoke([asked])
        assert first.text == ANSWER
        assert chat.invoke([asked, first, HumanMessage(content=QUESTION)]).text
        assert chat.with_structured_output(Seen).bind(max_tokens=80).invoke([asked]).colour in {"red", "blue"}
        called = chat.bind_tools([paint], tool_choice="any").bind(max_tokens=80).invoke([asked])
        (call,) = called.tool_calls
        result = ToolMessage("painted", tool_call_id=call["id"])
        assert chat.bind_tools([paint]).bind(max_tokens=30).invoke([asked, called, result]) is not None


def test_litellm(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm", reason="tested where it is installed")
    options: Any = {"model": "openai/any", "api_base": server.v1, "api_key": "none", "temperature": 0, "max_tokens": 80}
    first = litellm.completion(messages=[ASKED], **options)
    assert first.choices[0].message.content == ANSWER
    for message in (first.choices[0].message, first.choices[0].message.model_dump()):
        assert litellm.completion(messages=[ASKED, message, AGAIN], **options).choices[0].message.content


def test_litellm_calls(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm", reason="tested where it is installed")
    pytest.importorskip("mcp", reason="LiteLLM imports it for tools")
    options: Any = {"model": "openai/any", "api_base": server.v1, "api_key": "none", "temperature": 0, "max_tokens": 80}
    called = litellm.completion(messages=[ASKED], tools=[PAINT], tool_choice="required", **options).choices[0].message
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "painted"}
    assert litellm.completion(messages=[ASKED, called, result], tools=[PAINT], **options).choices


def test_huggingface_hub(server: Any) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="tested where it is installed")
    client = hub.InferenceClient(base_url=server.v1, api_key="none", timeout=60)
    first = client.chat_completion([ASKED], temperature=0, max_tokens=60)
    assert first.choices[0].message.content == ANSWER
    for message in (first.choices[0].message, dict(first.choices[0].message)):
        assert client.chat_completion([ASKED, message, AGAIN], temperature=0, max_tokens=60).choices[0].message.content
    text = "".join(
        piece.choices[0].delta.content or ""
        for piece in client.chat_completion([ASKED], temperature=0, max_tokens=60, stream=True)
        if piece.choices
    )
    assert text == ANSWER
    schema = {"type": "json", "value": PARAMETERS}
    for wanted in (schema, {"type": "json_schema", "json_schema": {"name": "seen", "schema": PARAMETERS}}):
        made = client.chat_completion([ASKED], response_format=wanted, temperature=0, max_tokens=80)
        assert json.loads(made.choices[0].message.content)["colour"] in {"red", "blue"}
    offered = client.chat_completion([ASKED], tools=[PAINT], tool_choice="auto", temperature=0, max_tokens=60)
    assert offered.choices[0].finish_reason in {"stop", "length", "tool_calls"}
    for choice in ("required", {"function": {"name": "paint"}, "type": "function"}):
        options: Any = {"tools": [PAINT], "tool_choice": choice, "temperature": 0, "max_tokens": 80}
        called = client.chat_completion([ASKED], **options)
        (call,) = called.choices[0].message.tool_calls
        pieces = [
            piece.choices[0].delta.tool_calls[0].function.arguments
            for piece in client.chat_completion([ASKED], **options, stream=True)
            if piece.choices and piece.choices[0].delta.tool_calls
        ]
        assert "".join(pieces) == call.function.arguments
        assert len(pieces) > 2, "arguments come as they are written"
        result = {"role": "tool", "tool_call_id": call.id, "content": "painted"}
        for sent in (called.choices[0].message, dict(called.choices[0].message)):
            again = client.chat_completion([ASKED, sent, result], tools=[PAINT], temperature=0, max_tokens=30)
            assert again.choices
