"""The vision encoder: mtmd's context, and images into embeddings."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from opsin.core.errors import BadParameter, EncodeFailed, ModelUnreadable, PairMismatch
from opsin.native import logs
from opsin.native.devices import default_threads, devices, pick
from opsin.native.ggml import EncodeSteps, EvalHook, floats
from opsin.native.handles import Owned
from opsin.native.projector import fingerprint, read_projector

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from opsin.core.backend import Embedding
    from opsin.core.settings import EngineSettings
    from opsin.core.tokens import ImageChunk
    from opsin.native.ggml import Observer
    from opsin.native.model import Model

_BATCHING = frozenset({"gemma4v", "internvl", "deepseekocr", "deepseekocr2"})
_BATCH = 8  # mtmd takes fewer when they have more than its 1,024 tokens
_BATCH_FULL = frozenset({2, 3})  # too many tokens, another shape


class Encoder:
    """An mtmd context over a language model. Images may be laid out by any thread, and encoded by one."""

    def __init__(self, model: Model, path: Path, settings: EngineSettings) -> None:
        self.lib = model.lib
        self.path = path
        self.file = read_projector(path)
        if self.file.architecture != "clip":
            raise PairMismatch(
                f"{path.name} is not a projector but a model of the kind {self.file.architecture or 'unknown'}: "
                "give the language model with --model and its mmproj file with --mmproj."
            )
        self._model = model
        self._hook = EvalHook(self.lib)
        device = _device(settings, self.lib)
        if 0 < (settings.image_max_tokens or 0) < (settings.image_min_tokens or 0):
            raise BadParameter("--image-min-tokens is larger than --image-max-tokens: give a smaller one.")
        params = self.lib.mtmd.mtmd_context_params_default()
        params.use_gpu = device is not None
        params.device = device or None
        params.print_timings = False
        params.warmup = False  # mtmd's own computes nothing
        # Nearly all weights of a projector file are of 16 bits.
        chosen = settings.threads_encode or settings.threads_batch or settings.threads
        params.n_threads = self.threads = chosen or default_threads(path.stat().st_size // 2)
        flash = settings.flash_attention if settings.vision_flash_attention is None else settings.vision_flash_attention
        params.flash_attn_type = -1 if flash is None else int(flash)
        params.image_min_tokens = settings.image_min_tokens or -1
        params.image_max_tokens = settings.image_max_tokens or -1
        params.cb_eval = self._hook.callback
        self.handle = self._open(params)
        self.fingerprint = fingerprint(path, self.file.header_bytes)
        # What the pixels handed to the encoder depend on besides the image.
        self.preprocessing = (params.image_min_tokens, params.image_max_tokens)
        self.batch = _BATCH if self.file.kind in _BATCHING else 1
        self.mrope: bool = self.lib.mtmd.mtmd_decode_use_mrope(self.pointer)

    def _open(self, params: Any) -> Owned:
        mark = logs.SINK.mark
        pointer = self.lib.mtmd.mtmd_init_from_file(str(self.path).encode(), self._model.pointer, params)
        logs.SINK.raise_interrupt()
        if not pointer:
            cause = logs.SINK.cause(mark)
            if "mismatch between text model" in cause:
                raise PairMismatch(
                    f"{self.path.name} was made for another language model than {self._model.path.name} ({cause}): "
                    "use the projector that was published with it."
                )
            raise ModelUnreadable(
                f"llama.cpp cannot load the projector {self.path.name} ({cause or 'no reason given'}): "
                "check that the file is whole and its kind is supported."
            )
        handle = Owned("vision encoder", pointer, self.lib.mtmd.mtmd_free, self._model.handle)
        if not self.lib.mtmd.mtmd_support_vision(pointer):
            handle.close()
            raise PairMismatch(f"{self.path.name} has no vision encoder: use a projector for images.")
        return handle

    @property
    def pointer(self) -> int:
        """The native mtmd context."""
        return self.handle.pointer

    def encode(self, run: ImageChunk, between: Callable[[], None] | None = None) -> Embedding:
        """float32 [n_tokens, n_embd] of one chunk, owned by the caller; see `Backend.encode`."""
        return self.observed(run, EncodeSteps(self.lib, between) if between is not None else None)

    def observed(self, run: ImageChunk, observer: Observer | None) -> Embedding:
        """Encode while `observer` looks at the nodes; what it raises is raised here and the embedding is lost."""
        chunk, mark = run.handle.pointer, logs.SINK.mark
        with self._hook.observing(observer):
            code = self.lib.mtmd.mtmd_encode_chunk(self.pointer, chunk)
        _require(code == 0, f"returned {code} ({logs.SINK.cause(mark)})")
        return self._copy(self.lib.mtmd.mtmd_get_output_embd(self.pointer), run.n_tokens)

    def encode_many(self, runs: Sequence[ImageChunk]) -> list[Embedding]:
        """Embeddings of several chunks, several at once where the family can; the same order."""
        done: list[Embedding] = []
        while len(done) < len(runs):
            done += self._encode_some(runs[len(done) :])
        return done

    def _encode_some(self, runs: Sequence[ImageChunk]) -> list[Embedding]:
        """Embeddings of as many of the first chunks as share a batch; mtmd compares token counts, not pixel sizes."""
        mtmd, sizes, mark = self.lib.mtmd, runs[0].handle.meta.sizes, logs.SINK.mark
        batch = mtmd.mtmd_batch_init(self.pointer)
        try:
            group: list[ImageChunk] = []
            for run in takewhile(lambda run: run.handle.meta.sizes == sizes, runs):
                code = mtmd.mtmd_batch_add_chunk(batch, run.handle.pointer)
                if code in _BATCH_FULL:
                    break
                _require(code == 0, f"refused an image with {code}")
                group.append(run)
            if len(group) < 2:
                return [self.encode(runs[0])]
            with self._hook.observing(None):
                code = mtmd.mtmd_batch_encode(batch)
            _require(code == 0, f"returned {code} ({logs.SINK.cause(mark)})")
            output = mtmd.mtmd_batch_get_output_embd
            return [self._copy(output(batch, run.handle.pointer), run.n_tokens) for run in group]
        finally:
            mtmd.mtmd_batch_free(batch)

    def _copy(self, address: Any, n_tokens: int) -> Embedding:
        _require(bool(address), "gave no output")
        rows: Embedding = floats(address, n_tokens * self._model.n_embd).reshape(n_tokens, -1).copy()
        _require(bool(np.isfinite(rows).all()), "computed values that are not numbers")
        return rows


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise EncodeFailed(f"The vision encoder {otherwise}: try another image or --mmproj-device none.")


def _device(settings: EngineSettings, lib: Any) -> int | None:
    """The encoder's device: an address, 0 for "whichever GPU mtmd takes", None for the CPU."""
    present = devices(lib)
    if settings.mmproj_device is None:
        return 0 if any(device.is_gpu for device in present) else None
    device = pick(settings.mmproj_device, "--mmproj-device", present)
    return None if device is None else device.handle
