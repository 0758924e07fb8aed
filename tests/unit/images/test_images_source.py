"""Paths, bytes, arrays, `data:` addresses and what is none of them."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from image_samples import LIMITS, encode, rgb_of, scene
from PIL import Image

import opsin
from opsin.core.errors import BadImage, BadInput, BadParameter, FetchFailed, ImageTooLarge
from opsin.core.settings import ImageSettings
from opsin.images import load_image

PNG = encode(scene(), "PNG")
SHA = load_image(PNG, LIMITS).sha256


def test_paths_and_bytes_of_every_kind_give_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "wrong name.jpeg"
    path.write_bytes(PNG)
    for source in (path, str(path), PNG, bytearray(PNG), memoryview(PNG), memoryview(PNG).cast("B")):
        assert load_image(source, LIMITS).sha256 == SHA
    assert load_image(path, LIMITS).fetch_ms > 0


def test_sources_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "loop").symlink_to("loop")
    cases: list[tuple[Any, str]] = [
        (tmp_path, "folder"),
        (tmp_path / "none.png", "no file"),
        (tmp_path / "empty.png" / "in", "no file"),
        (tmp_path / "empty.png", "empty"),
        (tmp_path / "loop", "link"),
        ("x" * 5000, "too long"),
        ("a\0b.png", "character"),
        ("", "empty"),
        ("/dev/zero", "device"),
        (b"", "empty"),
    ]
    for source, word in cases:
        with pytest.raises(BadImage, match=word) as refused:
            load_image(source, LIMITS)
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 400
        assert str(refused.value).endswith(".")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    path = tmp_path / "mine.png"
    path.write_bytes(PNG)
    path.chmod(0)
    with pytest.raises(BadImage, match="permissions"):
        load_image(path, LIMITS)


def test_a_refused_permission_is_told_whoever_runs_the_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "mine.png"
    path.write_bytes(PNG)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BadImage, match="permissions"):
        load_image(path, LIMITS)


def test_a_hostile_name_stays_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadImage) as refused:
        load_image(tmp_path / "a\n\x1b[31mred\x07.png", LIMITS)
    assert str(refused.value).isprintable()


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(2**40)
    tracemalloc.start()
    try:
        with pytest.raises(ImageTooLarge, match="67,108,864"):
            load_image(path, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize(("extra", "fits"), [(0, True), (1 << 20, False)])
def test_a_pipe_is_read_up_to_the_limit(tmp_path: Path, extra: int, fits: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def feed() -> None:
        try:
            pipe.write_bytes(PNG + bytes(extra))
        except BrokenPipeError:
            assert not fits

    writer = threading.Thread(target=feed)
    writer.start()
    limits = ImageSettings(max_bytes=100_000)
    if fits:
        assert load_image(pipe, limits).sha256 == SHA
    else:
        with pytest.raises(ImageTooLarge):
            load_image(pipe, limits)
    writer.join()


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "DATA:image/png;BASE64," + base64.b64encode(PNG).decode(),
        "data:;base64," + base64.b64encode(PNG).decode().rstrip("="),
        "data:image/png;base64," + base64.urlsafe_b64encode(PNG).decode().rstrip("="),
        "data:text/plain;charset=x;base64,\n" + base64.encodebytes(PNG).decode(),
        "data:image/png;base64," + base64.b64encode(PNG).decode().replace("+", "%2B").replace("=", "%3D"),
        "data:image/png," + quote_from_bytes(PNG),
    ],
)
def test_data_addresses(url: str) -> None:
    assert load_image(url, LIMITS).sha256 == SHA


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,####", "base64"),
        ("data:image/png;base64,AAAAA", "base64"),
        ("data:image/png;base64,iVBORä", "base64"),
        ("data:,hello", "text file"),
        ("data:image/png;base64," + base64.b64encode(PNG[:60]).decode(), "cut short"),
    ],
)
def test_broken_data_addresses_say_why(url: str, word: str) -> None:
    with pytest.raises(BadImage, match=word):
        load_image(url, LIMITS)


@pytest.mark.parametrize("prefix", ["data:;base64,", "data:,"])
def test_data_addresses_are_bounded_before_they_are_unpacked(prefix: str) -> None:
    limits = ImageSettings(max_bytes=1000)
    for size in (1400, 100_000):
        with pytest.raises(ImageTooLarge):
            load_image(prefix + "A" * size, limits)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
def test_arrays_of_every_type_give_the_same_image(dtype: Any) -> None:
    values = np.asarray(scene())
    scale = {"u1": 1, "u2": 257}.get(np.dtype(dtype).str[1:], 1 / 255)
    array = (values.astype(float) * scale).astype(dtype)
    image = load_image(array, LIMITS)
    assert image.sha256 == SHA
    assert image.format == "array"


def test_array_shapes() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = load_image(grey, LIMITS)
    assert (image.width, image.height) == (4, 3)
    assert np.array_equal(rgb_of(image), np.repeat(grey[..., None], 3, axis=2))
    rgba = np.dstack([np.asarray(scene()), np.full((32, 48), 255, np.uint8)])
    assert load_image(rgba, LIMITS).sha256 == SHA
    assert load_image(rgba[::-1][::-1], LIMITS).sha256 == SHA
    assert load_image(np.asfortranarray(np.asarray(scene())), LIMITS).sha256 == SHA


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((3, 8, 8), np.uint8), "colours last"),
        (np.zeros((1, 8, 8, 3), np.uint8), "shape"),
        (np.zeros((8, 8, 2), np.uint8), "shape"),
        (np.zeros(8, np.uint8), "shape"),
        (np.zeros((0, 8, 3), np.uint8), "0 pixels|by 0"),
        (np.zeros((8, 8), np.int32), "int32"),
        (np.zeros((8, 8), bool), "bool"),
        (np.zeros((8, 8), complex), "complex"),
        (np.full((8, 8), 255.0), "0 to 1"),
        (np.full((8, 8), np.nan), "0 to 1"),
        (np.full((8, 8), -0.1), "0 to 1"),
    ],
)
def test_arrays_that_are_no_image_say_why(array: Any, word: str) -> None:
    with pytest.raises(BadImage, match=word):
        load_image(array, LIMITS)


@pytest.mark.parametrize("source", [np.zeros((200, 10), np.uint8), Image.new("RGB", (10, 200))])
def test_arrays_and_images_obey_the_limits(source: Any) -> None:
    for limits in (ImageSettings(max_edge=199), ImageSettings(max_pixels=1999)):
        with pytest.raises(ImageTooLarge):
            load_image(source, limits)


@pytest.mark.parametrize("source", [None, 7, [1, 2], object()])
def test_other_types_are_refused(source: Any) -> None:
    with pytest.raises(BadParameter, match=type(source).__name__):
        load_image(source, LIMITS)


@pytest.mark.parametrize("url", ["ftp://x/a.png", "file:///a.png", "s3://b/a.png", "HTTP://x/a.png", "https://x/a.png"])
def test_addresses_that_are_not_read_or_not_allowed(url: str) -> None:
    with pytest.raises(FetchFailed):
        load_image(url, LIMITS)


def test_importing_the_room_imports_no_heavy_library() -> None:
    code = (
        "import sys, opsin.images\n"
        "print([name for name in ('PIL', 'numpy', 'pillow_heif', 'httpx', 'httpcore', 'ssl') if name in sys.modules])"
    )
    source = Path(opsin.__file__).parents[1]
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(source)}, check=True
    )
    assert child.stdout.strip() == "[]"


@pytest.mark.slow
def test_heif_is_imported_for_heif_only() -> None:
    code = (
        "import sys, opsin.images\n"
        "from opsin.core.settings import ImageSettings\n"
        "opsin.images.load_image(sys.stdin.buffer.read(), ImageSettings())\n"
        "print('pillow_heif' in sys.modules)"
    )
    source = Path(opsin.__file__).parents[1]
    for kind, expected in (("PNG", b"False"), ("AVIF", b"False"), ("HEIF", b"True")):
        child = subprocess.run(
            [sys.executable, "-c", code],
            input=encode(scene(), kind),
            capture_output=True,
            env={"PYTHONPATH": str(source)},
            check=True,
        )
        assert child.stdout.strip() == expected, kind


def test_an_image_file_opened_by_the_caller_and_broken_is_bad_input() -> None:
    import io

    image = Image.open(io.BytesIO(encode(scene(), "PNG")[:80]))
    with pytest.raises(BadInput, match="cut short"):
        load_image(image, LIMITS)
