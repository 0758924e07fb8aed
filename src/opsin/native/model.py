"""A loaded language model: its vocabulary, its sizes, its file's metadata, and handles on native memory."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opsin.core.errors import EngineClosed, ModelUnreadable
from opsin.core.ggml_types import TENSOR_TYPES
from opsin.core.request import Embedding, TextChunk, TextPart, TokenizedPrompt
from opsin.core.settings import EngineSettings
from opsin.native import logs
from opsin.native.devices import Device, devices, pick
from opsin.native.ggml import GgufInitParams
from opsin.native.library import Library, library

Loading = Callable[[float], None]  # hears how much of a model is loaded, from 0 to 1
# Architectures whose graph does the same to a token's embedding and to an image's (llama.cpp's src/models). Others
# scale a token's (gemma), or take more of a token than its embedding.
_PLAIN = frozenset({"internlm2", "llama", "mistral3", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "qwen3vlmoe", "smollm3"})

# llama_token_attr of llama.h
_ATTR_UNKNOWN, _ATTR_CONTROL, _ATTR_LSTRIP, _ATTR_RSTRIP = 1 << 0, 1 << 3, 1 << 7, 1 << 8
_ROPE_WITH_SECTIONS = frozenset({8, 40})  # GGML_ROPE_TYPE_MROPE, GGML_ROPE_TYPE_IMROPE


class Owned:
    """A native pointer with the function that frees it, and the handles that must be freed before it."""

    def __init__(self, name: str, pointer: int, free: Callable[[int], object], parent: Owned | None = None) -> None:
        if not pointer:
            raise ValueError(f"{name}: a null pointer cannot be owned")
        self.name = name
        self._pointer: int | None = pointer
        self._free = free
        self._parent = parent
        self._children: dict[int, Owned] = {}
        self._lock = threading.Lock()
        if parent is not None:
            parent.pointer  # noqa: B018 - raises when it is closed already
            parent._children[id(self)] = self  # noqa: SLF001 - of the same class

    @property
    def pointer(self) -> int:
        """The address. Raises EngineClosed after `close`, so that native code never gets freed memory."""
        pointer = self._pointer
        if pointer is None:
            raise EngineClosed(f"The {self.name} was closed already: load the model again.")
        return pointer

    @property
    def children(self) -> tuple[Owned, ...]:
        """What must be freed before it, the oldest first."""
        return tuple(self._children.values())

    def close(self) -> None:
        """Free the children, the youngest first, then this pointer; twice does no harm."""
        with self._lock:
            pointer, self._pointer = self._pointer, None
        if pointer is None:
            return
        for child in reversed(self.children):
            child.close()
        self._free(pointer)
        if self._parent is not None:
            self._parent._children.pop(id(self), None)  # noqa: SLF001 - of the same class


def floats(address: Any, count: int) -> NDArray[np.float32]:
    """A view of native memory, float32 [count], of which `address` is a ctypes pointer."""
    # Not `np.ctypeslib.as_array`: each call of it leaves a cycle for the garbage collector.
    memory: Any = (ctypes.c_float * count).from_address(ctypes.addressof(address.contents))
    return np.frombuffer(memory, np.float32)


class Model(Owned):
    """A language model in memory, for any thread; closing it frees everything made from it.

    An embedding row has `n_pos` positions: 4 under M-RoPE, else 1. With `whole_states_only` no part of the KV cache can
    be forgotten or copied. `begin` are the tokens put in front of a text, `bos` and `eos` the texts of such tokens.
    `eog_tokens` end a turn. `control_tokens` are texts that become a token only with special parsing, longest first.
    """

    def __init__(self, path: Path, settings: EngineSettings, progress: Loading = lambda _: None) -> None:
        self.lib: Library = library()
        self.path = path
        self._devices, self.n_gpu_layers = _placement(settings, devices())
        self.device = next(iter(self._devices), None)
        llama = self.lib.llama
        pointer = _load(self.lib, path, self._params(settings.device, progress))
        super().__init__("language model", pointer, llama.llama_model_free)
        if llama.llama_model_has_encoder(pointer):
            self.close()
            raise ModelUnreadable(f"{path.name} has an encoder for text, which Opsin cannot run: give a decoder model.")
        self._vocab: int = llama.llama_model_get_vocab(pointer)
        self.n_vocab: int = llama.llama_vocab_n_tokens(self._vocab)
        self.n_embd: int = llama.llama_model_n_embd_inp(pointer)
        self.n_layer: int = llama.llama_model_n_layer(pointer)
        self.n_head: int = llama.llama_model_n_head(pointer)
        self.n_head_kv: int = llama.llama_model_n_head_kv(pointer)
        self.n_ctx_train: int = llama.llama_model_n_ctx_train(pointer)
        self.n_pos: int = 4 if llama.llama_model_rope_type(pointer) in _ROPE_WITH_SECTIONS else 1
        self.whole_states_only: bool = llama.llama_model_is_recurrent(pointer) or llama.llama_model_is_hybrid(pointer)
        template: bytes | None = llama.llama_model_chat_template(pointer, None)
        self.chat_template = template.decode("utf-8", "replace") if template else None
        self.quantisation: str = llama.llama_ftype_name(llama.llama_model_ftype(pointer)).decode()
        bos: int = llama.llama_vocab_bos(self._vocab)
        self.begin = (bos,) if llama.llama_vocab_get_add_bos(self._vocab) else ()
        self.bos, self.eos = self.text_of(bos), self.text_of(llama.llama_vocab_eos(self._vocab))
        tokens, attr = range(self.n_vocab), llama.llama_vocab_get_attr
        self.eog_tokens = frozenset(token for token in tokens if llama.llama_vocab_is_eog(self._vocab, token))
        control = [token for token in tokens if attr(self._vocab, token) & (_ATTR_CONTROL | _ATTR_UNKNOWN)]
        texts = {self.text_of(token): token for token in control}
        self.control_tokens = dict(sorted(texts.items(), key=lambda item: -len(item[0].encode())))
        names = "|".join(re.escape(name) for name in self.control_tokens if name)
        self._control = re.compile(f"({names})" if names else r"((?!))")
        self._pieces: dict[int, bytes] = {}

    def _params(self, asked: str | None, progress: Loading) -> Any:
        """llama.cpp's parameters for loading it; `asked` is the device's name in the settings."""
        llama, told = self.lib.llama, -1
        params = llama.llama_model_default_params()
        params.n_gpu_layers = self.n_gpu_layers
        # Explicit devices (or none) are a list that ends with NULL; without it llama.cpp takes all GPUs.
        if asked is not None:
            handles = [device.handle for device in self._devices]
            params.chosen = (ctypes.c_void_p * (len(handles) + 1))(*handles, None)  # lives as long as they do
            params.devices = ctypes.cast(params.chosen, ctypes.c_void_p)

        def tell(share: float, _user_data: object) -> bool:
            nonlocal told
            try:
                if (percent := int(100 * share)) > told:
                    told = percent
                    progress(percent / 100)
            except BaseException as error:  # noqa: BLE001 - also Ctrl-C; raised when llama.cpp has come back
                params.errors.append(error)
            return not params.errors  # whether to go on

        params.errors = list[BaseException]()
        params.progress_callback = llama.llama_progress_callback(tell)
        return params

    @property
    def vocab(self) -> int:
        """The native vocabulary, a part of the model. Raises EngineClosed when that is closed."""
        self.pointer  # noqa: B018 - the check
        return self._vocab

    @property
    def layers_offloaded(self) -> int:
        """Layers asked to be on a GPU, 0 where there is none; the output layer, which goes there first, not counted."""
        return self.n_layer if self.n_gpu_layers < 0 else max(0, min(self.n_gpu_layers - 1, self.n_layer))

    @property
    def offloaded(self) -> bool:
        """Whether all of it is on a GPU, the output layer included."""
        return self.device is not None and not 0 <= self.n_gpu_layers <= self.n_layer

    @property
    def several_devices(self) -> bool:
        """Whether its layers are spread over GPUs, of which each can work on a part of a batch."""
        return self.offloaded and len(self._devices) > 1

    def metadata(self, key: str) -> str:
        """A scalar of the GGUF file's metadata, its first 1,000 bytes; empty where there is none."""
        text = ctypes.create_string_buffer(1001)
        self.lib.llama.llama_model_meta_val_str(self.pointer, key.encode(), text, len(text))
        return text.value.decode("utf-8", "replace")

    def text_of(self, token: int) -> str:
        """What the vocabulary calls a token; empty for -1."""
        return "" if token < 0 else self.lib.llama.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace")

    def spans(self, parts: Sequence[TextPart]) -> list[tuple[str, bool]]:
        """(text, special parsing) of spans whose tokens, one after another, are those of all the parts.

        llama.cpp itself starts anew behind each control token that the template wrote. Between them parts are joined,
        since a sentencepiece vocabulary puts a space in front of every text, and names that a user wrote stay text.
        """
        texts = [""]  # every second one is a control token
        for part in parts:
            first, *others = self._control.split(part.text) if part.special else [part.text]
            texts[-1] += first
            texts += others
        for at in range(1, len(texts), 2):
            attr = self.lib.llama.llama_vocab_get_attr(self.vocab, self.control_tokens[texts[at]])
            if attr & _ATTR_LSTRIP:
                texts[at - 1] = texts[at - 1].rstrip()
            if attr & _ATTR_RSTRIP:
                texts[at + 1] = texts[at + 1].lstrip()
        return [(text, at % 2 == 1) for at, text in enumerate(texts) if text]

    def tokenize_parts(self, parts: Sequence[TextPart], *, add_bos: bool) -> TokenizedPrompt:
        """Tokenize a prompt without images."""
        tokens = list(self.begin if add_bos else ())
        for text, special in self.spans(parts):
            tokens.extend(self.tokenize(text, special=special))
        return TokenizedPrompt((TextChunk(tuple(tokens)),) if tokens else (), ())

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


