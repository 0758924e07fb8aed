"""A loaded language model: its file's metadata, its vocabulary, its sizes."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

from opsin.core.errors import ModelNotFound, ModelUnreadable, PairMismatch
from opsin.native import logs
from opsin.native.devices import Device, devices, pick
from opsin.native.handles import Owned
from opsin.native.library import Library, library

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from opsin.core.settings import EngineSettings

# llama_token_attr of llama.h
_ATTR_UNKNOWN, _ATTR_CONTROL, _ATTR_LSTRIP, _ATTR_RSTRIP = 1 << 0, 1 << 3, 1 << 7, 1 << 8
_ROPE_WITH_SECTIONS = frozenset({8, 40})  # GGML_ROPE_TYPE_MROPE, GGML_ROPE_TYPE_IMROPE


class Model:
    """A language model in memory. Tokenising and metadata may be used by any thread.

    An embedding row has `n_pos` positions: 4 under M-RoPE, else 1. With `whole_states_only` no part of the KV cache can
    be forgotten or copied. `begin` are the tokens put in front of a text, `bos` and `eos` the texts of such tokens.
    """

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        lib = library()
        self.lib: Library = lib
        self.path = path
        self.device, self.n_gpu_layers = _placement(settings, devices(lib))
        self.handle = _load(lib, path, self.device, settings.device, self.n_gpu_layers)
        llama, pointer = lib.llama, self.handle.pointer
        if llama.llama_model_has_encoder(pointer):
            self.handle.close()
            raise ModelUnreadable(f"{path.name} has an encoder for text, which Opsin cannot run: give a decoder model.")
        self._vocab: int = llama.llama_model_get_vocab(pointer)
        self.n_vocab: int = llama.llama_vocab_n_tokens(self._vocab)
        self.n_embd: int = llama.llama_model_n_embd_inp(pointer)
        self.n_layer: int = llama.llama_model_n_layer(pointer)
        self.n_ctx_train: int = llama.llama_model_n_ctx_train(pointer)
        self.n_pos: int = 4 if llama.llama_model_rope_type(pointer) in _ROPE_WITH_SECTIONS else 1
        self.whole_states_only: bool = llama.llama_model_is_recurrent(pointer) or llama.llama_model_is_hybrid(pointer)
        template: bytes | None = llama.llama_model_chat_template(pointer, None)
        self.chat_template = template.decode("utf-8", "replace") if template else None
        self.quantisation: str = llama.llama_ftype_name(llama.llama_model_ftype(pointer)).decode()
        bos: int = llama.llama_vocab_bos(self._vocab)
        self.begin = (bos,) if llama.llama_vocab_get_add_bos(self._vocab) else ()
        self.bos, self.eos = self.text_of(bos), self.text_of(llama.llama_vocab_eos(self._vocab))
        self._pieces: dict[int, bytes] = {}

    @property
    def pointer(self) -> int:
        """The native model."""
        return self.handle.pointer

    @property
    def vocab(self) -> int:
        """The native vocabulary, a part of the model. Raises EngineClosed when that is closed."""
        self.handle.pointer  # noqa: B018 - the check
        return self._vocab

    @property
    def layers_offloaded(self) -> int:
        """Layers asked to be on a GPU, 0 where there is none; the output layer, which goes there first, not counted."""
        return self.n_layer if self.n_gpu_layers < 0 else max(0, min(self.n_gpu_layers - 1, self.n_layer))

    @functools.cached_property
    def metadata(self) -> dict[str, str]:
        """All scalar metadata of the GGUF file, as llama.cpp prints it."""
        llama, pointer = self.lib.llama, self.pointer

        def text(function: Any, index: int) -> str:
            filled = _filled(ctypes.c_char, 256, lambda buffer, size: function(pointer, index, buffer, size))
            return bytes(filled).decode("utf-8", "replace")

        return {
            text(llama.llama_model_meta_key_by_index, index): text(llama.llama_model_meta_val_str_by_index, index)
            for index in range(llama.llama_model_meta_count(pointer))
        }

    @functools.cached_property
    def eog_tokens(self) -> frozenset[int]:
        """Tokens that end a turn of the conversation."""
        is_eog, vocab = self.lib.llama.llama_vocab_is_eog, self.vocab
        return frozenset(token for token in range(self.n_vocab) if is_eog(vocab, token))

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """Texts that become a token only with special parsing, longest first, as llama.cpp looks for them."""
        attr, vocab, wanted = self.lib.llama.llama_vocab_get_attr, self.vocab, _ATTR_CONTROL | _ATTR_UNKNOWN
        found = {self.text_of(token): token for token in range(self.n_vocab) if attr(vocab, token) & wanted}
        return dict(sorted(found.items(), key=lambda item: -len(item[0].encode())))

    def strips(self, token: int) -> tuple[bool, bool]:
        """Whether white space before, and behind, this control token is dropped."""
        attr = self.lib.llama.llama_vocab_get_attr(self.vocab, token)
        return bool(attr & _ATTR_LSTRIP), bool(attr & _ATTR_RSTRIP)

    def text_of(self, token: int) -> str:
        """What the vocabulary calls a token; empty for -1."""
        return "" if token < 0 else self.lib.llama.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace")

    def tokenize(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Tokens of one text, without begin and end tokens; `special` lets names of control tokens become those."""
        data, call, vocab = text.encode("utf-8", "replace"), self.lib.llama.llama_tokenize, self.vocab
        size, given = len(data) + 8, (vocab, data, len(data))
        return tuple(_filled(ctypes.c_int32, size, lambda buffer, size: call(*given, buffer, size, False, special)))

    def piece(self, token: int) -> bytes:
        """The bytes of a token; control tokens are empty. Cached."""
        if token not in self._pieces:
            if not 0 <= token < self.n_vocab:
                raise ValueError(f"token {token} is not in the vocabulary of {self.n_vocab}")
            call, vocab = self.lib.llama.llama_token_to_piece, self.vocab
            filled = _filled(ctypes.c_char, 64, lambda buffer, size: call(vocab, token, buffer, size, 0, False))
            self._pieces[token] = bytes(filled)
        return self._pieces[token]

    def close(self) -> None:
        """Free it with everything made from it."""
        self.handle.close()


