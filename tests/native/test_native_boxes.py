"""Boxes on what mtmd itself prepares: a dot of the file is found in the encoder's input, where the mapping says."""

import ctypes
import io
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pil

from opsin.boxes.answer import Convention, check_boxes, read_boxes
from opsin.core.answer import ImageInfo
from opsin.core.errors import BadParameter, Cancelled
from opsin.core.request import Image, ImageChunk, ImagePart
from opsin.core.settings import EngineSettings, ImageSettings
from opsin.images import load_image
from opsin.native.ggml import Tensor
from synth import KINDS, write_pair

pytestmark = pytest.mark.slow

MOST = 200
MAX_TOKENS = dict.fromkeys(("qwen2vl-tiny", "qwen2.5vl-tiny", "qwen3vl-tiny", "pixtral-tiny", "kimivl-tiny"), 256)
# Families whose way to write boxes is not known: what mtmd does to their images is mapped all the same.
STRETCHED = {"llava-1.6-tiny", "smolvlm-tiny", "lfm2vl-tiny"}
# Of the pieces that a large image is cut into, the whole image in small comes last, or else first.
WHOLE_LAST = {"llava-1.6-tiny", "smolvlm-tiny", "lfm2vl-tiny", "internvl-tiny"}
LARGE = {"deepseekocr-tiny", "lfm2vl-tiny"}  # which cut images of more than 700 pixels


class Input:
    """Takes the encoder's input from the first node that reads it, and ends the encode there."""

    def __init__(self) -> None:
        self.bitmap: NDArray[np.float32] = np.zeros((0, 0), np.float32)

    @staticmethod
    def _raw(node: Any) -> Any:
        sources = (Tensor.from_address(address) for address in node.src if address)
        return next((one for one in sources if one.name == b"inp_raw"), None)

    def wants(self, node: Any) -> bool:
        return self._raw(node) is not None

    def seen(self, node: Any) -> None:
        raw = self._raw(node)
        width, height = raw.ne[0], raw.ne[1]
        values = (ctypes.c_float * (width * height)).from_address(raw.data)
        self.bitmap = np.frombuffer(values, np.float32).reshape(height, width).copy()  # red alone
        raise Cancelled("seen")


def bitmaps(backend: Any, image: Image) -> tuple[list[NDArray[np.float32]], ImageInfo]:
    """What the encoder gets for each piece of an image: red, [height, width]."""
    found = []
    with closing(backend.tokenize([ImagePart(image)], add_bos=False)) as tokenized:
        for chunk in tokenized.chunks:
            if isinstance(chunk, ImageChunk):
                observer = Input()
                with suppress(Cancelled):
                    backend._encoder.observed(chunk, observer)
                assert observer.bitmap.shape == chunk.handle.meta.sizes[0][::-1]
                found.append(observer.bitmap)
        return found, tokenized.images[0]


def dotted(rng: np.random.Generator, most: int) -> tuple[Image, tuple[float, float]]:
    """A file of random size and orientation with a white dot, read as it is, smaller, or in part; the dot's centre.

    The centre is in the pixels as the file stores them.
    """
    width = int(rng.integers(60, most))
    height = int(np.clip(width * 3 ** rng.uniform(-1, 1), 60, most))
    side = max(width, height) // 8
    x, y = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y : y + side, x : x + side] = 255
    exif, file = Pil.Exif(), io.BytesIO()
    exif[0x0112] = int(rng.integers(1, 9))
    Pil.fromarray(pixels).save(file, "PNG", exif=exif)
    image = load_image(file.getvalue(), ImageSettings())
    assert image.orientation == exif[0x0112]
    way, size = rng.integers(3), (image.width, image.height)
    upright = np.frombuffer(image.rgb, np.uint8).reshape(image.height, image.width, 3)
    if way == 1:
        share = rng.uniform(50, max(size)) / max(size)
        small = Pil.fromarray(upright).resize((round(size[0] * share), round(size[1] * share)), Pil.Resampling.LANCZOS)
        image = replace(image, rgb=small.tobytes(), width=small.width, height=small.height, source_size=size)
    elif way == 2:
        rows, columns = (np.flatnonzero(upright[..., 0].any(axis)) for axis in (1, 0))
        left, top = int(rng.integers(0, columns[0] + 1)), int(rng.integers(0, rows[0] + 1))
        right = int(rng.integers(columns[-1] + 1, image.width + 1))
        low = int(rng.integers(rows[-1] + 1, image.height + 1))
        cut = np.ascontiguousarray(upright[top:low, left:right])
        region = (left, top, right - left, low - top)
        image = replace(image, rgb=cut.tobytes(), width=region[2], height=region[3], region=region, source_size=size)
    return image, (x + side / 2, y + side / 2)


