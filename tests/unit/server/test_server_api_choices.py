"""A response format of the type `choices` on the fake backend, through all three APIs that take one."""

from typing import Any

import pytest
from api_driver import CHAT, QUESTION, events, run, text_of, world

pytestmark = pytest.mark.slow

COLOURS = {"type": "choices", "choices": ["red", "green", "a blue one"]}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": QUESTION, "response_format": COLOURS},
    "/v1/completions": {"prompt": "a colour: \x1e", "response_format": COLOURS},
    "/v1/responses": {"input": "which colour?", "text": {"format": COLOURS}},
}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": {"type": "object"}}}


def said(body: dict[str, Any]) -> Any:
    if "output" in body:
        return body["output"][0]["content"][0]["text"]
    (choice,) = body["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"]


@pytest.mark.parametrize("path", BODIES)
def test_the_answer_is_the_likeliest_label_and_says_how_likely_all_are(path: str) -> None:
    async def work() -> None:
        async with world(lambda _: "green, I think") as w:
            reply = await w.post(path, **BODIES[path], temperature=0.3)
            assert reply.status_code == 200, reply.text
            body = reply.json()
            assert said(body) == body["value"] == "green"
            assert list(body["probabilities"]) == COLOURS["choices"]
            assert sum(body["probabilities"].values()) == pytest.approx(1)
            assert body["margin"] > 0.9 < body["coverage"]
            assert "expected" not in body
            assert w.backend.drawn_with, "a sampler is made"

    run(work())


def test_a_stream_has_the_label_in_one_piece_and_its_probabilities_at_the_end() -> None:
    async def work() -> None:
        async with world(lambda _: "red") as w:
            chunks = await w.stream(**BODIES[CHAT])
            assert text_of(chunks) == "red"
            assert sum("content" in one["choices"][0]["delta"] for one in chunks[1:-1]) == 1
            assert chunks[-2]["probabilities"]["red"] > 0.9
            found = events((await w.post("/v1/responses", **BODIES["/v1/responses"], stream=True)).text)
            deltas = [one["delta"] for one in found if one["type"] == "response.output_text.delta"]
            assert deltas == ["red"]
            assert found[-1]["response"]["probabilities"]["red"] > 0.9

    run(work())


@pytest.mark.parametrize("path", BODIES)
def test_fields_that_only_the_command_has_are_ignored_by_name(path: str) -> None:
    strange = {"choices": ["red", "green"], "scale": "1-5", "boolean": True, "reasons": True}

    async def work() -> None:
        async with world(lambda _: "it is red") as w:
            body = {name: value for name, value in BODIES[path].items() if name not in {"response_format", "text"}}
            reply = await w.post(path, **body, **strange)
            assert reply.status_code == 200, reply.text
            assert said(reply.json()) == "it is red"
            assert set(reply.headers["opsin-ignored"].split(", ")) == set(strange)

    run(work())


def test_a_scale_a_boolean_and_reasons() -> None:
    async def work() -> None:
        async with world(lambda _: "as it is round, so 4.") as w:
            wanted = {"type": "choices", "scale": "1-5"}
            for more in ({}, {"reasons": None}, {"reasons": True}):
                body = await w.chat(response_format={**wanted, **more})
                assert (said(body), body["value"]) == ("4", 4)
                assert body["choices"][0]["message"]["reasoning_content"] == "as it is round, so 4."
                assert body["expected"] == pytest.approx(4, abs=0.1)
            body = await w.chat(response_format={**wanted, "reasons": False})
            assert body["choices"][0]["message"].get("reasoning_content") is None
            assert body["coverage"] < 0.1
            assert (await w.chat(response_format={"type": "choices", "boolean": True}))["value"] in {True, False}

    run(work())


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"n": 2}, "n"),
        ({"tools": [TOOL]}, "tools"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"json_schema": {"type": "string"}}, "json_schema"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"thinking": True}, "thinking"),
        ({"response_format": {"type": "choices"}}, "none of them"),
        ({"response_format": {"type": "choices", "choices": ["a", "b"], "boolean": True}}, "choices and boolean"),
        ({"response_format": {"type": "choices", "choices": ["a"]}}, "choices"),
        ({"response_format": {"type": "choices", "choices": ["a", "a"]}}, "choices"),
        ({"response_format": {"type": "choices", "scale": "9"}}, "scale"),
        ({"response_format": {"type": "choices", "scale": "1-5", "labels": []}}, "labels"),
        ({"guided_choice": ["a", "b"]}, "choices"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(more: dict[str, Any], word: str) -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.post(**{**BODIES[CHAT], **more})
            assert reply.status_code == 400, reply.text
            assert word in reply.json()["error"]["message"].lower()

    run(work())
