"""What clients send besides the question: understood, ignored and named, or refused by name."""

import json
from typing import Any

import pytest
from api_driver import PLAIN, QUESTION, WITH_TOOLS, data_url, run, text_of, world

from opsin.core.request import SamplingParams
from opsin.core.settings import ServerSettings

PAINT = {
    "type": "function",
    "function": {"name": "paint", "parameters": {"type": "object", "properties": {"colour": {"type": "string"}}}},
}
CALL = '{"name": "paint", "arguments": {"colour": "red"}}'
SCHEMA = {"type": "object", "properties": {"a": {"const": None}}}
MAX_TOKENS, TEMPERATURE = ServerSettings().max_tokens, SamplingParams().temperature


@pytest.mark.parametrize(
    ("body", "ignored"),
    [
        (
            {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options.include_obfuscation"),
        ({"verbosity": "low", "prompt_cache_retention": "24h"}, "verbosity, prompt_cache_retention"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"stop": [], "temperature": None, "seed": -1, "max_tokens": -1}, None),
        ({"cache_prompt": True, "id_slot": 0, "timings_per_token": True}, "cache_prompt, id_slot, timings_per_token"),
        ({"samplers": ["top_k"], "reasoning_format": "none"}, "samplers, reasoning_format"),
        ({"return_progress": True, "client_metadata": {"a": "b"}}, "return_progress, client_metadata"),
        ({"store": True, "metadata": {"a": 1}, "user": "me"}, "store, metadata, user"),
        ({"colour": None, "messages": [{"role": "user", "content": "x", "audio": None, "name": None}]}, None),
        ({"best_of": 1, "n": 1.0, "seed": 1.0, "max_tokens": 5.0}, None),
        (
            {
                "tools": [
                    {"type": "function", "cache_control": None, "function": {"name": "f", "strict": None, "x": None}}
                ],
                "tool_choice": None,
                "stream_options": {"include_usage": None, "x": None},
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "x": None}},
            },
            None,
        ),
        ({"response_format": {"type": "json_object", "strength": 1}}, "response_format.strength"),
        ({"tools": [{"type": "web_search", "size": 1}]}, "tools[0].size, tools[0].type"),
        ({"tools": [{"type": "web_search"}], "reasoning_effort": "low"}, "reasoning_effort, tools[0].type"),
        ({"\n": 1, "x" * 99: 2}, f"?, {'x' * 64}"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_has_no_effect_is_ignored_and_named(body: dict[str, Any], ignored: str | None, stream: bool) -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.post(**{"messages": QUESTION, "stream": stream, **body})
            assert reply.status_code == 200, reply.text
            named = reply.headers.get("opsin-ignored")
            assert named == ignored or sorted((named or "").split(", ")) == sorted((ignored or "").split(", "))

    run(work())


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({"repetition_penalty": 1.5}, {"repeat_penalty": 1.5}),
        ({"repetition_penalty": 1.5, "repeat_penalty": 1.2}, {"repeat_penalty": 1.2}),
        ({"n_predict": 5}, {"max_tokens": 5}),
        ({"n_predict": 5, "max_tokens": None}, {"max_tokens": 5}),
        ({"n_predict": -1, "max_tokens": 7}, {"max_tokens": 7}),
        ({"n_probs": 2}, {"logprobs": 2}),
        ({"repeat_last_n": 12}, {"penalty_last_n": 12}),
        ({"top_k": -1, "top_p": 0}, {"top_k": 0, "top_p": 1e-6}),
        ({"stop": ""}, {"stop": ()}),
        ({"stop": ["", "a"]}, {"stop": ("a",)}),
        ({"max_tokens": -1, "temperature": None}, {"max_tokens": MAX_TOKENS, "temperature": TEMPERATURE}),
        ({"max_tokens": 5.0, "seed": 7.0}, {"max_tokens": 5, "seed": 7}),
        ({"min_tokens": 16}, {"min_tokens": 16}),
        ({"thinking": {"type": "disabled"}}, {"thinking": False}),
        ({"reasoning_effort": "none"}, {"thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": False, "foo": 1}}, {"thinking": False}),
        ({"json_schema": SCHEMA}, {"json_schema": json.dumps(SCHEMA)}),
        ({"response_format": {"type": "json_object", "value": SCHEMA}}, {"json_schema": json.dumps(SCHEMA)}),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"json_schema": json.dumps(SCHEMA)}),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, {"json_schema": json.dumps(SCHEMA)}),
    ],
)
def test_other_servers_words_are_understood(body: dict[str, Any], wanted: dict[str, Any]) -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.post(messages=QUESTION, **body)
            assert reply.status_code == 200, reply.text
            assert "opsin-ignored" not in reply.headers
            params: SamplingParams = w.backend.drawn_with[-1]
            assert {name: getattr(params, name) for name in wanted} == wanted

    run(work())


