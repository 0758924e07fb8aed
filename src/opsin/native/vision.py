"""The vision encoder: mtmd's context, and pictures into embeddings."""

from __future__ import annotations

import ctypes
import logging
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from opsin.core.errors import BadParameter, EncodeFailed, ModelUnreadable, PairMismatch
from opsin.native import logs
from opsin.native.devices import devices, pick
from opsin.native.handles import Owned
from opsin.native.hook import EvalHook, Turns
from opsin.native.projector import ProjectorFile, fingerprint, read_projector
from opsin.native.threads import default_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from opsin.core.backend import Embedding
    from opsin.core.layout import ImageRun
    from opsin.core.settings import EngineSettings
    from opsin.native.chunk import ChunkHandle
    from opsin.native.hook import Observer
    from opsin.native.model import Model

_BATCHING = frozenset({"gemma4v", "internvl", "deepseekocr", "deepseekocr2"})
_BATCH = 8  # mtmd takes fewer when they have more than its 1,024 tokens
_BATCH_TOO_LARGE, _BATCH_OTHER_SHAPE = 2, 3


class Encoder:
    """An mtmd context over a language model. `tokenize` calls may come from any thread, `encode` from one."""

    def __init__(self, model: Model, path: Path, settings: EngineSettings) -> None:
        self.lib = model.lib
        self.path = path
        self.file = read_projector(path)
        _check_kind(self.file, path)
        self._model = model
        self._hook = EvalHook(self.lib)
        device = _device(settings, self.lib)
        if (
            settings.image_min_tokens
            and settings.image_max_tokens
            and (settings.image_min_tokens > settings.image_max_tokens)
        ):
            raise BadParameter("--image-min-tokens is larger than --image-max-tokens: give a smaller one.")
        params = self.lib.mtmd.mtmd_context_params_default()
        params.use_gpu = device is not None
        params.device = device or None
        params.print_timings = False
        # Its warm-up computes nothing: only a real encode warms up.
        params.warmup = False
        self.threads: int = _threads(settings, path)
        params.n_threads = self.threads
        flash = settings.flash_attention if settings.vision_flash_attention is None else settings.vision_flash_attention
        params.flash_attn_type = -1 if flash is None else int(flash)
        params.image_min_tokens = settings.image_min_tokens or -1
        params.image_max_tokens = settings.image_max_tokens or -1
        params.cb_eval = self._hook.callback
        self.handle = self._open(params)
        self.fingerprint = fingerprint(path, self.file.header_bytes)
        # What else the pixels handed to the encoder depend on.
        self.preprocessing = (params.image_min_tokens, params.image_max_tokens)
        self.batch = _BATCH if self.file.kind in _BATCHING else 1
        self.mrope: bool = self.lib.mtmd.mtmd_decode_use_mrope(self.pointer)
        self._encoding = threading.Lock()

    def _open(self, params: Any) -> Owned:
        mark = logs.SINK.mark()
        pointer = self.lib.mtmd.mtmd_init_from_file(str(self.path).encode(), self._model.pointer, params)
        logs.SINK.raise_interrupt()
        if not pointer:
            for line in logs.SINK.since(mark, logging.ERROR):
                if "mismatch between text model" in line:
                    raise PairMismatch(
                        f"{self.path.name} was made for another language model than {self._model.path.name} ({line}): "
                        "use the projector that was published with it."
                    )
            cause = logs.SINK.cause(mark)
            raise ModelUnreadable(
                f"llama.cpp cannot load the projector {self.path.name} ({cause or 'no reason given'}): "
                "check that the file is whole and its kind is supported."
            )
        handle = Owned("vision encoder", pointer, self.lib.mtmd.mtmd_free, self._model.handle)
        if not self.lib.mtmd.mtmd_support_vision(pointer):
            handle.close()
            raise PairMismatch(f"{self.path.name} has no vision encoder: use a projector for pictures.")
        return handle

    @property
    def pointer(self) -> int:
        """The native mtmd context."""
        return self.handle.pointer

    def encode(self, run: ImageRun, between: Callable[[], None] | None = None) -> Embedding:
        """float32 [n_tokens, n_embd] of one chunk, owned by the caller; see `Backend.encode`."""
        return self.observed(run, Turns(self.lib, between) if between is not None else None)

    def observed(self, run: ImageRun, observer: Observer | None) -> Embedding:
        """Encode while `observer` looks at the nodes; what it raises is raised here and the embedding is lost."""
        handle: ChunkHandle = run.handle
        # A second encode from inside `between` would overwrite the graph that is running.
        if not self._encoding.acquire(blocking=False):
            raise EncodeFailed("The vision encoder is at work already: pictures are encoded one after another.")
        mark = logs.SINK.mark()
        try:
            with self._hook.observing(observer):
                code = self.lib.mtmd.mtmd_encode_chunk(self.pointer, handle.pointer)
            if code != 0:
                raise _failed(f"returned {code}", logs.SINK.cause(mark))
            return self._copy(self.lib.mtmd.mtmd_get_output_embd(self.pointer), run.n_tokens)
        finally:
            self._encoding.release()

    def encode_many(self, runs: Sequence[ImageRun]) -> list[Embedding]:
        """Embeddings of several chunks, several at once where the family can; the same order.

        Only chunks of equal pixel sizes share a batch: mtmd itself compares token counts alone.
        """
        done: list[Embedding] = []
        at = 0
        while at < len(runs):
            batch = Owned("batch", self.lib.mtmd.mtmd_batch_init(self.pointer), self.lib.mtmd.mtmd_batch_free)
            try:
                group = self._gather(batch.pointer, runs[at:])
                if len(group) == 1:
                    done.append(self.encode(group[0]))
                else:
                    done.extend(self._encode_batch(batch.pointer, group))
            finally:
                batch.close()
            at += len(group)
        return done

    def _gather(self, batch: int, runs: Sequence[ImageRun]) -> list[ImageRun]:
        group: list[ImageRun] = []
        for run in runs:
            handle: ChunkHandle = run.handle
            if group and handle.meta.sizes != group[0].handle.meta.sizes:
                break
            code = self.lib.mtmd.mtmd_batch_add_chunk(batch, handle.pointer)
            if code in {_BATCH_TOO_LARGE, _BATCH_OTHER_SHAPE}:
                break
            if code != 0:
                raise _failed(f"refused a chunk with {code}", "")
            group.append(run)
        return group

    def _encode_batch(self, batch: int, group: list[ImageRun]) -> list[Embedding]:
        mark = logs.SINK.mark()
        if not self._encoding.acquire(blocking=False):
            raise EncodeFailed("The vision encoder is at work already: pictures are encoded one after another.")
        try:
            code = self.lib.mtmd.mtmd_batch_encode(batch)
            if code != 0:
                raise _failed(f"returned {code}", logs.SINK.cause(mark))
            rows = self.lib.mtmd.mtmd_batch_get_output_embd
            return [self._copy(rows(batch, run.handle.pointer), run.n_tokens) for run in group]
        finally:
            self._encoding.release()

    def _copy(self, address: Any, n_tokens: int) -> Embedding:
        if not address:
            raise _failed("gave no output", "")
        # Not `np.ctypeslib.as_array`: each call of it leaves a ring for the garbage collector.
        count = n_tokens * self._model.n_embd
        memory: Any = (ctypes.c_float * count).from_address(ctypes.addressof(address.contents))
        rows: Embedding = np.frombuffer(memory, np.float32).reshape(n_tokens, -1).copy()
        if not np.isfinite(rows).all():
            raise _failed("computed values that are not numbers", "")
        return rows

    def close(self) -> None:
        """Free it."""
        self.handle.close()


def _failed(what: str, cause: str) -> EncodeFailed:
    return EncodeFailed(
        f"The vision encoder {what}"
        + (f" ({cause})" if cause else "")
        + ": try another picture or --mmproj-device none."
    )


def _threads(settings: EngineSettings, path: Path) -> int:
    chosen = settings.threads_encode or settings.threads_batch or settings.threads
    return chosen or default_threads(_parameters(path))


def _parameters(path: Path) -> int:
    """About how many weights a projector file holds: they are nearly always of 16 bits."""
    return path.stat().st_size // 2


def _device(settings: EngineSettings, lib: Any) -> int | None:
    """The encoder's device: an address, 0 for "whichever GPU mtmd takes", None for the CPU."""
    present = devices(lib)
    if settings.mmproj_device is not None:
        device = pick(settings.mmproj_device, "--mmproj-device", present)
        return device.handle if device is not None else None
    return 0 if any(device.is_gpu for device in present) else None


def _check_kind(file: ProjectorFile, path: Path) -> None:
    architecture = file.architecture
    if architecture != "clip":
        raise PairMismatch(
            f"{path.name} is not a projector but a model of the kind {architecture or 'unknown'}: "
            "give the language model with --model and its mmproj file with --mmproj."
        )
