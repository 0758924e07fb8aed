"""Which frames of a video are read, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from drawn_videos import audio, bar, scene, video
from PIL import Image as Pil

from opsin.core.errors import BadImage, ImageTooLarge, ImageUnsupported
from opsin.core.request import Image
from opsin.core.settings import ImageSettings, VideoSettings
from opsin.images import load_image
from opsin.images.video import as_frames, is_video, read_video, spread

LIMITS = ImageSettings()
KINDS = {
    "mp4": {"codec": "libx264", "options": {"g": "12", "preset": "ultrafast", "bf": "2"}},
    "mov": {"codec": "mpeg4"},
    "webm": {"codec": "libvpx", "options": {"deadline": "realtime"}},
    "matroska": {"codec": "mpeg4", "options": {"g": "7"}},
    "avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "9"}},
    "gif": {"codec": "gif", "pixels": "rgb8"},
    "apng": {"codec": "apng", "pixels": "rgb24"},
}


def frames_of(source: object, **chosen: Any) -> list[Image]:
    return read_video(source, LIMITS, VideoSettings(**chosen))


def numbers(images: list[Image]) -> list[int]:
    return [bar(image.rgb, image.width) for image in images]


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_their_times_in_every_kind(kind: str) -> None:
    data = video(kind, **KINDS[kind])
    assert is_video(data, animations=True)
    assert is_video(data) == (kind not in {"gif", "apng"})
    images = frames_of(data)
    assert numbers(images) == [0, 10, 20]
    assert [image.frame for image in images] == [0, 1, 2]
    assert images[0].notes[0].startswith("3 of 30 frames, up to 2.0 s")
    assert numbers(frames_of(data, fps=2, max_frames=4)) in ([0, 8, 17, 25], [0, 10, 15, 25], [0, 5, 15, 25])
    assert numbers(frames_of(data, fps=1000, max_frames=256)) == list(range(30))


def test_frames_are_spread_evenly_with_the_first_and_the_last() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(101, 5) == [0, 25, 50, 75, 100]
    assert spread(10, 1) == [0]
    images = [load_image(scene(number), LIMITS) for number in range(9)]
    chosen = as_frames(images, 3)
    assert (numbers(chosen), [image.frame for image in chosen]) == ([0, 4, 8], [0, 1, 2])
    assert "3 of 9 frames" in chosen[0].notes[0]


def test_a_video_is_a_path_bytes_or_an_address(tmp_path: Path) -> None:
    file = tmp_path / "clip.bin"
    file.write_bytes(video())
    assert is_video(file)
    assert is_video(str(file))
    assert numbers(frames_of(file)) == [0, 10, 20]
    assert is_video("https://example.org/clip.mp4?key=1")
    assert is_video("data:video/webm;base64,AAAA")
    for other in ("https://example.org/mp4/photo.jpg", tmp_path, tmp_path / "none", "data:image/png;base64,AA", 3, b""):
        assert not is_video(other)


def test_frames_stand_upright_and_their_pixels_are_square() -> None:
    turned = video(change=lambda stream: stream.set_display_rotation(90))
    (image, *_) = frames_of(turned)
    assert (image.width, image.height) == (120, 160)
    unturned = Pil.frombytes("RGB", (120, 160), bytes(image.rgb)).rotate(-90, expand=True).tobytes()
    assert bar(unturned, 160) == 0, "turned counterclockwise, the bar's end is at the bottom left"
    flat = load_image(scene(0), LIMITS)
    first = frames_of(video())[0]
    assert (first.width, first.height) == (flat.width, flat.height)


def test_large_frames_are_shrunk_so_that_all_together_are_bounded() -> None:
    data = video(size=(1920, 1080), frames=4, rate=1)
    one, many = frames_of(data, max_frames=1), frames_of(data)
    assert (one[0].width, one[0].height) == (1920, 1080)
    assert len(many) == 4
    assert 5_000_000 < sum(image.width * image.height for image in many) <= 6_000_000


def test_sound_is_left_out_and_that_is_said() -> None:
    assert "its sound is not read" in frames_of(video(sound=True))[0].notes
    assert "its sound is not read" not in frames_of(video())[0].notes


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    good = video(options={"g": "5"}, container={"movflags": "faststart"}, path=str(tmp_path / "fast.mp4"))
    torn = bytearray(good)
    torn[len(good) // 2 : len(good) // 2 + 2000] = bytes(2000)
    for data, error, word in (
        (good[: len(good) * 2 // 3], BadImage, "cut short or damaged"),
        (video()[:-100], BadImage, "cut short"),
        (b"\0\0\0\x20ftypisom" + bytes(500), BadImage, "cut short or damaged"),
        (audio(), ImageUnsupported, "sound is not read"),
        (video(frames=0), ImageUnsupported, "no video in it"),
        (video("webm", "libvpx", frames=0), BadImage, "cut short"),
        (b"\x89PNG\r\n\x1a\n" + bytes(90), ImageUnsupported, "no video .PNG.: give it as an image"),
        (b"#EXTM3U\nfile:///etc/passwd\n", BadImage, "text file"),
        (b"\xff\xfb" + bytes(90), ImageUnsupported, "MP3 or AAC audio file"),
    ):
        with pytest.raises(error, match=word) as raised:
            frames_of(data)
        assert str(raised.value).count(". ") == 0


def test_a_video_that_is_too_long_too_large_or_of_too_many_pixels_is_refused() -> None:
    data = video()
    for limits, chosen, word in (
        (LIMITS, {"max_seconds": 1}, "at most .* in 1 s are read"),
        (LIMITS, {"max_bytes": 100}, "larger than the 100 bytes"),
        (ImageSettings(max_pixels=1000), {}, "at most 1,000 in all"),
    ):
        with pytest.raises(ImageTooLarge, match=word):
            read_video(data, limits, VideoSettings(**chosen))


def test_without_pyav_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImageUnsupported, match=r"pip install 'opsin\[video\]'"):
        frames_of(data)


def test_where_one_image_is_wanted_a_video_is_refused_with_what_to_do() -> None:
    with pytest.raises(ImageUnsupported, match="video_url part"):
        load_image(video(), LIMITS)