def test_a_seed_of_minus_one_is_as_good_as_none() -> None:
    async def work() -> None:
        async with world() as w:
            for _ in range(2):
                await w.chat(seed=-1)
            assert len({params.seed for params in w.backend.drawn_with[-2:]}) == 2

    run(work())


def test_the_template_gets_its_options() -> None:
    prompts: list[str] = []

    async def work() -> None:
        template = "{% if foo %}foo is {{ foo }}, thinking {{ enable_thinking }}\n{% endif %}" + PLAIN
        async with world(lambda prompt: prompts.append(prompt) or "ok.", template=template) as w:  # type: ignore[func-returns-value]
            await w.chat(chat_template_kwargs={"enable_thinking": False, "foo": 1})
            assert prompts[-1].startswith("foo is 1, thinking False\n")

    run(work())


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("guided_json", SCHEMA, "response_format"),
        ("structured_outputs", {"json": SCHEMA}, "response_format"),
        ("guided_regex", "a+", "grammar"),
        ("guided_choice", ["a", "b"], "response_format"),
        ("guided_grammar", 'root ::= "a"', "grammar"),
        ("functions", [PAINT["function"]], "tools"),
        ("function_call", "auto", "tools"),
        ("audio", {"voice": "alloy"}, "leave it out"),
        ("suffix", "b", "leave it out"),
    ],
)
@pytest.mark.parametrize("body", [{"messages": QUESTION}, {"prompt": "x"}])
def test_what_would_change_the_answer_is_refused_by_name_unless_it_is_null(
    field: str, value: Any, advice: str, body: dict[str, Any]
) -> None:
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"

    async def work() -> None:
        async with world() as w:
            reply = await w.post(path, **body, **{field: value})
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (400, field)
            assert advice in error["message"]
            assert (await w.post(path, **body, **{field: None})).status_code == 200

    run(work())


def test_min_tokens_keep_an_answer_from_ending() -> None:
    async def work() -> None:
        async with world(lambda _: "ab") as w:
            assert (await w.chat(min_tokens=5))["choices"][0]["message"]["content"] == "ab..."
            assert (await w.chat(min_tokens=1))["choices"][0]["message"]["content"] == "ab"

    run(work())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "x", "tools": [PAINT]}, "tools"),
        ("/v1/completions", {"prompt": "x", "messages": QUESTION}, "messages"),
        ("/v1/responses", {"input": "x", "response_format": {"type": "json_object"}}, "response_format"),
        ("/v1/responses", {"input": "x", "stop": ["a"]}, "stop"),
        ("/v1/responses", {"input": "x", "max_tokens": 5}, "max_tokens"),
        ("/v1/responses", {"input": "x", "prompt": {"id": "pmpt_1"}}, "prompt"),
    ],
)
def test_a_field_that_another_api_has_is_refused_where_its_neglect_would_matter(
    path: str, body: dict[str, Any], param: str
) -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.post(path, **body)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
            named = await w.post("/v1/responses", input="x", top_logprobs=0, reasoning={"effort": "low"})
            assert named.status_code == 200, named.text
            assert set(named.headers["opsin-ignored"].split(", ")) == {"top_logprobs", "reasoning.effort"}

    run(work())


def test_a_completion_keeps_to_a_schema_too() -> None:
    async def work() -> None:
        async with world() as w:
            wanted = {"type": "json_object", "schema": SCHEMA}
            assert (await w.post("/v1/completions", prompt="x", response_format=wanted)).status_code == 200
            assert w.backend.drawn_with[-1].json_schema == json.dumps(SCHEMA)

    run(work())


def test_strict_fields_refuses_them_by_name() -> None:
    async def work() -> None:
        async with world(strict_fields=True) as w:
            reply = await w.post(messages=QUESTION, stream_options={"colour": 1})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "stream_options.colour")
            assert (await w.post(messages=QUESTION, verbosity=None)).status_code == 200

    run(work())


