"""Does the installed llama.cpp fit this machine, and which command installs one that does?"""

import os
import shlex
from collections.abc import Iterable, Sequence

from opsin.doctor.check import Check, Status
from opsin.doctor.host import KNOWN, Gpu, Host, read_host
from opsin.native.devices import COMMIT, PACKAGE, PINNED, Build, Device, build_info

# Without these the matrix kernels fall back to generic code; others only speed up some types of weights.
ESSENTIAL = frozenset({"AVX", "AVX2", "FMA", "F16C", "NEON", "DOTPROD"})
HIDES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
RECIPES: dict[str, tuple[str, str, str]] = KNOWN["recipes"]
_ANY_GPU = frozenset({"Vulkan", "SYCL", "OpenCL"})  # backends that serve cards of several makers


def build_checks(build: Build, host: Host | None = None, threads: int | None = None) -> list[Check]:
    """The checks `build.*` on this host. `threads` are those that were asked for."""
    host = host or read_host()
    checks = [_version(build, host)]
    if not build.error:
        if build.assertions:
            message = "llama.cpp was compiled with assertions, as debug builds are: install a release build."
            fix = install_command(host, build.extra_backends, ["-DCMAKE_BUILD_TYPE=Release"])
            checks.append(Check("build.assertions", "warn", message, {}, fix))
        checks += [_cpu(build, host), *_driver(host), _gpu(build, host)]
    return [*checks, _threads(host, threads)]


def unused_gpu_hint(build: Build | None = None, host: Host | None = None) -> str | None:
    """One sentence, with the command, when a GPU is here that this build has no backend for; else None."""
    host = host or read_host(run=lambda _: "")  # by files alone: programs such as `nvidia-smi` take seconds
    gpu = next((gpu for gpu in host.gpus if not gpu.trouble), None)
    if gpu is None or (build := build or build_info()).error or not _lacks_backend(build, host):
        return None
    return f"{_no_backend(gpu)}, so it is not used; install one with: {_install_for(gpu, build, host)[0]}"


def in_software(device: Device) -> bool:
    """Whether what ggml sees as a GPU is a driver that computes on the CPU."""
    return any(name in device.description.lower() for name in ("llvmpipe", "lavapipe", "swiftshader"))


def _version(build: Build, host: Host) -> Check:
    evidence = {"llama_cpp_python": build.version, "needed": PINNED, "llama_cpp": build.llama, "commit": build.commit}
    # A library that cannot be loaded does not tell its backends; the host does.
    gpu = next((gpu for gpu in host.gpus if build.error and not gpu.trouble), None)
    fix, note = _install_for(gpu, build, host)
    if build.error or build.version != PINNED:
        told = build.error.rstrip(".") or f"{PACKAGE} {build.version} is installed, but Opsin needs {PINNED}"
        return Check("build.version", "fail", f"{told}; install {PINNED}{note}.", evidence, fix)
    commit = build.commit.removesuffix("-dirty")
    if commit not in {"", "unknown"} and not (COMMIT.startswith(commit) or commit.startswith(COMMIT)):
        message = f"llama.cpp is at commit {commit}, but {PACKAGE} {PINNED} carries {COMMIT}: reinstall it."
        return Check("build.version", "warn", message, evidence, fix)
    message = f"{PACKAGE} {build.version} with llama.cpp {build.llama} (commit {commit or 'unknown'})."
    return Check("build.version", "ok", message, evidence)


def _cpu(build: Build, host: Host) -> Check:
    unused = host.cpu_features - build.cpu_features
    evidence = {"cpu": host.cpu, "used": sorted(build.cpu_features), "unused": sorted(unused)}
    if not unused:
        return Check("build.cpu", "ok", "The build uses the instructions of this CPU.", evidence)
    essential = unused & ESSENTIAL
    names = ", ".join(sorted(essential or unused))
    message = f"This CPU has {names}, which the build does not use: compile it for this CPU."
    fix = install_command(host, build.extra_backends, ["-DGGML_NATIVE=on"])
    return Check("build.cpu", "fail" if essential else "warn", message, evidence, fix)


def _driver(host: Host) -> list[Check]:
    """Fails for a card that programs cannot reach where there is no other card."""
    if not host.gpus:
        return []
    lost = next((gpu for gpu in host.gpus if gpu.trouble), None)
    evidence = {"gpus": [{"name": gpu.name, "driver": gpu.driver, "trouble": gpu.trouble} for gpu in host.gpus]}
    if lost is None:
        return [Check("build.driver", "ok", f"Programs can use {_names(host.gpus)}.", evidence)]
    alone = all(gpu.trouble for gpu in host.gpus)
    message = f"{lost.name} is here, but {lost.trouble}."
    return [Check("build.driver", "fail" if alone else "warn", message, evidence, lost.fix)]


