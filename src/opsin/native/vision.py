"""The vision encoder: mtmd's context, prompts with images into chunks, and images into embeddings."""

import ctypes
import hashlib
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count, groupby, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opsin.core.answer import ImageInfo
from opsin.core.backend import Stopped
from opsin.core.errors import BadImage, BadInput, Cancelled, EncodeFailed, ModelUnreadable, NativeMismatch, PairMismatch
from opsin.core.image_options import ANY_SIZES, ImageSizes
from opsin.core.request import Chunk, Embedding, Image, ImageChunk, Part, TextChunk, TextPart, TokenizedPrompt
from opsin.core.settings import EngineSettings
from opsin.native import logs
from opsin.native.devices import default_threads, devices, pick
from opsin.native.frames import mergeable, notes
from opsin.native.ggml import Tensor, op_names
from opsin.native.library import ADVICE
from opsin.native.model import Model, Owned, floats
from opsin.native.projector import fingerprint, read_projector

_Input = tuple[str, bool] | Image  # a text, with whether names of control tokens are those, or an image

_HEAVY = frozenset({"MUL_MAT", "MUL_MAT_ID", "FLASH_ATTN_EXT", "CONV_2D", "CONV_3D"})  # nearly all of the time
_TEXT, _IMAGE = 0, 1  # mtmd_input_chunk_type
_SERIAL_VERSION = 2  # MTMD_SERIALIZATION_VERSION
_BATCHING = frozenset({"gemma4v", "internvl", "deepseekocr", "deepseekocr2"})
_BATCH = 8  # mtmd takes fewer when they have more than its 1,024 tokens
_BATCH_FULL = frozenset({2, 3})  # too many tokens, another shape


class EvalHook:
    """A `cb_eval` callback for the whole life of a native context.

    An observer has `wants(node)`, which says whether to stop behind a node, and `seen(node)`, which is called there.
    What it raises does not stop the encoder, which ends with code 0 and wrong numbers: errors wait until it is back.
    """

    def __init__(self, lib: Any) -> None:
        self._observer: Any = None
        self._error: BaseException | None = None
        # The library keeps the bare pointer: this object must live longer than what it was given to.
        self.callback: Any = lib.llama.ggml_backend_sched_eval_callback(self._call)

    def _call(self, address: int, ask: bool, _user_data: object) -> bool:
        try:
            if self._observer is None:
                return not ask
            node = Tensor.from_address(address)
            if ask:
                return bool(self._observer.wants(node))
            self._observer.seen(node)
        except BaseException as error:  # noqa: BLE001 - kept, and raised by `observing` behind the native call
            self._observer, self._error = None, error
            # False ends the graph early. Its numbers are wrong then, which is no harm: the caller never gets them.
            return not ask and not isinstance(error, (Cancelled, Stopped))
        return True

    @contextmanager
    def observing(self, observer: Any) -> Iterator[None]:
        """Let `observer` look while the one graph of the block runs; raises afterwards what it raised."""
        self._observer = observer
        try:
            yield
        finally:
            error, self._error, self._observer = self._error, None, None
        if error is not None:
            raise error


