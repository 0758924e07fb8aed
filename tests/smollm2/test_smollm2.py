"""What random weights cannot show: a real model that answers, keeps to schemas, calls tools, and loops at times."""

import json
import re
import zlib
from typing import Any

import pytest

from opsin import Message, Opsin
from opsin.core.answer import ReasoningStyle
from opsin.core.errors import BadInput
from opsin.core.request import Prompt, SamplingParams, TextPart
from opsin.core.settings import ServerSettings
from opsin.server.schema import ChosenTool, FunctionIn
from opsin.server.tools import CallReader, plan_tools


def ask(opsin: Opsin, question: str, **params: Any) -> Any:
    return opsin.submit([Message("user", question)], **{"temperature": 0.0, "max_tokens": 60, **params})


def test_it_answers_in_words(smollm2: Opsin) -> None:
    answer = ask(smollm2, "Write one sentence about a cat.").result()
    assert smollm2.info.projector is None
    assert len(re.findall(r"[A-Za-z]+", answer.text)) > 4
    assert answer.usage.image_tokens == 0


def test_many_at_once_say_what_each_says_alone(smollm2: Opsin) -> None:
    questions = [f"Write one sentence about {thing}." for thing in ("a cat", "the sea", "a red car")]
    alone = [ask(smollm2, question, max_tokens=12).result().text for question in questions]
    streams = [ask(smollm2, question, max_tokens=12) for question in questions * 2]
    together = [stream.result().text for stream in streams]
    # Rounding differs with the batch, and q4 weights may turn a close choice: the beginnings are the same.
    assert sum(one[:10] == other[:10] for one, other in zip(alone * 2, together, strict=True)) >= 4


def test_images_are_refused_in_one_sentence(smollm2: Opsin) -> None:
    import numpy as np

    with pytest.raises(BadInput, match=r"without a vision encoder|no image"):
        smollm2.ask(np.zeros((32, 32, 3), np.uint8), "What is this?")


def test_a_schema_gives_what_it_asks_for(smollm2: Opsin) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "country": {"enum": ["France", "Spain", "Italy"]},
            "large": {"type": "boolean"},
        },
        "required": ["city", "country", "large"],
        "additionalProperties": False,
    }
    answer = ask(
        smollm2, "Paris is the large capital of France. Describe it as JSON.", json_schema=json.dumps(schema)
    ).result()
    value = json.loads(answer.text)
    assert answer.finish_reason == "stop"
    assert value["city"] == "Paris"
    assert value["country"] == "France"


def test_a_grammar_gives_what_it_asks_for(smollm2: Opsin) -> None:
    answer = ask(smollm2, "Is the sky blue?", grammar='root ::= ("yes" | "no") ", " [a-z ]{3,30} "."').result()
    assert re.fullmatch(r"(yes|no), [a-z ]{3,30}\.", answer.text)


@pytest.mark.parametrize("asked", [{"json_schema": '{"enum": ["red", "blue"]}'}, {"grammar": r'root ::= "\"red\""'}])
def test_a_schema_holds_only_behind_the_reasoning(smollm2: Opsin, asked: dict[str, str]) -> None:
    """The prompt opens a block of reasoning, its budget closes it: what is in it is free, what follows is not."""
    style = ReasoningStyle()
    text = "<|im_start|>user\nWhat colour is the sky?<|im_end|>\n<|im_start|>assistant\n<think>\nThe user asks"
    prompt = Prompt((TextPart(text),), thinking=True, reasoning=style)
    params = SamplingParams(temperature=0.0, max_tokens=60, max_thinking_tokens=12, guard=False, **asked)
    answer = smollm2._runtime.engine.submit(prompt, params).result()
    assert answer.reasoning is not None
    assert len(answer.reasoning.split()) > 3
    assert json.loads(answer.text) in {"red", "blue"}
    assert answer.finish_reason == "stop"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": does,
            "parameters": {
                "type": "object",
                "properties": {argument: {"$ref": "#/$defs/word"}},
                "required": [argument],
                "$defs": {"word": {"type": "string", "maxLength": 12}},
                "additionalProperties": False,
            },
        },
    }
    for name, does, argument in (("get_weather", "The weather in a city", "city"), ("get_price", "A price", "product"))
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_must_come_comes(smollm2: Opsin, choice: Any) -> None:
    functions = [FunctionIn.model_validate(tool["function"]) for tool in TOOLS]
    wanted = ChosenTool.model_validate(choice) if isinstance(choice, dict) else choice
    plan = plan_tools(functions, wanted, smollm2._runtime.prompts, ServerSettings())
    assert plan is not None
    messages = plan.messages([Message("user", "What is the weather in Paris?")])
    stream = smollm2.submit(messages, json_schema=plan.schema, temperature=0.0, max_tokens=80)
    reader = CallReader(plan)
    reader.feed(stream.result().text)
    reader.finish()
    assert len(reader.calls) == 1
    called = reader.calls[0]["function"]
    assert called["name"] in {"get_weather", "get_price"}
    assert all(len(value) <= 12 for value in json.loads(called["arguments"]).values())


def stale(text: str, words: int) -> float:
    """By a rule of its own: the share of the last words that begin four words which the text has said before."""
    said = text.split()
    fours = [tuple(said[start : start + 4]) for start in range(len(said) - 3)]
    again = [four in fours[:start] for start, four in enumerate(fours)][-words:]
    return sum(again) / max(1, len(again))


TOPICS = (
    "a cat", "the sea", "a red car", "bread", "the moon", "a bridge", "rain", "a bicycle", "the number seven", "music",
    "a garden", "gold", "a river", "winter", "glass", "a clock", "paper", "the sun", "a mountain", "tea",
)  # fmt: skip


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_guard_ends_loops_and_nothing_else(smollm2: Opsin) -> None:
    questions = [f"Write a story about {topic}." for topic in TOPICS]
    questions += [f"List words about {topic}." for topic in TOPICS]
    streams = [ask(smollm2, question, max_tokens=None) for question in questions]
    answers = [stream.result() for stream in streams]
    cut = [answer for answer in answers if answer.guard is not None]
    left = [answer for answer in answers if answer.limit == "tokens"]
    print(f"{len(cut)} of {len(answers)} were ended by the guard, {len(left)} reached 1,024 tokens")
    fresh = [answer.text[-600:] for answer in cut if stale(answer.text, 60) < 0.5]
    assert [text for text in fresh if len(zlib.compress(text.encode())) > len(text) / 4] == []  # rows of one letter
    assert [answer.text[-600:] for answer in left if stale(answer.text, 200) > 0.9] == []


@pytest.mark.timeout(900)
def test_a_repetition_that_was_asked_for_is_not_cut(smollm2: Opsin) -> None:
    answer = ask(smollm2, "Repeat the word hello 200 times.", max_tokens=400).result()
    print(answer.text[-200:], answer.finish_reason, answer.guard)
    assert answer.guard is None