def _gpu(build: Build, host: Host) -> Check:
    """The GPUs of this host against those that ggml sees."""
    name, usable = "build.gpu", [gpu for gpu in host.gpus if not gpu.trouble]
    seen = [device for device in build.devices if device.is_gpu and not in_software(device)]
    told = [{"name": device.name, "description": device.description} for device in seen]
    evidence = {"here": [gpu.name for gpu in usable], "backends": list(build.backends), "seen": told}
    if not usable:
        status: Status = "warn"
        if seen:
            status, message = "ok", f"llama.cpp computes on {_names(seen)}."
        elif host.gpus:
            message = "A GPU cannot be used until build.driver is fixed."
        elif any(device.is_gpu for device in build.devices):
            message = "The only GPU is made of software: what is offloaded to it runs on the CPU; offload nothing."
        else:
            status, message = "ok", "No GPU here: everything runs on the CPU."
        return Check(name, status, message, evidence)
    if _lacks_backend(build, host):
        command, note = _install_for(usable[0], build, host)
        message = f"{_no_backend(usable[0])}, so it is not used: install one{note}."
        return Check(name, "fail", message, evidence, command)
    best = next((gpu for gpu in usable if gpu.kind in build.backends), usable[0])
    expected = sum(gpu.kind == best.kind or "Vulkan" in build.backends for gpu in usable)
    # CUDA calls those that share the CPU's memory integrated, and nvidia-smi lists them like cards.
    cards = [device for device in seen if device.type == "gpu" or device.name.startswith("CUDA")]
    if len(cards) >= expected:
        return Check(name, "ok", f"llama.cpp computes on {_names(seen)}.", evidence)
    start = f"{expected} GPUs are here ({best.name}), and llama.cpp sees {len(cards)} of them"
    status = "warn" if cards else "fail"
    hiding = [word for word in HIDES if word in os.environ]
    if hiding:
        values = ", ".join(f"{word} is {os.environ[word]!r}" for word in hiding)
        fix = f"env {' '.join(f'-u {word}' for word in hiding)} opsin doctor"
        return Check(name, status, f"{start}: {values}; unset it.", evidence, fix)
    message = f"{start}: its driver is too old for this build, or the build is for another card; compile it here."
    return Check(name, status, message, evidence, _install_for(best, build, host)[0])


def _threads(host: Host, asked: int | None) -> Check:
    threads, share = asked or host.threads, min(host.allowed, host.quota or host.allowed)
    fit = max(1, int(share))
    evidence = {"cores": host.cores, "allowed_cores": host.allowed, "quota_cores": host.quota, "threads": threads}
    advice = f": give --threads {fit}." if threads > fit else "."
    message = f"This process has {threads} threads for {share:g} of {host.cores} cores{advice}"
    return Check("build.threads", "warn" if threads > fit else "ok", message, evidence)


def _lacks_backend(build: Build, host: Host) -> bool:
    """No backend of this build can use any GPU that is here."""
    return not (_ANY_GPU | {gpu.kind for gpu in host.gpus if not gpu.trouble}) & set(build.backends)


def _install_for(gpu: Gpu | None, build: Build, host: Host) -> tuple[str, str]:
    """The command, and what must be said with it."""
    kinds = [gpu.kind] if gpu else []
    command = install_command(host, [*build.extra_backends, *kinds], fresh=not build.version)
    _, tool, source = RECIPES[gpu.kind] if gpu else ("", "", "")
    return command, f", after {tool} of {source}, which is not here" if tool and tool not in host.tools else ""


def _no_backend(gpu: Gpu) -> str:
    return f"An {gpu.name} is here, but this build has no {gpu.kind} backend"


def _names(devices: Iterable[Device | Gpu]) -> str:
    return ", ".join(device.name for device in devices)


def install_command(host: Host, backends: Iterable[str] = (), extra: Sequence[str] = (), *, fresh: bool = False) -> str:
    """A POSIX shell line that compiles the pinned version with these backends; `fresh`: with its dependencies, too."""
    wanted = sorted({name for name in backends if name in RECIPES})
    flags = [*(RECIPES[name][0] for name in wanted), *extra]
    assignments = []
    if "CUDA" in wanted and host.tools.get("nvcc") == "/usr/local/cuda/bin/nvcc":
        assignments.append("CUDACXX=/usr/local/cuda/bin/nvcc")  # CMake looks in the search path only
    if "ROCm" in wanted and "hipconfig" in host.tools:
        assignments += ['HIPCXX="$(hipconfig -l)/clang"', 'HIP_PATH="$(hipconfig -R)"']
    if flags:
        assignments.append(f'CMAKE_ARGS="{" ".join(flags)}"')
    first = "" if host.pip or "uv" in host.tools else f"{shlex.quote(host.python)} -m ensurepip && "
    if not host.pip and "uv" in host.tools:
        again = [] if fresh else ["--reinstall-package", PACKAGE, "--no-deps"]
        words = [host.tools["uv"], "pip", "install", "--python", host.python, *again, "--no-cache"]
    else:
        again = [] if fresh else ["--force-reinstall", "--no-deps"]
        words = [host.python, "-m", "pip", "install", *again, "--no-cache-dir"]
    return first + " ".join([*assignments, shlex.join([*words, "--no-binary", PACKAGE]), f'"{PACKAGE}=={PINNED}"'])
