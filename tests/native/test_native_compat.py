"""llama-cpp-python's way of asking about images, on a real model: ours, and beside it theirs."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from native_help import Child
from PIL import Image

from opsin.compat import Llama, Llava15ChatHandler, MoondreamChatHandler, MTMDChatHandler


def data_uri() -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((64, 48)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def question(text: str = "What's in this image?") -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "You describe images."},
        {
            "role": "user",
            "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": data_uri()}}],
        },
    ]


def opened(pair: Any) -> Llama:
    return Llama(
        model_path=str(pair.llm),
        chat_handler=Llava15ChatHandler(clip_model_path=str(pair.mmproj)),
        n_ctx=1024,
        n_threads=1,
        seed=3,
        verbose=False,
    )


@pytest.fixture(scope="module")
def llm(pair: Any) -> Iterator[Llama]:
    llm = opened(pair)
    yield llm
    llm.close()


def test_an_answer_about_an_image(llm: Llama) -> None:
    response = llm.create_chat_completion(messages=question(), max_tokens=12, temperature=0.0)
    assert response["usage"]["completion_tokens"] <= 12
    assert response["usage"]["prompt_tokens"] > 16
    assert response["choices"][0]["finish_reason"] in {"length", "stop"}
    chunks = llm.create_chat_completion(messages=question(), max_tokens=12, temperature=0.0, stream=True)
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert streamed == response["choices"][0]["message"]["content"]


def test_one_seed_gives_one_answer_and_another_gives_another(pair: Any) -> None:
    # Dropping an idle prefix changes the order in which attention adds up: logits move by some hundredths. Prefixes are
    # dropped after 40 steps at the earliest, and these are 5 x 7.
    llm = opened(pair)

    def text(**options: Any) -> str:
        response = llm.create_chat_completion(messages=question(), max_tokens=7, temperature=2.0, **options)
        content: str = response["choices"][0]["message"]["content"]
        return content

    try:
        assert text() == text() == text(seed=3)
        assert text(seed=4) != text(seed=3)
    finally:
        llm.close()


def test_an_answer_in_json(llm: Llama) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    response = llm.create_chat_completion(
        messages=question(), response_format={"type": "json_object", "schema": schema}, max_tokens=64
    )
    assert json.loads(response["choices"][0]["message"]["content"])["colour"] in {"red", "blue"}


def test_a_handler_with_a_format_of_its_own(pair: Any) -> None:
    handler = MoondreamChatHandler(clip_model_path=str(pair.mmproj))
    llm = Llama(model_path=str(pair.llm), chat_handler=handler, n_ctx=512, n_threads=1)
    try:
        response = llm.create_chat_completion(messages=question()[1:], max_tokens=4)
        assert response["choices"][0]["text"] == response["choices"][0]["message"]["content"]
    finally:
        llm.close()


THEIRS = """
import json
from llama_cpp import Llama
from llama_cpp.llama_chat_format import MTMDChatHandler
handler = MTMDChatHandler(clip_model_path=str(MMPROJ), verbose=False)
llm = Llama(model_path=str(LLM), chat_handler=handler, n_ctx=1024, n_threads=1, verbose=False)
whole = llm.create_chat_completion(messages=MESSAGES, max_tokens=24, temperature=0.0)
chunks = list(llm.create_chat_completion(messages=MESSAGES, max_tokens=24, temperature=0.0, stream=True))
print(json.dumps([whole, chunks]))
"""


def shape(value: Any) -> Any:
    """A dict's keys, all the way down; what the leaves hold does not matter."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value else type(value).__name__


def test_shape_and_words_are_the_peers_own(pair: Any, in_child: Callable[[str], Child]) -> None:
    """Through the model's own template both write the same prompt, so a greedy answer must be the same too."""
    child = in_child(f"MESSAGES = {question()!r}\n{THEIRS}")
    assert child.code == 0, child.err
    whole, chunks = json.loads(child.out.splitlines()[-1])
    llm = Llama(model_path=str(pair.llm), chat_handler=MTMDChatHandler(str(pair.mmproj)), n_ctx=1024, n_threads=1)
    try:
        options = {"messages": question(), "max_tokens": 24, "temperature": 0.0, "guard": False}
        ours = llm.create_chat_completion(**options)
        our_chunks = list(llm.create_chat_completion(**options, stream=True))
    finally:
        llm.close()
    assert shape(ours) == shape(whole)
    assert ours["usage"] == whole["usage"]
    assert ours["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    # Bytes that are no text (a random model writes such) are dropped there, and shown as U+FFFD here.
    content = ours["choices"][0]["message"]["content"].replace("\ufffd", "")
    assert content.strip() == whole["choices"][0]["message"]["content"].strip()
    for index in (0, 1, -1):
        assert shape(our_chunks[index]) == shape(chunks[index])
