"""Frames of a video: llama.cpp's Qwen encoders read two of them as one image with time in it (temporal merge)."""

from collections.abc import Sequence
from itertools import takewhile

from opsin.core.request import Image, ImageChunk


def follows(image: Image, before: object) -> bool:
    """Whether an image is the next frame of the video of what stands right before it, in the same size."""
    return (
        isinstance(before, Image)
        and image.frame is not None
        and before.frame == image.frame - 1
        and (before.width, before.height) == (image.width, image.height)
    )


def mergeable(inputs: Sequence[object]) -> set[int]:
    """Which of a prompt's images, by their numbers, mtmd may merge: it takes them two by two, whatever they show."""
    pairs, number, before = set[int](), -1, None
    for given in inputs:
        if isinstance(given, Image):
            number += 1
            if number - 1 not in pairs and follows(given, before):
                pairs |= {number - 1, number}
        before = given
    return pairs


def notes(images: Sequence[Image], chunks: Sequence[ImageChunk], at: int) -> tuple[str, ...]:
    """What is said with the first frame of a video, at that number: whether the model sees the frames one by one."""
    count = sum(1 for _ in takewhile(lambda pair: pair[1].frame == pair[0], enumerate(images[at:])))
    mine = [chunk for chunk in chunks if at <= chunk.image < at + count]
    if any(chunk.frames > 1 for chunk in mine):
        return (f"the model merges frames in pairs: {count} of them are read as {len(mine)} images",)
    return (f"the model does not merge frames: it reads {count} images, in this order",) if count > 1 else ()
