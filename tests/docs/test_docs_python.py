"""The examples of docs/python.md, run as they stand with a small random model under the names they use."""

import re
import shutil
from pathlib import Path

import pytest

from opsin.models import Pair
from opsin.models.resolve import write_default
from synth import write_pair

DOCUMENT = Path(__file__).parents[2] / "docs" / "python.md"
BLOCKS = [
    (DOCUMENT.read_text(encoding="utf-8")[: found.start()].count("\n") + 2, found[1])
    for found in re.finditer(r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
]

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("tiny", tmp_path_factory.mktemp("docs"))


@pytest.fixture
def reader(tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of somebody who follows the document."""
    from PIL import Image

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tiny.mmproj is not None
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(tiny.llm, folder / "llava.gguf")
    shutil.copy(tiny.mmproj, folder / "mmproj.gguf")
    write_default(tiny)
    for name, colour in (("photo.png", "red"), ("other.png", "blue")):
        Image.new("RGB", (64, 48), colour).save(folder / name)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("code", [pytest.param(code, id=f"line-{line}") for line, code in BLOCKS])
def test_an_example_runs(code: str, reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "docs/python.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "assert" in code or printed, "an example shows something"
    if "no-such-file" in code:
        assert printed.startswith("bad_image")


def test_all_that_is_promised_is_shown() -> None:
    text = "\n".join(code for _, code in BLOCKS)
    for word in ("opsin.ask(", "Opsin(", "Engine(", "async for", "ask_async(", "opsin.compat", ".submit("):
        assert word in text, word


def test_the_handlers_named_are_those_there_are() -> None:
    from opsin import compat

    named = set(re.findall(r"`(\w+ChatHandler)`", DOCUMENT.read_text(encoding="utf-8")))
    assert named == {name for name in compat.__all__ if name.endswith("ChatHandler")}
