"""Parts of a prompt into chunks of tokens and chunks of images."""

from __future__ import annotations

import ctypes
import hashlib
import re
import struct
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count, groupby
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from opsin.core.answer import ImageInfo
from opsin.core.errors import BadImage, BadInput, EncodeFailed, NativeMismatch
from opsin.core.prompt import ImagePart, TextPart
from opsin.core.tokens import Chunk, ImageChunk, TextChunk, TokenizedPrompt
from opsin.native import logs
from opsin.native.handles import Owned
from opsin.native.library import ADVICE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from collections.abc import Set as AbstractSet

    from numpy.typing import NDArray

    from opsin.core.image import Image
    from opsin.core.prompt import Part
    from opsin.native.model import Model
    from opsin.native.vision import Encoder

_TEXT, _IMAGE = 0, 1  # mtmd_input_chunk_type
_SERIAL_VERSION = 2  # MTMD_SERIALIZATION_VERSION


class TextSpans:
    """Cuts spans of text parts at the control tokens that the template wrote."""

    def __init__(self, model: Model) -> None:
        self._model = model
        names = "|".join(re.escape(name) for name in model.control_tokens if name)
        self._control_tokens = re.compile(f"({names})" if names else r"((?!))")

    def pieces(self, parts: Sequence[TextPart]) -> list[tuple[str, bool]]:
        """(text, special parsing) of each piece; their tokens one after another are those of the whole span.

        llama.cpp itself starts anew behind each control token. Between them parts are joined, since a sentencepiece
        vocabulary puts a space in front of every text, and names that a user wrote stay text.
        """
        texts = [""]  # every second one is a control token
        for part in parts:
            first, *others = self._control_tokens.split(part.text) if part.special else [part.text]
            texts[-1] += first
            texts += others
        for at in range(1, len(texts), 2):
            before, behind = self._model.strips(self._model.control_tokens[texts[at]])
            if before:
                texts[at - 1] = texts[at - 1].rstrip()
            if behind:
                texts[at + 1] = texts[at + 1].lstrip()
        return [(text, at % 2 == 1) for at, text in enumerate(texts) if text]


