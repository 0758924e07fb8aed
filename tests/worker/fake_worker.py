"""A worker on a fake backend that crashes, hangs or dawdles for images of certain widths; in a real process."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opsin.compose import Runtime
from opsin.core.backend import BackendLimits
from opsin.core.errors import ModelNotFound
from opsin.core.request import Embedding, EmbeddingRows, ImageChunk, ImagePart, Part, TokenBatch, TokenizedPrompt
from opsin.core.settings import EngineSettings
from opsin.engine import Engine, Policy
from opsin.prompt import PromptBuilder, TemplateSource
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import N_VOCAB, TURN_TEXT
from opsin.worker import process

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}" + TURN_TEXT
SLOW, CRASHES_IN_ENCODE, HANGS_IN_ENCODE, CRASHES_IN_PREFILL = 11, 13, 17, 19
"""Widths of images."""
SLOW_SECONDS = 0.5


def hang(library: ctypes.CDLL) -> None:
    """Never come back from native code; a `PyDLL` keeps the interpreter lock, too."""
    print("the worker hangs", file=sys.stderr, flush=True)
    library.pause()


class Backend(FakeBackend):
    """Its answers are long; a step takes 10 ms."""

    def __init__(self) -> None:
        limits = BackendLimits(n_ctx=4096, n_ubatch=64, n_seq_max=8, n_vocab=N_VOCAB, n_embd=4, n_ctx_seq=4096)
        super().__init__(lambda _: "ab" * 100, limits=limits)
        self._widths: dict[str, int] = {}
        self._encoding = 0

    def tokenize(
        self, parts: Sequence[Part], *, add_bos: bool, known: Callable[[str], bool] | None = None
    ) -> TokenizedPrompt:
        for part in parts:
            if isinstance(part, ImagePart):
                assert len(part.image.rgb) == part.image.width * part.image.height * 3
                self._widths[f"{part.image.sha256}:0"] = part.image.width
        return super().tokenize(parts, add_bos=add_bos, known=known)

    def encode(self, run: ImageChunk, between: Callable[[], None] | None = None) -> Embedding:
        width = self._encoding = self._widths[run.identity]
        if width in {SLOW, CRASHES_IN_ENCODE}:
            time.sleep(SLOW_SECONDS)
        if width == CRASHES_IN_ENCODE:
            os.abort()
        if width == HANGS_IN_ENCODE:
            hang(ctypes.CDLL(None))
        return super().encode(run, between)

    def decode(self, rows: TokenBatch | EmbeddingRows, *, may_stop: bool = False) -> bool:
        if isinstance(rows, EmbeddingRows) and self._encoding == CRASHES_IN_PREFILL:
            os.kill(os.getpid(), 11)
        time.sleep(0.01)
        return super().decode(rows, may_stop=may_stop)


def open_model(
    *,
    model: Any,
    settings: EngineSettings,
    max_queue: int,
    watch: Any,
    wake: Any,
    resolved: Any,
    progress: Any,
    **_: Any,
) -> Runtime:
    """`model` names what happens while it is loaded."""
    resolved(Path(model or "fake.gguf"), None)
    progress(0.25)
    if model == "missing":
        raise ModelNotFound("there is no file missing")
    if model == "aborts":
        os.abort()
    if model == "hangs":
        hang(ctypes.PyDLL(None))
    engine = Engine(Backend, policy=Policy(parallel=settings.parallel, max_queue=max_queue), watch=watch, wake=wake)
    source = TemplateSource(TEMPLATE, "llama", "fake", None, "", "", frozenset({TURN_TEXT}))
    return Runtime(engine, PromptBuilder(source), False, "fake")


def main() -> None:
    process.main(open_model=open_model)