def _filled(kind: Any, size: int, call: Callable[[Any, int], int]) -> Any:
    """What `call` writes into a buffer of `size` values; one that needs more says how many, with either sign."""
    while True:
        buffer = (kind * size)()
        count = call(buffer, size)
        if 0 <= count < size:
            return buffer[:count]
        size = abs(count) + 1


def _placement(settings: EngineSettings, present: tuple[Device, ...]) -> tuple[list[Device], int]:
    """The devices for the layers and how many of them (-1: all)."""
    found = pick(settings.device, "--device", present)
    layers = -1 if settings.gpu_layers is None else settings.gpu_layers
    return found, layers if found else 0


def _load(lib: Library, path: Path, params: Any) -> int:
    mark = logs.SINK.mark
    pointer: int = lib.llama.llama_model_load_from_file(str(path).encode(), params)
    logs.SINK.raise_interrupt()
    if params.errors:
        lib.llama.llama_model_free(pointer)
        raise params.errors[0]
    if not pointer:
        raise ModelUnreadable(
            f"llama.cpp cannot load {path.name} ({logs.SINK.cause(mark) or 'no reason given'}): "
            "check that the file is whole and its architecture is supported."
        )
    return pointer


class TokenTable:
    """A model's token embeddings: rows of `token_embd.weight`, a view of its file, of which only some are read.

    `llama_batch` holds tokens or embeddings, never both, and reading all weights for a batch of one token costs as much
    as for thirty rows. With its embedding a token can go beside an image's rows.
    """

    def __init__(self, model: Model) -> None:
        """Raises LookupError for models whose tokens cannot be given as embeddings."""
        ggml = model.lib.ggml
        if model.metadata("general.architecture") not in _PLAIN:
            raise LookupError
        file = ggml.gguf_init_from_file(os.fsencode(model.path), GgufInitParams(True, None))
        at = ggml.gguf_find_tensor(file, b"token_embd.weight") if file else -1
        try:
            if at < 0:
                raise LookupError
            kind, size = ggml.gguf_get_tensor_type(file, at), ggml.gguf_get_tensor_size(file, at)
            offset = ggml.gguf_get_data_offset(file) + ggml.gguf_get_tensor_offset(file, at)
        finally:
            ggml.gguf_free(file)  # a null pointer does no harm
        traits = ggml.ggml_get_type_traits(kind).contents
        self._width, self._padded = model.lib.llama.llama_model_n_embd(model.pointer), model.n_embd
        row = self._width // traits.block * traits.size
        self._to_float = traits.to_float
        known = TENSOR_TYPES[kind][1:] == (traits.block, traits.size) and size == row * model.n_vocab
        if not (known and self._to_float):
            raise LookupError
        self._rows = np.memmap(model.path, np.uint8, "r", offset, (model.n_vocab, row))

    def rows(self, tokens: Sequence[int]) -> Embedding:
        """The embeddings of these tokens, float32 [n, n_embd]; behind them zeros where images take more (deepstack)."""
        found = np.zeros((len(tokens), self._padded), np.float32)
        for place, token in zip(found, tokens, strict=True):
            row = self._rows[token]
            self._to_float(row.ctypes.data, place.ctypes.data, self._width)
        return found
