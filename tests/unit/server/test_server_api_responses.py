"""POST /v1/responses and /v1/completions on the fake backend."""

import json
from typing import Any

import pytest
from api_driver import PLAIN, WITH_TOOLS, data_url, events, run, world

pytestmark = pytest.mark.slow

RESPONSES, COMPLETIONS = "/v1/responses", "/v1/completions"
TOOL = {"type": "function", "name": "paint", "parameters": {"type": "object"}}
CALL = '{"name": "paint", "arguments": {"colour": "red"}}'


def test_a_whole_response() -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.post(RESPONSES, input="what is this?", instructions="Be brief.", metadata={"a": "b"})
            body = reply.json()
            assert reply.status_code == 200, body
            assert (body["object"], body["status"], body["store"], body["error"]) == (
                "response",
                "completed",
                True,
                None,
            )
            (item,) = body["output"]
            assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
            assert item["content"] == [
                {"type": "output_text", "text": "a red circle.", "annotations": [], "logprobs": []}
            ]
            assert body["usage"]["output_tokens"] == len("a red circle.")
            assert body["metadata"] == {"a": "b"}
            assert body["stages"]["total_ms"] > 0
            assert "server-timing" in reply.headers

    run(work())


def test_events_come_in_openais_order_and_agree_with_each_other() -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.post(RESPONSES, input="what is this?", stream=True)
            found = events(reply.text)
            kinds = [event["type"] for event in found]
            assert [event["sequence_number"] for event in found] == list(range(len(found)))
            assert reply.text.count("event: ") == len(found)
            deltas = kinds.count("response.output_text.delta")
            assert deltas > 1
            assert kinds == [
                "response.created",
                "response.in_progress",
                "response.output_item.added",
                "response.content_part.added",
                *["response.output_text.delta"] * deltas,
                "response.output_text.done",
                "response.content_part.done",
                "response.output_item.done",
                "response.completed",
            ]
            assert "".join(event.get("delta", "") for event in found) == "a red circle."
            last = found[-1]["response"]
            assert last["output"] == [found[-2]["item"]]
            assert last["stages"]["total_ms"] > 0
            assert len({event["item_id"] for event in found if "item_id" in event}) == 1

    run(work())


def test_thoughts_and_calls_are_items_of_their_own() -> None:
    template = "{# <think> #}" + WITH_TOOLS

    async def work() -> None:
        async with world(lambda _: f"<think>hm</think><tool_call>{CALL}</tool_call>", template=template) as w:
            body = (await w.post(RESPONSES, input="paint", tools=[TOOL])).json()
            assert [item["type"] for item in body["output"]] == ["reasoning", "function_call"]
            assert body["output"][0]["content"][0] == {"type": "reasoning_text", "text": "hm"}
            call = body["output"][1]
            assert (call["name"], json.loads(call["arguments"])) == ("paint", {"colour": "red"})
            found = events((await w.post(RESPONSES, input="paint", tools=[TOOL], stream=True)).text)
            kinds = [event["type"] for event in found]
            first = kinds.index("response.function_call_arguments.delta")
            assert kinds[first - 1] == "response.output_item.added"
            assert set(kinds[first:-3]) == {"response.function_call_arguments.delta"}
            pieces = [event["delta"] for event in found[first:-3]]
            assert len(pieces) > 1, "arguments come as they are written"
            assert "".join(pieces) == found[-3]["arguments"] == found[-2]["item"]["arguments"]
            assert kinds[-3:] == [
                "response.function_call_arguments.done",
                "response.output_item.done",
                "response.completed",
            ]
            assert kinds.index("response.reasoning_text.done") < kinds.index("response.function_call_arguments.delta")

    run(work())


def test_text_behind_a_call_is_an_item_behind_it() -> None:
    async def work() -> None:
        async with world(lambda _: f"<tool_call>{CALL}</tool_call> Done so.", template=WITH_TOOLS) as w:
            found = events((await w.post(RESPONSES, input="paint", tools=[TOOL], stream=True)).text)
            output = found[-1]["response"]["output"]
            assert [item["type"] for item in output] == ["function_call", "message"]
            assert output[1]["content"][0]["text"].strip() == "Done so."
            added = {
                event["item"]["id"]: event["output_index"]
                for event in found
                if "added" in event["type"] and "item" in event
            }
            done = {
                event["item"]["id"]: event["output_index"] for event in found if event["type"].endswith("item.done")
            }
            assert added == done == {item["id"]: index for index, item in enumerate(output)}
            whole = (await w.post(RESPONSES, input="paint", tools=[TOOL])).json()["output"]
            assert [item["type"] for item in whole] == ["function_call", "message"]

    run(work())


