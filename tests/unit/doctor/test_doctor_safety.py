"""The trial of an unknown pair: children that really die, by shell, at every stage; and what is remembered."""

import os
import platform
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pair_fixes import parsed

from opsin.core.errors import ModelNotFound
from opsin.core.settings import EngineSettings
from opsin.doctor.check import Check
from opsin.doctor.pair import read_pair
from opsin.doctor.safety import trial_check
from opsin.models.pairing import Pair
from opsin.native.devices import Device
from opsin.native.trial import Trial, try_pair
from synth import write_pair

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the children are shells"),
    pytest.mark.usefixtures("built"),
]
GPU = Device("CUDA0", "a GPU", "gpu", 2**33, 2**34, 2)
BEGUN = ("load", "projector", "encode", "prefill", "decode")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("tiny", tmp_path_factory.mktemp("pair"))


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A llama.cpp that is a folder and some words."""
    folder = tmp_path / "lib"
    folder.mkdir()
    for name in ("libllama.so", "libggml-cpu.so"):
        (folder / name).write_bytes(b"code")
    words = SimpleNamespace(llama_print_system_info=lambda: b"CPU : AVX2 = 1")
    found = SimpleNamespace(path=folder / "libllama.so", llama=words)
    monkeypatch.setattr("opsin.native.trial.library", lambda: found)
    return found


def shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script, "sh")


def stages(last: str) -> str:
    return "; ".join(f"echo stage {stage}" for stage in BEGUN[: BEGUN.index(last) + 1])


def tried(pair: Pair, script: str, seconds: float = 30) -> Trial:
    return try_pair(pair.llm, pair.mmproj, command=shell(script), seconds=seconds)


@pytest.mark.parametrize("stage", BEGUN)
@pytest.mark.parametrize("name", ["SEGV", "ABRT"])
def test_a_child_that_dies_tells_its_stage_and_signal(pair: Pair, tmp_path: Path, stage: str, name: str) -> None:
    script = f"{stages(stage)}; echo a native line; echo GGML_ASSERT >&2; kill -{name} $$"
    done = tried(pair, script)
    assert (done.end, done.stage, done.signal, done.lines) == ("crashed", stage, f"SIG{name}", ("GGML_ASSERT",))
    check = checked(pair, tmp_path, done)
    assert check.status == "fail"
    assert f"died of SIG{name}" in check.message
    assert f"stage {stage!r}" in check.message
    assert check.evidence["lines"] == ["GGML_ASSERT"]


def test_a_child_that_hangs_is_ended(pair: Pair, tmp_path: Path) -> None:
    done = tried(pair, "echo stage load; echo stage prefill; echo reading >&2; exec sleep 60", seconds=0.25)
    assert (done.end, done.stage, done.signal, done.lines) == ("hung", "prefill", None, ("reading",))
    assert done.seconds < 20
    check = checked(pair, tmp_path, done)
    assert check.status == "fail"
    assert "hung for 0 s" in check.message
    assert "in the stage 'prefill'" in check.message


def test_a_child_that_ends_well_and_one_that_refuses(pair: Pair, tmp_path: Path) -> None:
    done = tried(pair, stages("decode"))
    assert (done.end, done.stage, done.signal, done.lines) == ("done", "decode", None, ())
    assert checked(pair, tmp_path, done).status == "ok"
    done = tried(pair, "echo stage load; echo There is no device CUDA7. >&2; exit 2")
    assert (done.end, done.stage) == ("refused", "load")
    check = checked(pair, tmp_path / "other", done)
    assert check.status == "fail"
    assert check.message == "The pair was refused in the stage 'load': There is no device CUDA7."


def test_a_child_is_given_the_pair_the_settings_and_the_last_stage(pair: Pair) -> None:
    done = try_pair(
        pair.llm,
        None,
        EngineSettings(kv_type="q8_0"),
        command=shell('for word in "$@"; do echo "[$word]" >&2; done'),
    )
    llm, projector, settings = done.lines
    assert (llm, projector) == (f"[{pair.llm}]", "[]")
    assert '"kv_type":"q8_0"' in settings
    assert done.stage == "start"


def test_lines_are_few_and_short(pair: Pair) -> None:
    done = tried(pair, "for i in 1 2 3 4 5 6 7 8 9; do printf '%0700d\\n' $i >&2; done")
    assert len(done.lines) == 6
    assert {len(line) for line in done.lines} == {600}


def checked(pair: Pair, folder: Path, done: Trial, **more: Any) -> Check:
    return trial_check(read_pair(pair), EngineSettings(), [], trial=lambda *_: done, folder=folder, **more)


def ended(end: Any = "crashed", stage: Any = "encode", name: str | None = "SIGSEGV") -> Trial:
    return Trial(end, stage, name, ("a line",), 1.0)


def test_what_went_well_is_not_tried_again_until_something_changes(pair: Pair, tmp_path: Path) -> None:
    calls: list[int] = []

    def trial(*_: object, **_more: object) -> Trial:
        calls.append(1)
        return ended("done", "decode", None)

    def check(present: Any = (), settings: EngineSettings | None = None) -> Check:
        return trial_check(read_pair(pair), settings or EngineSettings(), present, trial=trial, folder=tmp_path)

    assert check().evidence["remembered"] is False
    assert check().evidence == {"remembered": True}
    assert len(calls) == 1
    check((GPU,))
    check(settings=EngineSettings(kv_type="q8_0"))
    assert len(calls) == 3
    assert pair.mmproj is not None
    os.utime(pair.mmproj, ns=(1, 1))
    check()
    assert len(calls) == 4
    for file in tmp_path.glob("*.json"):
        file.write_text("[")
    check()
    assert len(calls) == 5


def test_another_build_and_another_machine_are_tried_anew(
    pair: Pair, tmp_path: Path, built: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's version stays when it is built with other flags, and the cache may lie on a shared disk."""

    def known() -> bool:
        return bool(checked(pair, tmp_path / "trials", ended("done", "decode", None)).evidence["remembered"])

    assert [known(), known()] == [False, True]
    (built.path.parent / "libggml-cpu.so").write_bytes(b"other code")
    assert [known(), known()] == [False, True]
    built.llama.llama_print_system_info = lambda: b"CPU : AVX512 = 1"
    assert [known(), known()] == [False, True]
    monkeypatch.setattr(platform, "node", lambda: "another")
    assert [known(), known()] == [False, True]


