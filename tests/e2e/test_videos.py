"""Frames and videos by command, from Python and over HTTP: on the demo model, and where Qwen's encoder merges them."""

import asyncio
import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from drawn_videos import audio, scene, video
from serve_process import served

from opsin import Opsin
from opsin.core.errors import BadImage, BadParameter, ImageUnsupported
from synth import write_pair

pytestmark = [pytest.mark.slow, pytest.mark.native]

QUESTION = "What is in this picture?"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a video, its frames as images, an animation, a damaged video and a sound."""
    place = tmp_path_factory.mktemp("clip")
    (place / "clip.mp4").write_bytes(video(frames=40, sound=True))
    (place / "clip.webm").write_bytes(video("webm", "libvpx", frames=40, options={"deadline": "realtime"}))
    (place / "clip.gif").write_bytes(video("gif", "gif", frames=40, pixels="rgb8"))
    (place / "torn.mp4").write_bytes(video()[:-2000])
    (place / "song.m4a").write_bytes(audio())
    for number in range(6):
        scene(number).save(place / f"frame{number}.png")
    return place


@pytest.fixture(scope="module", params=["qwen2vl-tiny", "qwen2.5vl-tiny"])
def qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_pair(request.param, tmp_path_factory.mktemp("qwen"))


def ask(env: dict[str, str], place: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opsin", "ask", *arguments, "--temperature", "0", "--max-tokens", "8"]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def row(env: dict[str, str], place: Path, *arguments: str) -> Any:
    return json.loads(ask(env, place, *arguments, "--json").stdout)


def test_a_video_by_command(clip: Path, opsin_env: dict[str, str]) -> None:
    shown = ask(opsin_env, clip, "clip.mp4", QUESTION)
    assert "4 of 40 frames" in shown.stderr
    assert "its sound is not read" in shown.stderr
    assert "reads 4 images" in shown.stderr
    assert shown.stdout.startswith("a ")
    chosen = row(opsin_env, clip, "clip.webm", QUESTION, "--fps", "10", "--max-frames", "3")
    assert (chosen["source"], len(chosen["images"])) == ("clip.webm", 3)
    assert len(row(opsin_env, clip, "clip.gif", QUESTION)["images"]) == 1
    assert len(row(opsin_env, clip, "clip.gif", QUESTION, "--frames")["images"]) == 4


def test_several_frames_are_one_request(clip: Path, opsin_env: dict[str, str]) -> None:
    names = [f"frame{number}.png" for number in range(6)]
    asked = row(opsin_env, clip, *names, "What happens?", "--together", "--frames")
    assert (asked["source"], len(asked["images"])) == (names, 6)
    fewer = row(opsin_env, clip, *names, "What happens?", "--frames", "--max-frames", "3")
    assert len(fewer["images"]) == 3
    assert "3 of 6 frames, evenly spread" in fewer["images"][0]["notes"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["torn.mp4"], "cut short or damaged"),
        (["song.m4a"], "an audio file|sound is not read"),
        (["frame0.png", "frame1.png", "--fps", "2"], "fps is for videos"),
        (["frame0.png", "frame1.png", "--frames", "--fps", "2"], "fps is for videos"),
        (["clip.mp4", "--max-frames", "0"], "max_frames must be"),
        (["clip.mp4", "--fps", "-1"], "fps must be"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments: list[str], word: str, clip: Path, opsin_env: dict[str, str]) -> None:
    sources = [one for one in arguments if "." in one]
    options = [one for one in arguments if one not in sources]
    said = ask(opsin_env, clip, *sources, QUESTION, *options, code=2).stderr
    assert any(one in said for one in word.split("|")), said


def test_from_python_frames_cost_half_where_the_encoder_merges_them(clip: Path, qwen: Any) -> None:
    params = {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "guard": False}
    with Opsin(qwen.llm, qwen.mmproj, config=False, ctx=4096, image_max_tokens=64) as opsin:
        frames = [clip / f"frame{number}.png" for number in range(6)]
        apart = opsin.ask(frames, "What happens?", **params)
        merged = opsin.ask(frames, "What happens?", frames=True, **params)
        assert merged.usage.image_tokens * 2 == apart.usage.image_tokens
        assert "6 of them are read as 3 images" in " ".join(merged.images[0].notes)
        read = opsin.images(clip / "clip.mp4", fps=2, max_frames=5)
        assert [image.frame for image in read] == list(range(5))
        asked = opsin.ask(clip / "clip.mp4", "What happens?", fps=2, max_frames=5, **params)
        later = asyncio.run(opsin.ask_async(clip / "clip.mp4", "What happens?", fps=2, max_frames=5, **params))
        assert [image.sha256 for image in asked.images] == [image.sha256 for image in read]
        assert (later.text, [image.cached for image in later.images]) == (asked.text, [True] * 5)
        mapped = list(opsin.map([clip / "clip.mp4", clip / "frame0.png"], "What?", max_frames=2, **params))
        assert [len(one.answer.images) for one in mapped if one.answer] == [2, 1]
        for wrong, error in (({"fps": 1}, BadParameter), ({"max_frames": 2.5}, BadParameter)):
            with pytest.raises(error):
                opsin.ask(clip / "frame0.png", "What?", **wrong)
            with pytest.raises(error):
                opsin.count_tokens(clip / "frame0.png", "What?", **wrong)
        with pytest.raises(ImageUnsupported, match="video_url part"):
            opsin.image(clip / "clip.mp4")
        with pytest.raises(BadImage, match="cut short"):
            opsin.ask(clip / "torn.mp4", "What?")


def test_over_http_a_video_is_decoded_apart_and_merged(clip: Path, qwen: Any) -> None:
    def part(name: str) -> dict[str, Any]:
        data = base64.b64encode((clip / name).read_bytes()).decode()
        return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}

    def asked(*parts: dict[str, Any]) -> dict[str, Any]:
        content = [*parts, {"type": "text", "text": "What happens?"}]
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}

    pair = ("--model", str(qwen.llm), "--mmproj", str(qwen.mmproj), "--ctx", "4096", "--image-max-tokens", "64")
    with served(*pair, "--media-path", str(clip)) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        path = "/v1/chat/completions"
        first = client.post(path, json=asked(part("clip.mp4")))
        assert first.status_code == 200, first.text
        images = first.json()["images"]
        assert [bool(image["tokens"]) for image in images] == [True, False, True, False]
        assert first.json()["usage"]["prompt_tokens_details"]["image_tokens"] == sum(one["tokens"] for one in images)
        named = {"type": "video", "video": f"file://{clip}/clip.webm", "fps": 0.5}
        assert len(client.post(path, json=asked(named)).json()["images"]) == 2
        torn = client.post(path, json=asked(part("torn.mp4")))
        assert (torn.status_code, torn.json()["error"]["code"]) == (400, "bad_image")
        sound = client.post(path, json=asked(part("song.m4a")))
        assert sound.status_code == 415, sound.text
        again = client.post(path, json=asked(part("clip.mp4"))).json()
        assert all(image["cached"] for image in again["images"])
