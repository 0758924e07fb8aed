"""What a command or a program names as images: videos and documents are read in a process that can be ended."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from opsin.core.errors import BadParameter
from opsin.core.image_options import ANY_SIZES, ImageOptions, ImageSizes
from opsin.core.request import Image
from opsin.core.settings import ImageSettings, VideoSettings
from opsin.images import is_pdf, load_images
from opsin.images.decode import read_source
from opsin.images.video import as_frames, is_video
from opsin.worker.decoders import DecoderPool, decode, decode_video, measure

Sizes = Callable[[], ImageSizes]
VIDEO_SECONDS = 120.0
"""What one video may take; in a server as long as an image."""


def load_source(
    source: object, limits: ImageSettings, video: VideoSettings, options: ImageOptions, sizes: Sizes, *, frames: bool
) -> list[Image]:
    """The frames of a video, an image and its tiles, or pages; with `frames` also those of an animation (GIF, APNG).

    `sizes` is asked for documents that can be read. Raises BadImage and its kinds, FetchFailed, BadParameter.
    """
    is_one = is_video(source, animations=frames)
    if options.tiles and (frames or is_one):
        raise BadParameter("Tiles are for images, not for the frames of a video: leave them out.")
    if is_one and limits.pages:
        raise BadParameter("Pages are those of documents, and this is a video: leave them out.")
    if is_one:
        with contextlib.closing(DecoderPool(VIDEO_SECONDS)) as pool:
            images: list[Image] = pool.call(decode_video, source, limits, video, options.split()[0], ANY_SIZES)
            return images
    begin = time.perf_counter()
    name, found = read_source(source, limits)
    if limits.pages and not isinstance(found, bytes):
        raise BadParameter("Pages are those of files: leave them out for an image that is open already.")
    fetch_ms = (time.perf_counter() - begin) * 1e3
    if isinstance(found, bytes) and (limits.pages or is_pdf(found)):
        with contextlib.closing(DecoderPool()) as pool:
            pool.call(measure, found, limits, options, ANY_SIZES, name)
            images = pool.call(decode, found, limits, options, sizes(), name)
    else:
        images = load_images(found, limits, options.split()[0], name=name)
    return [dataclasses.replace(images[0], fetch_ms=fetch_ms), *images[1:]] if isinstance(found, bytes) else images


def join(groups: Iterable[Sequence[Image]], *, frames: bool = False, **video: Any) -> list[Image]:
    """The images of several sources; as `frames` they are one video, of which some are taken if there are too many."""
    images = [image for group in groups for image in group]
    return as_frames(images, video.get("max_frames")) if frames else images


def check_videos(sources: Sequence[object], *, frames: bool = False, **video: Any) -> None:
    """Raise BadParameter if somebody made a setting of videos, and no source is one ("-" may be)."""
    without_effect = sorted(video.keys() - ({"max_frames"} if frames else set()))
    if without_effect and not any(
        (isinstance(one, str) and one == "-") or is_video(one, animations=frames) for one in sources
    ):
        raise BadParameter(f"{without_effect[0]} is for videos, and there is none: leave it out, or give a video.")
