"""Answers that the Responses API may go on from: what is remembered, for whom, for how long, and how much."""

from typing import Any

import pytest
from api_driver import data_url, run, world

from opsin.server.stored import KEPT_BYTES_BY_KEY, KEPT_SECONDS, StoredResponses
from opsin.testing import FakeClock

RESPONSES = "/v1/responses"
TOOL = {"type": "function", "name": "paint", "parameters": {"type": "object"}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on_from_an_answer(stream: bool) -> None:
    prompts: list[str] = []

    async def work() -> None:
        async with world(lambda prompt: prompts.append(prompt) or "red.") as w:  # type: ignore[func-returns-value]
            image = {"type": "input_image", "image_url": data_url()}
            first = {"role": "user", "content": [image, {"type": "input_text", "text": "colour?"}]}
            made = (await w.post(RESPONSES, input=[first], instructions="Be brief.")).json()
            for question in ("sure?", "really?"):
                reply = await w.post(RESPONSES, input=question, previous_response_id=made["id"], stream=stream)
                assert reply.status_code == 200, reply.text
            if not stream:
                again = await w.post(RESPONSES, input="and?", previous_response_id=reply.json()["id"])
                assert again.json()["previous_response_id"] == reply.json()["id"]
                assert prompts[-1].count("red.") == 2
            # The instructions hold for their own answer alone, and each goes on from where it says.
            assert prompts[-1].startswith("user: <")
            assert "colour?\nassistant: red.\nuser: " in prompts[-1]
            assert "sure?" not in prompts[-1]

    run(work())


def test_items_of_an_answer_may_be_named_instead_of_sent() -> None:
    prompts: list[str] = []
    call = '{"name": "paint", "arguments": {"colour": "red"}}'

    async def work() -> None:
        async with world(lambda prompt: prompts.append(prompt) or call) as w:  # type: ignore[func-returns-value]
            made = (await w.post(RESPONSES, input="paint!", tools=[TOOL])).json()
            (item,) = made["output"]
            assert item["type"] == "function_call"
            asked: list[Any] = [
                {"role": "user", "content": "paint!"},
                {"type": "item_reference", "id": item["id"]},
                {"type": "function_call_output", "call_id": item["call_id"], "output": "done"},
            ]
            assert (await w.post(RESPONSES, input=asked, tools=[TOOL])).status_code == 200
            assert call in prompts[-1]
            assert "done" in prompts[-1]

    run(work())


def test_what_a_conversation_goes_on_from_counts_for_it_too() -> None:
    """Each conversation keeps its images in memory, also when the answer that it goes on from is forgotten."""
    part = KEPT_BYTES_BY_KEY // 3

    async def work() -> None:
        async with world(max_prompt_chars=KEPT_BYTES_BY_KEY) as w:
            first = (await w.post(RESPONSES, input="\x1e" + "x" * 10)).json()["id"]
            key = next(iter(w.manager.stored._stored))[0]
            held = w.manager.stored._stored[key, first]
            held.size += part
            held.conversation[0].content[0].text += "x" * part
            await w.post(RESPONSES, input="?", previous_response_id=first, max_output_tokens=1)
            *_, last = w.manager.stored._stored.values()
            assert last.size > part

    run(work())


def test_what_was_not_to_be_stored_is_not() -> None:
    async def work() -> None:
        async with world() as w:
            made = (await w.post(RESPONSES, input="?", store=False)).json()
            assert made["store"] is False
            reply = await w.post(RESPONSES, input="?", previous_response_id=made["id"])
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "previous_response_id")

    run(work())


def test_one_keys_answers_are_not_anothers() -> None:
    stored = StoredResponses()
    stored.keep("a", "resp_1", ["x"], {"msg_1": "y"}, 10)
    assert stored.conversation("a", "resp_1") == ["x"]
    assert stored.item("a", "msg_1") == "y"
    assert stored.conversation("b", "resp_1") is None
    assert stored.item("b", "msg_1") is None


def test_answers_are_forgotten_after_their_time() -> None:
    clock = FakeClock()
    stored = StoredResponses(clock)
    stored.keep("a", "resp_1", ["x"], {}, 10)
    clock.spend(1e3 * KEPT_SECONDS - 1)
    assert stored.conversation("a", "resp_1")
    clock.spend(2)
    assert stored.conversation("a", "resp_1") is None


def test_a_keys_oldest_answers_go_first_and_nobody_elses() -> None:
    stored = StoredResponses()
    stored.keep("b", "resp_0", ["b"], {}, KEPT_BYTES_BY_KEY // 2)
    for number in range(5):
        stored.keep("a", f"resp_{number}", ["x"], {}, KEPT_BYTES_BY_KEY // 3)
    assert [stored.conversation("a", f"resp_{number}") is not None for number in range(5)] == [False] * 2 + [True] * 3
    assert stored.conversation("b", "resp_0") == ["b"]
    stored.keep("a", "large", ["x"], {}, KEPT_BYTES_BY_KEY + 1)
    assert stored.conversation("a", "large") is None
    assert stored.conversation("a", "resp_4")
    for number in range(12):  # all keys together
        stored.keep(f"key {number}", "resp", ["x"], {}, KEPT_BYTES_BY_KEY)
    assert stored.conversation("b", "resp_0") is None
    assert stored.conversation("key 11", "resp")
