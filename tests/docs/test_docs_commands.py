"""Every command and example of the documentation, run as it stands by somebody who has the files that it names.

A block that cannot run here is marked above itself: `<!-- not run: why -->`. `<!-- serves -->` marks a server, which is
started and ended.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from drawn_videos import scene, video
from pdf_files import write_images_pdf
from serve_process import Served, served

import opsin.models
from synth import write_pair

pytestmark = [pytest.mark.slow, pytest.mark.native]

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DEMO = Path(opsin.models.__file__).parent / "demo"
WRITTEN_FOR = "http://127.0.0.1:8000"
# The log speaks of what was, with scripts that were not kept.
PAGES = [page for page in PAGES if page.name != "log.md"]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the mark above it."""

    page: str
    line: int
    language: str
    text: str
    mark: str

    @property
    def name(self) -> str:
        return f"{self.page}-{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"(?:^<!-- (.*?) -->\n)?^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text[: found.start(2)].count("\n") + 1
            yield Block(page.name, line, found[2], found[3], found[1] or "")


def of(*languages: str, mark: str = "") -> list[object]:
    return [pytest.param(one, id=one.name) for one in blocks() if one.language in languages and one.mark == mark]


def test_marks_are_known_and_say_why() -> None:
    for block in blocks():
        assert re.fullmatch(r"|serves|not run: .{8,}", block.mark), (block.name, block.mark)
        assert block.language in {"sh", "python", "console", "json", "toml", "yaml", "ini", "text"}, block.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documentation speaks of: images, a form and its schema, a pair, a log, and a clone's files."""
    from PIL import Image

    place = tmp_path_factory.mktemp("reader")
    pair = write_pair("tiny", tmp_path_factory.mktemp("pair"))
    shutil.copy(pair.llm, place / "llava.gguf")
    shutil.copy(pair.mmproj, place / "mmproj.gguf")
    sized = write_pair("qwen2.5vl-tiny", tmp_path_factory.mktemp("sized"))  # a model that keeps the size of an image
    (place / "vl").mkdir()
    shutil.copy(sized.llm, place / "vl" / "model.gguf")
    shutil.copy(sized.mmproj, place / "vl" / "mmproj.gguf")
    (place / "photos" / "more").mkdir(parents=True)
    (place / "forms").mkdir()
    shapes = Image.open(DEMO / "shapes.png").convert("RGB")
    names = [
        "photo.jpg",
        "before.jpg",
        "after.jpg",
        "photo.png",
        "other.png",
        "form.png",
        "a.png",
        "b.png",
        "forms/1.png",
    ]
    for number, name in enumerate([*names, "photos/p2.jpg", "photos/p10.jpg", "photos/more/p1.jpg"]):
        shapes.rotate(90 * number).resize((120 + number, 120)).save(place / name)
    shapes.resize((1600, 1200)).save(place / "scan.jpg")
    (place / "clip.mp4").write_bytes(video(frames=60, size=shapes.size, draw=lambda *_: shapes))
    for number in range(1, 5):
        scene(10 * number, 320, 240).save(place / f"frame{number}.jpg")
    pair = write_pair("qwen2.5vl-tiny", tmp_path_factory.mktemp("qwen"))
    shutil.copy(pair.llm, place / "qwen.gguf")
    shutil.copy(pair.mmproj, place / "qwen-mmproj.gguf")
    pages = [shapes, shapes.rotate(90), shapes.rotate(180), shapes.rotate(270)]
    (place / "reports").mkdir()
    shutil.copy(write_images_pdf(place / "report.pdf", *pages), place / "reports")
    shapes.save(place / "scan.tiff", save_all=True, append_images=pages[1:])
    (place / "letter.docx").write_bytes(b"PK\x03\x04" + bytes(40))
    for page, name in (("forms-to-json.md", "form.schema.json"), ("boxes.md", "boxes.schema.json")):
        schema = re.search(r"```json\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
        assert schema is not None
        (place / name).write_text(schema[1])
    shutil.copy(ROOT / "tests" / "logs" / "llama-server-0c1e570-runaway.log", place / "server.log")
    for name in ("forms.jsonl", "people.jsonl"):  # what a command wrote before, whichever test runs first
        (place / name).write_text('{"source": "1.png", "error": null, "text": "{}"}\n')
    (place / "things.csv").write_text("file,thing\nphoto.jpg,square\nphotos/p2.jpg,circle\n")
    for name in ("src", "tests", "tools", "docs", "bench", "training"):
        (place / name).symlink_to(ROOT / name)
    return place


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPSIN_")}
    folders = {name: str(home / name) for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "HF_HOME")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, **folders, "PATH": path, "PYTHONPATH": str(ROOT / "src")}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


def run(text: str, folder: Path, env: dict[str, str], *, well: bool = True) -> str:
    """Its standard output; with standard error, whatever the exit code, unless it has to go `well`."""
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{text}"],
        cwd=folder,
        env=env,
        input="What is this?\n",  # for a conversation
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert "Traceback" not in done.stderr
    if not well:
        return done.stdout + done.stderr
    assert done.returncode == 0, (text, done.stdout[-500:], done.stderr[-500:])
    return done.stdout


@pytest.mark.parametrize("block", of("sh"))
def test_a_command_runs(block: Block, folder: Path, env: dict[str, str], server: Served) -> None:
    out = run(block.text.replace(WRITTEN_FOR, server.url), folder, env)
    assert '"error":{' not in out


@pytest.mark.parametrize("block", of("python"))
def test_an_example_runs(block: Block, folder: Path, env: dict[str, str], server: Served) -> None:
    code = block.text.replace(WRITTEN_FOR, server.url)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, (code, done.stderr[-800:])
    assert "assert" in code or done.stdout, "an example shows something"


@pytest.mark.parametrize("block", of("sh", mark="serves"))
def test_a_server_starts_as_written(block: Block, folder: Path) -> None:
    command = block.text.split("#")[0].split()
    assert command[:2] == ["opsin", "serve"]
    with served(*command[2:], cwd=folder) as running:
        assert running.url


def words(line: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]{3,}", line))


@pytest.mark.parametrize("block", of("console"))
def test_a_shown_output_is_what_comes(block: Block, folder: Path, env: dict[str, str]) -> None:
    """Numbers differ from run to run; the words of each line that is shown have to come, in this order."""
    first, *shown = block.text.splitlines()
    got = run(first.removeprefix("$ "), folder, env, well=False).splitlines()
    for line in shown:
        if line.strip() != "…":
            assert any(words(line) <= words(other) for other in got), line
