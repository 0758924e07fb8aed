"""Files that make llama.cpp abort or crash: one sentence that names the file and exit 3, also in `ask`."""

import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import opsin.models
from opsin import Opsin
from opsin.core.errors import ModelError, ModelUnreadable
from opsin.core.settings import EngineSettings
from opsin.models.gguf import read_header
from opsin.native.trial import ensure_loadable, read_record

DEMO = Path(opsin.models.__file__).parent / "demo"
LLM, MMPROJ = DEMO / "opsin-demo.gguf", DEMO / "mmproj-opsin-demo.gguf"
U32, F32 = struct.pack("<I", 4), struct.pack("<I", 6)


def changed(key: str, kind: bytes, value: bytes) -> Callable[[bytes], bytes]:
    """Another value of a number in a header, in its place."""

    def change(data: bytes) -> bytes:
        at = data.index(key.encode() + kind) + len(key) + len(kind)
        return data[: at - 4] + (value if len(value) == 8 else kind + value) + data[at + 4 :]

    return change


def filled(data: bytes, path: Path, value: bytes) -> bytes:
    """The file with weights of this byte alone."""
    start = read_header(path).data
    return data[:start] + value * (len(data) - start)


FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "model-no-blocks": changed("llama.block_count", U32, struct.pack("<I", 0)),
    "model-eps-nan": changed("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", float("nan"))),
    "projector-patch-7": changed("clip.vision.patch_size", U32, struct.pack("<I", 7)),
    "projector-size-is-a-fraction": changed("clip.vision.image_size", U32, F32 + struct.pack("<f", 56.0)),
    "projector-tensor-renamed": lambda data: data.replace(b"v.patch_embd.weight", b"v.patch_embx.weight"),
    "model-weights-zero": lambda data: filled(data, LLM, b"\0"),
    "model-weights-not-numbers": lambda data: filled(data, LLM, b"\xff"),
    "model-no-token-texts": lambda data: data.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"),
    "projector-weights-zero": lambda data: filled(data, MMPROJ, b"\0"),
    "projector-weights-not-numbers": lambda data: filled(data, MMPROJ, b"\xff"),
    "projector-size-0": changed("clip.vision.image_size", U32, struct.pack("<I", 0)),
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


@pytest.mark.parametrize(
    "damaged",
    ["model-weights-zero", "model-weights-not-numbers", "projector-weights-zero", "projector-size-0"],
    indirect=True,
)
def test_serve_ends_in_one_sentence_after_one_start(
    damaged: tuple[Path, Path, Path], opsin_env: dict[str, str]
) -> None:
    llm, mmproj, bad = damaged
    done = subprocess.run(
        [sys.executable, "-m", "opsin", "serve", "--port", "0", "--model", str(llm), "--mmproj", str(mmproj)],
        env=opsin_env,
        cwd=bad.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("opsin: ")]
    assert len(sentences) == 1
    assert bad.name in sentences[0]
    assert "started again" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="no such limit elsewhere")
@pytest.mark.parametrize("megabytes", [200, 400, 750])
@pytest.mark.parametrize(
    "command",
    [
        ["ask", "a.png", "What?", "--max-tokens", "2"],
        ["models"],
        ["serve", "--port", "0", "--batch-store", "sqlite:///batches.sqlite"],
    ],
)
def test_too_little_address_space_is_one_sentence(
    megabytes: int, command: list[str], tmp_path: Path, opsin_env: dict[str, str]
) -> None:
    """There were tracebacks, aborts, and servers that were ready and answered nothing but 500."""
    done = _run_with(megabytes, command, tmp_path, opsin_env)
    assert done.returncode == 4
    assert done.stderr.startswith("opsin: A process may have ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="no such limit elsewhere")
def test_enough_address_space_is_enough(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    done = _run_with(4000, ["ask", "a.png", "What?", "--max-tokens", "2"], tmp_path, opsin_env)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    serve = ["serve", "--port", "0", "--batch-store", "sqlite:///batches.sqlite"]
    with subprocess.Popen(
        _limited(4000, serve), env=opsin_env, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        said, status = [], 0
        for line in child.stderr:
            said.append(line)
            if found := re.search(r"ready at (http://\S+)", line):
                body = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2}
                status = httpx.post(f"{found[1]}/v1/chat/completions", json=body, timeout=60).status_code
                child.terminate()
    assert (status, child.returncode) == (200, 0), said
    assert "Traceback" not in "".join(said)


def _limited(megabytes: int, command: list[str]) -> list[str]:
    return ["sh", "-c", f'ulimit -v {megabytes}000; exec "$@"', "sh", sys.executable, "-m", "opsin", *command]


def _run_with(
    megabytes: int, command: list[str], folder: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _limited(megabytes, command),
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_damaged_record_of_a_trial_counts_as_none(tmp_path: Path) -> None:
    for text in ("[" * 100_000, "\0", ""):
        (tmp_path / "a.json").write_text(text)
        assert read_record(tmp_path / "a.json") is None
