"""POST /v1/messages and the counts of tokens on the fake backend."""

import asyncio
import json
import re
from typing import Any

import pytest
from api_driver import CHAT, PLAIN, QUESTION, WITH_TOOLS, Caller, Gate, data_url, run, until, world

from opsin.core.errors import EngineDied, QueueFull
from opsin.server import handler
from opsin.testing.fake_backend import TURN_TEXT

pytestmark = pytest.mark.slow

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
THINKS = "{# <think> #}" + WITH_TOOLS
PARAMETERS = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}
PAINT = {"name": "paint", "description": "Paints.", "input_schema": PARAMETERS, "cache_control": {"type": "ephemeral"}}
CALL = '{"name": "paint", "arguments": {"colour": "red"}}'
ASKED: dict[str, Any] = {"model": "claude", "max_tokens": 200, "messages": QUESTION}


def image(colour: str = "red") -> dict[str, Any]:
    """An image block with the bytes of a file."""
    data = data_url(colour).partition(",")[2]
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def frames(text: str) -> list[dict[str, Any]]:
    """The events of a stream; each has its own type as its name."""
    found = re.findall(r"^event: (\w+)\ndata: (.*)$", text, re.MULTILINE)
    assert all(json.loads(data)["type"] == name for name, data in found)
    return [json.loads(data) for _, data in found]


def told(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content blocks that a stream's events make."""
    blocks: list[dict[str, Any]] = []
    closed = 0
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks) == closed
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            kind = delta.pop("type")
            assert event["index"] == closed
            ((key, piece),) = delta.items()
            if kind == "input_json_delta":
                block["json"] = block.get("json", "") + piece
            else:
                block[key] += piece
        elif event["type"] == "content_block_stop":
            assert event["index"] == closed
            closed += 1
    assert closed == len(blocks)
    return [{**block, "input": json.loads(block.pop("json") or "{}")} if "json" in block else block for block in blocks]


def test_a_whole_message() -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.post(MESSAGES, **ASKED, system="Be brief.")
            body = reply.json()
            assert reply.status_code == 200, body
            assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "fake")
            assert body["id"].startswith("msg_")
            assert body["content"] == [{"type": "text", "text": "a red circle."}]
            assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
            assert body["usage"]["output_tokens"] == len("a red circle.")
            assert body["stages"]["total_ms"] > 0
            assert reply.headers["request-id"] == reply.headers["x-request-id"]
            again = (await w.post(MESSAGES, **ASKED, system="Be brief.")).json()["usage"]
            assert again["cache_read_input_tokens"] > 0
            whole = {"input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"}
            assert sum(again[name] for name in whole) == sum(body["usage"][name] for name in whole)

    run(work())


def test_a_streams_events_come_in_anthropics_order() -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.post(f"{MESSAGES}?beta=true", **ASKED, stream=True)
            events = frames(reply.text)
            kinds = [event["type"] for event in events]
            deltas = kinds.count("content_block_delta")
            assert deltas > 1
            assert kinds == [
                "message_start",
                "ping",
                "content_block_start",
                *["content_block_delta"] * deltas,
                "content_block_stop",
                "message_delta",
                "message_stop",
            ]
            assert events[0]["message"]["content"] == []
            assert told(events) == [{"type": "text", "text": "a red circle."}]
            assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
            whole = (await w.post(MESSAGES, **ASKED)).json()
            assert events[-2]["usage"].keys() == whole["usage"].keys()
            assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]

    run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_text_and_parallel_calls_are_blocks(stream: bool) -> None:
    answer = f"<think>hm</think>Let me.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n"

    async def work() -> None:
        async with world(lambda _: answer, template=THINKS) as w:
            for one_call in (False, True):
                choice = {"type": "auto", "disable_parallel_tool_use": one_call}
                reply = await w.post(MESSAGES, **ASKED, tools=[PAINT], tool_choice=choice, stream=stream)
                if stream:
                    events = frames(reply.text)
                    blocks, reason = told(events), events[-2]["delta"]["stop_reason"]
                else:
                    blocks, reason = reply.json()["content"], reply.json()["stop_reason"]
                thought, text, *calls = blocks
                assert thought["thinking"] == "hm"
                assert thought["signature"]
                assert text == {"type": "text", "text": "Let me.\n"}
                assert reason == "tool_use"
                assert len(calls) == (1 if one_call else 2)
                assert {call["type"] for call in calls} == {"tool_use"}
                assert [call["input"] for call in calls] == [{"colour": "red"}] * len(calls)
                assert len({call["id"] for call in calls}) == len(calls)

    run(work())


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "paint"}])
@pytest.mark.parametrize("template", [PLAIN, WITH_TOOLS])
def test_a_forced_tool_is_a_schema_for_the_answer(choice: dict[str, str], template: str) -> None:
    async def work() -> None:
        async with world(lambda _: CALL, template=template) as w:
            body = (await w.post(MESSAGES, **ASKED, tools=[PAINT], tool_choice=choice)).json()
            assert json.loads(w.backend.drawn_with[-1].json_schema or "")["properties"]["name"] == {"const": "paint"}
            ((block,), reason) = body["content"], body["stop_reason"]
            assert (block["name"], block["input"], reason) == ("paint", {"colour": "red"}, "tool_use")
            cut = {**ASKED, "max_tokens": len(CALL) - 8}
            body = (await w.post(MESSAGES, **cut, tools=[PAINT], tool_choice=choice)).json()
            assert (body["content"][0]["input"], body["stop_reason"]) == ({}, "max_tokens")

    run(work())


