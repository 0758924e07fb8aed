"""A pair that was never loaded here is tried in a child process first: if llama.cpp crashes on it, the child ends.

Damaged files make llama.cpp abort or crash in many ways, which only trying tells. The child prints each stage that it
begins; the last one is where it ended.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from opsin.core.errors import ModelError, ModelUnreadable, OpsinError
from opsin.core.request import EmbeddingRows, Image, ImageChunk, ImagePart, TextPart, TokenBatch
from opsin.core.settings import EngineSettings
from opsin.native import logs
from opsin.native.context import Context
from opsin.native.devices import devices
from opsin.native.model import Model
from opsin.native.records import fingerprint, keep_record, read_record, record_file
from opsin.native.vision import Encoder

Stage = Literal["start", "load", "projector", "encode", "prefill", "decode"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_SECONDS = 120.0
_BYTES_A_SECOND = 50e6  # a slow disk; a first load reads the whole files
_LINES, _LINE_CHARS = 6, 600
_ROOM_TOKENS = 64  # of context beside the image
_EDGE = 336
# `-c` instead of `-m`, which puts the working folder before everything.
_CODE = "import sys; sys.path[:] = filter(None, sys.path); from opsin.native.trial import main; main(*sys.argv[1:])"
# Settings that decide whether a file loads.
_DECISIVE = ("device", "mmproj_device", "gpu_layers", "flash_attention", "vision_flash_attention")


@dataclass(frozen=True, slots=True)
class Trial:
    """How it went: `stage` is the last one begun, `lines` the last of standard error.

    `end` is done, refused (an orderly error), crashed (`signal` names by what) or hung (over the time limit).
    """

    end: Literal["done", "refused", "crashed", "hung"]
    stage: Stage
    signal: str | None
    lines: tuple[str, ...]
    seconds: float


def try_pair(
    llm: Path,
    mmproj: Path | None,
    settings: EngineSettings | None = None,
    *,
    brief: bool = False,
    seconds: float | None = None,
    command: Sequence[str] | None = None,
) -> Trial:
    """Load the pair in a child, encode an image, prefill it with a question, and decode a token.

    With `brief` only the question is prefilled, since an image takes a large model long on a CPU. `seconds` is the time
    limit (None: by the files' sizes). `command` is run with the two paths, the settings as JSON and "brief" or "whole".
    """
    files = [path for path in (llm, mmproj) if path is not None and path.exists()]
    limit = seconds or _SECONDS + sum(path.stat().st_size for path in files) / _BYTES_A_SECOND
    given = [str(llm), str(mmproj or ""), (settings or EngineSettings()).model_dump_json()]
    started = time.perf_counter()
    try:
        child = subprocess.run(  # noqa: S603 - our own code, with two paths
            [*(command or (sys.executable, "-c", _CODE)), *given, "brief" if brief else "whole"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit,
            check=False,
            # Without it ggml starts a debugger to print where it aborts.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        out, err, code = child.stdout, child.stderr, child.returncode
        end: Literal["done", "refused", "crashed", "hung"] = "crashed" if code < 0 else "refused" if code else "done"
    except subprocess.TimeoutExpired as late:
        out, err, code, end = late.stdout or b"", late.stderr or b"", 0, "hung"
    said, lines = (text.decode("utf-8", "replace").splitlines() for text in (out, err))
    cause = next((known.name for known in signal.Signals if known == -code), f"signal {-code}") if code < 0 else None
    stage: Stage = next((stage for stage in reversed(STAGES) if f"stage {stage}" in said), "start")
    told = tuple(line.strip()[:_LINE_CHARS] for line in lines if line.strip())[-_LINES:]
    return Trial(end, stage, cause, told, time.perf_counter() - started)


def ensure_loadable(
    model: Path,
    mmproj: Path | None,
    settings: EngineSettings,
    *,
    folder: Path | None = None,
    seconds: float | None = None,
    command: Sequence[str] | None = None,
) -> None:
    """Try files that were never loaded here in a child process, and remember in `folder` that they can be.

    An orderly error is left for the load itself, which words it better. `seconds` and `command` are as in `try_pair`.
    Raises ModelUnreadable, which names the file, when the child crashes or hangs, ModelError when the system ended it,
    NativeMismatch, and OSError for files that are not there.
    """
    asked = EngineSettings(**{name: getattr(settings, name) for name in _DECISIVE})
    record = record_file("loads", fingerprint([model, mmproj], asked, devices()), folder)
    if read_record(record) is not None:
        return
    done = try_pair(model, mmproj, asked, brief=True, seconds=seconds, command=command)
    if done.end == "done":
        keep_record(record, {"seconds": round(done.seconds, 3)})
    if done.end in {"done", "refused"}:
        return
    if done.signal == "SIGKILL":
        raise ModelError(f"The system ended a trial of {model.name}, most likely for lack of memory: free some.")
    blamed = mmproj if mmproj is not None and done.stage in {"projector", "encode"} else model
    advice = "download it again, or take its f16 file or another quantisation (`opsin doctor` tells more)"
    what = f"crashes ({done.signal})" if done.signal else f"hangs (for {done.seconds:.0f} s)"
    raise ModelUnreadable(f"llama.cpp {what} on {blamed.name} in the stage {done.stage!r} of a trial: {advice}.")


def main(llm: str, mmproj: str, settings: str, how: str) -> None:
    """The child: an error that is told is one sentence on standard error, and an exit code."""
    if sys.platform != "win32":
        import resource

        # A crash is expected here, and its core file would be as large as the model.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    try:
        _run(
            Path(llm),
            Path(mmproj) if mmproj else None,
            EngineSettings.model_validate_json(settings),
            brief=how == "brief",
        )
    except OpsinError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        raise SystemExit(error.exit_code) from None


def _begin(stage: Stage) -> None:
    sys.stdout.write(f"stage {stage}\n")
    sys.stdout.flush()


def _run(llm: Path, mmproj: Path | None, settings: EngineSettings, *, brief: bool) -> None:
    _begin("load")
    logs.show(True)
    model = Model(llm, settings)
    text = TextPart("What is this?", special=False)
    tokenized, embeddings = model.tokenize_parts([text], add_bos=True), {}
    if mmproj is not None:
        _begin("projector")
        encoder = Encoder(model, mmproj, settings)
        _begin("encode")
        whole = encoder.tokenize([ImagePart(drawn_image()), text], add_bos=True)
        embeddings = {
            index: encoder.encode(run) for index, run in enumerate(whole.chunks) if isinstance(run, ImageChunk)
        }
        tokenized, other = (tokenized, whole) if brief else (whole, tokenized)
        other.close()
    largest = max((run.n_tokens for run in tokenized.chunks if isinstance(run, ImageChunk)), default=0)
    small = settings.model_copy(update={"parallel": 1, "ubatch": max(settings.ubatch, largest)})
    context = Context(model, small, ctx=-(-(tokenized.n_tokens + _ROOM_TOKENS) // 256) * 256)
    _begin("prefill")
    pos = 0
    for index, run in enumerate(tokenized.chunks):
        last = index == len(tokenized.chunks) - 1
        if isinstance(run, ImageChunk):
            positions = run.positions_at(pos, 0, run.n_tokens)
            context.decode(EmbeddingRows(embeddings[index], positions, 0, logits=last, causal=run.causal))
        else:
            batch = TokenBatch()
            batch.append(run.tokens, pos, 0, logits=last)
            context.decode(batch)
        context.synchronize()
        pos += run.n_pos
    _begin("decode")
    token = int(np.argmax(context.logits(-1)))
    context.decode(TokenBatch([token], [pos], [0], [0]))
    context.synchronize()
    tokenized.close()
    model.close()


def drawn_image() -> Image:
    """Stripes, always the same."""
    rgb = bytes(range(256)) * (3 * _EDGE**2 // 256)
    return Image(rgb, _EDGE, _EDGE, hashlib.sha256(rgb).hexdigest(), "PNG", _EDGE, _EDGE)
