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
    from pathlib import Path

    from opsin.core.settings import EngineSettings

# llama_token_attr of llama.h
_ATTR_UNKNOWN, _ATTR_CONTROL, _ATTR_LSTRIP, _ATTR_RSTRIP = 1 << 0, 1 << 3, 1 << 7, 1 << 8
_ROPE_WITH_SECTIONS = frozenset({8, 40})  # GGML_ROPE_TYPE_MROPE, GGML_ROPE_TYPE_IMROPE
_ROOM_ON_GPU = 0.9  # of the free memory: drivers, compute buffers and the encoder need the rest


class Model:
    """A language model in memory. Tokenising and metadata may be used by any thread."""

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        lib = library()
        self.lib: Library = lib
        self.path = path
        present = devices(lib)
        self.device, self.n_gpu_layers = _placement(path, settings, present)
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
        # Positions an embedding row carries: time, height, width and one more for models that rotate by section.
        self.n_pos: int = 4 if llama.llama_model_rope_type(pointer) in _ROPE_WITH_SECTIONS else 1
        # Their memory is a state, not a list of cells: it cannot forget or copy a part.
        self.whole_states_only: bool = llama.llama_model_is_recurrent(pointer) or llama.llama_model_is_hybrid(pointer)
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
        if self.device is None:
            return 0
        return self.n_layer if self.n_gpu_layers < 0 else max(0, min(self.n_gpu_layers - 1, self.n_layer))

    @functools.cached_property
    def metadata(self) -> dict[str, str]:
        """All scalar metadata of the GGUF file, as llama.cpp prints it."""
        return _metadata(self.lib.llama, self.pointer)

    @property
    def chat_template(self) -> str | None:
        """The file's own chat template (Jinja), None when it ships none."""
        template: bytes | None = self.lib.llama.llama_model_chat_template(self.pointer, None)
        return template.decode("utf-8", "replace") if template else None

    @property
    def quantisation(self) -> str:
        """The file type as llama.cpp names it, such as "Q8_0" or "Q4_K - Medium"."""
        name: bytes = self.lib.llama.llama_ftype_name(self.lib.llama.llama_model_ftype(self.pointer))
        return name.decode()

    @functools.cached_property
    def eog_tokens(self) -> frozenset[int]:
        """Tokens that end a turn."""
        is_eog, vocab = self.lib.llama.llama_vocab_is_eog, self.vocab
        return frozenset(token for token in range(self.n_vocab) if is_eog(vocab, token))

    @property
    def eog_texts(self) -> frozenset[str]:
        """Texts of the tokens that end a turn."""
        return frozenset(self._token_text(token) for token in self.eog_tokens)

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """Texts that become a token only with special parsing, longest first, as llama.cpp looks for them."""
        llama, vocab = self.lib.llama, self.vocab
        attr = llama.llama_vocab_get_attr
        found = {
            llama.llama_vocab_get_text(vocab, token).decode("utf-8", "replace"): token
            for token in range(self.n_vocab)
            if attr(vocab, token) & (_ATTR_CONTROL | _ATTR_UNKNOWN)
        }
        return dict(sorted(found.items(), key=lambda item: -len(item[0].encode())))

    def strips(self, token: int) -> tuple[bool, bool]:
        """Whether white space before, and behind, this control token is dropped."""
        attr = self.lib.llama.llama_vocab_get_attr(self.vocab, token)
        return bool(attr & _ATTR_LSTRIP), bool(attr & _ATTR_RSTRIP)

    @property
    def bos(self) -> str:
        """The text of the begin token, empty when there is none."""
        return self._token_text(self.lib.llama.llama_vocab_bos(self.vocab))

    @property
    def eos(self) -> str:
        """The text of the end token, empty when there is none."""
        return self._token_text(self.lib.llama.llama_vocab_eos(self.vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts the begin token in front."""
        return bool(self.lib.llama.llama_vocab_get_add_bos(self.vocab))

    def _token_text(self, token: int) -> str:
        return "" if token < 0 else self.lib.llama.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace")

    def tokenize(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Tokens of one text, without begin and end tokens; `special` lets names of control tokens become those."""
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        while True:
            buffer = (ctypes.c_int32 * size)()
            count = self.lib.llama.llama_tokenize(self.vocab, data, len(data), buffer, size, False, special)
            if count >= 0:
                return tuple(buffer[:count])
            size = -count

    def piece(self, token: int) -> bytes:
        """The bytes of a token; control tokens are empty. Cached."""
        known = self._pieces.get(token)
        if known is not None:
            return known
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"token {token} is not in the vocabulary of {self.n_vocab}")
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self.lib.llama.llama_token_to_piece(self.vocab, token, buffer, size, 0, False)
            if count >= 0:
                piece = self._pieces[token] = buffer.raw[:count]
                return piece
            size = -count

    def close(self) -> None:
        """Free it with everything made from it."""
        self.handle.close()


def _text(function: Any, pointer: int, index: int) -> str:
    size = 256
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = function(pointer, index, buffer, size)
        if length < size:
            return buffer.value.decode("utf-8", "replace")
        size = length + 1


def _placement(path: Path, settings: EngineSettings, present: tuple[Device, ...]) -> tuple[Device | None, int]:
    """The device for the layers and how many of them (-1: all)."""
    if settings.device is not None:
        device = pick(settings.device, "--device", present)
    else:
        device = next((one for one in present if one.is_gpu), None)
    if device is None:
        return None, 0
    if settings.gpu_layers is not None:
        return device, settings.gpu_layers
    # A simple estimate: layers are equal slices of the file. Weights of several devices are llama.cpp's business.
    gpus = [one for one in present if one.is_gpu] if settings.device is None else [device]
    room = sum(one.memory_free for one in gpus) * _ROOM_ON_GPU
    size = _file_bytes(path)
    if room <= 0 or size <= room:
        return device, -1
    return device, max(0, int(_layers_of(path) * room / size))


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ModelNotFound(f"There is no model file {path}: check the path given to --model.") from error


def _layers_of(path: Path) -> int:
    """The layer count of a file that does not fit whole, from its metadata: 0 when it has none.

    Not by a `no_alloc` load, which aborts as long as the file is mapped.
    """
    llama = library().llama
    params = llama.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers = True, 0
    pointer = llama.llama_model_load_from_file(str(path).encode(), params)
    if not pointer:
        return 0
    handle = Owned("metadata", pointer, llama.llama_model_free)
    try:
        metadata = _metadata(llama, pointer)
        return int(metadata.get(f"{metadata.get('general.architecture')}.block_count", 0))
    finally:
        handle.close()


def _metadata(llama: Any, pointer: int) -> dict[str, str]:
    return {
        _text(llama.llama_model_meta_key_by_index, pointer, index): _text(
            llama.llama_model_meta_val_str_by_index, pointer, index
        )
        for index in range(llama.llama_model_meta_count(pointer))
    }


def _load(lib: Library, path: Path, device: Device | None, asked: str | None, layers: int) -> Owned:
    _file_bytes(path)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelUnreadable(f"{path.name} is not a GGUF file: give a language model in GGUF format.")
    params = lib.llama.llama_model_default_params()
    params.n_gpu_layers = layers
    # An explicit device (or none) is a list that ends with NULL; without it llama.cpp takes all GPUs.
    chosen = (ctypes.c_void_p * 2)(device.handle if device else None, None)
    if asked is not None:
        params.devices = ctypes.cast(chosen, ctypes.c_void_p)
    mark = logs.SINK.mark()
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
