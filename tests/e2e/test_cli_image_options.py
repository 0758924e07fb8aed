"""Parts, tiles and budgets on the command line: ask, batch and chat."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opsin.models import Pair
from synth import write_pair

pytestmark = [pytest.mark.slow, pytest.mark.native]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("qwen2.5vl-tiny", Path(tmp_path_factory.mktemp("pair")), quantisation="f16")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo that a camera held upright: the file's pixels lie on their side."""
    path = Path(tmp_path_factory.mktemp("photos")) / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((1600, 1200)).save(path, exif=exif)
    return path


def opsin(env: dict[str, str], *arguments: object, code: int = 0, stdin: str = "") -> tuple[str, str]:
    command = [sys.executable, "-m", "opsin", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, env=env, timeout=180, check=False, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def images(out: str) -> list[tuple[int, int, int, int]]:
    rows = [json.loads(line) for line in out.splitlines()]
    names = ("width", "height", "resized_width", "resized_height")
    return [tuple(image[name] for name in names) for row in rows for image in row["images"]]  # type: ignore[misc]


def test_ask_and_batch_show_the_same(opsin_env: dict[str, str], pair: Pair, photo: Path, tmp_path: Path) -> None:
    same = ("--model", pair.llm, "--mmproj", pair.mmproj, "--max-tokens", 2, "--no-disk-cache")
    for flags, expected in (
        (("--image-max-tokens", 100), [(224, 308, 224, 308)]),
        (("--region", "25%,25%,50%,50%"), [(600, 800, 588, 812)]),
        (("--region", "0,0,60,40", "--image-max-tokens", 8), [(60, 40, 112, 84)]),
        (("--tiles", "1x2", "--image-max-tokens", 64), [(168, 252, 168, 252)] + [(252, 168, 252, 168)] * 2),
    ):
        out, _ = opsin(opsin_env, "ask", photo, "What?", *same, "--json", *flags)
        shown = images(out)
        assert shown == expected
        target = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        opsin(opsin_env, "batch", photo.parent, "What?", "-o", target, *same, *flags, "--report", "none")
        assert images(target.read_text()) == shown


def test_other_options_are_another_job(opsin_env: dict[str, str], pair: Pair, photo: Path, tmp_path: Path) -> None:
    same = ("--model", pair.llm, "--max-tokens", 2, "--no-disk-cache", "--report", "none", "-o", tmp_path / "out.jsonl")
    opsin(opsin_env, "batch", photo.parent, "What?", *same)
    opsin(opsin_env, "batch", photo.parent, "What?", *same)
    _, said = opsin(opsin_env, "batch", photo.parent, "What?", *same, "--region", "0,0,50,50", code=2)
    assert "image_region" in said


def test_a_conversation_about_a_part(opsin_env: dict[str, str], pair: Pair, photo: Path, tmp_path: Path) -> None:
    flags = ("--model", pair.llm, "--max-tokens", 2, "--region", "0,0,120,80", "--tiles", "2x1")
    kept = tmp_path / "kept.md"
    opsin(opsin_env, "chat", photo, *flags, stdin=f"What?\n/save {kept}\n")
    assert "(image of 120 x 80) (image of 60 x 80) (image of 60 x 80)" in kept.read_text()


@pytest.mark.parametrize("command", ["ask", "batch", "chat"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--region", "1,2,3"), "region"),
        (("--tiles", "4"), "tiles"),
        (("--region", "0,0,5000,5"), "1200 by 1600"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    opsin_env: dict[str, str], photo: Path, tmp_path: Path, command: str, flags: tuple[str, str], said: str
) -> None:
    rest = {
        "ask": (photo, "What?"),
        "batch": (photo.parent, "What?", "-o", tmp_path / "out.jsonl"),
        "chat": (photo,),
    }[command]
    is_row = command == "batch" and "by" in said  # one bad image is one error row
    _, told = opsin(opsin_env, command, *rest, *flags, code=1 if is_row else 2)
    assert said in (told if not is_row else (tmp_path / "out.jsonl").read_text())
