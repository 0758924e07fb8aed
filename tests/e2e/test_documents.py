"""Documents as a user gives them: to `ask`, `batch` and `chat`, and in Python, on the shipped demo model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pdf_files import RED_SQUARE, endless, hostile, pdf, write_images_pdf
from PIL import Image

from opsin import Opsin
from opsin.core.errors import BadImage
from opsin.core.image_options import ANY_SIZES, AS_IT_IS, ImageSizes
from opsin.core.settings import ImageSettings, VideoSettings
from opsin.worker import DecoderPool, decoders
from opsin.worker.decoders import load_source

pytestmark = [pytest.mark.slow, pytest.mark.native]

DEMO = Path(__file__).parents[2] / "src" / "opsin" / "models" / "demo"
QUESTION = "What is in this picture?"


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return Image.open(DEMO / "shapes.png").convert("RGB")


@pytest.fixture
def three(tmp_path: Path, scene: Image.Image) -> Path:
    return write_images_pdf(tmp_path / "three.pdf", scene, scene.rotate(90), scene.rotate(180))


def opsin(env: dict[str, str], *arguments: object, stdin: bytes = b"", code: int = 0) -> tuple[str, str]:
    command = [sys.executable, "-m", "opsin", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, env=env, timeout=120, check=False)
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done.stdout.decode(), done.stderr.decode()


def test_a_page_with_a_scene_is_answered_as_its_image_is(opsin_env: dict[str, str], three: Path) -> None:
    wanted, _ = opsin(opsin_env, "ask", DEMO / "shapes.png", QUESTION, "--temperature", 0)
    assert opsin(opsin_env, "ask", three, QUESTION, "--temperature", 0, "--pages", 1)[0] == wanted
    assert (
        opsin(opsin_env, "ask", "-", QUESTION, "--temperature", 0, "--pages", 1, stdin=three.read_bytes())[0] == wanted
    )


def test_all_pages_go_into_one_prompt_and_are_encoded_once(
    opsin_env: dict[str, str], three: Path, tmp_path: Path
) -> None:
    env = {**opsin_env, "XDG_CACHE_HOME": str(tmp_path)}
    asked = [json.loads(opsin(env, "ask", three, question, "--json")[0]) for question in ("What is it?", "Why?")]
    assert [image["page"] for image in asked[0]["images"]] == [1, 2, 3]
    assert [one["sha256"] for one in asked[0]["images"]] == [one["sha256"] for one in asked[1]["images"]]
    assert asked[0]["stages"]["encode_ms"] > 0
    assert asked[1]["stages"]["encode_ms"] == 0


def test_pages_left_out_are_told_and_what_cannot_be_read_ends_the_command(
    opsin_env: dict[str, str], three: Path, tmp_path: Path
) -> None:
    assert "first 2 of 3 pages" in opsin(opsin_env, "ask", three, QUESTION, "--max-pages", 2)[1]
    assert "there is no page 7" in opsin(opsin_env, "ask", three, QUESTION, "--pages", 7, code=2)[1]
    assert "not a list of pages" in opsin(opsin_env, "ask", three, QUESTION, "--pages", "a", code=2)[1]
    for why, data in hostile().items():
        (tmp_path / "bad.pdf").write_bytes(data)
        assert why in opsin(opsin_env, "ask", tmp_path / "bad.pdf", QUESTION, code=2)[1]


def test_batch_has_a_row_for_each_document(opsin_env: dict[str, str], three: Path, scene: Image.Image) -> None:
    folder = three.parent
    scene.save(folder / "a.png")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 and nothing more")
    out = folder / "out.jsonl"
    opsin(opsin_env, "batch", folder, QUESTION, "-o", out, "--report", "none", code=1)
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert [image["page"] for image in rows["three.pdf"]["images"]] == [1, 2, 3]
    assert [image["page"] for image in rows["a.png"]["images"]] == [None]
    assert "damaged PDF" in rows["broken.pdf"]["error"]["message"]
    _, said = opsin(opsin_env, "batch", folder, QUESTION, "-o", out, "--pages", "2", code=2)
    assert "another job" in said
    one = folder / "one.jsonl"
    opsin(opsin_env, "batch", three, QUESTION, "-o", one, "--pages", "2", "--report", "none")
    assert [image["page"] for image in json.loads(one.read_text())["images"]] == [2]


def test_chat_shows_documents(opsin_env: dict[str, str], three: Path, tmp_path: Path) -> None:
    saved = tmp_path / "said.md"
    talk = f"What is this?\n/image {three}\nAnd this?\n/save {saved}\n"
    _, said = opsin(opsin_env, "chat", three, "--pages", "1-2,9", stdin=talk.encode())
    assert "has 3 pages, so not all of the pages 1-2,9 are there" in said
    assert saved.read_text().count("(image of") == 4


def test_python_reads_documents(three: Path) -> None:
    with Opsin(config=False, disk_cache=False) as model:
        answer = model.ask(three, QUESTION, pages="1", temperature=0)
        assert answer.text == model.ask(DEMO / "shapes.png", QUESTION, temperature=0).text
        first, second = model.images(three, max_pages=2)
        assert [one.cached for one in model.ask([first, second], QUESTION).images] == [True, False]
        (mapped,) = model.map([three], QUESTION, pages="2-3", temperature=0)
        assert mapped.answer is not None
        assert [image.page for image in mapped.answer.images] == [2, 3]
        assert mapped.answer.images[0].cached


def test_a_document_without_end_is_stopped_and_the_next_is_read() -> None:
    pool = DecoderPool(5.0)
    begin = time.monotonic()
    with pytest.raises(BadImage, match=r"made its decoder crash|longer than 5 s"):
        pool.call(decoders.decode, endless(), ImageSettings(), AS_IT_IS, ANY_SIZES)
    assert time.monotonic() - begin < 60
    (image,) = pool.call(decoders.decode, pdf(RED_SQUARE), ImageSettings(), AS_IT_IS, ANY_SIZES)
    assert image.page == 1
    pool.close()


def test_large_pages_come_from_another_process_whole() -> None:
    data, sizes = pdf(RED_SQUARE, b" ", box=b"0 0 800 800"), ImageSizes(edge=1000)
    here = decoders.decode(data, ImageSettings(), AS_IT_IS, sizes)
    there = load_source(data, ImageSettings(), VideoSettings(), AS_IT_IS, lambda: sizes, frames=False)
    assert [bytes(image.rgb) for image in there] == [bytes(image.rgb) for image in here]
    assert there[0].width == 2000