class ChunkMeta(NamedTuple):
    """What mtmd saves of an image chunk besides its pixels.

    `entries` are the preprocessed images in it, each (view separator, newline, leading padding, width, height).
    `order` are the fields that place it in the prompt: some families encode the same image differently by them.
    """

    n_x: int
    n_y: int
    order: tuple[int, ...]
    entries: tuple[tuple[Any, ...], ...]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each preprocessed image."""
        return tuple((entry[3], entry[4]) for entry in self.entries)


@dataclass(frozen=True, slots=True)
class ChunkHandle:
    """An image chunk of a tokenized prompt that may have been closed meanwhile."""

    owner: Owned
    address: int
    meta: ChunkMeta

    @property
    def pointer(self) -> int:
        """The native chunk. Raises EncodeFailed after its tokenized prompt was closed."""
        if self.owner.closed:
            raise EncodeFailed("The tokenized prompt of this image was closed before it was encoded.")
        return self.address


def tokenize_text(model: Model, spans: TextSpans, parts: Sequence[TextPart], *, add_bos: bool) -> TokenizedPrompt:
    """Tokenize a prompt without images."""
    tokens = list(model.begin if add_bos else ())
    for text, special in spans.pieces(parts):
        tokens.extend(model.tokenize(text, special=special))
    return TokenizedPrompt((TextChunk(tuple(tokens)),) if tokens else (), ())


def tokenize_prompt(
    model: Model,
    encoder: Encoder,
    spans: TextSpans,
    parts: Sequence[Part],
    *,
    add_bos: bool,
    known: Callable[[str], bool] | None = None,
) -> TokenizedPrompt:
    """Tokenize a prompt with images; those whose identities are all `known` stay placeholders without pixels.

    mtmd lays placeholders out in no time, with the same tokens and identities. Raises BadImage, BadInput.
    """
    prompt = _Prompt(encoder, model.begin if add_bos else ())
    for is_text, group in groupby(parts, lambda part: isinstance(part, TextPart)):
        if is_text:
            prompt.inputs += spans.pieces(cast("list[TextPart]", list(group)))
        else:
            prompt.inputs += [_checked(cast("ImagePart", part).image) for part in group]
    everything = frozenset(range(len(prompt.images)))
    tokenized = prompt.tokenize_prompt(everything)
    unknown = {
        run.image for run in tokenized.chunks if isinstance(run, ImageChunk) and not (known and known(run.identity))
    }
    if not unknown:
        return tokenized
    tokenized.close()
    return prompt.tokenize_prompt(everything - unknown)


def _checked(image: Image) -> Image:
    # mtmd copies so many bytes, whatever is there.
    if len(image.rgb) != image.width * image.height * 3 or not image.rgb:
        raise BadImage(
            f"An image of {image.width}x{image.height} pixels came with {len(image.rgb)} bytes of RGB: "
            "it needs three a pixel."
        )
    return image


class _Prompt:
    """What mtmd is given, texts (with whether they are special) and images, and the chunks that it makes of it."""

    def __init__(self, encoder: Encoder, begin: tuple[int, ...]) -> None:
        self.inputs: list[tuple[str, bool] | Image] = []
        self._encoder, self._begin, self._mtmd = encoder, begin, encoder.lib.mtmd

    @property
    def images(self) -> list[Image]:
        return [given for given in self.inputs if not isinstance(given, tuple)]

    def tokenize_prompt(self, placeholders: AbstractSet[int]) -> TokenizedPrompt:
        """The tokenized prompt, in which the images with these numbers have no pixels."""
        owned = Owned("tokenized prompt", self._mtmd.mtmd_input_chunks_init(), self._mtmd.mtmd_input_chunks_free)
        try:
            self._tokenize(owned.pointer, placeholders)
            runs = self._runs(owned, placeholders)
        except BaseException:
            owned.close()
            raise
        images = [run for run in runs if isinstance(run, ImageChunk)]
        infos = (_info(one, [run for run in images if run.image == at]) for at, one in enumerate(self.images))
        return TokenizedPrompt(tuple(runs), tuple(infos), owned)

    def _tokenize(self, chunks: int, placeholders: AbstractSet[int]) -> None:
        mtmd, parts, numbers = self._mtmd, [], count()
        with ExitStack() as bitmaps:
            for given in self.inputs:
                if isinstance(given, tuple):
                    data = given[0].encode("utf-8", "replace")
                    text = mtmd.mtmd_input_text(data, len(data), False, given[1])
                    parts.append(mtmd.mtmd_input_part(ctypes.pointer(text), None))
                    continue
                number = next(numbers)
                pixels = None
                if number not in placeholders:
                    rgb = np.frombuffer(given.rgb, np.uint8)  # alive until mtmd has copied it
                    pixels = ctypes.cast(rgb.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
                bitmap = mtmd.mtmd_bitmap_init(given.width, given.height, pixels)
                bitmaps.callback(mtmd.mtmd_bitmap_free, bitmap)
                # The chunks made of it carry this number back: one image may become many.
                mtmd.mtmd_bitmap_set_id(bitmap, str(number).encode())
                parts.append(mtmd.mtmd_input_part(None, bitmap))
            pointers = (ctypes.POINTER(mtmd.mtmd_input_part) * len(parts))(*map(ctypes.pointer, parts))
            mark = logs.SINK.mark
            code = mtmd.mtmd_tokenize_from_parts(self._encoder.pointer, chunks, pointers, len(parts), False)
        if code != 0:
            raise BadImage(
                f"The model's preprocessing refuses an image ({logs.SINK.cause(mark, most=1) or f'code {code}'}): "
                "give one that is less narrow or less small."
            )

    def _runs(self, owned: Owned, placeholders: AbstractSet[int]) -> list[Chunk]:
        mtmd, runs, tokens, seen = self._mtmd, list[Chunk](), list(self._begin), Counter[int]()
        for at in range(mtmd.mtmd_input_chunks_size(owned.pointer)):
            chunk = mtmd.mtmd_input_chunks_get(owned.pointer, at)
            kind = mtmd.mtmd_input_chunk_get_type(chunk)
            if kind == _TEXT:
                size = ctypes.c_size_t(0)
                data = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(size))
                tokens += data[: size.value]
                continue
            if kind != _IMAGE:
                raise BadInput("The model made sound of an image: Opsin reads images only.")
            if tokens:
                runs.append(TextChunk(tuple(tokens)))
                tokens.clear()
            number = int(mtmd.mtmd_input_chunk_get_id(chunk))
            run = self._image_run(owned, chunk, number, seen[number])
            runs.append(replace(run, placeholder=number in placeholders))
            seen[number] += 1
        return [*runs, TextChunk(tuple(tokens))] if tokens else runs

    def _image_run(self, owned: Owned, chunk: int, number: int, index: int) -> ImageChunk:
        mtmd, encoder, meta = self._mtmd, self._encoder, _read_meta(self._mtmd, chunk)
        n_tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        positions = _positions(mtmd, chunk, n_tokens, 0) if encoder.mrope else None
        name = (self.images[number].sha256, index, encoder.fingerprint, encoder.preprocessing, *meta)
        return ImageChunk(
            identity=hashlib.sha256(repr(name).encode()).hexdigest(),
            image=number,
            n_tokens=n_tokens,
            n_pos=mtmd.mtmd_input_chunk_get_n_pos(chunk),
            causal=not mtmd.mtmd_decode_use_non_causal(encoder.pointer, chunk),
            positions=positions,
            moves=None if positions is None else _positions(mtmd, chunk, n_tokens, 1) - positions,
            handle=ChunkHandle(owned, chunk, meta),
        )


def _positions(mtmd: Any, chunk: int, n_tokens: int, first: int) -> NDArray[np.int32]:
    """int32 [n_tokens, 4] in llama.cpp's order of sections: time, height, width and one more, for a run at `first`."""
    array = (mtmd.mtmd_decoder_pos * n_tokens)()
    mtmd.mtmd_helper_image_get_decoder_pos(mtmd.mtmd_input_chunk_get_tokens_image(chunk), first, array)
    fields = np.frombuffer(array, np.uint32).reshape(n_tokens, 4)  # t, x, y, z
    return np.ascontiguousarray(fields[:, [0, 2, 1, 3]].astype(np.int32))


