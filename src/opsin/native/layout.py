"""Parts of a prompt into runs: tokens of text, chunks of pictures.

Text. Each stretch between two pictures is tokenised whole, as one text, because the pieces of a text have other tokens
than the text: a sentencepiece vocabulary puts a space in front of every call. Where a user wrote the name of a
control token, that text must not become the token. Such a text is joined with its plain neighbours up to the next real
control tokens of the template, and that stretch alone goes without special parsing. llama.cpp itself cuts a text at
control tokens and starts anew behind each, so these cuts change nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from opsin.core.answer import ImageInfo
from opsin.core.errors import BadInput, BadPicture
from opsin.core.layout import ImageRun, Layout, Run, TextRun
from opsin.core.parts import PicturePart, TextPart
from opsin.native import logs
from opsin.native.chunk import ChunkHandle, read_meta
from opsin.native.handles import Owned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from opsin.core.parts import Part
    from opsin.core.picture import Picture
    from opsin.native.model import Model
    from opsin.native.vision import Encoder

_TEXT, _IMAGE = 0, 1  # mtmd_input_chunk_type


class Stretches:
    """Cuts stretches of text parts into the pieces that are tokenised one by one."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._pattern: re.Pattern[str] | None = None

    def pieces(self, parts: Sequence[TextPart]) -> list[tuple[str, bool]]:
        """(text, special parsing) of each piece; their tokens one after another are the stretch."""
        if all(part.special for part in parts):
            text = "".join(part.text for part in parts)
            return [(text, True)] if text else []
        groups: list[tuple[str, bool]] = []
        atoms = list(self._atoms(parts))
        for index, (text, plain, _) in enumerate(atoms):
            if plain:
                before = atoms[index - 1][2] if index else None
                after = atoms[index + 1][2] if index + 1 < len(atoms) else None
                groups.append((self._stripped(text, before, after), False))
            elif groups and groups[-1][1]:
                groups[-1] = (groups[-1][0] + text, True)
            else:
                groups.append((text, True))
        return [piece for piece in groups if piece[0]]

    def _atoms(self, parts: Sequence[TextPart]) -> Iterator[tuple[str, bool, int | None]]:
        """Runs of ordinary text (with whether a plain part is in it) and control tokens, in order."""
        text, plain = "", False
        for part in parts:
            if not part.special:
                text, plain = text + part.text, plain or bool(part.text)
                continue
            at = 0
            for match in self._control_tokens().finditer(part.text):
                text += part.text[at : match.start()]
                if text:
                    yield text, plain, None
                yield match[0], False, self._model.control_tokens[match[0]]
                text, plain, at = "", False, match.end()
            text += part.text[at:]
        if text:
            yield text, plain, None

    def _control_tokens(self) -> re.Pattern[str]:
        if self._pattern is None:
            names = [re.escape(name) for name in self._model.control_tokens if name]
            self._pattern = re.compile("|".join(names) or r"(?!)")
        return self._pattern

    def _stripped(self, text: str, before: int | None, after: int | None) -> str:
        if before is not None and self._model.strips(before)[1]:
            text = text.lstrip()
        if after is not None and self._model.strips(after)[0]:
            text = text.rstrip()
        return text


def lay_out_text(model: Model, stretches: Stretches, parts: Sequence[TextPart], *, add_bos: bool) -> Layout:
    """The layout of a prompt without pictures."""
    tokens = list(_begin(model, add_bos=add_bos))
    for text, special in stretches.pieces(parts):
        tokens.extend(model.tokenize(text, special=special))
    return Layout((TextRun(tuple(tokens)),) if tokens else (), ())


def _begin(model: Model, *, add_bos: bool) -> tuple[int, ...]:
    if add_bos and model.adds_bos:
        return (int(model.lib.llama.llama_vocab_bos(model.vocab)),)
    return ()


@dataclass(slots=True)
class _Input:
    """mtmd's parts, with everything their pointers point to."""

    parts: list[Any] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)
    bitmaps: list[Owned] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def close(self) -> None:
        for bitmap in self.bitmaps:
            bitmap.close()


