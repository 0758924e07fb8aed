"""Hostile and broken files give one sentence or an image, in bounded memory, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile
import image_samples as samples
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_samples import LIMITS, encode, scene

import opsin
from opsin.core.errors import BadImage, BadInput, ImageTooLarge, ImageUnsupported
from opsin.core.request import Image
from opsin.core.settings import ImageSettings
from opsin.images import load_image

pytestmark = pytest.mark.slow  # together they take seconds, so `make check` leaves them out

FILES = dict(hostile.hostile_files())
MIB = 2**20

# what a file that must not be taken for another must be called
NAMED = {
    "paper.pdf": "PDF",
    "late.pdf": "PDF",
    "film.mp4": "video",
    "film.mov": "video",
    "film.mkv": "video",
    "film.avi": "video",
    "film.mpg": "video",
    "film.ts": "video",
    "song.m4a": "audio",
    "sound.wav": "audio",
    "sound.mp3": "audio",
    "bare.mp3": "audio",
    "sound.flac": "audio",
    "sound.ogg": "audio",
    "drawing.svg": "SVG",
    "icon.ico": "icon",
    "layers.psd": "Photoshop",
    "images.zip": "ZIP",
    "images.tar": "tar",
    "new.jxl": "JPEG XL",
    "page.html.png": "web page",
    "model.gguf.png": "GGUF",
}
READ = {
    "1x20000.png": (1, 20_000),
    "20000x1.png": (20_000, 1),
    "image-named.txt": (48, 32),
    "jpeg-named.png": (48, 32),
    "65535-frames.gif": (1, 1),
    "looping-directories.tif": (2, 2),
    "animated.webp": (56, 40),
    "animated.png": (56, 40),
}

# run by a child process: it warms every decoder, then loads each file of a folder and reports
CHILD = """
import json, resource, sys, time
from pathlib import Path
import opsin
from opsin.core.errors import BadInput
from opsin.core.settings import ImageSettings
from opsin.images import load_image
def peak():
    # ru_maxrss would start at what the parent had when it made this process
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
limits = ImageSettings()
for path in sorted(Path(sys.argv[1]).iterdir()):
    load_image(path, limits)
before, rows = peak(), []
for path in sorted(Path(sys.argv[2]).iterdir()):
    begin = time.process_time()
    try:
        image = load_image(path, limits)
        told = f"{image.width} by {image.height}."
    except BadInput as error:
        told = str(error)
    rows.append((path.name, told, time.process_time() - begin, peak() - before))
print(json.dumps(rows))
"""


def one_sentence(error: BaseException) -> bool:
    text = str(error)
    plain = "Traceback" not in text and "Error" not in text and "0x" not in text
    return text.isprintable() and text.endswith(".") and 20 < len(text) < 400 and plain


def outcome(data: bytes, limits: ImageSettings) -> Image | BadInput:
    try:
        return load_image(data, limits)
    except BadInput as error:
        return error


def check(result: Image | BadInput) -> None:
    if isinstance(result, BadInput):
        assert one_sentence(result), str(result)
        assert result.exit_code == 2
    else:
        assert len(result.rgb) == result.width * result.height * 3


def test_there_are_forty_files_and_more() -> None:
    assert len(FILES) == len(hostile.hostile_files()) >= 100


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_gives_one_sentence_or_an_image(name: str) -> None:
    result = outcome(FILES[name], LIMITS)
    check(result)
    if name in READ:
        assert isinstance(result, Image)
        assert (result.width, result.height) == READ[name]


@pytest.mark.parametrize("name", NAMED)
def test_a_kind_that_is_not_read_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ImageUnsupported, match=NAMED[name]) as refused:
        load_image(FILES[name], LIMITS)
    assert refused.value.http_status == 415


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("huge", "bomb", "canvas", "upside"))])
def test_huge_headers_are_refused_before_pixels_are_made(name: str) -> None:
    with pytest.raises(ImageTooLarge if not name.endswith((".avif", ".heic")) else BadImage):
        load_image(FILES[name], LIMITS)


def test_a_run_length_bmp_that_would_take_pillow_long_is_refused() -> None:
    """Pillow fills the rest of each line pixel by pixel in Python: 13 KB are worth a quarter of a minute."""
    with pytest.raises(ImageTooLarge, match="run-length"):
        load_image(FILES["slow-run-length.bmp"], LIMITS)


def test_memory_and_time_stay_bounded_over_all_hostile_files(tmp_path: Path) -> None:
    valid, bad = tmp_path / "valid", tmp_path / "bad"
    valid.mkdir()
    bad.mkdir()
    for index, (kind, options) in enumerate(samples.EVERY):
        valid.joinpath(f"{index}").write_bytes(encode(scene(), kind, **options))
    for name, data in FILES.items():
        bad.joinpath(name).write_bytes(data)
    command = [sys.executable, "-W", "error", "-c", CHILD, str(valid), str(bad)]
    source = Path(opsin.__file__).parents[1]
    child = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(source)}, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    rows = json.loads(child.stdout)
    assert len(rows) == len(FILES)
    worst = max(rows, key=lambda row: row[3])
    assert worst[3] < 64 * MIB, worst
    assert max(row[2] for row in rows) < 2, max(rows, key=lambda row: row[2])
    assert all(told.endswith(".") and "\n" not in told for _, told, _, _ in rows)


SEEDS = [(kind, encode(scene(24, 16), kind, **options)) for kind, options in samples.EVERY]
SMALL = ImageSettings(max_pixels=250_000, max_bytes=2**20)


@st.composite
def mutations(draw: Any) -> bytes:
    _, seed = draw(st.sampled_from(SEEDS))
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["set", "number", "cut", "drop", "insert", "repeat"])):
            case "set":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "number":
                data[at : at + 4] = draw(
                    st.sampled_from([b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x01\0\0\0"])
                )
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 16))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case _:
                data[at:at] = data[at : at + 32]
    return bytes(data)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(mutations())
def test_mutated_files_raise_nothing_but_bad_input(data: bytes) -> None:
    result = outcome(data, SMALL)
    check(result)
    if isinstance(result, Image):
        assert result.width * result.height <= SMALL.max_pixels


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from([data[:16] for _, data in SEEDS]), st.binary(max_size=300))
def test_any_bytes_behind_a_true_beginning_raise_nothing_but_bad_input(head: bytes, rest: bytes) -> None:
    check(outcome(head + rest, SMALL))
