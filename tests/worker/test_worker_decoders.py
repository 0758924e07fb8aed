"""Decoder processes: the same images as in this process, and files that crash or hold them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from io import BytesIO

import pytest
from drawn_videos import video
from PIL import Image

from opsin.core.errors import BadImage, ImageUnsupported
from opsin.core.image_options import ANY_SIZES, AS_IT_IS, ImageOptions
from opsin.core.settings import ImageSettings, VideoSettings
from opsin.worker import DecoderPool, decoders
from opsin.worker.messages import Pixels

pytestmark = pytest.mark.slow

LIMITS = ImageSettings()
AS_ALWAYS = LIMITS, AS_IT_IS, ANY_SIZES
# A decoder that aborts on one file and never comes back from another.
HOSTILE = """
import os, threading
from opsin.worker import decoders
honest = decoders.decode
def decode(data, *more):
    if data == b"crash":
        os.abort()
    if data == b"hang":
        threading.Event().wait()
    return honest(data, *more)
decoders.decode = decode
decoders.main()
"""


def png(width: int, height: int) -> bytes:
    file = BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    made = DecoderPool()
    yield made
    made.close()


def test_a_process_decodes_what_this_one_does(pool: DecoderPool) -> None:
    data = png(1024, 600)
    assert pool.call(decoders.measure, data, LIMITS) == (1024 * 600, 1, None)
    low, tiles = ImageOptions(detail="low"), ImageOptions(tiles="2x1")
    for file, options in ((data, AS_IT_IS), (data, low), (png(2000, 1000), AS_IT_IS), (png(2000, 1400), tiles)):
        asked = file, LIMITS, options, ANY_SIZES
        pairs = list(zip(pool.call(decoders.decode, *asked), decoders.decode(*asked), strict=True))
        assert len(pairs) == options.count  # some of them are shared, some are copied
        for apart, wanted in pairs:
            assert (apart.sha256, apart.width, apart.notes) == (wanted.sha256, wanted.width, wanted.notes)
            assert bytes(apart.rgb) == bytes(wanted.rgb)  # type: ignore[arg-type]
    with pytest.raises(ImageUnsupported):
        pool.call(decoders.decode, b"%!PS and more", *AS_ALWAYS)


def test_a_file_that_crashes_its_decoder_is_refused_and_the_others_are_decoded(
    pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_START", HOSTILE)
    pool.close()  # the one that was started before
    assert pool.call(decoders.decode, png(8, 8), *AS_ALWAYS)[0].width == 8
    with pytest.raises(BadImage, match="SIGABRT"):
        pool.call(decoders.decode, b"crash", *AS_ALWAYS)
    assert pool.call(decoders.decode, png(9, 8), *AS_ALWAYS)[0].width == 9


def test_a_file_that_takes_too_long_is_refused_while_others_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_START", HOSTILE)
    pool, told = DecoderPool(8.0), []

    def hanging() -> None:
        try:
            pool.call(decoders.decode, b"hang", *AS_ALWAYS)
        except BadImage as error:
            told.append(str(error))

    thread = threading.Thread(target=hanging)
    thread.start()
    assert pool.call(decoders.decode, png(9, 8), *AS_ALWAYS)[0].width == 9
    thread.join(60)
    assert len(told) == 1
    assert "longer than 8 s" in told[0]
    pool.close()


def test_frames_come_as_they_are_read_here_and_large_ones_in_shared_memory(pool: DecoderPool) -> None:
    data, chosen = video(size=(1920, 1080), frames=3, rate=1), VideoSettings(max_frames=2)
    apart = pool.call(decoders.decode_video, data, LIMITS, chosen, AS_IT_IS, ANY_SIZES)
    here = decoders.decode_video(data, LIMITS, chosen, AS_IT_IS, ANY_SIZES)
    assert [(one.sha256, one.frame, one.notes) for one in apart] == [(one.sha256, one.frame, one.notes) for one in here]
    assert [bytes(one.rgb) for one in apart] == [bytes(one.rgb) for one in here]
    assert all(isinstance(one.rgb, Pixels) for one in apart)


def test_a_video_that_takes_too_long_ends_with_its_process(pool: DecoderPool) -> None:
    hasty = DecoderPool(0.05)
    try:
        slow = video(size=(1920, 1080), frames=60, options={"g": "60"})
        with pytest.raises(BadImage, match="took longer than"):
            hasty.call(
                decoders.decode_video, slow, LIMITS, VideoSettings(fps=1000, max_frames=256), AS_IT_IS, ANY_SIZES
            )
    finally:
        hasty.close()