def _filled(kind: Any, size: int, call: Callable[[Any, int], int]) -> Any:
    """What `call` writes into a buffer of `size` values; one that needs more says how many, with either sign."""
    while True:
        buffer = (kind * size)()
        count = call(buffer, size)
        if 0 <= count < size:
            return buffer[:count]
        size = abs(count) + 1


def _placement(settings: EngineSettings, present: tuple[Device, ...]) -> tuple[Device | None, int]:
    """The device for the layers and how many of them (-1: all)."""
    device = next((one for one in present if one.is_gpu), None)
    if settings.device is not None:
        device = pick(settings.device, "--device", present)
    layers = -1 if settings.gpu_layers is None else settings.gpu_layers
    return device, 0 if device is None else layers


def _load(lib: Library, path: Path, device: Device | None, asked: str | None, layers: int) -> Owned:
    if not path.is_file():
        raise ModelNotFound(f"There is no model file {path}: check the path given to --model.")
    params = lib.llama.llama_model_default_params()
    params.n_gpu_layers = layers
    # An explicit device (or none) is a list that ends with NULL; without it llama.cpp takes all GPUs.
    chosen = (ctypes.c_void_p * 2)(device.handle if device else None, None)
    if asked is not None:
        params.devices = ctypes.cast(chosen, ctypes.c_void_p)
    mark = logs.SINK.mark
    pointer = lib.llama.llama_model_load_from_file(str(path).encode(), params)
    logs.SINK.raise_interrupt()
    if not pointer:
        cause = logs.SINK.cause(mark)
        if "CLIP cannot be used" in cause:
            raise PairMismatch(f"{path.name} is a projector, not a language model: give it with --mmproj instead.")
        raise ModelUnreadable(
            f"llama.cpp cannot load {path.name} ({cause or 'no reason given'}): "
            "check that the file is whole and its architecture is supported."
        )
    return Owned("language model", pointer, lib.llama.llama_model_free)