def test_why_an_answer_ended() -> None:
    async def work() -> None:
        async with world() as w:
            body = (await w.post(MESSAGES, **ASKED, stop_sequences=["cir", "zzz"])).json()
            assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "cir")
            assert body["content"] == [{"type": "text", "text": "a red "}]
            body = (await w.post(MESSAGES, **{**ASKED, "max_tokens": 3})).json()
            assert (body["stop_reason"], body["stop_sequence"]) == ("max_tokens", None)
        async with world(lambda _: "abcdefgh" * 200) as w:
            body = (await w.post(MESSAGES, **{**ASKED, "max_tokens": 9000}, guard=False)).json()
            assert body["stop_reason"] == "model_context_window_exceeded"

    run(work())


def test_an_agents_conversation_reaches_the_model() -> None:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return "done."

    call = {"type": "tool_use", "id": "toolu_1", "name": "paint", "input": {"colour": "red"}, "caller": None}
    other = {**call, "id": "toolu_2"}
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=abc;"},
        {"type": "text", "text": "Be an agent.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be brief."},
    ]
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    messages = [
        {"role": "user", "content": [image(), {"type": "text", "text": "paint"}]},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "Yes."}, call, other]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "so"}, image()]},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no brush", "is_error": True},
                {"type": "text", "text": "and now?"},
            ],
        },
        {
            "role": "assistant",
            "content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "Well"}],
        },
    ]

    async def work() -> None:
        tooled = (
            "{% for m in messages %}{{ m.role }}[{{ m.name }}]: {{ m.content }}"
            "{{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}{{ tools | length if tools }}" + TURN_TEXT
        )
        async with world(reply, template=tooled) as w:
            body = {**ASKED, "system": system, "messages": messages, "tools": [PAINT], "stream": False}
            answer = await w.post(
                MESSAGES, **body, headers={"anthropic-beta": "a,b", "anthropic-version": "2023-06-01"}
            )
            assert answer.status_code == 200, answer.text
            said = prompts[-1]
            assert "billing" not in said
            assert re.search("Be an agent.\nBe brief.", said)
            assert said.index("Yes.") < said.index('"arguments": {"colour": "red"}') < said.index("tool[paint]: so")
            assert "tool[paint]: Error:\nno brush" in said
            assert said.index("no brush") < said.index("user[]: and now?")
            assert answer.json()["content"] == [{"type": "text", "text": "."}], (
                "it continues the assistant's last message"
            )
            assert said.count("<") == 2 * w.backend.image_tokens
            assert "text':" not in said
            assert len(answer.json()["images"]) == 2

    run(work())