def test_a_conversation_is_sent_back_as_it_came() -> None:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return "a red circle."

    async def work() -> None:
        async with world(reply) as w:
            image = {"type": "input_image", "image_url": data_url(), "detail": "auto"}
            first = {"role": "user", "content": [{"type": "input_text", "text": "this?"}, image]}
            body = (await w.post(RESPONSES, input=[first])).json()
            assert body["images"][0]["width"] == 8
            more = [
                {"type": "function_call", "call_id": "1", "name": "paint", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "painted"},
                {"type": "reasoning", "id": "r", "summary": []},
                {"type": "message", "role": "user", "content": "and now?"},
            ]
            body = (await w.post(RESPONSES, input=[first, *body["output"], *more])).json()
            assert body["status"] == "completed", body
            assert prompts[-1].startswith("user: this?<")
            # The template shows no calls: they are told as text, and in the order in which they came.
            assert 'assistant: a red circle.\n{"name": "paint", "arguments": {}}\nuser: Result of' in prompts[-1]
            assert prompts[-1].endswith("painted\nand now?\n\x1e")

    run(work())


def test_a_response_that_was_cut_is_incomplete() -> None:
    async def work() -> None:
        async with world() as w:
            body = (await w.post(RESPONSES, input="?", max_output_tokens=3)).json()
            assert body["status"] == "incomplete"
            assert body["incomplete_details"] == {"reason": "max_output_tokens"}
            assert body["output"][0]["status"] == "incomplete"
            found = events((await w.post(RESPONSES, input="?", max_output_tokens=3, stream=True)).text)
            assert found[-1]["type"] == "response.incomplete"

    run(work())


@pytest.mark.parametrize("wanted", [{"type": "json_schema", "name": "a", "schema": {"type": "array"}}])
def test_a_format_becomes_a_schema(wanted: Any) -> None:
    async def work() -> None:
        async with world() as w:
            body = (await w.post(RESPONSES, input="?", text={"format": wanted})).json()
            assert json.loads(w.backend.drawn_with[-1].json_schema or "") == {"type": "array"}
            assert body["text"]["format"]["schema"] == {"type": "array"}

    run(work())


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the conversation whole"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id", "send the conversation whole"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"background": True}, "background", "False"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"type": "computer_call"}]}, "input", "no message"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "input[0].content[0]",
            "file_data",
        ),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "no message"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice", "no functions"),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]},
            "input[0].arguments",
            "JSON",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least"),
    ],
)
def test_what_a_response_cannot_do_is_refused_by_name(body: Any, param: str, word: str) -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.post(RESPONSES, **{"input": "?", **body})
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (400, param), error
            assert word in error["message"]

    run(work())


def test_completions_take_the_text_as_it_is() -> None:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return "a red circle."

    async def work() -> None:
        async with world(reply, template=PLAIN) as w:
            body = (await w.post(COMPLETIONS, prompt=["one\x1e", "two\x1e"], n=2, logprobs=1)).json()
            assert body["object"] == "text_completion"
            assert [choice["text"] for choice in body["choices"]] == ["a red circle."] * 4
            assert {prompt for prompt in prompts if prompt.startswith(("one", "two"))} == {"one\x1e", "two\x1e"}
            told = body["choices"][0]["logprobs"]
            assert told["tokens"][:3] == ["a", " ", "r"]
            assert told["text_offset"][:3] == [0, 1, 2]
            assert told["top_logprobs"][0] == {"a": 0.0}
            assert body["usage"]["prompt_tokens"] >= 16
            *chunks, done = await w.stream(COMPLETIONS, prompt="one\x1e", stream_options={"include_usage": True})
            assert done == "[DONE]"
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "a red circle."
            assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
            assert chunks[-2]["stages"]["total_ms"] > 0
            assert chunks[-1]["usage"]["completion_tokens"] == len("a red circle.")

    run(work())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [[1, 2]]}, "prompt[0]"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": ["a"] * 5, "n": 2}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_what_a_completion_cannot_do_is_refused_by_name(body: Any, param: str) -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.post(COMPLETIONS, **body)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text

    run(work())