@pytest.mark.parametrize(
    "answer",
    [
        {
            "content": "red",
            "reasoning": "r",
            "annotations": [{}],
            "audio": None,
            "refusal": None,
            "function_call": None,
        },
        {"content": "red", "id": "x", "provider_specific_fields": {"a": 1}, "parsed": {"colour": "red"}},
        {"content": [{"type": "output_text", "text": "red", "annotations": [{}], "role": "assistant"}]},
        {"content": [{"type": "refusal", "refusal": "red"}], "reasoning_details": [{}], "extra_content": {}},
        {"content": [{"type": "text", "text": "red", "image_url": None, "cache_control": {"type": "ephemeral"}}]},
        {"content": "red", "tool_calls": None, "reasoning_content": None, "thinking_blocks": []},
        {"content": "red", "reasoning": None, "tool_calls": [], "tool_call_id": None, "name": None},
    ],
)
def test_an_answer_is_sent_back_as_any_client_has_it(answer: dict[str, Any]) -> None:
    prompts: list[str] = []

    async def work() -> None:
        async with world(lambda prompt: prompts.append(prompt) or "ok.") as w:  # type: ignore[func-returns-value]
            image = {"type": "image_url", "image_url": {"url": data_url(), "format": "png", "detail": ""}, "uuid": "1"}
            first = {"role": "user", "content": [image, {"type": "text", "text": "what colour?"}]}
            await w.chat(messages=[first, {"role": "assistant", **answer}, {"role": "user", "content": "sure?"}])
            assert "assistant: red\nuser: sure?\n" in prompts[-1]

    run(work())


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [("", {}), ({"colour": "teal"}, {"colour": "teal"}), ('{"colour": "teal"}', {"colour": "teal"}), (None, {})],
)
def test_a_calls_arguments_are_read_as_clients_have_them(arguments: Any, shown: dict[str, str]) -> None:
    prompts: list[str] = []

    async def work() -> None:
        async with world(lambda prompt: prompts.append(prompt) or "ok.") as w:  # type: ignore[func-returns-value]
            function = {"name": "paint", "arguments": arguments, "parsed_arguments": shown}
            call = {"id": "1", "index": 0, "type": "function", "function": function}
            messages = [
                *QUESTION,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "done"},
            ]
            await w.chat(messages=messages, tools=[PAINT])
            assert json.dumps({"name": "paint", "arguments": shown}) in prompts[-1]

    run(work())


@pytest.mark.parametrize("arguments", ["{", '{"colour": "te', "nonsense"])
def test_cut_arguments_are_refused_by_their_whole_path(arguments: str) -> None:
    async def work() -> None:
        async with world() as w:
            call = {"id": "1", "type": "function", "function": {"name": "paint", "arguments": arguments}}
            reply = await w.post(messages=[*QUESTION, {"role": "assistant", "tool_calls": [call]}])
            error = reply.json()["error"]
            assert reply.status_code == 400
            assert error["param"] == "messages[1].tool_calls[0].function.arguments"
            assert error["param"] in error["message"]

    run(work())


@pytest.mark.parametrize("choice", [None, "auto"])
def test_a_template_without_tools_does_not_keep_agents_from_starting(choice: str | None) -> None:
    """No template of a model that is shipped knows tools: every agent's first request was refused."""
    prompts: list[str] = []

    async def work() -> None:
        async with world(lambda prompt: prompts.append(prompt) or CALL) as w:  # type: ignore[func-returns-value]
            tools = [{"type": "web_search"}, PAINT, {"type": "custom", "name": "x"}]
            made = await w.chat(tools=tools, tool_choice=choice)
            assert '"name": "paint"' in prompts[-1]
            assert "what is this?" in prompts[-1]
            assert w.backend.drawn_with[-1].json_schema is None
            (call,) = made["choices"][0]["message"]["tool_calls"]
            assert call["function"] == {"name": "paint", "arguments": '{"colour": "red"}'}
        async with world() as w:
            made = await w.chat(tools=tools, tool_choice=choice)
            assert made["choices"][0]["message"]["content"] == "a red circle."

    run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_that_was_cut_is_a_call_with_what_is_there(stream: bool) -> None:
    async def work() -> None:
        async with world(lambda _: CALL, template=WITH_TOOLS) as w:
            body: dict[str, Any] = {"tools": [PAINT], "tool_choice": "required", "max_tokens": len(CALL) - 8}
            if stream:
                chunks = await w.stream(messages=QUESTION, **body)
                told = [one for chunk in chunks[:-1] for one in chunk["choices"][0]["delta"].get("tool_calls", ())]
                arguments = "".join(one["function"]["arguments"] for one in told)
                assert text_of(chunks) == ""
                reason = chunks[-2]["choices"][0]["finish_reason"]
            else:
                (choice,) = (await w.chat(**body))["choices"]
                (call,) = choice["message"]["tool_calls"]
                arguments, reason = call["function"]["arguments"], choice["finish_reason"]
            assert arguments == '{"colour":'
            assert reason == "length"

    run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_keeps_its_white_space_and_agrees_with_its_logprobs(stream: bool) -> None:
    async def work() -> None:
        async with world(lambda _: " Paris. ") as w:
            body: dict[str, Any] = {"prompt": "The capital of France is\x1e", "logprobs": 1}
            if stream:
                choices = [chunk["choices"][0] for chunk in (await w.stream("/v1/completions", **body))[:-1]]
            else:
                choices = (await w.post("/v1/completions", **body)).json()["choices"]
            text = "".join(choice["text"] for choice in choices)
            shown = [choice["logprobs"] for choice in choices if choice["logprobs"]]
            tokens = [token for one in shown for token in one["tokens"]]
            offsets = [offset for one in shown for offset in one["text_offset"]]
            assert text == " Paris. "
            assert "".join(tokens) == text
            assert all(text[at:].startswith(token) for at, token in zip(offsets, tokens, strict=True))
            # A chat's first space is the template's, unless its tokens are shown.
            said = (await w.chat())["choices"][0]["message"]["content"]
            shown = (await w.chat(logprobs=True))["choices"][0]["message"]["content"]
            assert (said, shown) == ("Paris. ", " Paris. ")

    run(work())


