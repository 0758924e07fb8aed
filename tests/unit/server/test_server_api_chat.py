"""POST /v1/chat/completions on the fake backend: what goes in, what comes out, and what is refused."""

import asyncio
import json
import re
import threading
from typing import Any

import pytest
from api_driver import CHAT, LIMIT, PLAIN, QUESTION, Caller, Gate, data_url, run, text_of, until, world

from opsin.core.errors import DecodeFailed
from opsin.engine import Engine
from opsin.prompt import PromptBuilder
from opsin.server import handler

pytestmark = pytest.mark.slow

TIMINGS = {
    "cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second",
    "predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second",
    "draft_n", "draft_n_accepted",
}  # fmt: skip


def image_part(**more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(), **more}}


def asked(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_a_whole_answer_has_openais_shape_and_our_extensions() -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.post(messages=QUESTION, model="whatever")
            answer = reply.json()
            assert answer["object"] == "chat.completion"
            assert answer["id"].startswith("chatcmpl-")
            assert answer["model"] == "fake"
            (choice,) = answer["choices"]
            assert choice["message"] == {"role": "assistant", "content": "a red circle.", "refusal": None}
            assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
            usage = answer["usage"]
            assert usage["completion_tokens"] == len("a red circle.")
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": 0}
            assert set(answer["timings"]) == TIMINGS
            assert answer["stages"]["total_ms"] > 0
            assert (answer["images"], answer["guard"]) == ([], None)
            timing = reply.headers["server-timing"]
            assert re.fullmatch(r"([a-z_]+;dur=[\d.]+)(, [a-z_]+;dur=[\d.]+)*", timing)
            assert f"total;dur={answer['stages']['total_ms']}" in timing
            assert len(reply.headers["x-request-id"]) == 32

    run(work())


def test_images_stand_where_they_were_put_and_are_told_of() -> None:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return "yes"

    async def work() -> None:
        async with world(reply) as w:
            text = {"type": "text", "text": "first"}
            bare = {"type": "image_url", "image_url": data_url("blue", (30, 10))}
            answer = await w.chat(messages=asked(text, image_part(detail="high"), {**text, "text": "second"}, bare))
            assert re.search(r"user: first(<\d+\.\d>){4}second(<\d+\.\d>){4}\n", prompts[-1])
            assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 8
            assert [(image["width"], image["height"]) for image in answer["images"]] == [(8, 6), (30, 10)]
            assert [image["cached"] for image in answer["images"]] == [False, False]
            again = await w.chat(messages=asked(image_part()))
            assert [image["cached"] for image in again["images"]] == [True]
            assert w.records[0].images == 2

    run(work())


def test_low_detail_shrinks_the_image() -> None:
    async def work() -> None:
        async with world() as w:
            big = {"url": data_url("red", (1024, 100)), "detail": "low"}
            answer = await w.chat(messages=asked({"type": "image_url", "image_url": big}))
            assert answer["images"][0]["width"] == 512

    run(work())


def test_a_stream_says_the_same_as_the_whole_answer() -> None:
    async def work() -> None:
        async with world() as w:
            *chunks, done = await w.stream(messages=QUESTION)
            assert done == "[DONE]"
            assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert text_of(chunks) == "a red circle."
            assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
            assert len({chunk["id"] for chunk in chunks}) == 1
            reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
            assert reasons == [None] * (len(chunks) - 1) + ["stop"]
            assert all("usage" not in chunk for chunk in chunks)
            assert set(chunks[-1]["timings"]) == TIMINGS
            assert chunks[-1]["stages"]["total_ms"] > 0
            assert (chunks[-1]["images"], chunks[-1]["guard"]) == ([], None)

    run(work())


def test_usage_is_one_more_event_where_it_is_asked_for() -> None:
    async def work() -> None:
        async with world() as w:
            whole = await w.chat()
            *_, finish, usage, done = await w.stream(messages=QUESTION, stream_options={"include_usage": True})
            assert done == "[DONE]"
            assert finish["choices"][0]["finish_reason"] == "stop"
            assert usage["choices"] == []
            assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
            assert "timings" in usage

    run(work())


def test_choices_share_the_prompt_and_have_seeds_of_their_own() -> None:
    async def work() -> None:
        async with world() as w:
            answer = await w.chat(n=3, seed=7, messages=asked(image_part(), {"type": "text", "text": "?"}))
            assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
            assert {choice["message"]["content"] for choice in answer["choices"]} == {"a red circle."}
            assert sorted(params.seed or 0 for params in w.backend.drawn_with) == [7, 8, 9]
            assert len(w.backend.encoded) == 1
            assert answer["usage"]["completion_tokens"] == 3 * len("a red circle.")
            assert all(choice["stages"]["total_ms"] > 0 for choice in answer["choices"])
            assert len(w.records[-1].answers) == len(w.records[-1].deltas) == 3
            chunks = await w.stream(n=2, messages=QUESTION)
            assert [text_of(chunks, index) for index in (0, 1)] == ["a red circle."] * 2

    run(work())


@pytest.mark.parametrize("stop", ["red", ["nothing", "red"]])
def test_stop_is_a_string_or_several(stop: Any) -> None:
    async def work() -> None:
        async with world() as w:
            assert (await w.chat(stop=stop))["choices"][0]["message"]["content"] == "a "

    run(work())


def test_the_newer_limit_wins_and_the_reason_is_length() -> None:
    async def work() -> None:
        async with world(max_tokens=5) as w:
            texts = {}
            for name, body in {
                "settings": {},
                "older": {"max_tokens": 3},
                "both": {"max_tokens": 3, "max_completion_tokens": 1},
            }.items():
                choice = (await w.chat(**body))["choices"][0]
                assert choice["finish_reason"] == "length"
                texts[name] = choice["message"]["content"]
            assert texts == {"settings": "a red", "older": "a r", "both": "a"}

    run(work())


def test_logprobs_tell_bytes_and_alternatives() -> None:
    async def work() -> None:
        async with world(lambda _: "é!") as w:
            choice = (await w.chat(logprobs=True, top_logprobs=1))["choices"][0]
            content = choice["logprobs"]["content"]
            assert [token["bytes"] for token in content][:3] == [[0xC3], [0xA9], [0x21]]
            assert content[2] == {
                "token": "!",
                "logprob": 0.0,
                "bytes": [33],
                "top_logprobs": [{"token": "!", "logprob": 0.0, "bytes": [33]}],
            }
            bare = (await w.chat(logprobs=True))["choices"][0]["logprobs"]["content"]
            assert all(token["top_logprobs"] == [] for token in bare)
            chunks = await w.stream(messages=QUESTION, logprobs=True)
            streamed = [
                token["bytes"]
                for chunk in chunks[:-1]
                for choice in chunk["choices"]
                if choice["logprobs"]
                for token in choice["logprobs"]["content"]
            ]
            assert streamed[:3] == [[0xC3], [0xA9], [0x21]]

    run(work())


SCHEMA = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}


