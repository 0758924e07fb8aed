"""Files that make llama.cpp abort or crash: one sentence that names the file and exit 3, also in `ask`."""

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import opsin.models
from opsin import Opsin
from opsin.core.errors import ModelError, ModelUnreadable
from opsin.core.settings import EngineSettings
from opsin.native.trial import ensure_loadable

DEMO = Path(opsin.models.__file__).parent / "demo"
LLM, MMPROJ = DEMO / "opsin-demo.gguf", DEMO / "mmproj-opsin-demo.gguf"
U32, F32 = struct.pack("<I", 4), struct.pack("<I", 6)


def changed(key: str, kind: bytes, value: bytes) -> Callable[[bytes], bytes]:
    """Another value of a number in a header, in its place."""

    def change(data: bytes) -> bytes:
        at = data.index(key.encode() + kind) + len(key) + len(kind)
        return data[: at - 4] + (value if len(value) == 8 else kind + value) + data[at + 4 :]

    return change


FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "model-no-blocks": changed("llama.block_count", U32, struct.pack("<I", 0)),
    "model-eps-nan": changed("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", float("nan"))),
    "projector-patch-7": changed("clip.vision.patch_size", U32, struct.pack("<I", 7)),
    "projector-size-is-a-fraction": changed("clip.vision.image_size", U32, F32 + struct.pack("<f", 56.0)),
    "projector-tensor-renamed": lambda data: data.replace(b"v.patch_embd.weight", b"v.patch_embx.weight"),
}


@pytest.fixture
def damaged(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path, Path]:
    """A model and a projector of which one is damaged, and that one."""
    name = request.param
    source = LLM if name.startswith("model") else MMPROJ
    data = source.read_bytes()
    bad = tmp_path / f"{name}.gguf"
    bad.write_bytes(FAULTS[name](data))
    assert bad.read_bytes() != data
    return (bad, MMPROJ, bad) if source == LLM else (LLM, bad, bad)


@pytest.mark.parametrize("damaged", FAULTS, indirect=True)
def test_ask_ends_in_one_sentence_that_names_the_file(
    damaged: tuple[Path, Path, Path], tmp_path: Path, opsin_env: dict[str, str]
) -> None:
    from PIL import Image

    image, temporary = tmp_path / "a.png", tmp_path / "tmp"
    temporary.mkdir()
    Image.new("RGB", (64, 64), "red").save(image)
    llm, mmproj, bad = damaged
    done = subprocess.run(
        [sys.executable, "-m", "opsin", "ask", str(image), "What?", "--model", str(llm), "--mmproj", str(mmproj)],
        env={**opsin_env, "TMPDIR": str(temporary)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == "", "nothing of a debugger's output"
    sentences = [line for line in done.stderr.splitlines() if line.startswith("opsin: ")]
    assert len(sentences) == 1
    assert bad.name in sentences[0]
    assert sentences[0].endswith(".")
    assert "Traceback" not in done.stderr
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("damaged", ["projector-patch-7"], indirect=True)
def test_doctor_finds_a_crash_and_leaves_nothing_behind(
    damaged: tuple[Path, Path, Path], tmp_path: Path, opsin_env: dict[str, str]
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    llm, mmproj, bad = damaged
    done = subprocess.run(
        [sys.executable, "-m", "opsin", "doctor", "--model", str(llm), "--mmproj", str(mmproj)],
        env={**opsin_env, "TMPDIR": str(temporary)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert bad.name in done.stdout
    assert list(temporary.iterdir()) == []


def test_a_good_file_is_tried_once_and_remembered(tmp_path: Path) -> None:
    well = (sys.executable, "-c", "print('stage decode')")
    crash = (sys.executable, "-c", "import os; print('stage load', flush=True); os.abort()")
    ensure_loadable(LLM, MMPROJ, EngineSettings(), folder=tmp_path, command=well)
    assert len(list(tmp_path.glob("*.json"))) == 1
    ensure_loadable(LLM, MMPROJ, EngineSettings(ctx=512, parallel=2), folder=tmp_path, command=crash)
    with pytest.raises(ModelUnreadable, match="SIGABRT"):
        ensure_loadable(LLM, MMPROJ, EngineSettings(device="none"), folder=tmp_path, command=crash)
    with pytest.raises(ModelUnreadable, match=LLM.name):
        ensure_loadable(LLM, None, EngineSettings(), folder=tmp_path, command=crash)


def test_the_demo_model_needs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.compose.ensure_loadable", lambda *_: pytest.fail("it was tried"))
    with Opsin():
        pass


def test_a_trial_is_bounded_and_what_the_system_ended_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    hang = (sys.executable, "-c", "import time; print('stage projector', flush=True); time.sleep(60)")
    with pytest.raises(ModelUnreadable, match=MMPROJ.name):
        ensure_loadable(LLM, MMPROJ, EngineSettings(), folder=tmp_path, command=hang, seconds=1)
    killed = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ModelError, match="memory") as error:
        ensure_loadable(LLM, MMPROJ, EngineSettings(), folder=tmp_path, command=killed)
    assert not isinstance(error.value, ModelUnreadable)
    refused = (sys.executable, "-c", "raise SystemExit(3)")
    ensure_loadable(LLM, MMPROJ, EngineSettings(), folder=tmp_path, command=refused)
    assert list(tmp_path.glob("*.json")) == []