def lay_out(
    model: Model,
    encoder: Encoder,
    stretches: Stretches,
    parts: Sequence[Part],
    *,
    add_bos: bool,
    known: Callable[[str], bool] | None = None,
) -> Layout:
    """The layout of a prompt with pictures. Raises BadPicture, BadInput.

    mtmd lays a picture without pixels out in no time, with the same tokens, so identities are known before anything
    is preprocessed; those that `known` accepts stay without.
    """
    pictures = range(sum(isinstance(part, PicturePart) for part in parts))
    hollow: frozenset[int] = frozenset()
    if known is not None:
        hollow = frozenset(pictures)
        layout = _lay_out(model, encoder, stretches, parts, add_bos=add_bos, hollow=hollow)
        hollow -= {run.picture for run in layout.runs if isinstance(run, ImageRun) and not known(run.identity)}
        if len(hollow) == len(pictures):
            return layout
        layout.close()
    return _lay_out(model, encoder, stretches, parts, add_bos=add_bos, hollow=hollow)


def _lay_out(
    model: Model,
    encoder: Encoder,
    stretches: Stretches,
    parts: Sequence[Part],
    *,
    add_bos: bool,
    hollow: frozenset[int],
) -> Layout:
    mtmd = model.lib.mtmd
    given = _Input()
    owned = Owned("layout", mtmd.mtmd_input_chunks_init(), mtmd.mtmd_input_chunks_free)
    try:
        _fill(given, mtmd, stretches, parts, hollow)
        _tokenize(mtmd, encoder, given, owned.pointer)
        runs, images = _read(model, encoder, given.pictures, owned, begin=_begin(model, add_bos=add_bos))
        runs = tuple(
            replace(run, placeholder=True) if isinstance(run, ImageRun) and run.picture in hollow else run
            for run in runs
        )
    except BaseException:
        owned.close()
        raise
    finally:
        given.close()
    return Layout(runs, images, owned)


def _fill(given: _Input, mtmd: Any, stretches: Stretches, parts: Sequence[Part], hollow: frozenset[int]) -> None:
    stretch: list[TextPart] = []
    for part in [*parts, None]:
        if isinstance(part, TextPart):
            stretch.append(part)
            continue
        for text, special in stretches.pieces(stretch):
            data = text.encode("utf-8", "replace")
            struct = mtmd.mtmd_input_text(data, len(data), False, special)
            given.keep.append((data, struct))
            given.parts.append(mtmd.mtmd_input_part(ctypes.pointer(struct), None))
        stretch = []
        if isinstance(part, PicturePart):
            index = len(given.pictures)
            bitmap = _bitmap(mtmd, part.picture, index, hollow=index in hollow)
            given.bitmaps.append(bitmap)
            given.pictures.append(part.picture)
            given.parts.append(mtmd.mtmd_input_part(None, bitmap.pointer))


def _bitmap(mtmd: Any, picture: Picture, index: int, *, hollow: bool) -> Owned:
    rgb = picture.rgb  # read once: a worker lets go of it when its request is cancelled
    if len(rgb) != picture.width * picture.height * 3 or not rgb:
        raise BadPicture(
            f"A picture of {picture.width}x{picture.height} pixels came with {len(rgb)} bytes of RGB: "
            "it needs three a pixel."
        )
    data = np.frombuffer(rgb, np.uint8)
    pixels = None if hollow else data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = Owned("bitmap", mtmd.mtmd_bitmap_init(picture.width, picture.height, pixels), mtmd.mtmd_bitmap_free)
    # The chunks made of it carry this number back: one picture may become many.
    mtmd.mtmd_bitmap_set_id(bitmap.pointer, str(index).encode())
    return bitmap