def test_a_crash_is_tried_again_and_a_folder_that_cannot_be_written_loses_nothing(pair: Pair, tmp_path: Path) -> None:
    assert checked(pair, tmp_path, ended()).status == "fail"
    assert list(tmp_path.glob("*.json")) == []
    assert checked(pair, tmp_path, ended("done", "decode", None)).evidence["remembered"] is False
    (tmp_path / "file").write_text("")
    assert checked(pair, tmp_path / "file" / "folder", ended("done", "decode", None)).status == "ok"


def test_a_crash_names_what_to_try_by_its_stage(pair: Pair, tmp_path: Path) -> None:
    def fix(stage: str, **settings: Any) -> tuple[str | None, str]:
        info, chosen = read_pair(pair), EngineSettings(**settings)
        check = trial_check(info, chosen, [GPU], trial=lambda *_: ended(stage=stage), folder=tmp_path)
        return check.fix, check.message

    assert parsed(fix("encode", ctx=2048)[0])[1].items() >= {"mmproj_device": "none", "ctx": 2048}.items()
    on_cpu, message = fix("encode", mmproj_device="cpu")
    assert on_cpu is None, "it is on the CPU"
    assert "published with the model" in message
    assert parsed(fix("decode", parallel=3)[0])[1].items() >= {"flash_attention": False, "parallel": 3}.items()
    assert "download them again" in fix("prefill", flash_attention=False)[1]
    assert fix("load")[0] is None


def test_a_crash_on_an_all_f32_projector_names_that(tmp_path: Path) -> None:
    wide = write_pair("tiny", tmp_path, mmproj_type="f32")
    assert "convert it to f16" in checked(wide, tmp_path / "trials", ended()).message


@pytest.mark.parametrize(("name", "said"), [("SIGKILL", "want of memory"), ("SIGILL", "this CPU lacks")])
def test_signals_with_a_meaning_tell_it(pair: Pair, tmp_path: Path, name: str, said: str) -> None:
    assert said in checked(pair, tmp_path, ended("crashed", "load", name)).message
    assert signal.Signals[name]


def test_a_text_model_and_a_file_that_is_not_there(pair: Pair, tmp_path: Path) -> None:
    done = ended("done", "decode", None)
    assert checked(replace(pair, mmproj=None), tmp_path, done).status == "ok"
    with pytest.raises(ModelNotFound):
        read_pair(replace(pair, llm=tmp_path / "no.gguf"))