class Encoder(Owned):
    """An mtmd context over a language model. Prompts may be tokenized by any thread, and images encoded by one.

    `watched`: somebody can look at its nodes. Then llama.cpp asks about each of several hundred, and every question
    waits for Python's lock, so that an encoder on a GPU is watched only for the proof of where it runs.
    """

    def __init__(
        self,
        model: Model,
        path: Path,
        settings: EngineSettings,
        sizes: ImageSizes = ANY_SIZES,
        *,
        watched: bool = False,
    ) -> None:
        self.lib = model.lib
        self.path = path
        self.kind, edge, self._row_end = read_projector(path)
        self.sizes = replace(sizes, edge=edge)
        self._model = model
        self._hook = EvalHook(self.lib)
        self._heavy = frozenset(number for number, name in enumerate(op_names(self.lib)) if name in _HEAVY)
        picked = pick(settings.mmproj_device, "--mmproj-device", devices())
        params = self.lib.mtmd.mtmd_context_params_default()
        params.use_gpu = bool(picked)
        if picked and settings.mmproj_device is not None:  # else mtmd takes the first
            params.device = picked[0].handle
        params.print_timings = False
        # Nearly all weights of a projector file are of 16 bits.
        chosen = settings.threads_encode or settings.threads_batch or settings.threads
        params.n_threads = chosen or default_threads(path.stat().st_size // 2, offloaded=bool(picked))
        flash = settings.flash_attention if settings.vision_flash_attention is None else settings.vision_flash_attention
        params.flash_attn_type = -1 if flash is None else int(flash)
        params.image_min_tokens = settings.image_min_tokens or -1
        params.image_max_tokens = settings.image_max_tokens or -1
        self.watched = watched or not picked
        if self.watched:
            params.cb_eval = self._hook.callback
        super().__init__("vision encoder", self._open(params), self.lib.mtmd.mtmd_free, model)
        # What the pixels handed to the encoder depend on besides the image.
        preprocessing = (params.image_min_tokens, params.image_max_tokens)
        self._identity = fingerprint(path), preprocessing
        self.batch = _BATCH if self.kind in _BATCHING else 1
        self._mrope: bool = self.lib.mtmd.mtmd_decode_use_mrope(self.pointer)
        self.causal: bool = not self.lib.mtmd.mtmd_decode_use_non_causal(self.pointer, None)

    def _open(self, params: Any) -> int:
        name, mark = self.path.name, logs.SINK.mark
        pointer: int = self.lib.mtmd.mtmd_init_from_file(str(self.path).encode(), self._model.pointer, params)
        logs.SINK.raise_interrupt()
        if not pointer:
            cause = logs.SINK.cause(mark)
            if "mismatch between text model" in cause:
                raise PairMismatch(
                    f"{name} was made for another language model than {self._model.path.name} ({cause}): "
                    "use the projector that was published with it."
                )
            raise ModelUnreadable(
                f"llama.cpp cannot load the projector {name} ({cause or 'no reason given'}): "
                "check that the file is whole and its kind is supported."
            )
        return pointer

    def encode(self, chunk: ImageChunk, between: Callable[[], None] | None = None) -> Embedding:
        """float32 [n_tokens, n_embd] of one chunk, owned by the caller; see `Backend.encode`."""
        steps = None
        if between is not None and self.watched:
            # Behind every heavy node: six or seven times a layer, which costs a hundredth of the time.
            steps = SimpleNamespace(wants=lambda node: node.op in self._heavy, seen=lambda _node: between())
        return self.observed(chunk, steps)

    def observed(self, chunk: ImageChunk, observer: Any) -> Embedding:
        """Encode while `observer` looks at the nodes; what it raises is raised here and the embedding is lost."""
        native, mark = chunk.handle.pointer, logs.SINK.mark
        with self._hook.observing(observer):
            code = self.lib.mtmd.mtmd_encode_chunk(self.pointer, native)
        _require(code == 0, f"returned {code} ({logs.SINK.cause(mark)})")
        return self._copy(self.lib.mtmd.mtmd_get_output_embd(self.pointer), chunk)

    def encode_many(self, chunks: Sequence[ImageChunk]) -> list[Embedding]:
        """Embeddings of several chunks, several at once where the family can; the same order."""
        done: list[Embedding] = []
        while len(done) < len(chunks):
            done += self._encode_some(chunks[len(done) :])
        return done

    def _encode_some(self, chunks: Sequence[ImageChunk]) -> list[Embedding]:
        """Embeddings of as many of the first chunks as share a batch; mtmd compares token counts, not pixel sizes."""
        mtmd, sizes, mark = self.lib.mtmd, chunks[0].handle.meta.sizes, logs.SINK.mark
        batch = mtmd.mtmd_batch_init(self.pointer)
        try:
            group: list[ImageChunk] = []
            for chunk in takewhile(lambda chunk: chunk.handle.meta.sizes == sizes, chunks):
                code = mtmd.mtmd_batch_add_chunk(batch, chunk.handle.pointer)
                if code in _BATCH_FULL:
                    break
                _require(code == 0, f"refused an image with {code}")
                group.append(chunk)
            if len(group) < 2:
                return [self.encode(chunks[0])]
            with self._hook.observing(None):
                code = mtmd.mtmd_batch_encode(batch)
            _require(code == 0, f"returned {code} ({logs.SINK.cause(mark)})")
            output = mtmd.mtmd_batch_get_output_embd
            return [self._copy(output(batch, chunk.handle.pointer), chunk) for chunk in group]
        finally:
            mtmd.mtmd_batch_free(batch)

    def _copy(self, address: Any, chunk: ImageChunk) -> Embedding:
        _require(bool(address), "gave no output")
        rows: Embedding = floats(address, chunk.n_tokens * self._model.n_embd).reshape(chunk.n_tokens, -1).copy()
        if self._row_end is not None:
            ((width, height),), count = chunk.handle.meta.sizes, chunk.n_tokens + 1  # as if the last row had one, too
            each = count // round((math.sqrt(height**2 + 4 * width * height * count) - height) / (2 * width))
            rows[each - 1 :: each] = self._row_end
        _require(bool(np.isfinite(rows).all() and rows.any()), "computed values that are not numbers, or zeros alone")
        return rows

    def tokenize(
        self, parts: Sequence[Part], *, add_bos: bool, known: Callable[[str], bool] | None = None
    ) -> TokenizedPrompt:
        """Tokenize a prompt with images; those whose identities are all `known` stay placeholders without pixels.

        mtmd takes no time for placeholders, and gives the same tokens and identities. Raises BadImage, BadInput.
        """
        inputs: list[_Input] = []
        for is_text, group in groupby(parts, lambda part: isinstance(part, TextPart)):
            some: list[Any] = list(group)
            inputs += self._model.spans(some) if is_text else [_checked(part.image) for part in some]
        begin = self._model.begin if add_bos else ()
        everything = frozenset(range(sum(not isinstance(given, tuple) for given in inputs)))
        tokenized = self._tokenized(inputs, begin, everything)
        chunks = (chunk for chunk in tokenized.chunks if isinstance(chunk, ImageChunk))
        new = [chunk for chunk in chunks if not (known and known(chunk.identity))]
        unknown = {number for chunk in new for number in range(chunk.image, chunk.image + chunk.frames)}
        if not unknown:
            return tokenized
        tokenized.close()
        return self._tokenized(inputs, begin, everything - unknown)

    def _tokenized(
        self, inputs: Sequence[_Input], begin: tuple[int, ...], placeholders: AbstractSet[int]
    ) -> TokenizedPrompt:
        """The tokenized prompt, in which the images with the numbers `placeholders` have no pixels."""
        mtmd, images = self.lib.mtmd, [given for given in inputs if not isinstance(given, tuple)]
        owned = Owned("tokenized prompt", mtmd.mtmd_input_chunks_init(), mtmd.mtmd_input_chunks_free)
        try:
            self._fill(owned.pointer, inputs, placeholders)
            chunks = list(self._chunks(owned, begin, images, placeholders))
        except BaseException:
            owned.close()
            raise
        seen = [chunk for chunk in chunks if isinstance(chunk, ImageChunk)]
        infos = (_info(at, images, seen) for at in range(len(images)))
        return TokenizedPrompt(tuple(chunks), tuple(infos), owned)

    def _fill(self, chunks: int, inputs: Sequence[_Input], placeholders: AbstractSet[int]) -> None:
        mtmd, parts, numbers = self.lib.mtmd, [], count()
        is_video = any(isinstance(given, Image) and given.frame is not None for given in inputs)
        frames = mergeable(inputs) if is_video else set[int]()
        with ExitStack() as bitmaps:
            for given in inputs:
                if isinstance(given, tuple):
                    data = given[0].encode("utf-8", "replace")
                    text = mtmd.mtmd_input_text(data, len(data), False, given[1])
                    parts.append(mtmd.mtmd_input_part(ctypes.pointer(text), None))
                    continue
                number, pixels = next(numbers), None
                if number not in placeholders:
                    rgb = np.frombuffer(given.rgb, np.uint8)  # alive until mtmd has copied it
                    pixels = ctypes.cast(rgb.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
                bitmap = mtmd.mtmd_bitmap_init(given.width, given.height, pixels)
                bitmaps.callback(mtmd.mtmd_bitmap_free, bitmap)
                # The chunks made of it carry this number back: one image may become many.
                mtmd.mtmd_bitmap_set_id(bitmap, str(number).encode())
                mtmd.mtmd_bitmap_set_mergeable(bitmap, number in frames)
                parts.append(mtmd.mtmd_input_part(None, bitmap))
            pointers = (ctypes.POINTER(mtmd.mtmd_input_part) * len(parts))(*map(ctypes.pointer, parts))
            mark = logs.SINK.mark
            code = mtmd.mtmd_tokenize_from_parts(self.pointer, chunks, pointers, len(parts), False)
        if code != 0:
            raise BadImage(
                f"The model's preprocessing refuses an image ({logs.SINK.cause(mark, most=1) or f'code {code}'}): "
                "give one that is less narrow or less small."
            )

    def _chunks(
        self, owned: Owned, begin: tuple[int, ...], images: Sequence[Image], placeholders: AbstractSet[int]
    ) -> Iterator[Chunk]:
        mtmd, tokens, seen = self.lib.mtmd, list(begin), Counter[int]()
        for at in range(mtmd.mtmd_input_chunks_size(owned.pointer)):
            native = mtmd.mtmd_input_chunks_get(owned.pointer, at)
            kind = mtmd.mtmd_input_chunk_get_type(native)
            if kind == _TEXT:
                size = ctypes.c_size_t(0)
                data = mtmd.mtmd_input_chunk_get_tokens_text(native, ctypes.byref(size))
                tokens += data[: size.value]
                continue
            if kind != _IMAGE:
                raise BadInput("The model made sound of an image: Opsin reads images only.")
            if tokens:
                yield TextChunk(tuple(tokens))
                tokens.clear()
            number = int(mtmd.mtmd_input_chunk_get_id(native))
            meta, n_tokens = _read_meta(mtmd, native), mtmd.mtmd_input_chunk_get_n_tokens(native)
            positions = _positions(mtmd, native, n_tokens, 0) if self._mrope else None
            merged = images[number : number + meta.frames]
            name = ("+".join(image.sha256 for image in merged), seen[number], *self._identity, *meta)
            yield ImageChunk(
                identity=hashlib.sha256(repr(name).encode()).hexdigest(),
                image=number,
                n_tokens=n_tokens,
                n_pos=mtmd.mtmd_input_chunk_get_n_pos(native),
                causal=self.causal,
                placeholder=number in placeholders,
                frames=meta.frames,
                positions=positions,
                moves=None if positions is None else _positions(mtmd, native, n_tokens, 1) - positions,
                handle=ChunkHandle(owned, native, meta),
            )
            seen[number] += 1
        if tokens:
            yield TextChunk(tuple(tokens))


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise EncodeFailed(f"The vision encoder {otherwise}: try another image or --mmproj-device none.")


def _checked(image: Image) -> Image:
    # mtmd copies so many bytes, whatever is there.
    if len(image.rgb) != image.width * image.height * 3 or not image.rgb:
        raise BadImage(
            f"An image of {image.width}x{image.height} pixels came with {len(image.rgb)} bytes of RGB: "
            "it needs three a pixel."
        )
    return image


class ChunkMeta(NamedTuple):
    """What mtmd saves of an image chunk besides its pixels.

    `entries` are the preprocessed images in it, each (view separator, newline, leading padding, width, height).
    `order` are the fields that place it in the prompt: some families encode the same image differently by them. The
    last is how many frames of a video the family merges.
    """

    n_x: int
    n_y: int
    order: tuple[int, ...]
    entries: tuple[tuple[Any, ...], ...]

    @property
    def frames(self) -> int:
        """How many images are merged in this chunk."""
        return len(self.entries) if self.order[-1] > 1 else 1

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
        """The native chunk. Raises EngineClosed after its tokenized prompt was closed."""
        self.owner.pointer  # noqa: B018 - the check
        return self.address


def _positions(mtmd: Any, chunk: int, n_tokens: int, first: int) -> NDArray[np.int32]:
    """int32 [n_tokens, 4] in llama.cpp's order of sections: time, height, width, one more; of a chunk at `first`."""
    array = (mtmd.mtmd_decoder_pos * n_tokens)()
    mtmd.mtmd_helper_image_get_decoder_pos(mtmd.mtmd_input_chunk_get_tokens_image(chunk), first, array)
    fields = np.frombuffer(array, np.uint32).reshape(n_tokens, 4)  # t, x, y, z
    return np.ascontiguousarray(fields[:, [0, 2, 1, 3]].astype(np.int32))


def _info(at: int, images: Sequence[Image], seen: Sequence[ImageChunk]) -> ImageInfo:
    """What became of the image with that number; the tokens of merged frames are counted with the first of them."""
    image, chunks = images[at], [chunk for chunk in seen if chunk.image <= at < chunk.image + chunk.frames]
    sizes = [size for chunk in chunks for size in chunk.handle.meta.sizes[:: chunk.frames]]
    width, height = sizes[0] if sizes else (0, 0)
    return ImageInfo(
        sha256=image.sha256,
        width=image.width,
        height=image.height,
        resized_width=width,
        resized_height=height,
        tokens=sum(chunk.n_tokens for chunk in chunks if chunk.image == at),
        tiles=len(sizes),
        orientation=image.orientation,
        notes=(*image.notes, *(notes(images, seen, at) if image.frame == 0 else ())),
        source_size=image.source_size,
        region=image.region,
        page=image.page,
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
