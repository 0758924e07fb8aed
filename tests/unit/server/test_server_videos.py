"""Videos in requests: as vLLM, llama-server and Qwen write them, on the fake backend."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from api_driver import CHAT, run, world
from drawn_videos import scene, video

MP4 = "data:video/mp4;base64," + base64.b64encode(video()).decode()


def jpeg(number: int) -> str:
    out = io.BytesIO()
    scene(number).save(out, "JPEG")
    return base64.b64encode(out.getvalue()).decode()


def asked(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what happens?"}]}]


JPEGS = [jpeg(number) for number in range(4)]
LISTED = [f"data:image/jpeg;base64,{one}" for one in JPEGS]
PARTS = {
    "vllm": ({"type": "video_url", "video_url": {"url": MP4}}, 3),
    "text": ({"type": "video_url", "video_url": MP4}, 3),
    "qwen": ({"type": "video", "video": MP4, "fps": 5, "max_frames": 7}, 7),
    "qwen-count": ({"type": "video", "video": MP4, "fps": 1000, "nframes": 5}, 5),
    "llama-server": ({"type": "input_video", "input_video": {"data": MP4.partition(",")[2], "format": "mp4"}}, 3),
    "responses": ({"type": "input_video", "video_url": MP4}, 3),
    "list": ({"type": "video", "video": LISTED}, 4),
    "list-chosen": ({"type": "video", "video": LISTED, "max_frames": 2}, 2),
    "vllm-frames": ({"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(JPEGS)}"}}, 4),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_video_is_read_as_each_client_writes_it(name: str) -> None:
    part, frames = PARTS[name]

    async def work() -> None:
        async with world() as w:
            body = await w.chat(messages=asked(part))
            assert len(body["images"]) == frames
            assert len({image["sha256"] for image in body["images"]}) == frames
            assert {(image["width"], image["height"]) for image in body["images"]} == {(160, 120)}
            reply = await w.client.post("/v1/responses", json={"input": asked(part)})
            assert [one["sha256"] for one in reply.json()["images"]] == [one["sha256"] for one in body["images"]]

    run(work())


def test_images_and_videos_keep_their_order() -> None:
    still = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{jpeg(9)}"}}

    async def work() -> None:
        async with world() as w:
            body = await w.chat(messages=asked(PARTS["list"][0], still, PARTS["vllm"][0]))
            names = [image["sha256"] for image in body["images"]]
            alone = [
                image["sha256"]
                for part in (PARTS["list"][0], still, PARTS["vllm"][0])
                for image in (await w.chat(messages=asked(part)))["images"]
            ]
            assert names == alone

    run(work())


@pytest.mark.parametrize(
    ("parts", "param", "word", "status"),
    [
        ([{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}], "video_url", "no image of", 400),
        ([{"type": "video_url", "video_url": {"url": LISTED[0]}}], "video_url", "give it as an image", 415),
        ([{"type": "image_url", "image_url": {"url": MP4}}], "image_url", "video_url part", 415),
        ([{"type": "video_url"}], "messages[0].content[0]", "no video in it", 400),
        ([{"type": "video", "video": []}], "video", "", 400),
        (
            [{"type": "video", "video": MP4, "video_start": 3}],
            "messages[0].content[0]",
            "video_start is not supported",
            400,
        ),
        ([{"type": "video", "video": MP4, "fps": 0}], "fps", "greater than 0", 400),
        ([{"type": "video", "video": MP4, "max_frames": 9}], "video", "8 are the limit", 400),
        ([{"type": "video", "video": MP4, "max_frames": 5}] * 2, "video", "4 are the limit", 400),
        ([{"type": "video", "video": LISTED * 3}], "video", "8 are the limit", 400),
        ([{"type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}}], "video_url", "not fetched", 400),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}], "type", "input_audio", 400),
    ],
)
def test_what_is_no_video_is_refused_by_name(parts: list[Any], param: str, word: str, status: int) -> None:
    async def work() -> None:
        async with world(max_frames=8) as w:
            reply = await w.client.post(CHAT, json={"messages": asked(*parts)})
            error = reply.json()["error"]
            assert (reply.status_code, word in error["message"]) == (status, True), error
            assert param in error["param"]

    run(work())


def test_frames_are_shared_by_the_videos_of_a_request() -> None:
    async def work() -> None:
        async with world(max_frames=4) as w:
            part = {"type": "video", "video": MP4, "fps": 10}
            assert len((await w.chat(messages=asked(part)))["images"]) == 4
            assert len((await w.chat(messages=asked(part, part)))["images"]) == 4

    run(work())