def test_a_response_takes_what_clients_send_with_it() -> None:
    body: dict[str, Any] = {
        "include": ["reasoning.encrypted_content"],
        "reasoning": None,
        "conversation": None,
        "truncation": "auto",
        "top_logprobs": 0,
        "stream_options": {"include_obfuscation": False},
        "text": {"verbosity": "low"},
    }

    async def work() -> None:
        async with world() as w:
            reply = await w.post("/v1/responses", input="what is this?", **body)
            assert reply.status_code == 200, reply.text
            named = {"include", "truncation", "top_logprobs", "stream_options", "text.verbosity"}
            assert set(reply.headers["opsin-ignored"].split(", ")) == named

    run(work())


def test_a_responses_items_are_sent_back_as_any_client_has_them() -> None:
    prompts: list[str] = []
    said = {"type": "output_text", "text": "red", "annotations": [], "logprobs": [], "parsed": {"colour": "red"}}
    items: list[Any] = [
        {"role": "user", "content": "what colour?"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "x"}],
            "encrypted_content": "y",
        },
        {"type": "message", "id": "msg_1", "role": "assistant", "phase": "final_answer", "content": [said]},
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "1",
            "name": "paint",
            "arguments": "",
            "parsed_arguments": {},
            "async_": None,
            "status": "completed",
        },
        {"type": "function_call_output", "call_id": "1", "output": "painted", "id": None, "status": None},
        {"role": "user", "content": "sure?"},
    ]

    async def work() -> None:
        async with world(lambda prompt: prompts.append(prompt) or "ok.") as w:  # type: ignore[func-returns-value]
            reply = await w.post("/v1/responses", input=items)
            assert reply.status_code == 200, reply.text
            assert 'assistant: red\n{"name": "paint", "arguments": {}}\n' in prompts[-1]
            assert "painted" in prompts[-1]
            assert "sure?" in prompts[-1]

    run(work())


def test_a_coding_agents_first_request_starts_a_conversation() -> None:
    """As Codex CLI sends it: functions among tools that only OpenAI has, and a request that nothing be stored."""
    prompts: list[str] = []
    text = {"type": "input_text", "text": "what is this?"}
    body: dict[str, Any] = {
        "model": "any",
        "instructions": "You are an agent.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be careful."}]},
            {"type": "message", "role": "user", "content": [text]},
        ],
        "tools": [
            {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object"}},
            {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
            {"type": "namespace", "name": "mcp", "tools": [{"type": "function", "name": "inner"}]},
            {"type": "web_search", "external_web_access": False},
            {"type": "local_shell"},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "store": False,
        "stream": True,
        "prompt_cache_key": "x",
        "client_metadata": {"a": "b"},
    }

    async def work() -> None:
        async with world(lambda prompt: prompts.append(prompt) or "ok.") as w:  # type: ignore[func-returns-value]
            reply = await w.post("/v1/responses", **body)
            assert reply.status_code == 200, reply.text
            assert "response.completed" in reply.text
            assert all(f"tools[{index}].type" in reply.headers["opsin-ignored"] for index in range(1, 5))
            for word in ("You are an agent.", "Be careful.", '"name": "shell"', "what is this?"):
                assert word in prompts[-1]
            assert "inner" not in prompts[-1]

    run(work())
