"""Is it safe to load a pair: does it fit the memory, and does llama.cpp get through it in a process of its own?"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opsin.core.errors import BadParameter
from opsin.core.model_info import PairFacts
from opsin.core.settings import EngineSettings, as_flags
from opsin.doctor.check import Check, Status, means_cpu, serve_command
from opsin.doctor.host import KNOWN
from opsin.doctor.pair import PairInfo
from opsin.native.devices import Device, free_memory
from opsin.native.memory import FULL, MemoryPlanner, needed_by_device, size_text
from opsin.native.trial import Trial, fingerprint, keep_record, read_record, record_file, try_pair

_NAME = "safety.trial"


def room_checks(
    facts: PairFacts,
    present: Sequence[Device],
    settings: EngineSettings,
    cpu_features: frozenset[str] = frozenset(),
    root: Path = Path("/"),
) -> list[Check]:
    """One `room.memory` for each device that takes part and tells how much is free; `root` has /proc and /sys."""
    free = free_memory(present, root)
    planner = MemoryPlanner(facts, present, settings, free, cpu_features)
    try:  # what loading would choose; where it would refuse, what the settings need
        plan = planner.plan()
    except BadParameter:
        plan = planner.needed()
    checks = []
    for name, size in sorted(needed_by_device(plan, present).items()):
        if not size or name not in free:
            continue
        parts = {f"{key}_bytes": value for key, value in asdict(plan.by_device[name]).items()}
        evidence = {"device": name, **parts, "needed_bytes": size, "free_bytes": free[name]}
        message = f"{name} has {size_text(free[name])} free, and this setup needs {size_text(size)}"
        if size <= FULL * free[name]:
            checks.append(Check("room.memory", "ok", f"{message}.", evidence))
            continue
        largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
        told = ", ".join(f"{key.removesuffix('_bytes').replace('_', ' ')} {size_text(value)}" for key, value in largest)
        change = planner.advice()
        advice = f"{' '.join(as_flags(change))} would fit" if change else "no setting makes it fit, use a smaller model"
        fix = serve_command(settings, **change) if change else None
        status: Status = "fail" if size > free[name] else "warn"
        checks.append(Check("room.memory", status, f"{message} ({told}): {advice}.", evidence, fix))
    return checks


def trial_check(
    info: PairInfo,
    settings: EngineSettings,
    present: Sequence[Device],
    *,
    trial: Callable[..., Trial] = try_pair,
    folder: Path | None = None,
) -> Check:
    """`safety.trial`: load, encode, prefill and decode in a child process. Raises NativeMismatch.

    Success is remembered in `folder`; a pair that fails must not be loaded in this process.
    """
    llm, mmproj = info.llm.path, info.mmproj.path if info.mmproj else None
    file = record_file("trials", fingerprint([*info.parts, mmproj], settings, present), folder)
    if read_record(file) is not None:
        return Check(_NAME, "ok", f"{llm.name} ran here before.", {"remembered": True})
    done = trial(llm, mmproj, settings)
    evidence = {"remembered": False, **asdict(done), "seconds": round(done.seconds, 3), "lines": list(done.lines)}
    if done.end == "done":
        keep_record(file, evidence)
        return Check(_NAME, "ok", f"{llm.name} was loaded and asked in a process of its own.", evidence)
    if done.end == "refused":
        last = done.lines[-1] if done.lines else "it said nothing"
        return Check(_NAME, "fail", f"The pair was refused in the stage {done.stage!r}: {last}", evidence)
    what = f"died of {done.signal}" if done.end == "crashed" else f"hung for {done.seconds:.0f} s"
    advice, change = _advice(info, done, settings, gpu=any(device.is_gpu for device in present))
    message = f"llama.cpp {what} in the stage {done.stage!r} with {(mmproj or llm).name}: {advice}."
    fix = serve_command(settings, **change) if change else None
    return Check(_NAME, "fail", message, evidence, fix)


def _advice(info: PairInfo, done: Trial, settings: EngineSettings, *, gpu: bool) -> tuple[str, dict[str, Any]]:
    """What to try, in words and as a change of settings, by the stage it died in."""
    f32 = info.mmproj is not None and info.mmproj.is_all_f32
    if done.signal in KNOWN["signals"]:
        return KNOWN["signals"][done.signal], {}
    if done.end == "hung":
        return "wait for the disk and try again, or take another quantisation", {}
    if done.stage in {"prefill", "decode"} and settings.flash_attention is not False:
        return "try it without flash attention", {"flash_attention": False}
    if done.stage in {"projector", "encode"}:
        if done.stage == "encode" and gpu and not means_cpu(settings.mmproj_device) and not f32:
            return "try the encoder on the CPU", {"mmproj_device": "none"}
        all_f32 = "all of the projector is f32, use its f16 file or convert it to f16"
        return all_f32 if f32 else "take the projector that was published with the model, in f16", {}
    return "the files may be damaged, download them again or take another quantisation", {}
