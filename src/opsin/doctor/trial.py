"""Is it safe to load this pair here? An unknown one is tried in a child process, so that a crash is a finding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opsin.core.settings import EngineSettings
from opsin.doctor.check import Check, means_cpu, serve_command
from opsin.doctor.pair import PairInfo
from opsin.native import Device, devices
from opsin.native.records import fingerprint, keep_record, read_record, record_file
from opsin.native.trial import Trial, try_pair

_Try = Callable[..., Trial]  # called as try_pair is

_NAME = "safety.trial"
_DOING = {
    "start": "before it was loaded",
    "load": "while it was loaded",
    "projector": "while its projector was loaded",
    "encode": "while an image was encoded",
    "prefill": "while the prompt was read",
    "decode": "while an answer was written",
}
_MEANING = {
    "SIGKILL": "most likely the system ended it for want of memory: see room.memory",
    "SIGILL": "this build uses instructions that this CPU lacks: install one that was built here",
}
_VISION = {"projector", "encode"}


def trial_check(
    info: PairInfo,
    settings: EngineSettings | None = None,
    *,
    seconds: float | None = None,
    trial: _Try = try_pair,
    folder: Path | None = None,
    present: Sequence[Device] | None = None,
) -> Check:
    """`safety.trial`: load, encode, prefill and decode in a child process; ok when that was done once.

    What went well is remembered in `folder` for these files, settings, devices and this library, and not tried again;
    what failed is, and so are settings that may avoid it. `seconds` is the time limit (None: by the files' sizes);
    `present` are the devices ggml sees (None: it is asked). A pair that fails must not be loaded in this process.
    Raises NativeMismatch.
    """
    chosen, here = settings or EngineSettings(), devices() if present is None else present
    llm, mmproj = info.llm.path, info.mmproj.path if info.mmproj else None
    file = record_file("trials", fingerprint([*info.parts, mmproj], chosen, here), folder)
    name = mmproj.name if mmproj is not None else llm.name
    known = read_record(file)
    if isinstance(known, dict) and known.get("end") == "done":
        return Check(_NAME, "ok", f"{llm.name} ran here before.", {"remembered": True})
    done = trial(llm, mmproj, chosen, seconds=seconds)
    evidence = {"remembered": False, **asdict(done), "seconds": round(done.seconds, 3), "lines": list(done.lines)}
    if done.end == "done":
        keep_record(file, evidence)
        return Check(_NAME, "ok", f"{llm.name} was loaded and asked in a process of its own.", evidence)
    last = done.lines[-1] if done.lines else "it said nothing"
    if done.end == "refused":
        return Check(_NAME, "fail", f"The pair cannot be used {_DOING[done.stage]}: {last}", evidence)
    what = f"died of {done.signal}" if done.end == "crashed" else f"hung for {done.seconds:.0f} s"
    remedy = _proved(llm, mmproj, chosen, done, trial, gpu=any(device.is_gpu for device in here))
    mend = _general(info, done) if remedy is None else f"{remedy[0]}, with which it ran"
    fix = None if remedy is None else serve_command(chosen, model=llm, mmproj=mmproj, **remedy[1])
    message = f"llama.cpp {what} {_DOING[done.stage]} ({done.stage}) with {name}: {mend}."
    return Check(_NAME, "fail", message, evidence, fix)


_Remedy = tuple[str, dict[str, Any]]  # in words, and the setting that may avoid a crash
_NO_FLASH: _Remedy = ("switch flash attention off", {"flash_attention": False})
_MODEL_ON_CPU: _Remedy = ("run the language model on the CPU", {"device": "none"})
_ENCODER_NO_FLASH: _Remedy = ("switch the encoder's flash attention off", {"vision_flash_attention": False})
_ENCODER_ON_CPU: _Remedy = ("run the encoder on the CPU", {"mmproj_device": "none"})
_PLAIN_KV: _Remedy = ("keep the KV cache in f16", {"kv_type": "f16"})


def _proved(
    llm: Path, mmproj: Path | None, settings: EngineSettings, done: Trial, trial: _Try, *, gpu: bool
) -> _Remedy | None:
    """The first remedy with which the pair runs, each tried in a child; what costs least speed first."""
    candidates: list[_Remedy] = []
    if done.signal in _MEANING or done.end == "hung":
        return None
    if done.stage in _VISION and mmproj is not None:
        candidates = [_ENCODER_NO_FLASH, *([_ENCODER_ON_CPU] if gpu and not means_cpu(settings.mmproj_device) else [])]
    elif done.stage in {"prefill", "decode"}:
        candidates = [_PLAIN_KV, _NO_FLASH, *([_MODEL_ON_CPU] if gpu and not means_cpu(settings.device) else [])]
    for remedy in candidates:
        changed = settings.model_copy(update=remedy[1])
        if changed != settings and trial(llm, mmproj, changed).end == "done":
            return remedy
    return None


def _general(info: PairInfo, done: Trial) -> str:
    """What to do where no setting helps."""
    if done.signal in _MEANING:
        return _MEANING[done.signal]
    if done.end == "hung":
        return "wait for the disk and try again, or take another quantisation"
    if done.stage in _VISION and info.mmproj is not None:
        if info.mmproj.is_all_f32:
            return "all of it is f32: use its f16 file, or convert it to f16"
        return "take the projector that was published with the model, in f16"
    return "the files may be damaged: download them again, or take another quantisation"