def _tokenize(mtmd: Any, encoder: Encoder, given: _Input, chunks: int) -> None:
    pointers = (ctypes.POINTER(mtmd.mtmd_input_part) * len(given.parts))(*map(ctypes.pointer, given.parts))
    mark = logs.SINK.mark()
    code = mtmd.mtmd_tokenize_from_parts(encoder.pointer, chunks, pointers, len(given.parts), False)
    if code != 0:
        cause = logs.SINK.cause(mark, most=1)
        raise BadPicture(
            "The model's preprocessing refuses a picture"
            + (f" ({cause})" if cause else f" (code {code})")
            + ": give one that is less narrow or less small."
        )


def _read(
    model: Model, encoder: Encoder, pictures: list[Picture], owned: Owned, begin: tuple[int, ...]
) -> tuple[tuple[Run, ...], tuple[ImageInfo, ...]]:
    mtmd, chunks = model.lib.mtmd, owned.pointer
    runs: list[Run] = []
    tokens: list[int] = list(begin)
    seen: Counter[int] = Counter()
    for index in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, index)
        kind = mtmd.mtmd_input_chunk_get_type(chunk)
        if kind == _TEXT:
            count = ctypes.c_size_t(0)
            data = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            tokens.extend(data[: count.value])
        elif kind == _IMAGE:
            if tokens:
                runs.append(TextRun(tuple(tokens)))
                tokens = []
            picture = int(mtmd.mtmd_input_chunk_get_id(chunk))
            runs.append(
                _image_run(model, encoder, pictures[picture], picture, index=seen[picture], owned=owned, chunk=chunk)
            )
            seen[picture] += 1
        else:
            raise BadInput("The model made sound of a picture: Opsin reads pictures only.")
    if tokens:
        runs.append(TextRun(tuple(tokens)))
    images = [run for run in runs if isinstance(run, ImageRun)]
    return tuple(runs), tuple(
        _info(pictures[n], [run for run in images if run.picture == n]) for n in range(len(pictures))
    )


def _image_run(
    model: Model, encoder: Encoder, picture: Picture, number: int, *, index: int, owned: Owned, chunk: int
) -> ImageRun:
    mtmd = model.lib.mtmd
    handle = ChunkHandle(owned, chunk, read_meta(model.lib, chunk))
    meta = handle.meta
    n_tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
    positions = _positions(mtmd, chunk, n_tokens, 0) if encoder.mrope else None
    name = (
        picture.sha256,
        index,
        encoder.fingerprint,
        encoder.preprocessing,
        meta.n_x,
        meta.n_y,
        meta.order,
        meta.entries,
    )
    return ImageRun(
        identity=hashlib.sha256(repr(name).encode()).hexdigest(),
        picture=number,
        n_tokens=n_tokens,
        n_pos=mtmd.mtmd_input_chunk_get_n_pos(chunk),
        causal=not mtmd.mtmd_decode_use_non_causal(encoder.pointer, chunk),
        positions=positions,
        moves=_positions(mtmd, chunk, n_tokens, 1) - positions if positions is not None else None,
        handle=handle,
    )


def _positions(mtmd: Any, chunk: int, n_tokens: int, first: int) -> NDArray[np.int32]:
    """int32 [n_tokens, 4] in llama.cpp's order of sections: time, height, width and one more, for a run at `first`."""
    array = (mtmd.mtmd_decoder_pos * n_tokens)()
    mtmd.mtmd_helper_image_get_decoder_pos(mtmd.mtmd_input_chunk_get_tokens_image(chunk), first, array)
    fields = np.frombuffer(array, np.uint32).reshape(n_tokens, 4)  # t, x, y, z
    return np.ascontiguousarray(fields[:, [0, 2, 1, 3]].astype(np.int32))


def _info(picture: Picture, runs: list[ImageRun]) -> ImageInfo:
    sizes = [size for run in runs for size in run.handle.meta.sizes]
    width, height = sizes[0] if sizes else (0, 0)
    return ImageInfo(
        sha256=picture.sha256,
        width=picture.width,
        height=picture.height,
        resized_width=width,
        resized_height=height,
        tokens=sum(run.n_tokens for run in runs),
        tiles=len(sizes),
        orientation=picture.orientation,
    )
