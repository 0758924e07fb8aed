"""A pair that was never loaded here is tried in a child process first: if llama.cpp crashes on it, the child ends.

Damaged files make llama.cpp abort or crash in many ways, and some builds end the process on a LLaVA projector whose
matrices are all f32. Which file does that on this machine can only be told by trying. The child says on standard output
which stage it begins; the last one that it named is where it ended.
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
from typing import TYPE_CHECKING, Literal

from opsin.core.errors import ModelError, ModelUnreadable, OpsinError
from opsin.core.picture import Picture
from opsin.core.settings import EngineSettings
from opsin.native.devices import devices
from opsin.native.records import fingerprint, keep_record, read_record, record_file

if TYPE_CHECKING:
    from opsin.core.backend import Embedding
    from opsin.core.layout import Run
    from opsin.native.context import Context
    from opsin.native.model import Model

Stage = Literal["start", "load", "projector", "encode", "prefill", "decode"]
STAGES: tuple[Stage, ...] = ("start", "load", "projector", "encode", "prefill", "decode")

_SECONDS = 120.0
_BYTES_A_SECOND = 50e6  # a slow disk; a first load reads the whole files
_LINES, _LINE_CHARS = 6, 600
_WINDOWS_EXCEPTIONS = 0xC0000000  # exit codes from here on are exceptions
_ROOM_TOKENS = 64  # of context beside the picture
_NEW_TOKENS = 4
_PICTURE_EDGE = 336
# What decides whether a file loads; sizes such as the context do not.
_DECISIVE = ("device", "mmproj_device", "gpu_layers", "flash_attention", "vision_flash_attention")


def child_command(module: str) -> tuple[str, ...]:
    """A child that calls `main` of a module with its arguments: `-m` puts the working folder before everything."""
    code = f"import sys; sys.path[:] = filter(None, sys.path); from {module} import main; main(*sys.argv[1:])"
    return (sys.executable, "-c", code)


_COMMAND = child_command("opsin.native.trial")


@dataclass(frozen=True, slots=True)
class Trial:
    """How it went: `stage` is the last one begun.

    `end` is done, refused (an error in an orderly way), crashed (`signal` names by what) or hung (over the time
    limit). `lines` are the last that the child wrote to standard error.
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
    """Load the pair in a child, encode an image, prefill it with a question, and decode four tokens.

    With `brief` the question alone is prefilled: on a CPU an image takes a large model long. `seconds` is the time
    limit (None: two minutes and what a slow disk takes to read the files). `command` is what is run with the two paths,
    the settings as JSON and "brief" or "whole" as further arguments.
    """
    chosen = settings or EngineSettings()
    files = [path for path in (llm, mmproj) if path is not None and path.exists()]
    limit = seconds or _SECONDS + sum(path.stat().st_size for path in files) / _BYTES_A_SECOND
    arguments = [str(llm), str(mmproj or ""), chosen.model_dump_json(), "brief" if brief else "whole"]
    started = time.perf_counter()
    try:
        child = subprocess.run(  # noqa: S603 - our own code, with two paths
            [*(command or _COMMAND), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit,
            check=False,
            # Without it ggml starts a debugger to print where it aborts.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
    except subprocess.TimeoutExpired as late:
        return Trial("hung", _stage(late.stdout), None, _tail(late.stderr), time.perf_counter() - started)
    took = time.perf_counter() - started
    cause = _signal(child.returncode)
    end: Literal["done", "refused", "crashed"] = "crashed" if cause else "refused" if child.returncode else "done"
    return Trial(end, _stage(child.stdout), cause, _tail(child.stderr), took)


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

    An error that llama.cpp reports in an orderly way is left for the load itself, which has the better words. `seconds`
    and `command` are as in `try_pair`. Raises ModelUnreadable, which names the file, when the child crashes or hangs,
    and ModelError when the system ended it; NativeMismatch, and OSError for files that are not there.
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
    if done.end == "hung":
        raise ModelUnreadable(
            f"llama.cpp did not get through a trial of {blamed.name} within {done.seconds:.0f} s: check the disk and "
            "the file, or take another quantisation."
        )
    raise ModelUnreadable(
        f"llama.cpp crashes on {blamed.name} ({done.signal} in the stage {done.stage!r} of a trial): "
        f"{_remedy(blamed, done)}."
    )


def _remedy(blamed: Path, done: Trial) -> str:
    if done.signal == "SIGILL":
        return "this build uses instructions that this CPU lacks; install one that was built here"
    if done.stage == "encode":
        return "if all of it is f32, use its f16 file or convert it to f16; else download it again"
    return f"the file may be damaged; download {blamed.name} again, or take another quantisation"


def _signal(code: int) -> str | None:
    if code >= _WINDOWS_EXCEPTIONS:
        return f"exception 0x{code:08X}"
    if code >= 0:
        return None
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _stage(out: bytes | None) -> Stage:
    """The last stage named; other output, such as a native library's, is passed over."""
    said = (out or b"").decode("utf-8", "replace").splitlines()
    found: Stage = "start"
    for stage in STAGES:
        if f"stage {stage}" in said:
            found = stage
    return found


def _tail(err: bytes | None) -> tuple[str, ...]:
    lines = [line.strip() for line in (err or b"").decode("utf-8", "replace").splitlines()]
    return tuple(line[:_LINE_CHARS] for line in lines if line)[-_LINES:]


def main(llm: str, mmproj: str, settings: str, how: str) -> None:
    """The child: one sentence on standard error and an exit code for an error that is told."""
    _no_core_file()
    try:
        chosen = EngineSettings.model_validate_json(settings)
        _run(Path(llm), Path(mmproj) if mmproj else None, chosen, brief=how == "brief")
    except OpsinError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        raise SystemExit(error.exit_code) from None


def _no_core_file() -> None:
    """A crash is expected here, and its core file would be as large as the model."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _begin(stage: Stage) -> None:
    sys.stdout.write(f"stage {stage}\n")
    sys.stdout.flush()


def _run(llm: Path, mmproj: Path | None, settings: EngineSettings, *, brief: bool) -> None:
    from opsin.core.layout import ImageRun
    from opsin.core.parts import PicturePart, TextPart
    from opsin.native import logs
    from opsin.native.context import Context
    from opsin.native.model import Model
    from opsin.native.tokenize import Stretches, lay_out, lay_out_text
    from opsin.native.vision import Encoder

    _begin("load")
    logs.show(True)
    model = Model(llm, settings)
    stretches, text = Stretches(model), TextPart("What is this?", special=False)
    layout = lay_out_text(model, stretches, [text], add_bos=True)
    embeddings = {}
    if mmproj is not None:
        _begin("projector")
        encoder = Encoder(model, mmproj, settings)
        _begin("encode")
        whole = lay_out(model, encoder, stretches, [PicturePart(drawn_picture()), text], add_bos=True)
        embeddings = {index: encoder.encode(run) for index, run in enumerate(whole.runs) if isinstance(run, ImageRun)}
        layout, other = (layout, whole) if brief else (whole, layout)
        other.close()
    largest = max((run.n_tokens for run in layout.runs if isinstance(run, ImageRun) and not run.causal), default=0)
    small = settings.model_copy(update={"parallel": 1, "ubatch": max(settings.ubatch, largest)})
    context = Context(model, small, ctx=-(-(layout.n_tokens + _ROOM_TOKENS) // 256) * 256)
    _begin("prefill")
    pos = 0
    for index, run in enumerate(layout.runs):
        last = index == len(layout.runs) - 1
        _prefill(context, run, embeddings.get(index), pos, last=last)
        pos += run.n_pos
    _begin("decode")
    _decode(model, context, pos)
    layout.close()
    model.close()


def _prefill(context: Context, run: Run, rows: Embedding | None, pos: int, *, last: bool) -> None:
    from opsin.core.backend import EmbeddingRows, TokenBatch
    from opsin.core.layout import TextRun

    if isinstance(run, TextRun):
        batch = TokenBatch()
        batch.append(run.tokens, pos, 0, logits=last)
        context.decode(batch)
    elif rows is not None:
        width = context.limits.n_ubatch if run.causal else run.n_tokens
        for start in range(0, run.n_tokens, width):
            stop = min(start + width, run.n_tokens)
            positions = run.positions_at(pos, start, stop)
            wanted = last and stop == run.n_tokens
            context.decode(EmbeddingRows(rows[start:stop], positions, 0, logits=wanted, causal=run.causal))
    context.synchronize()


def _decode(model: Model, context: Context, pos: int) -> None:
    import numpy as np

    from opsin.core.backend import TokenBatch

    for step in range(_NEW_TOKENS):
        token = int(np.argmax(context.logits(-1)))
        context.decode(TokenBatch([min(token, model.n_vocab - 1)], [pos + step], [0], [0]))
        context.synchronize()


def drawn_picture() -> Picture:
    """Stripes, always the same."""
    edge = _PICTURE_EDGE
    rgb = bytes(range(256)) * (3 * edge**2 // 256)
    return Picture(rgb, edge, edge, hashlib.sha256(rgb).hexdigest(), "PNG", edge, edge)
