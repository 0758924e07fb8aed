"""Is it safe to load this pair here? An unknown one is tried in a child process, so that a crash is a finding."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from opsin.core.settings import EngineSettings
from opsin.doctor.check import Check
from opsin.doctor.pair import serve_command
from opsin.doctor.proof import write_file
from opsin.models.gguf_info import read_info
from opsin.native import Device, devices
from opsin.native.trial import Trial, try_pair

_NAME = "safety.trial"
_HEAD_BYTES = 2**20  # of a file, from its start: metadata and tensor list, or most of them
_DOING = {
    "start": "before it was loaded",
    "load": "while it was loaded",
    "encode": "while a picture was encoded",
    "prefill": "while the prompt was read",
    "decode": "while an answer was written",
}
_MEANING = {
    "SIGKILL": "most likely the system ended it for want of memory: see room.memory",
    "SIGILL": "this build uses instructions that this CPU lacks: install one that was built here",
}


def safety_check(
    llm: Path,
    mmproj: Path | None,
    settings: EngineSettings | None = None,
    *,
    seconds: float | None = None,
    trial: Callable[[Path, Path | None, EngineSettings, float | None], Trial] | None = None,
    folder: Path | None = None,
    present: Sequence[Device] | None = None,
) -> Check:
    """`safety.trial`: load, encode, prefill and decode in a child process; ok when that was done once.

    What went well is remembered in `folder` for these files, settings, devices and this library, and not tried again;
    what failed is. `seconds` is the time limit (none: by the files' sizes); `present` are the devices ggml sees (none:
    it is asked). A pair that fails must not be loaded in this process. Raises ModelNotFound, ModelUnreadable,
    NativeMismatch.
    """
    chosen, here = settings or EngineSettings(), devices() if present is None else present
    path = (folder or _default_folder()) / f"{_setup(llm, mmproj, chosen, here)}.json"
    name = mmproj.name if mmproj is not None else llm.name
    if _is_known(path):
        return Check(_NAME, "ok", f"{llm.name} ran here before.", {"remembered": True})
    done = (trial or _try)(llm, mmproj, chosen, seconds)
    evidence = {"remembered": False, **asdict(done), "seconds": round(done.seconds, 3), "lines": list(done.lines)}
    if done.end == "done":
        with contextlib.suppress(OSError):
            write_file(path, json.dumps(evidence))
        return Check(_NAME, "ok", f"{llm.name} was loaded and asked in a process of its own.", evidence)
    last = done.lines[-1] if done.lines else "it said nothing"
    if done.end == "refused":
        return Check(_NAME, "fail", f"The pair cannot be used {_DOING[done.stage]}: {last}", evidence)
    what = f"died of {done.signal}" if done.end == "crashed" else f"hung for {done.seconds:.3g} s"
    mend, fix = _mend(llm, mmproj, chosen, done, gpu=any(device.is_gpu for device in here))
    message = f"llama.cpp {what} {_DOING[done.stage]} ({done.stage}) with {name}: {mend}."
    return Check(_NAME, "fail", message, evidence, fix)


def _try(llm: Path, mmproj: Path | None, settings: EngineSettings, seconds: float | None) -> Trial:
    return try_pair(llm, mmproj, settings, seconds=seconds)


def _mend(
    llm: Path, mmproj: Path | None, settings: EngineSettings, done: Trial, *, gpu: bool
) -> tuple[str, str | None]:
    """What to do about it, and the command where one does it."""
    if done.signal in _MEANING:
        return _MEANING[done.signal], None
    if done.end == "hung":
        return "wait for the disk and try again, or take another quantisation", None
    mend, fix = "the files may be damaged: download them again, or take another quantisation", None
    if done.stage == "encode" and mmproj is not None:
        if gpu and settings.mmproj_device != "none":
            mend, fix = "run the encoder on the CPU", serve_command(llm, mmproj, "--mmproj-device", "none")
        elif read_info(mmproj).is_all_f32:
            mend = "all of it is f32: use its f16 file, or convert it to f16"
        else:
            mend = "take the projector that was published with the model, in f16"
    elif done.stage in {"prefill", "decode"}:
        if settings.kv_type != "f16" or settings.flash_attention is not None:
            mend, fix = "leave --kv-type and --flash-attention out", serve_command(llm, mmproj)
        elif gpu and settings.device != "none":
            mend, fix = "run the language model on the CPU", serve_command(llm, mmproj, "--device", "none")
    return mend, fix


def _is_known(path: Path) -> bool:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(known, dict) and known.get("end") == "done"


def _default_folder() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("opsin") / "trials"


def _setup(llm: Path, mmproj: Path | None, settings: EngineSettings, present: Sequence[Device]) -> str:
    """Names the files by size, time and head, with settings, devices and library, in 32 hex digits."""
    digest = hashlib.sha256(settings.model_dump_json().encode())
    digest.update(repr((version("llama-cpp-python"), [device.name for device in present])).encode())
    for path in (llm, mmproj):
        if path is not None:
            found = read_info(path)  # its errors say it better than those of the system
            stat = path.stat()
            digest.update(repr((str(path), found.size, stat.st_size, stat.st_mtime_ns)).encode())
            with path.open("rb") as file:
                digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()[:32]