@pytest.mark.parametrize(
    ("wanted", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_object", "schema": SCHEMA}, SCHEMA),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}, SCHEMA),
    ],
)
def test_response_formats_become_schemas(wanted: Any, schema: Any) -> None:
    async def work() -> None:
        async with world() as w:
            await w.chat(response_format=wanted)
            held_to = w.backend.drawn_with[-1].json_schema
            assert (None if held_to is None else json.loads(held_to)) == schema

    run(work())


def test_sampling_fields_and_extensions_reach_the_sampler() -> None:
    fields: dict[str, Any] = {
        "temperature": 1.5, "top_p": 0.5, "top_k": 7, "min_p": 0.25, "repeat_penalty": 1.25, "presence_penalty": 0.5,
        "frequency_penalty": -0.5, "seed": 11, "ignore_eos": True, "guard": False, "max_seconds": 9.5, "max_tokens": 3,
    }  # fmt: skip

    async def work() -> None:
        async with world() as w:
            await w.chat(**fields, logit_bias={"5": -1}, stop=["x"])
            drawn = w.backend.drawn_with[-1]
            assert {name: getattr(drawn, name) for name in fields} == {
                **fields,
                "max_seconds": pytest.approx(9.5, abs=0.1),
            }
            assert (drawn.logit_bias, drawn.stop) == ({5: -1.0}, ("x",))

    run(work())


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_the_limit_on_reasoning_reaches_the_engine(path: str, tokens: int) -> None:
    async def work() -> None:
        async with world(lambda _: "<think>hm, red</think>a circle.", template="{# <think> #}" + PLAIN) as w:
            asked = {"messages": QUESTION} if path == CHAT else {"input": "what?"}
            reply = await w.post(path, **asked, max_thinking_tokens=tokens)
            assert reply.status_code == 200, reply.text
            assert w.backend.drawn_with[-1].max_thinking_tokens == tokens

    run(work())


