"""`boxes: true` in requests, on the fake backend."""

from typing import Any

import pytest
from api_driver import data_url, run, world

from opsin.core.model_info import ModelInfo
from opsin.testing import FakeBackend

pytestmark = pytest.mark.slow

ANSWER = '[{"bbox_2d": [2, 0, 6, 8], "label": "cat"}, {"bbox_2d": [1, 2'
CAT = [{"label": "cat", "x1": 200.0, "y1": 0.0, "x2": 600.0, "y2": 800.0}]


def asked(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": data_url(size=size)}} for size in sizes]
    return [{"role": "user", "content": [*images, {"type": "text", "text": "Where is the cat?"}]}]


@pytest.fixture
def qwen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake backend sees 8 × 8 pixels of any image."""
    info = ModelInfo("fake", "fake", "qwen2.5vl_merger", "fake.gguf", "mmproj-fake.gguf", "f16")
    monkeypatch.setattr(FakeBackend, "info", info)


@pytest.mark.usefixtures("qwen")
def test_boxes_are_an_extension_of_each_answer() -> None:
    async def work() -> None:
        async with world(lambda _: ANSWER) as w:
            answer = await w.chat(messages=asked((800, 800)), boxes=True)
            assert answer["boxes"] == CAT
            assert answer["choices"][0]["message"]["content"] == ANSWER
            assert any("left out" in note for note in answer["images"][0]["notes"])
            assert "boxes" not in await w.chat(messages=asked((800, 800)))
            events = await w.stream(messages=asked((800, 800)), boxes=True)
            assert [event["boxes"] for event in events if event != "[DONE]" and "boxes" in event] == [CAT]
            content = [
                {"type": "input_image", "image_url": data_url(size=(800, 800))},
                {"type": "input_text", "text": "Where?"},
            ]
            reply = await w.post("/v1/responses", input=[{"role": "user", "content": content}], boxes=True)
            assert reply.json()["boxes"] == CAT

    run(work())


@pytest.mark.usefixtures("qwen")
def test_several_images_are_refused() -> None:
    async def work() -> None:
        async with world(lambda _: ANSWER) as w:
            reply = await w.post(messages=asked((8, 8), (9, 9)), boxes=True)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "boxes")
            assert "there are 2" in reply.json()["error"]["message"]

    run(work())


def test_an_unknown_convention_is_refused_before_an_image_is_read() -> None:
    async def work() -> None:
        async with world() as w:
            broken = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,no image"}}]}]
            reply = await w.post(messages=broken, boxes=True)
            assert reply.status_code == 400
            assert "type fake" in reply.json()["error"]["message"]
            reply = await w.post("/v1/completions", prompt="where", boxes=True)
            assert reply.status_code == 400
            assert "boxes" in reply.json()["error"]["message"]

    run(work())