def test_what_cannot_be_done_is_refused_by_name_or_ignored_and_named() -> None:
    async def work() -> None:
        async with world() as w:

            async def refused(path: str = MESSAGES, **body: Any) -> str:
                reply = await w.post(path, **{**ASKED, **body})
                error = reply.json()
                assert reply.status_code == 400, error
                assert error["type"] == "error"
                assert error["error"]["type"] == "invalid_request_error"
                assert error["request_id"] == reply.headers["request-id"]
                return str(error["error"]["message"])

            def asked(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
                return [{"role": "user", "content": [*blocks]}]

            file = {"type": "image", "source": {"type": "file", "file_id": "x"}}
            assert "messages[0].content[0].source.type" in await refused(messages=asked(file))
            document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}
            assert "messages[0].content[0].source.type" in await refused(messages=asked(document))
            broken = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
            await refused(messages=asked(broken))
            web = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}
            assert "--fetch-images" in await refused(messages=asked(web))
            assert "'stop'" in await refused(stop=["a"])
            assert "output_config" in await refused(output_format={"type": "json_schema", "schema": {}})
            assert "tools[0]" in await refused(tools=[{"type": "custom", "name": "x"}])
            assert "messages" in await refused(COUNT, messages=[])
            assert "tool_choice" in await refused(tools=[PAINT], tool_choice={"type": "tool", "name": "x"})
            search = {"type": "web_search_20250305", "name": "web_search"}
            reply = await w.post(
                MESSAGES,
                **ASKED,
                tools=[search],
                metadata={"user_id": "me"},
                thinking={"type": "enabled", "budget_tokens": 1024},
                output_config={"effort": "low"},
            )
            assert reply.status_code == 200, reply.text
            named = set(reply.headers["opsin-ignored"].split(", "))
            assert named == {"tools[0].name", "tools[0].type", "metadata", "thinking", "output_config.effort"}
        async with world(strict_fields=True) as w:
            assert "'thinking'" in await refused(thinking={"type": "enabled", "budget_tokens": 1024})
            assert (await w.post(MESSAGES, **ASKED, tools=[PAINT])).status_code == 200

    run(work())


@pytest.mark.parametrize(
    ("thinking", "wanted"),
    [
        ({"type": "enabled", "budget_tokens": 7}, (True, 7)),
        ({"type": "disabled"}, (False, None)),
        ({"type": "adaptive"}, (None, None)),
        (None, (None, None)),
    ],
)
def test_thinking_as_anthropic_says_it(thinking: Any, wanted: tuple[bool | None, int | None]) -> None:
    async def work() -> None:
        async with world(template=THINKS) as w:
            assert (await w.post(MESSAGES, **ASKED, thinking=thinking)).status_code == 200
            drawn = w.backend.drawn_with[-1]
            assert (drawn.thinking, drawn.max_thinking_tokens) == wanted

    run(work())


def test_a_format_holds_the_answer() -> None:
    async def work() -> None:
        async with world() as w:
            config = {"format": {"type": "json_schema", "schema": PARAMETERS}}
            assert (await w.post(MESSAGES, **ASKED, output_config=config)).status_code == 200
            assert json.loads(w.backend.drawn_with[-1].json_schema or "") == PARAMETERS

    run(work())


def test_errors_of_every_kind_have_anthropics_shape() -> None:
    async def work() -> None:
        async with world(keys=("secret",), strict_model=True, concurrent_requests=1, max_body_bytes=4096) as w:
            key = {"x-api-key": "secret"}

            async def kind(status: int, path: str = MESSAGES, headers: Any = None, **body: Any) -> str:
                reply = await w.post(path, headers=headers, **body)
                assert reply.status_code == status, reply.text
                assert set(reply.json()) == {"type", "error", "request_id"}
                return str(reply.json()["error"]["type"])

            assert await kind(401) == "authentication_error"
            assert await kind(401, COUNT) == "authentication_error"
            assert await kind(404, f"{MESSAGES}/batches", key) == "not_found_error"
            assert await kind(404, MESSAGES, key, **ASKED) == "not_found_error"  # the model
            assert await kind(413, MESSAGES, key, system="x" * 5000) == "request_too_large"
            assert await kind(403, MESSAGES, {**key, "origin": "https://else"}) == "permission_error"
            assert await kind(404, "/v1/nothing", {**key, "anthropic-version": "2023-06-01"}) == "not_found_error"
            asked = {**ASKED, "model": "fake"}
            w.engine.stopped = EngineDied("x")
            assert await kind(503, MESSAGES, key, **asked) == "overloaded_error"
            assert await kind(503, COUNT, key, **asked) == "overloaded_error"
            w.engine.stopped = QueueFull("x")
            assert await kind(429, MESSAGES, key, **asked) == "rate_limit_error"
            w.engine.stopped = None
            reply = await w.client.get(MESSAGES, headers=key)
            assert (reply.status_code, reply.json()["type"]) == (405, "error")
            assert (await w.post(MESSAGES, headers=key, **asked)).status_code == 200
            reply = await w.post(f"/v1{MESSAGES}", headers=key)
            assert "http://127.0.0.1:8000," in reply.json()["error"]["message"], "without /v1"
            assert "param" in (await w.post(CHAT)).json()["error"], "the other APIs keep their shape"

    run(work())


def test_an_error_in_the_middle_of_a_stream_is_an_event() -> None:
    async def work() -> None:
        gate = Gate()
        async with world(gate) as w:
            asking = asyncio.ensure_future(w.post(MESSAGES, **ASKED, stream=True))
            await until(lambda: gate.steps > 4)
            w.backend.fail_decode = RuntimeError("no")
            gate.open.set()
            events = frames((await asking).text)
            assert events[0]["type"] == "message_start"
            assert events[-1]["error"]["type"] == "api_error"

    run(work())


