"""Budget, region and tiles in requests: for all images, for one, and refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from api_driver import QUESTION, data_url, run, world

from opsin.core.backend import BackendLimits
from opsin.core.image_options import ImageSizes
from opsin.testing.fake_backend import N_VOCAB

KEEPS = BackendLimits(
    512, 64, n_seq_max=8, n_vocab=N_VOCAB, n_embd=4, n_ctx_seq=512, images=ImageSizes(cell=10, least=2, most=400)
)
SHOT = data_url("red", (400, 200))


def part(**fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": SHOT}, **fields}


def asked(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": "what?"}, *parts]}]


def sizes(answer: Any) -> list[tuple[int, int]]:
    return [(image["width"], image["height"]) for image in answer["images"]]


def test_a_budget_for_all_images_and_one_for_one_of_them() -> None:
    async def work() -> None:
        async with world(limits=KEEPS) as w:
            own = {"type": "image_url", "image_url": {"url": SHOT, "image_max_tokens": 8}}
            parts = part(), part(image_max_tokens=32), own, part(detail="low")
            answer = await w.chat(messages=asked(*parts), image_max_tokens=50)
            assert sizes(answer) == [(100, 50), (80, 40), (40, 20), (100, 50)]
            assert "100 by 50" in answer["images"][0]["notes"][0]
            assert sizes(await w.chat(messages=asked(part(), part(detail="low")))) == [(400, 200), (140, 70)]
            responses = await w.post(
                "/v1/responses",
                input=[
                    {"role": "user", "content": [{"type": "input_image", "image_url": SHOT, "image_max_tokens": 8}]}
                ],
            )
            assert sizes(responses.json()) == [(40, 20)]

    run(work())


def test_anthropic_requests_have_them_too() -> None:
    async def work() -> None:
        async with world(limits=KEEPS) as w:
            source = {"type": "base64", "media_type": "image/png", "data": SHOT.partition(",")[2]}
            shot = {"type": "image", "source": source}
            blocks = [{**shot, "image_region": "50%,0,50%,100%"}, shot, {"type": "text", "text": "what?"}]
            body = {"model": "any", "max_tokens": 5, "messages": [{"role": "user", "content": blocks}]}
            answer = (await w.post("/v1/messages", **body, image_max_tokens=32)).json()
            assert sizes(answer) == [(50, 50), (80, 40)]
            counted = (await w.post("/v1/messages/count_tokens", **body, image_tiles="2x1")).json()
            whole = (await w.post("/v1/messages/count_tokens", **body)).json()
            assert counted["input_tokens"] > whole["input_tokens"]

    run(work())


def test_regions_and_tiles() -> None:
    async def work() -> None:
        async with world(limits=KEEPS) as w:
            parts = part(image_region=[300, 0, 100, 50]), part(image_region="50%,0%,50%,100%"), part(image_tiles="2x2")
            answer = await w.chat(messages=asked(*parts), image_region="0,0,40,40")
            assert sizes(answer) == [(100, 50), (200, 200), (40, 40), *[(20, 20)] * 4]
            whole = await w.chat(messages=asked(part()), image_tiles="2x1", image_max_tokens=18)
            assert sizes(whole) == [(60, 30), (40, 40), (40, 40)]

    run(work())


def test_frames_of_a_video_have_them_too() -> None:
    async def work() -> None:
        async with world(limits=KEEPS) as w:
            frames = {"type": "video", "video": [SHOT, data_url("blue", (400, 200))]}
            answer = await w.chat(messages=asked({**frames, "image_region": "0,0,50%,100%"}), image_max_tokens=9)
            assert sizes(answer) == [(30, 30), (30, 30)]
            refused = await w.post(messages=asked(frames), image_tiles="2x2")
            assert (refused.status_code, "image_tiles" in refused.text) == (400, True)

    run(work())


def test_what_changes_nothing_is_said() -> None:
    async def work() -> None:
        async with world() as w:
            answer = await w.chat(messages=asked(part()), image_max_tokens=50)
            assert sizes(answer) == [(400, 200)]
            assert "changes nothing" in answer["images"][0]["notes"][0]

    run(work())


@pytest.mark.parametrize(
    ("fields", "of_part", "param"),
    [
        ({"image_max_tokens": 0}, {}, "image_max_tokens"),
        ({"image_region": "1,2,3"}, {}, "image_region"),
        ({"image_region": [1, 2, 3, -4]}, {}, "image_region"),
        ({"image_tiles": "9x9"}, {}, "image_tiles"),
        ({}, {"image_region": "a"}, "messages[0].content[1].image_region"),
        ({}, {"image_region": "0,0,4000,10"}, "messages[0].content[1].image_url"),
        ({}, {"image_tiles": "4x4"}, "messages"),  # with the whole image more than max_images
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], of_part: dict[str, Any], param: str) -> None:
    async def work() -> None:
        async with world(limits=KEEPS) as w:
            reply = await w.post(messages=asked(part(**of_part)), **fields)
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (400, param), error
            assert error["message"].endswith(".")

    run(work())


def test_texts_without_images_do_not_take_them() -> None:
    async def work() -> None:
        async with world() as w:
            reply = await w.post("/v1/completions", prompt="a", image_max_tokens=8)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "image_max_tokens")
            assert (await w.post(messages=QUESTION, image_max_tokens=8)).status_code == 200

    run(work())
