"""A pair that was never loaded here is tried in a child process first: if llama.cpp crashes on it, the child ends.

Damaged files make llama.cpp abort or crash in many ways, which only trying tells. The child prints each stage that it
begins; the last one is where it ended. What was found out is kept as JSON in the user's cache.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from opsin.core.errors import ModelError, ModelUnreadable, OpsinError
from opsin.core.files import write_whole
from opsin.core.request import Image, ImageChunk, ImagePart, TokenBatch
from opsin.core.settings import EngineSettings
from opsin.native import logs
from opsin.native.context import Context
from opsin.native.devices import Device, devices
from opsin.native.library import library
from opsin.native.model import Model
from opsin.native.vision import Encoder

End = Literal["done", "refused", "crashed", "hung"]
Stage = Literal["start", "load", "projector", "encode", "prefill", "decode"]

_SECONDS = 120.0
_BYTES_A_SECOND = 50e6  # a slow disk; a first load reads the whole files
_LINES, _LINE_CHARS = 6, 600
_CTX = 256
_EDGE = 336
# `-c` instead of `-m`, which puts the working folder before everything.
_CODE = "import sys; sys.path[:] = filter(None, sys.path); from opsin.native.trial import main; main(*sys.argv[1:])"
# Settings that decide whether a file loads.
_DECISIVE = (
    "device", "mmproj_device", "gpu_layers", "flash_attention", "vision_flash_attention", "swa_full", "device_sampling",
)  # fmt: skip
_HEAD_BYTES = 2**20  # of a file, from its start: metadata and tensor list, or most of them
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Trial:
    """How it went: `stage` is the last one begun, `lines` the last of standard error.

    `end` is done, refused (an orderly error), crashed (`signal` names by what) or hung (over the time limit).
    """

    end: End
    stage: Stage
    signal: str | None
    lines: tuple[str, ...]
    seconds: float


def try_pair(
    llm: Path,
    mmproj: Path | None,
    settings: EngineSettings | None = None,
    *,
    seconds: float | None = None,
    command: Sequence[str] = (sys.executable, "-c", _CODE),
) -> Trial:
    """Load the pair in a child, encode an image, prefill a question, and decode a token.

    The image is not prefilled, which takes a large model long on a CPU. `seconds` is the time limit (None: by the
    files' sizes). `command` is run with the two paths and the settings as JSON.
    """
    files = [path for path in (llm, mmproj) if path is not None and path.exists()]
    limit = seconds or _SECONDS + sum(path.stat().st_size for path in files) / _BYTES_A_SECOND
    given = [str(llm), str(mmproj or ""), (settings or EngineSettings()).model_dump_json()]
    started = time.perf_counter()
    try:
        child = subprocess.run(  # noqa: S603 - our own code, with two paths
            [*command, *given], stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False
        )
        out, err, code = child.stdout, child.stderr, child.returncode
        end: End = "crashed" if code < 0 else "refused" if code else "done"
    except subprocess.TimeoutExpired as late:
        out, err, code, end = late.stdout or b"", late.stderr or b"", 0, "hung"
    said, lines = (text.decode("utf-8", "replace").splitlines() for text in (out, err))
    cause = next((known.name for known in signal.Signals if known == -code), f"signal {-code}") if code < 0 else None
    stage: Stage = next((stage for stage in reversed(get_args(Stage)) if f"stage {stage}" in said), "start")
    told = tuple(line.strip()[:_LINE_CHARS] for line in lines if line.strip())[-_LINES:]
    return Trial(end, stage, cause, told, time.perf_counter() - started)


def ensure_loadable(
    model: Path, mmproj: Path | None, settings: EngineSettings, *, folder: Path | None = None, **options: Any
) -> None:
    """Try files that were never loaded here in a child process, and remember in `folder` that they can be.

    An orderly error of loading is left for the load itself, which words it better. `options` are `try_pair`'s. Raises
    ModelUnreadable, which names the file, when the child crashes, hangs or fails later, ModelError when it was killed,
    NativeMismatch, and OSError for files that are not there.
    """
    asked = EngineSettings(**{name: getattr(settings, name) for name in _DECISIVE})
    record = record_file("loads", fingerprint([model, mmproj], asked, devices()), folder)
    if read_record(record) is not None:
        return
    done = try_pair(model, mmproj, asked, **options)
    if done.end == "done":
        keep_record(record, {"seconds": round(done.seconds, 3)})
    told = done.lines[-1] if done.lines else ""
    loading = done.stage in {"start", "load", "projector"} or not told.endswith(".")
    if done.end == "done" or (done.end == "refused" and loading):
        return
    if done.signal == "SIGKILL":
        raise ModelError(f"The system ended a trial of {model.name}, most likely for lack of memory: free some.")
    blamed = mmproj if mmproj is not None and done.stage in {"projector", "encode"} else model
    if done.end == "refused":
        raise ModelUnreadable(f"{blamed.name} cannot be used. {told}")
    advice = "download it again, or take its f16 file or another quantisation (`opsin doctor` tells more)"
    what = f"crashes ({done.signal})" if done.signal else f"hangs (for {done.seconds:.0f} s)"
    raise ModelUnreadable(f"llama.cpp {what} on {blamed.name} in the stage {done.stage!r} of a trial: {advice}.")


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process as soon as the process with this id, its parent, has ended.

    Linux alone can do that; elsewhere whoever reads from the parent has to notice. On Linux it also helps a process
    that was stopped, or that native code keeps from running any Python.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before that
        os._exit(0)


def fingerprint(files: Sequence[Path | None], settings: EngineSettings, present: Sequence[Device]) -> str:
    """Names files, settings, devices, library and machine in 32 hex digits.

    A library that was built anew keeps its version, so its files and features count; several machines may share a
    cache. Raises NativeMismatch, and OSError for files that are not there.
    """
    lib, models = library(), [path for path in files if path is not None]
    built = {path for name in ("*llama*", "*ggml*") for path in lib.path.parent.glob(name)}
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (*models, *sorted(built))]
    said = (version("llama-cpp-python"), lib.llama.llama_print_system_info(), platform.node())
    names = [device.name for device in present]
    digest = hashlib.sha256(repr((stats, settings.model_dump_json(), names, said)).encode())
    for path in models:
        with path.open("rb") as file:
            digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()[:32]


def record_file(kind: str, name: str, folder: Path | None = None) -> Path:
    """Where a finding is kept: in `folder` (None: in the user's cache)."""
    from platformdirs import user_cache_path

    return (folder or user_cache_path("opsin") / kind) / f"{name}.json"


def read_record(file: Path) -> Any:
    """What was kept there, None for nothing."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(file.read_text(encoding="utf-8"))


def keep_record(file: Path, finding: object) -> None:
    """Write it whole, or not at all: it will be found out again."""
    with contextlib.suppress(OSError):
        write_whole(file, json.dumps(finding))


def main(llm: str, mmproj: str, settings: str) -> None:
    """The child: an error that is told is one sentence on standard error, and an exit code."""
    if sys.platform != "win32":
        import resource

        # A crash is expected here, and its core file would be as large as the model.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    try:
        _run(Path(llm), Path(mmproj) if mmproj else None, EngineSettings.model_validate_json(settings))
    except OpsinError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(error.exit_code) from None


def _begin(stage: Stage) -> None:
    sys.stdout.write(f"stage {stage}\n")
    sys.stdout.flush()


def _run(llm: Path, mmproj: Path | None, settings: EngineSettings) -> None:
    _begin("load")
    logs.show(True)
    model = Model(llm, settings)
    if mmproj is not None:
        _begin("projector")
        encoder = Encoder(model, mmproj, settings)
        _begin("encode")
        image = encoder.tokenize([ImagePart(drawn_image())], add_bos=False)
        encoder.encode_many([run for run in image.chunks if isinstance(run, ImageChunk)])
        image.close()
    context = Context(model, settings.model_copy(update={"parallel": 1}), ctx=_CTX)
    _begin("prefill")
    tokens = [*model.begin, *model.tokenize("What is this?", special=False)]
    question = TokenBatch()
    question.append(tokens, 0, 0, logits=True)
    context.decode(question)
    context.synchronize()
    _begin("decode")
    if (logits := context.logits(-1)).min() == logits.max():
        raise ModelUnreadable(f"{llm.name} takes every token for as likely: its weights are damaged.")
    context.decode(TokenBatch([int(np.argmax(logits))], [len(tokens)], [0], [0]))
    context.synchronize()
    model.close()


def drawn_image() -> Image:
    """Stripes, always the same."""
    rgb = bytes(range(256)) * (3 * _EDGE**2 // 256)
    return Image(rgb, _EDGE, _EDGE, hashlib.sha256(rgb).hexdigest(), "PNG")
