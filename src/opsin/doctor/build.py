"""Does the llama.cpp that is installed fit this machine? Versions, GPUs, CPU instructions, build flags, cores."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from opsin.doctor.check import Check, Status
from opsin.doctor.host import Gpu, Host, here, in_software, read_host
from opsin.doctor.install import install_command, known_bad, missing_tool, modern, old_flags, wheel_command
from opsin.native import COMMIT, PACKAGE, PINNED, Build, Device, build_info, devices

# Without these the matrix kernels fall back to generic code; without the others some types of weights are slower.
ESSENTIAL = frozenset({"AVX", "AVX2", "FMA", "F16C", "NEON", "DOTPROD"})
# The first driver that can run programs of a CUDA major version (docs.nvidia.com/deploy/cuda-compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
HIDES = {
    "CUDA": ("CUDA_VISIBLE_DEVICES",),
    "ROCm": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    "Vulkan": ("GGML_VK_VISIBLE_DEVICES",),
}


def build_checks(
    build: Build | None = None,
    host: Host | None = None,
    environment: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> list[Check]:
    """All checks of this group, in the order to read them; what is not handed in is looked at here.

    Names: build.version, build.assertions, build.cpu, build.driver, build.gpu, build.flags, build.threads. Those
    about a library that cannot be loaded are left out, and so are build.assertions where its files do not tell, and
    build.driver where there is no GPU. `threads` are those that were asked for.
    """
    build = build_info() if build is None else build
    host = read_host() if host is None else host
    environment = os.environ if environment is None else environment
    found: list[Check | None] = [check_version(build, host)]
    found += [] if build.error else [check_assertions(build, host), check_cpu(build, host)]
    found.append(check_driver(host))
    found += [] if build.error else [check_gpu(build, host, environment)]
    found += [check_flags(environment, host), check_threads(host, threads)]
    return [check for check in found if check is not None]


def unused_gpu_hint(build: Build | None = None, host: Host | None = None) -> str | None:
    """One sentence when a GPU is here that this build has no backend for, with the command; else None.

    Without arguments this machine is looked at by files alone: it is asked before the first answer, and programs such
    as `nvidia-smi` take seconds.
    """
    host = host or read_host(here(run=lambda _: None))
    if all(gpu.kind == "Vulkan" or gpu.trouble for gpu in host.gpus):
        return None
    build = build or build_info()
    lacking = None if build.error else _lacking(build, host.gpus)
    if lacking is None:
        return None
    return f"{_lacks(lacking)}, so it is not used; install one with: {_install_for(lacking, build, host)[0]}"


def gpu_backends() -> list[str]:
    """The kinds of GPU that this build has a device for here: CUDA, ROCm, Metal, Vulkan. Raises NativeMismatch."""
    names = {device.name.rstrip("0123456789") for device in devices() if device.is_gpu}
    return sorted("Metal" if name == "MTL" else name for name in names)


def check_version(build: Build, host: Host) -> Check:
    """build.version: the very library this code was written for, and the llama.cpp inside it."""
    evidence: dict[str, Any] = {"llama_cpp_python": build.version, "needed": PINNED, "llama_cpp": build.llama}
    evidence |= {"ggml": build.ggml, "commit": build.commit, "compiler": build.compiler}
    evidence["backends"] = list(build.backends)
    # A library that cannot be asked hides which backends the next one must have; the host tells.
    best = next((gpu for gpu in host.gpus if build.error and not gpu.trouble and not gpu.integrated), None)
    fix, note = _install_for(best, build, host)
    if build.error or build.version != PINNED:
        message = build.error.rstrip(".") or f"{PACKAGE} {build.version} is installed, but Opsin needs {PINNED}"
        told = "; ".join(filter(None, (message, known_bad(build.version), f"install {PINNED}{note}")))
        return Check("build.version", "fail", f"{told}.", evidence, fix)
    commit = build.commit.removesuffix("-dirty")
    if commit not in {"", "unknown"} and not (COMMIT.startswith(commit) or commit.startswith(COMMIT)):
        message = f"llama.cpp is at commit {commit}, not at the {COMMIT} that {PACKAGE} {PINNED} carries: reinstall it."
        return Check("build.version", "warn", message, evidence, fix)
    made = f", compiled by {build.compiler}" if build.compiler else ""
    message = f"{PACKAGE} {build.version} with llama.cpp {build.llama} (commit {commit or 'unknown'}){made}."
    return Check("build.version", "ok", message, evidence)


def check_assertions(build: Build, host: Host) -> Check | None:
    """build.assertions: a debug build has them, and so has an optimised one that was made without -DNDEBUG."""
    if build.assertions is None:
        return None
    evidence = {"assertions": build.assertions}
    if not build.assertions:
        return Check("build.assertions", "ok", "llama.cpp was compiled without assertions, as a release is.", evidence)
    message = "llama.cpp was compiled with assertions, as debug builds are: install a release build."
    fix = install_command(host, _kept(build), ["-DCMAKE_BUILD_TYPE=Release"])
    return Check("build.assertions", "warn", message, evidence, fix)


def check_cpu(build: Build, host: Host) -> Check:
    """build.cpu: does the build use the instructions this CPU has?"""
    unused = host.cpu_features - build.cpu_features
    evidence = {"cpu": host.cpu, "used": sorted(build.cpu_features), "unused": sorted(unused)}
    if not unused:
        known = ", ".join(sorted(host.cpu_features & build.cpu_features))
        told = f"The build uses what this CPU has: {known}." if known else "This system does not tell what its CPU has."
        return Check("build.cpu", "ok", told, evidence)
    fix = install_command(host, _kept(build), ["-DGGML_NATIVE=on"])
    essential = unused & ESSENTIAL
    names = ", ".join(sorted(essential or unused))
    if essential:
        message = f"This CPU has {names}, but llama.cpp was built for a plain CPU without: everything on it is slow."
        return Check("build.cpu", "fail", f"{message[:-1]}; compile it for this one.", evidence, fix)
    message = f"This CPU has {names}, which the build does not use: compile it for this CPU."
    return Check("build.cpu", "warn", message, evidence, fix)


def check_driver(host: Host) -> Check | None:
    """build.driver: which GPUs programs can reach; a card that they cannot only fails where there is no other."""
    if not host.gpus:
        return None
    fine = [gpu for gpu in host.gpus if not gpu.trouble]
    told = [f"{_article(gpu)} is here, but {gpu.trouble}" for gpu in host.gpus if gpu.trouble]
    names = ", ".join(gpu.name + (f" (driver {gpu.driver})" if gpu.driver else "") for gpu in fine)
    message = "; ".join([*told, f"programs can reach {names}"] if fine else told)
    message = f"{message[0].upper()}{message[1:]}."
    evidence = {"gpus": [_row(gpu) for gpu in host.gpus]}
    # One inside the CPU that nothing may use, as in a container for the card beside it, is no loss.
    lost = next((gpu for gpu in host.gpus if gpu.trouble and not gpu.integrated), None)
    if lost is None:
        return Check("build.driver", "ok", message, evidence)
    status: Status = "fail" if all(gpu.integrated for gpu in fine) else "warn"
    return Check("build.driver", status, message, evidence, lost.fix)


def check_gpu(build: Build, host: Host, environment: Mapping[str, str]) -> Check:
    """build.gpu: the GPUs of the host against those that ggml sees."""
    offered = [device for device in build.devices if device.is_gpu]
    seen = [device for device in offered if not in_software(device)]
    evidence = {
        "here": [_row(gpu) for gpu in host.gpus],
        "backends": list(build.backends),
        "seen": [_row(device) for device in offered],
    }
    usable = [gpu for gpu in host.gpus if not gpu.trouble]
    lacking = _lacking(build, usable)
    if lacking is not None:
        return _no_backend(lacking, build, host, evidence)
    if not usable or (usable[0].integrated and not seen):
        return _without_gpu(host, offered, seen, evidence)
    best = next((gpu for gpu in usable if gpu.kind in build.backends and not gpu.integrated), usable[0])
    same = [gpu for gpu in usable if not gpu.integrated and (gpu.kind == best.kind or "Vulkan" in build.backends)]
    # nvidia-smi lists GPUs that share the CPU's memory like cards, and CUDA calls them integrated.
    cards = [device for device in seen if device.type == "gpu" or device.name.startswith("CUDA")]
    hiding = [name for kind in (best.kind, "Vulkan") for name in HIDES.get(kind, ()) if name in environment]
    if same and not cards:
        return _unseen(best, build, host, evidence, {name: environment[name] for name in hiding})
    shown = ", ".join(f"{device.name} ({device.description})" for device in seen)
    if len(cards) < len(same):
        why = f" ({hiding[0]} is {environment[hiding[0]]!r})" if hiding else ""
        message = f"{len(same)} GPUs are here, but llama.cpp sees {len(cards)} of them{why}: {shown}."
        return Check("build.gpu", "warn", message, evidence, _unhide(hiding[:1], host))
    return Check("build.gpu", "ok", f"llama.cpp computes on {shown}.", evidence)


def _without_gpu(host: Host, offered: list[Device], seen: list[Device], evidence: dict[str, Any]) -> Check:
    waiting = next((gpu for gpu in host.gpus if gpu.trouble and not gpu.integrated), None)
    if waiting is not None:
        message = f"{waiting.name} cannot be used before what build.driver says is fixed."
        return Check("build.gpu", "warn", message, evidence)
    if seen:
        return Check("build.gpu", "ok", f"llama.cpp computes on {', '.join(d.name for d in seen)}.", evidence)
    if offered:
        message = f"{offered[0].name} is a GPU in software: what is offloaded to it runs on the CPU; offload nothing."
        return Check("build.gpu", "warn", message, evidence)
    return Check("build.gpu", "ok", "llama.cpp sees no GPU here: everything runs on the CPU.", evidence)


def _no_backend(gpu: Gpu, build: Build, host: Host, evidence: dict[str, Any]) -> Check:
    if gpu.integrated:
        message = f"{_lacks(gpu)}; a GPU that shares the CPU's memory may be no faster than the CPU: measure both."
        return Check("build.gpu", "ok", message, evidence)
    command, note = _install_for(gpu, build, host)
    message = f"{_lacks(gpu)}, so it is not used: install one{note}."
    return Check("build.gpu", "warn" if gpu.kind == "Vulkan" else "fail", message, evidence, command)


def _unseen(gpu: Gpu, build: Build, host: Host, evidence: dict[str, Any], hiding: dict[str, str]) -> Check:
    """The backend is compiled in, the GPU is here and free of trouble, and ggml has no device of it."""
    start = f"{_article(gpu)} is here and this build has a backend for it, but llama.cpp does not see it"
    if hiding:
        told = ", ".join(f"{name} is {value!r}" for name, value in hiding.items())
        return Check("build.gpu", "fail", f"{start}: {told}; unset it.", evidence, _unhide(hiding, host))
    oldest = OLDEST_DRIVER.get(build.cuda or 0, 0)
    major = gpu.driver.partition(".")[0]
    if gpu.kind == "CUDA" and major.isdigit() and int(major) < oldest:
        message = (
            f"{start}: driver {gpu.driver} is too old for CUDA {build.cuda}, which needs {oldest}; update the driver."
        )
        return Check("build.gpu", "fail", message, {**evidence, "oldest_driver": oldest})
    message = f"{start}; it may be built for another kind of card: compile it on this machine."
    return Check("build.gpu", "fail", message, evidence, _install_for(gpu, build, host)[0])


def check_flags(environment: Mapping[str, str], host: Host) -> Check:
    """build.flags: would what the environment holds build the next llama-cpp-python as its owner thinks?"""
    flags = environment.get("CMAKE_ARGS", "")
    old = old_flags(flags)
    # The Makefile of before read these by themselves; nothing has since.
    words = [name for name in ("LLAMA_CUBLAS", "LLAMA_METAL", "LLAMA_HIPBLAS", "LLAMA_CLBLAST") if name in environment]
    evidence = {"CMAKE_ARGS": flags, "old": old, "ignored_variables": words}
    if old:
        message = f"CMAKE_ARGS holds {', '.join(old)} of old versions, which a build of today refuses or ignores."
        return Check("build.flags", "warn", message, evidence, _export(modern(flags), host))
    if words:
        message = f"{words[0]} in the environment does nothing today: give the flag in CMAKE_ARGS."
        return Check("build.flags", "warn", message, evidence, _export(modern(f"-D{words[0]}=on"), host))
    told = f"CMAKE_ARGS ({flags}) holds no flags of old versions." if flags else "No build flags are set."
    return Check("build.flags", "ok", told, evidence)


def check_threads(host: Host, asked: int | None = None) -> Check:
    """build.threads: may this process use the cores that it would start threads for, or the `asked` ones?"""
    threads = asked or host.threads
    evidence = {"cores": host.cores, "allowed_cores": host.allowed, "quota_cores": host.quota}
    evidence["threads"] = threads
    share = min(host.allowed, host.quota or host.allowed)
    fit = max(1, int(share))
    if threads > fit:
        message = (
            f"This process gets {share:g} of {host.cores} cores (a control group's limit, or the cores it may run "
            f"on), and {threads} threads would wait for each other: give --threads {fit}."
        )
        return Check("build.threads", "warn", message, evidence)
    return Check("build.threads", "ok", f"{threads} threads on {share:g} of {host.cores} cores.", evidence)


def _lacking(build: Build, gpus: Iterable[Gpu]) -> Gpu | None:
    """The best GPU that is here when no backend of this build can use any."""
    usable = [gpu for gpu in gpus if not gpu.trouble]
    kinds = {"Vulkan", "SYCL", "OpenCL", *(gpu.kind for gpu in usable)}
    return usable[0] if usable and not kinds & set(build.backends) else None


def _install_for(gpu: Gpu | None, build: Build, host: Host) -> tuple[str, str]:
    """The command, and what must be said with it."""
    fresh = not build.version
    if gpu is None:
        return install_command(host, _kept(build), fresh=fresh), ""
    missing = missing_tool(host, gpu.kind)
    wheel = wheel_command(host, gpu.driver, fresh=fresh) if missing and gpu.kind == "CUDA" else None
    if wheel:
        return wheel, f" (a prebuilt one, since {missing} is not here to compile it)"
    command = install_command(host, [*_kept(build), gpu.kind], fresh=fresh)
    return command, f", after {missing}, which is not here" if missing else ""


def _kept(build: Build) -> list[str]:
    """The backends that a new build must have too."""
    return [name for name in build.backends if name != "CPU"]


def _unhide(names: Iterable[str], host: Host) -> str | None:
    words = " ".join(f"-u {name}" for name in names)
    return f"env {words} opsin doctor" if words and host.system != "Windows" else None


def _export(flags: str, host: Host) -> str | None:
    escaped = re.sub(r'([\\"$`])', r"\\\1", flags)
    return None if host.system == "Windows" else f'export CMAKE_ARGS="{escaped}"'


def _article(gpu: Gpu) -> str:
    """Every maker's name that is known here is spoken with a vowel first."""
    return f"{'An' if gpu.name.startswith(('NVIDIA', 'AMD', 'Apple', 'Intel')) else 'A'} {gpu.name}"


def _lacks(gpu: Gpu) -> str:
    return f"{_article(gpu)} is here, but this build has no {gpu.kind} backend"


def _row(item: Gpu | Device) -> dict[str, Any]:
    names = (
        ("kind", "name", "driver", "integrated", "trouble")
        if isinstance(item, Gpu)
        else ("name", "description", "type")
    )
    told = {name: getattr(item, name) for name in names}
    return {**told, "memory_total_bytes": item.memory_total, "memory_free_bytes": item.memory_free}