def centre(bitmap: NDArray[np.float32], dimmest: float) -> tuple[float, float]:
    """The middle of the bright dot, from the left upper corner; what has less than `dimmest` of its light is border."""
    low, high = bitmap.min(), bitmap.max()
    bright = (bitmap - low) / (high - low)
    bright[bright < dimmest] = 0
    y, x = np.indices(bitmap.shape) + 0.5
    return float((bright * x).sum() / bright.sum()), float((bright * y).sum() / bright.sum())


def mosaic(rows: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The image that DeepSeek-OCR's tiles were cut from; a row of them is stacked on one another."""
    edge = rows[0].shape[1]
    return np.vstack([np.hstack(np.split(row, len(row) // edge)) for row in rows])


def written(convention: Convention, bitmap: NDArray[np.float32], x: float, y: float) -> str:
    """A point of the bitmap as the model writes it."""
    height, width = bitmap.shape
    if convention.scale:
        x, y = x / width * convention.scale, y / height * convention.scale
    pair = [y, x] if convention.y_first else [x, y]
    return f'{{"point_2d": [{pair[0]:.4f}, {pair[1]:.4f}], "label": "dot"}}'


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    from opsin.native import open_backend

    def opened(kind: str) -> Any:
        pair = write_pair(kind, Path(tmp_path_factory.mktemp(kind)), quantisation="f16")
        settings = {"ctx": 512, "parallel": 1, "ubatch": 256, "threads": 1, "image_max_tokens": MAX_TOKENS.get(kind)}
        return open_backend(EngineSettings(model=pair.llm, mmproj=pair.mmproj, **settings))

    return opened


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tiny-152k"])
def test_a_dot_is_where_the_mapping_says(kind: str, opened: Callable[[str], Any]) -> None:
    rng = np.random.default_rng(5)
    with closing(opened(kind)) as backend:
        try:
            convention = check_boxes(backend.info)
        except BadParameter:
            convention = Convention(kind, 1000, "image" if kind in STRETCHED else "padded")
        worst, cut = 0.0, 0  # `tiny` fills up with grey
        for _ in range(MOST):
            image, (x, y) = dotted(rng, 1400 if kind in LARGE else 700)
            seen, info = bitmaps(backend, image)
            cut += len(seen) > 1
            bitmap = seen[-1 if kind in WHOLE_LAST else 0]
            if kind == "deepseekocr-tiny":
                bitmap = mosaic(seen[:-1]) if len(seen) > 1 else unbordered(seen[0], image)
            found = centre(bitmap, 0.6 if kind == "tiny" else 0.0)
            boxes, unread = read_boxes(written(convention, bitmap, *found), convention, info)
            assert (len(boxes), unread) == (1, 0)
            assert (boxes[0].x1, boxes[0].y1) == (boxes[0].x2, boxes[0].y2)
            point = boxes[0].stored(info)
            # One pixel of the bitmap, in pixels of the file.
            part = info.region or (0, 0, *info.file_size)
            step = max(part[2] / image.width, part[3] / image.height)
            step *= max(image.width / bitmap.shape[1], image.height / bitmap.shape[0])
            off = max(abs(point.x1 - x), abs(point.y1 - y))
            assert off <= step + 0.051, (image, info, point, (x, y))  # places are given to a tenth
            worst = max(worst, off / step)
        print(f"{kind}: off by at most {worst:.2f} pixels of the bitmap; {cut} of {MOST} images were cut into pieces")


def unbordered(bitmap: NDArray[np.float32], image: Image) -> NDArray[np.float32]:
    """DeepSeek-OCR's view of a small image without the grey around it (Pillow's ImageOps.pad)."""
    scale = min(bitmap.shape[1] / image.width, bitmap.shape[0] / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (bitmap.shape[1] - width + 1) // 2, (bitmap.shape[0] - height + 1) // 2
    return bitmap[top : top + height, left : left + width]
