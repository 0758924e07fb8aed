"""Tools: what the model is told, what its answer is held to, and calls found in its text."""

import json
from typing import Any

import pytest
from api_driver import QUESTION, WITH_TOOLS, run, text_of, world

from opsin.server.tools import CallReader, ToolPlan

pytestmark = pytest.mark.slow

PARAMETERS = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}
PAINT = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": PARAMETERS}}
ERASE = {"type": "function", "function": {"name": "erase"}}
ARGUMENTS = {"colour": "red"}
CALL = json.dumps({"name": "paint", "arguments": ARGUMENTS})
NAMES = frozenset({"paint", "erase"})

CALLS = [
    (f"<tool_call>\n{CALL}\n</tool_call>", "", 1),
    (f"Let me see.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "Let me see.", 2),
    (f"<tool_call>{CALL}", "", 1),
    (CALL, "", 1),
    (f"  {CALL}\n", "", 1),
    (json.dumps({"name": "paint", "parameters": ARGUMENTS}), "", 1),
    (f"<|python_tag|>{CALL}", "", 1),
    (f"[TOOL_CALLS][{CALL}, {CALL}]", "", 2),
    ("a red circle", "a red circle", 0),
    ("2 < 3, <tool", "2 < 3, <tool", 0),
    ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', 0),
    ('{"name": ["paint"]}', '{"name": ["paint"]}', 0),
    ('{"colour": "red"}', '{"colour": "red"}', 0),
    ("<tool_call>no json</tool_call> so", "<tool_call>no json</tool_call> so", 0),
    ("<tool_call>half", "<tool_call>half", 0),
    ("[" * 5000, "[" * 5000, 0),
]


@pytest.mark.parametrize("size", [1, 3, 10_000])
@pytest.mark.parametrize(("answer", "text", "n_calls"), CALLS)
def test_calls_are_found_however_the_text_comes(answer: str, text: str, n_calls: int, size: int) -> None:
    reader = CallReader(ToolPlan(names=NAMES))
    told = "".join(reader.feed(answer[at : at + size]) for at in range(0, len(answer), size)) + reader.finish()
    assert told.strip() == text
    assert [json.loads(call["function"]["arguments"]) for call in reader.calls] == [ARGUMENTS] * n_calls
    assert {call["function"]["name"] for call in reader.calls} <= {"paint"}
    assert len({call["id"] for call in reader.calls}) == n_calls


def test_text_is_given_as_soon_as_it_can_be_no_call() -> None:
    reader = CallReader(ToolPlan(names=NAMES))
    assert reader.feed("a red ") == "a red "
    assert reader.feed("circle <") == "circle "
    assert reader.feed("b>") == "<b>"


def test_the_template_is_told_of_the_tools_and_the_call_comes_back() -> None:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return f"<tool_call>{CALL}</tool_call>"

    async def work() -> None:
        async with world(reply, template=WITH_TOOLS) as w:
            choice = (await w.chat(tools=[PAINT]))["choices"][0]
            assert prompts[-1].startswith("TOOLS [")
            assert '"description": "Paints."' in prompts[-1]
            assert choice["finish_reason"] == "tool_calls"
            assert choice["message"]["content"] is None
            (call,) = choice["message"]["tool_calls"]
            assert call["type"] == "function"
            assert call["function"]["name"] == "paint"
            assert json.loads(call["function"]["arguments"]) == ARGUMENTS
            assert w.backend.drawn_with[-1].json_schema is None
            chunks = await w.stream(messages=QUESTION, tools=[PAINT])
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
            first, *rest = [one for delta in deltas for one in delta.get("tool_calls", ())]
            assert (first["index"], first["type"], first["function"]) == (
                0,
                "function",
                {"name": "paint", "arguments": ""},
            )
            assert first["id"].startswith("call_")
            assert len(rest) > 1, "arguments come as they are written"
            assert "".join(one["function"]["arguments"] for one in rest) == call["function"]["arguments"]
            assert text_of(chunks) == ""
            assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
            await w.chat(tools=[PAINT], tool_choice="none")
            assert not prompts[-1].startswith("TOOLS")

    run(work())


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
@pytest.mark.parametrize("template", [None, WITH_TOOLS])
def test_a_forced_call_is_a_schema_for_the_answer(choice: Any, template: str | None) -> None:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return CALL

    async def work() -> None:
        options = {} if template is None else {"template": template}
        async with world(reply, **options) as w:  # type: ignore[arg-type]
            body = await w.chat(tools=[PAINT, ERASE], tool_choice=choice)
            (call,) = body["choices"][0]["message"]["tool_calls"]
            assert call["function"]["name"] == "paint"
            schema = json.loads(w.backend.drawn_with[-1].json_schema or "")
            paint = {
                "type": "object",
                "properties": {"name": {"const": "paint"}, "arguments": PARAMETERS},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            if choice == "required":
                assert schema["anyOf"][0] == paint
                assert schema["anyOf"][1]["properties"]["name"] == {"const": "erase"}
            else:
                assert schema == paint
            told = "TOOLS [" if template else "system: Call one of these functions."
            assert prompts[-1].startswith(told)
            assert '"name": "paint"' in prompts[-1]

    run(work())


def test_a_forced_call_that_was_cut_is_text() -> None:
    async def work() -> None:
        async with world(lambda _: CALL) as w:
            choice = (await w.chat(tools=[PAINT], tool_choice="required", max_tokens=5))["choices"][0]
            assert choice["finish_reason"] == "length"
            assert choice["message"]["content"] == CALL[:5]
            assert "tool_calls" not in choice["message"]

    run(work())


def test_the_words_about_tools_join_the_system_message_that_is_there() -> None:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return CALL

    async def work() -> None:
        async with world(reply) as w:
            messages = [{"role": "developer", "content": "Be brief."}, *QUESTION]
            await w.chat(messages=messages, tools=[PAINT], tool_choice="required")
            assert prompts[-1].startswith("system: Be brief.\nCall one of")
            assert prompts[-1].count("system:") == 1

    run(work())


def test_references_in_parameters_still_point_where_they_did() -> None:
    shape = {"$defs": {"c": {"enum": ["red"]}}, "type": "object", "properties": {"colour": {"$ref": "#/$defs/c"}}}
    tool = {"type": "function", "function": {"name": "paint", "parameters": shape}}

    async def work() -> None:
        async with world(lambda _: CALL) as w:
            await w.chat(tools=[tool], tool_choice="required")
            schema = json.loads(w.backend.drawn_with[-1].json_schema or "")
            assert schema["properties"]["arguments"] == {"$ref": "#/$defs/f0"}
            moved = schema["$defs"]["f0"]["properties"]["colour"]["$ref"]
            target = schema
            for step in moved.split("/")[1:]:
                target = target[step]
            assert target == {"enum": ["red"]}

    run(work())


def test_what_tools_cannot_be_is_refused() -> None:
    deep: Any = {}
    for _ in range(100):
        deep = {"properties": {"a": deep}}

    async def work() -> None:
        named = {"type": "function", "function": {"name": "other"}}
        async with world() as w:
            for body, word in (
                ({"tools": [PAINT], "tool_choice": named}, "not among tools"),
                ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "pattern"),
                ({"tools": [{"type": "function", "function": {"name": "a", "parameters": deep}}]}, "nested"),
                ({"tools": [PAINT], "tool_choice": "required", "grammar": 'root ::= "a"'}, "forced tool"),
            ):
                reply = await w.post(messages=QUESTION, **body)
                assert reply.status_code == 400
                assert word in reply.json()["error"]["message"]

    run(work())


def test_a_conversation_with_calls_goes_to_the_template_with_its_arguments_as_an_object() -> None:
    prompts: list[str] = []

    def reply(prompt: str) -> str:
        prompts.append(prompt)
        return "done."

    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
        "{{ c['function']['name'] }} {{ c['function']['arguments']['colour'] }}{% endfor %}"
        "{{ '\n' }}{% endfor %}\x1e"
    )

    async def work() -> None:
        async with world(reply, template=template) as w:
            call = {"id": "1", "type": "function", "function": {"name": "paint", "arguments": '{"colour": "teal"}'}}
            conversation = [
                *QUESTION,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "painted", "tool_call_id": "1"},
            ]
            await w.chat(messages=conversation)
            assert "assistant: paint teal\ntool: painted\n" in prompts[-1]

    run(work())