def test_the_servers_limits_are_the_only_ones() -> None:
    async def work() -> None:
        async with world(max_stop=32, max_logit_bias=2000, max_schema_bytes=200_000) as w:
            schema = {"type": "object", "properties": {"a": {"enum": [f"value {i}" for i in range(8_000)]}}}
            wanted = {"type": "json_object", "schema": schema}
            bias = {str(token): 0 for token in range(1_500)}
            await w.chat(stop=[f"stop {i}" for i in range(32)], logit_bias=bias, response_format=wanted)
            drawn = w.backend.drawn_with[-1]
            assert (len(drawn.stop), len(drawn.logit_bias)) == (32, 1_500)
            assert len(drawn.json_schema or "") > 100_000

    run(work())


@pytest.mark.parametrize(("given", "own"), [(2**32 - 1, 0), (2**63 - 1, (2**63 - 1) % (2**32 - 1))])
def test_every_seed_is_taken_and_repeatable(given: int, own: int) -> None:
    async def work() -> None:
        async with world() as w:
            await w.chat(seed=given)
            assert w.backend.drawn_with[-1].seed == own

    run(work())


def test_fields_without_effect_are_accepted() -> None:
    async def work() -> None:
        async with world() as w:
            await w.chat(
                user="u", metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=True,
                prompt_cache_key="k", safety_identifier="s", modalities=["text"], tools=None, logprobs=False,
            )  # fmt: skip
            older: dict[str, Any] = {
                "role": "assistant",
                "content": "red",
                "refusal": None,
                "audio": None,
                "annotations": [],
            }
            await w.chat(messages=[*QUESTION, older, *QUESTION])

    run(work())


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ({"audio": {}}, "audio", "not supported"),
        ({"guided_json": {"type": "object"}}, "guided_json", "response_format"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"best_of": 2}, "best_of", "1"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", "'text'"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", "missing"),
        ({"messages": {}}, "messages", "list"),
        ({"messages": asked({"type": "file", "file": {}})}, "messages[0].content[0]", "file_data"),
        ({"messages": asked({"type": "input_audio"})}, "messages[0].content[0].type", "'input_audio'"),
        ({"messages": asked({"type": "video_url"})}, "messages[0].content[0]", "video_url"),
        ({"messages": asked({"type": "text"})}, "messages[0].content[0].text", "missing"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": asked({"type": "image_url", "image_url": "ftp://x"})}, "messages[0].content[0].image_url", "dat"),
        ({"messages": asked(image_part(detail="ultra"))}, "messages[0].content[0].image_url.detail", "'low'"),
        ({"messages": asked(*[image_part()] * 3)}, "messages", "3 images"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages", "300 characters"),
        ({"temperature": 99}, "temperature", "10"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"max_tokens": 0}, "max_tokens", "at least"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "at least"),
        ({"n": 0}, "n", "at least"),
        ({"n": 4}, "n", "3 are the limit"),
        ({"stop": ["a", "b", "c"]}, "stop", "2 are the limit"),
        ({"stop": ["x" * 1001]}, "stop[0]", "1000"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens", "at least"),
        ({"logit_bias": {"1": 0, "2": 0, "3": 0}}, "logit_bias", "2 are the limit"),
        ({"logit_bias": {"a": 0}}, "logit_bias.a", "integer"),
        ({"logprobs": True, "top_logprobs": 3}, "top_logprobs", "2 are the limit"),
        ({"top_logprobs": 1}, "top_logprobs", "logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"response_format": {"type": "json_object", "schema": {"d": "x" * 99}}}, "response_format", "99 are"),
        ({"grammar": "x" * 100}, "grammar", "99 are"),
        ({"grammar": "root ::= x", "response_format": {"type": "json_object"}}, "grammar", "leave one out"),
        ({"grammar": "bad"}, None, "cannot be read"),
        ({"thinking": True}, None, "does not think"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, None, "does not think"),
        ({"tool_choice": "required"}, "tool_choice", "no functions"),
        (
            {"tools": [{"type": "web_search"}], "tool_choice": "required"},
            "tool_choice",
            "no functions",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tool_choice": "any"}, "tool_choice", "'required'"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
        ({"top_k": 2**40}, "top_k", "2147483647"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused_by_name(body: Any, param: str | None, word: str, stream: bool) -> None:
    async def work() -> None:
        limits: Any = {
            "max_images": 2, "max_prompt_chars": 250, "max_n": 3, "max_stop": 2, "max_logit_bias": 2,
            "max_top_logprobs": 2, "max_schema_bytes": 99,
        }  # fmt: skip
        async with world(**limits) as w:
            reply = await w.post(**{"messages": QUESTION, "stream": stream, **body})
            error = reply.json()["error"]
            assert reply.status_code == 400, error
            assert error["type"] == "invalid_request_error"
            assert error["param"] == param
            assert word in error["message"], error["message"]
            assert error["message"].endswith(".")
            assert w.records[-1].refused == error["code"]
            assert w.records[-1].status == 400
            assert (w.records[-1].answers, w.manager._entered) == ([], set())

    run(work())


def test_model_names_count_where_the_settings_say_so_and_away_from_loopback() -> None:
    async def work() -> None:
        for settings, status in (({}, 200), ({"strict_model": True}, 404), ({"host": "192.0.2.1"}, 404)):
            async with world(**settings) as w:
                headers = {"host": "127.0.0.1"}
                assert (await w.post(messages=QUESTION, model="fake", headers=headers)).status_code == 200
                reply = await w.post(messages=QUESTION, model="gpt-4o", headers=headers)
                assert reply.status_code == status
                if status == 404:
                    assert reply.json()["error"]["code"] == "model_not_found"
                    assert reply.json()["error"]["param"] == "model"

    run(work())


def test_thoughts_come_apart_from_the_answer() -> None:
    template = "{# <think> #}" + PLAIN

    async def work() -> None:
        async with world(lambda _: "<think>hm, red</think>a circle.", template=template) as w:
            message = (await w.chat())["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == ("hm, red", "a circle.")
            chunks = await w.stream(messages=QUESTION)
            assert text_of(chunks, key="reasoning_content") == "hm, red"
            assert text_of(chunks) == "a circle."

    run(work())


def test_a_comment_keeps_the_connection_alive_until_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "KEEP_ALIVE_SECONDS", 0.02)
    gate = Gate("done", stop_at=0)

    async def work() -> None:
        async with world(gate) as w:
            caller = Caller(w.app, {"messages": QUESTION, "stream": True})
            await until(lambda: caller.text.count("\n\n") >= 4)
            comments = [block for block in caller.text.split("\n\n") if block.startswith(": ")]
            assert len(comments) >= 3
            gate.open.set()
            await caller.task
            assert caller.text.endswith("data: [DONE]\n\n")
            assert '"content":"d' in caller.text

    run(work())


def test_a_call_that_is_held_back_until_it_is_whole_keeps_the_connection_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handler, "KEEP_ALIVE_SECONDS", 0.02)
    gate = Gate('{"name": "paint", "arguments": {}}', stop_at=9)
    tool = {"type": "function", "function": {"name": "paint"}}

    async def work() -> None:
        async with world(gate) as w:
            body = {"messages": QUESTION, "stream": True, "tools": [tool], "tool_choice": "required"}
            caller = Caller(w.app, body)
            await until(lambda: caller.text.count("\n: ") >= 2)
            gate.open.set()
            await caller.task
            assert '"tool_calls":[{"index":0' in caller.text

    run(work())


def test_an_error_in_the_middle_of_a_stream_is_an_event() -> None:
    gate = Gate()

    async def work() -> None:
        async with world(gate) as w:
            caller = Caller(w.app, {"messages": QUESTION, "stream": True, "guard": False})
            await until(lambda: "abcd" in "".join(re.findall(r'"content":"(\w+)"', caller.text)))
            w.backend.fail_decode = DecodeFailed("x")
            gate.open.set()
            await caller.task
            last = caller.text.strip().split("\n\n")[-1]
            error = json.loads(last.removeprefix("data: "))["error"]
            assert error["type"] == "server_error"
            assert "[DONE]" not in caller.text
            assert w.records[-1].refused == error["code"]

    run(work())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_answer_within_one_step(stream: bool) -> None:
    gate = Gate()

    async def work() -> None:
        async with world(gate) as w:
            caller = Caller(w.app, {"messages": QUESTION, "stream": stream, "guard": False, "n": 2})
            await until(lambda: gate.steps > 4)
            before = gate.steps
            caller.gone.set()
            await caller.task
            assert not w.manager._entered
            gate.open.set()
            await until(lambda: w.engine.stats.running == 0)
            # The step that ran while the client left draws a token for each of its two answers.
            assert gate.steps <= before + 2
            assert w.records[-1].refused == "cancelled"
            assert w.records[-1].status == 499
            assert w.backend.open_handles == 0

    run(work())


def test_answers_of_different_keys_share_nothing() -> None:
    async def work() -> None:
        async with world(keys=("one", "two")) as w:
            cached = []
            for key in ("one", "one", "two"):
                reply = await w.post(messages=QUESTION, headers={"Authorization": f"Bearer {key}"})
                cached.append(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0)
            assert cached == [False, True, False]
            assert (await w.post(messages=QUESTION)).status_code == 401
            assert w.records[-1].status == 401

    run(work())


def test_the_record_tells_when_pieces_went_out() -> None:
    async def work() -> None:
        async with world() as w:
            for stream in (False, True):
                await w.post(messages=QUESTION, stream=stream, headers={"traceparent": "00-abc"})
                record = w.records[-1]
                assert record.route == CHAT
                assert (record.streamed, record.status, record.model) == (stream, 200, "fake")
                assert record.traceparent == "00-abc"
                assert record.answers[0].text == "a red circle."
                (times,) = record.deltas
                assert len(times) > 1
                assert record.began < times[0] <= times[-1] <= record.ended

    run(work())


def test_before_the_model_is_there_and_while_the_server_drains_others_are_told_to_come_back() -> None:
    async def work() -> None:
        async with world(start=False) as w:
            for state in ("loading", "draining"):
                if state == "draining":
                    await w.manager.drain(0.0)
                for stream in (False, True):
                    reply = await w.post(messages=QUESTION, stream=stream)
                    assert reply.status_code == 503
                    assert int(reply.headers["retry-after"]) >= 1
                    assert reply.json()["error"]["code"] == "not_ready"

    run(work())


def test_a_full_queue_is_no_fault_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with world() as w:
            monkeypatch.setattr(Engine, "submit", lambda *_, **__: (_ for _ in ()).throw(_full()))
            reply = await w.post(messages=QUESTION)
            assert reply.status_code == 429
            assert reply.json()["error"]["type"] == "rate_limit_error"
            assert "retry-after" in reply.headers

    run(work())


def _full() -> Exception:
    from opsin.core.errors import QueueFull

    return QueueFull("Too many.")


def test_a_hundred_streams_leave_the_loop_responsive() -> None:
    gate = Gate("abcdefgh" * 8)

    async def work() -> None:
        async with world(gate) as w:
            asked = [w.stream(messages=QUESTION, guard=False, max_tokens=64) for _ in range(100)]
            streams = asyncio.gather(*asked)
            await until(lambda: len(w.manager._entered) == 100 and gate.steps > 4)
            # All of them wait for a token that does not come: whoever waited in the loop would hold this up for ever.
            assert (await w.client.get("/health")).status_code == 200
            assert not streams.done()
            gate.open.set()
            assert all(text_of(chunks) == "abcdefgh" * 8 for chunks in await streams)

    run(work())


def test_a_template_is_rendered_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    rendering, done, threads = threading.Event(), threading.Event(), []
    build = PromptBuilder.build

    def slow(builder: PromptBuilder, *args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        rendering.set()
        assert done.wait(LIMIT)
        return build(builder, *args, **options)

    async def work() -> None:
        async with world() as w:
            monkeypatch.setattr(PromptBuilder, "build", slow)
            asked = asyncio.ensure_future(w.chat())
            await until(rendering.is_set)
            assert (await w.client.get("/health")).status_code == 200
            done.set()
            assert (await asked)["usage"]["completion_tokens"]
        assert not any("opsin-engine" in name for name in threads)

    run(work())


def test_forty_requests_of_eight_choices_leave_room_for_another_key() -> None:
    gate = Gate("abcd", stop_at=0)

    async def work() -> None:
        async with world(gate, keys=("greedy", "modest"), max_tokens=4) as w:

            async def ask(key: str, n: int) -> Any:
                return await w.post(messages=QUESTION, n=n, headers={"Authorization": f"Bearer {key}"})

            greedy = [asyncio.ensure_future(ask("greedy", 8)) for _ in range(40)]
            await until(lambda: sum(task.done() for task in greedy) == 7)  # 264 answers run or wait: 33 requests
            modest = [asyncio.ensure_future(ask("modest", 1)) for _ in range(8)]
            await until(lambda: sum(task.done() for task in greedy) == 8)
            gate.open.set()
            replies = [await task for task in modest]
            assert [reply.status_code for reply in replies] == [200] * 8
            assert sum(not task.done() for task in greedy) > 16, "they did not wait for all that came before"
            stages = replies[-1].json()["stages"]
            assert stages["queue_ms"] > stages["other_ms"]
            refused = [reply for reply in await asyncio.gather(*greedy) if reply.status_code != 200]
            assert {reply.json()["error"]["code"] for reply in refused} == {"queue_full"}
            assert len(refused) == 8

    run(work())


def test_choices_that_were_begun_are_ended_when_a_later_one_finds_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(stop_at=0)
    submit = Engine.submit
    entered: list[int] = []

    def only_once(engine: Engine, *args: Any, **named: Any) -> Any:
        if entered:
            raise _full()
        entered.append(1)
        return submit(engine, *args, **named)

    async def work() -> None:
        async with world(gate) as w:
            monkeypatch.setattr(Engine, "submit", only_once)
            assert (await w.post(messages=QUESTION, n=2)).status_code == 429
            gate.open.set()
            await until(lambda: w.engine.stats.running == 0)
            assert gate.steps <= 1
            assert not w.manager._entered

    run(work())


def test_messages_that_the_template_does_not_take_are_told_of() -> None:
    dropped = "{% for m in messages %}{% if m.role != 'system' or loop.first %}"
    first_alone = PLAIN.replace("{% for m in messages %}", dropped)
    first_alone = first_alone.replace("{{ '\n' }}{% endfor %}", "{{ '\n' }}{% endif %}{% endfor %}")

    async def work() -> None:
        async with world(template=first_alone) as w:
            twice = [{"role": "system", "content": "one"}, {"role": "system", "content": "two"}, *QUESTION]
            for more in ({}, {"stream": True}):
                reply = await w.post(messages=twice, **more)
                assert reply.status_code == 200
                assert "system messages were joined" in reply.headers["opsin-notes"]
            assert "opsin-notes" not in (await w.post(messages=twice[1:])).headers

    run(work())