def test_pings_keep_the_connection_alive_until_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "KEEP_ALIVE_SECONDS", 0.02)
    gate = Gate("done", stop_at=0)

    async def work() -> None:
        async with world(gate) as w:
            caller = Caller(w.app, {**ASKED, "stream": True}, MESSAGES)
            await until(lambda: caller.text.count("event: ping") >= 4)
            gate.open.set()
            await caller.task
            assert frames(caller.text)[0]["type"] == "message_start"
            assert told(frames(caller.text)) == [{"type": "text", "text": "done"}]

    run(work())


BODIES: list[dict[str, Any]] = [
    {},
    {"system": "Be brief.", "tools": [PAINT]},
    {"messages": [{"role": "user", "content": [image(), {"type": "text", "text": "this?"}]}]},
    {"messages": [{"role": "user", "content": [image(), image("blue"), {"type": "text", "text": "these?"}]}]},
]


@pytest.mark.parametrize("body", BODIES)
def test_a_count_is_what_the_answer_costs_and_encodes_nothing(body: dict[str, Any]) -> None:
    async def work() -> None:
        async with world(template=WITH_TOOLS) as w:
            counted = (await w.post(COUNT, **{**ASKED, **body})).json()["input_tokens"]
            assert w.backend.encoded == []
            assert w.backend.open_handles == 0
            assert w.records[-1].route == COUNT
            usage = (await w.post(MESSAGES, **{**ASKED, **body})).json()["usage"]
            assert counted == sum(usage[name] for name in usage if name != "output_tokens")

    run(work())


def test_the_other_apis_count_too() -> None:
    async def work() -> None:
        async with world() as w:
            part = {"type": "image_url", "image_url": {"url": data_url()}}
            chat = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "this?"}]}], "n": 2}
            counted = (await w.post(f"{CHAT}/input_tokens", **chat)).json()
            assert counted["input_tokens"] == (await w.chat(**chat))["usage"]["prompt_tokens"]
            assert (await w.post(f"{CHAT}/input_tokens", messages=[])).json()["error"]["param"] == "messages"
            counted = (await w.post("/v1/responses/input_tokens", input="what?", instructions="Be brief.")).json()
            asked = (await w.post("/v1/responses", input="what?", instructions="Be brief.")).json()
            assert counted == {"object": "response.input_tokens", "input_tokens": asked["usage"]["input_tokens"]}

    run(work())


def test_a_count_waits_for_no_answer() -> None:
    async def work() -> None:
        gate = Gate()
        async with world(gate, parallel=1, max_queue=3) as w:
            asking = [asyncio.ensure_future(w.post(MESSAGES, **ASKED, guard=False)) for _ in range(3)]
            await until(lambda: gate.steps > 4)
            assert (await w.post(COUNT, **{**ASKED, **BODIES[2]})).status_code == 200
            assert not any(task.done() for task in asking)
            gate.open.set()
            assert [reply.status_code for reply in await asyncio.gather(*asking)] == [200] * 3

    run(work())


def test_a_count_does_not_wait_for_the_pixels_of_those_who_wait() -> None:
    async def work() -> None:
        gate = Gate()
        async with world(gate, max_pixels_in_flight=60) as w:
            asking = asyncio.ensure_future(w.post(MESSAGES, **{**ASKED, **BODIES[2]}, guard=False))
            await until(lambda: gate.steps > 0)
            await w.app.state.images.room.take("x", 60)
            assert (await w.post(COUNT, **{**ASKED, **BODIES[2]})).status_code == 200
            assert (w.app.state.images.count_room._used, w.app.state.images.room._used) == (0, 60)
            gate.open.set()
            await asking

    run(work())


def test_a_prompt_that_does_not_fit_is_counted_all_the_same() -> None:
    async def work() -> None:
        async with world() as w:
            asked = {**ASKED, "messages": [{"role": "user", "content": "x" * 2000}]}
            assert (await w.post(COUNT, **asked)).json()["input_tokens"] > 2000
            assert (await w.post(MESSAGES, **asked)).status_code == 400

    run(work())


def test_models_as_anthropics_clients_read_them() -> None:
    async def work() -> None:
        async with world() as w:
            listed = (await w.client.get("/v1/models")).json()
            (card,) = listed["data"]
            assert (card["type"], card["display_name"], listed["has_more"]) == ("model", "fake", False)

    run(work())
