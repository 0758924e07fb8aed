"""Boxes by command, HTTP and Python on a pair shaped like Qwen2.5-VL, whose answer a schema forces."""

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw
from serve_process import LIMIT, served

from opsin import Opsin
from opsin.core.errors import BadParameter
from opsin.models import Pair
from synth import write_pair

pytestmark = [pytest.mark.slow, pytest.mark.native]

# 504 × 364 pixels are 18 × 13 squares of 28, and so the image's own pixels.
SIZE = (504, 364)
ANSWER = [{"bbox_2d": [50, 60, 350, 320], "label": "sun"}, {"point_2d": [7, 9], "label": "dot"}]
SCHEMA = json.dumps({"const": ANSWER})
BOXES = [
    {"label": "sun", "x1": 50.0, "y1": 60.0, "x2": 350.0, "y2": 320.0},
    {"label": "dot", "x1": 7.0, "y1": 9.0, "x2": 7.0, "y2": 9.0},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("qwen2.5vl-tiny", tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photo that a camera held sideways: its file has the rows as columns."""
    drawn = Image.new("RGB", SIZE, "navy")
    ImageDraw.Draw(drawn).ellipse((50, 60, 350, 320), fill="yellow")
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    (tmp_path / "answer.json").write_text(SCHEMA)
    return tmp_path / "photo.png"


def opsin(env: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opsin", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def flags(pair: Pair) -> list[str]:
    return ["--model", str(pair.llm), "--mmproj", str(pair.mmproj), "--ctx", "2048", "--json-schema", "answer.json"]


def test_the_command_prints_and_draws_them(pair: Pair, photo: Path, opsin_env: dict[str, str]) -> None:
    asked = ["ask", "photo.png", "Where is the sun?", *flags(pair)]
    done = opsin(opsin_env, photo.parent, *asked, "--draw", "drawn.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["50,60,350,320 sun", "7,9,7,9 dot"]
    with Image.open(photo.parent / "drawn.png") as drawn:
        assert drawn.size == SIZE
        edge, middle = drawn.getpixel((51, 200)), drawn.getpixel((200, 200))
    assert middle == (255, 255, 0)
    assert edge not in {(255, 255, 0), (0, 0, 128)}, "an edge is drawn where the box is"
    rows = opsin(opsin_env, photo.parent, *asked, "--boxes", "--json")
    assert json.loads(rows.stdout)["boxes"] == BOXES
    without = opsin(opsin_env, photo.parent, *asked, "--json")
    assert "boxes" not in json.loads(without.stdout)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--boxes", "--format", "csv"], "no place for boxes"),
        (["--draw", "drawn.gif"], "is not known by its name"),
        (["--draw", "drawn.png", "--pages", "1"], "save the page"),
        (["--draw", "nowhere/drawn.png"], "is not there"),
        (["photo.png", "--draw", "drawn.png"], "one image"),
        (["photo.png", "--boxes", "--together"], "there are 2"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], says: str, pair: Pair, photo: Path, opsin_env: dict[str, str]
) -> None:
    done = opsin(opsin_env, photo.parent, "ask", "photo.png", *arguments, "Where is the sun?", *flags(pair))
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_model_is_refused_as_its_convention_is_unknown(photo: Path, opsin_env: dict[str, str]) -> None:
    done = opsin(opsin_env, photo.parent, "ask", "photo.png", "Where is the circle?", "--boxes")
    assert (done.returncode, done.stdout) == (2, "")
    assert "mlp" in done.stderr


def test_batch_rows_have_them_and_tables_are_refused(pair: Pair, photo: Path, opsin_env: dict[str, str]) -> None:
    asked = ["batch", "photo.png", "Where is the sun?", *flags(pair), "--boxes", "--report", "none"]
    done = opsin(opsin_env, photo.parent, *asked, "-o", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert json.loads((photo.parent / "out.jsonl").read_text())["boxes"] == BOXES
    table = opsin(opsin_env, photo.parent, *asked, "-o", "out.csv")
    assert table.returncode == 2
    assert "FILE.jsonl" in table.stderr
    # Another question, as its rows have something else.
    without = opsin(opsin_env, photo.parent, *[one for one in asked if one != "--boxes"], "-o", "out.jsonl")
    assert without.returncode == 2
    assert "boxes" in without.stderr


def test_python_gives_boxes_and_their_stored_pixels(pair: Pair, photo: Path) -> None:
    with Opsin(pair.llm, pair.mmproj, config=False, ctx=2048) as model:
        answer = model.ask(photo, "Where is the sun?", boxes=True, json_schema=SCHEMA)
        assert answer.boxes is not None
        sun = answer.boxes[0]
        assert (sun.x1, sun.y1, sun.x2, sun.y2) == (50, 60, 350, 320)
        stored = sun.stored(answer.images[0])
        assert (stored.x1, stored.y1, stored.x2, stored.y2) == (60, 154, 320, 454)
        assert model.ask(photo, "Where?", max_tokens=2).boxes is None
        cut = model.ask(photo, "Where?", boxes=True, grammar='root ::= "{\\"bbox_2d\\": [1, 2, 3"')
        assert cut.boxes == ()
        assert any("left out" in note for note in cut.images[0].notes)
        with pytest.raises(BadParameter, match="there are 2"):
            model.ask([photo, photo], "Where?", boxes=True)
    with Opsin(config=False) as demo, pytest.raises(BadParameter, match="not known"):
        demo.ask(photo, "Where?", boxes=True)


def test_requests_give_boxes(pair: Pair, photo: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode()
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Where is the sun?"},
    ]
    chat = {"messages": [{"role": "user", "content": content}], "boxes": True, "json_schema": json.loads(SCHEMA)}
    with served("--model", str(pair.llm), "--mmproj", str(pair.mmproj), "--ctx", "2048") as server:
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=chat, timeout=LIMIT).json()
        assert reply["boxes"] == BOXES
        content[:] = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "Where is the sun?"}]
        wanted = {"format": {"type": "json_schema", "name": "boxes", "schema": json.loads(SCHEMA)}}
        asked = {"input": [{"role": "user", "content": content}], "boxes": True, "text": wanted}
        reply = httpx.post(f"{server.url}/v1/responses", json=asked, timeout=LIMIT).json()
        assert reply["boxes"] == BOXES