def _info(image: Image, runs: list[ImageChunk]) -> ImageInfo:
    sizes = [size for run in runs for size in run.handle.meta.sizes]
    width, height = sizes[0] if sizes else (0, 0)
    return ImageInfo(
        sha256=image.sha256,
        width=image.width,
        height=image.height,
        resized_width=width,
        resized_height=height,
        tokens=sum(run.n_tokens for run in runs),
        tiles=len(sizes),
        orientation=image.orientation,
    )


def _read_meta(mtmd: Any, chunk: int) -> ChunkMeta:
    size = ctypes.c_size_t(0)
    mtmd.mtmd_input_chunk_save(chunk, None, 0, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    mtmd.mtmd_input_chunk_save(chunk, buffer, size.value, ctypes.byref(size))  # on failure it stays empty
    try:
        return parse_meta(buffer.raw)
    except (struct.error, ValueError) as error:
        raise NativeMismatch(f"mtmd describes an image's chunk in a format Opsin does not know: {ADVICE}.") from error


def parse_meta(data: bytes) -> ChunkMeta:
    """Read `mtmd_input_chunk_save`'s format, version 2. Raises ValueError or struct.error."""
    version, _kind, n_text = struct.unpack_from("<QIQ", data)
    if version != _SERIAL_VERSION:
        raise ValueError(f"version {version}")
    at = 20 + 4 * n_text
    has_image, n_x, n_y, *order, id_bytes = struct.unpack_from("<?5IQ", data, at)
    at += 29 + id_bytes
    _audio, count = struct.unpack_from("<?Q", data, at)
    end = at + 9 + 14 * count
    if not has_image or end >= len(data):
        raise ValueError("no image, or cut off")
    return ChunkMeta(n_x, n_y, tuple(order), tuple(struct.iter_unpack("<??iii", data[at + 9 : end])))
