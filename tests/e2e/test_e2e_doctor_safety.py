"""Pairs on which llama.cpp really aborts: the child ends, this process and its findings go on."""

import os
import shlex
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opsin.core.settings import EngineSettings
from opsin.doctor.pair import read_pair
from opsin.doctor.safety import trial_check
from opsin.models.pairing import Pair
from opsin.native.devices import devices
from opsin.native.trial import try_pair
from synth import write_pair

pytestmark = pytest.mark.native
UINT32 = 4
ON_CPU = EngineSettings(device="none", mmproj_device="none")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("tiny", tmp_path_factory.mktemp("pair"))


def damaged(pair: Pair, folder: Path, key: str, old: int, new: int) -> Path:
    """The projector with one number of its metadata changed."""
    assert pair.mmproj is not None
    data = bytearray(pair.mmproj.read_bytes())
    at = data.index(key.encode()) + len(key)
    assert struct.unpack_from("<II", data, at) == (UINT32, old)
    struct.pack_into("<I", data, at + 4, new)
    path = folder / "mmproj-damaged.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "old", "new", "stage"),
    [("clip.vision.image_size", 56, 112, "encode"), ("clip.vision.attention.head_count", 4, 3, "projector")],
    ids=["more patches than positions", "heads that do not divide the width"],
)
def test_a_projector_on_which_llama_cpp_aborts_is_a_finding(
    pair: Pair, tmp_path: Path, key: str, old: int, new: int, stage: str
) -> None:
    bad = damaged(pair, tmp_path, key, old, new)
    check = trial_check(read_pair(replace(pair, mmproj=bad)), ON_CPU, devices(), folder=tmp_path / "trials")
    assert check.status == "fail"
    assert f"died of SIGABRT in the stage {stage!r} with mmproj-damaged.gguf" in check.message
    assert [check.evidence[name] for name in ("end", "stage", "signal")] == ["crashed", stage, "SIGABRT"]
    assert any("GGML_ASSERT" in line for line in check.evidence["lines"])


@pytest.mark.slow
def test_a_sound_pair_is_tried_once_and_then_loads_here(pair: Pair, tmp_path: Path) -> None:
    from opsin.native import open_backend

    first = trial_check(read_pair(pair), ON_CPU, devices(), folder=tmp_path)
    assert (first.status, first.evidence["stage"], first.evidence["end"]) == ("ok", "decode", "done")
    assert trial_check(read_pair(pair), ON_CPU, devices(), folder=tmp_path).evidence == {"remembered": True}
    settings = ON_CPU.model_copy(update={"model": pair.llm, "mmproj": pair.mmproj, "ctx": 256})
    open_backend(settings).close()


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["qwen2vl-tiny", "gemma3-tiny", "llava-1.6-tiny"])
def test_positions_in_sections_both_directions_and_tiles_pass(tmp_path: Path, shape: str) -> None:
    other = write_pair(shape, tmp_path)
    done = try_pair(other.llm, other.mmproj, ON_CPU)
    assert (done.end, done.stage) == ("done", "decode"), done.lines


@pytest.mark.slow
def test_an_all_f32_projector_is_judged_by_what_this_build_does(tmp_path: Path) -> None:
    """Some builds crash on it; whichever this is, the finding tells the truth and this process lives."""
    wide = write_pair("tiny", tmp_path, mmproj_type="f32")
    done = try_pair(wide.llm, wide.mmproj, ON_CPU)
    check = trial_check(read_pair(wide), ON_CPU, devices(), folder=tmp_path / "trials")
    assert (check.status, check.evidence["end"]) == (("ok", "done") if done.end == "done" else ("fail", "crashed"))


def test_a_model_alone_passes_and_a_broken_file_is_refused_in_a_sentence(pair: Pair, tmp_path: Path) -> None:
    alone = try_pair(pair.llm, None, ON_CPU)
    assert (alone.end, alone.stage) == ("done", "decode"), alone.lines
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(pair.llm.read_bytes()[:2000])
    done = try_pair(broken, pair.mmproj, ON_CPU)
    assert (done.end, done.stage) == ("refused", "load")
    assert done.lines[-1].endswith(".")
    assert "broken.gguf" in done.lines[-1]


def test_the_fix_of_a_crash_is_a_command_that_runs(pair: Pair, tmp_path: Path) -> None:
    """As far as it goes without listening: the settings it would serve with are those meant."""
    from opsin.native.devices import Device
    from opsin.native.trial import Trial

    gpu = Device("CUDA0", "a GPU", "gpu", 2**33, 2**34, 0)
    crash = Trial("crashed", "encode", "SIGSEGV", (), 1.0)
    settings = EngineSettings(model=pair.llm, mmproj=pair.mmproj)
    check = trial_check(read_pair(pair), settings, [gpu], trial=lambda *_: crash, folder=tmp_path)
    assert check.fix is not None
    words = [sys.executable, "-m", *shlex.split(check.fix), "--print-config"]
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root / "src"), "XDG_CONFIG_HOME": str(tmp_path)}
    shown = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=True).stdout
    assert 'mmproj_device = "none"  # flag --mmproj-device' in shown
    assert f'mmproj = "{pair.mmproj}"' in shown
