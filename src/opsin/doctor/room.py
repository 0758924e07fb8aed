"""Will a pair fit the memory of its devices? Told before a weight is read, and what to change if not.

Weights are counted from the files' headers. Everything else is what llama.cpp reserves in a hollow load
(`opsin.native.memory`), or simple arithmetic where that cannot be had.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from opsin.core.errors import ModelError
from opsin.core.ggml_types import TENSOR_TYPES, bytes_per_value
from opsin.core.settings import CTX_PER_SEQUENCE, EngineSettings
from opsin.doctor.check import Check, Status
from opsin.doctor.free_memory import free_memory
from opsin.doctor.pair import serve_command
from opsin.models.gguf import GgufHeader, TensorHead, read_header
from opsin.models.naming import parts_of
from opsin.native import Device
from opsin.native.memory import HOST, Reserved, reserve
from opsin.native.places import cells_beside

FULL = 0.9
"""Share of the free memory from which on it is tight: drivers, pictures being read and other programs need some."""

_TYPES = {name: (values, size) for name, values, size in TENSOR_TYPES.values()}
_BLOCK = re.compile(r"blk\.(\d+)\.")
_ON_HOST = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")  # looked up, never multiplied with
_LEAST_CTX = 512  # tokens an answer; less is no use with pictures
_ALIGNMENT = 32
# Seen as the growth of resident memory beyond all that is logged, with pairs of 0.02 to 0.2 B parameters.
_BOOKKEEPING, _TOKEN = 12 * 2**20, 300


@dataclass(frozen=True, slots=True)
class Parts:
    """What goes into one device, in bytes. `compute` includes the logits, `pictures` is the full picture cache.

    `vision_compute` is for the largest picture that the encoder takes. `rest` is what llama.cpp takes on the host and
    does not tell: vocabulary, graphs, and what its CPU kernels convert to another type.
    """

    weights: int = 0
    kv: int = 0
    compute: int = 0
    vision_weights: int = 0
    vision_compute: int = 0
    pictures: int = 0
    rest: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))


@dataclass(frozen=True, slots=True)
class Estimate:
    """The memory of a setup, by device name ("CPU" is the host).

    `ctx` are the tokens of context of all answers. `layers` are the devices of the layers, the output layer last.
    `note` says why this is arithmetic and not llama.cpp's own word, None where it is that; with `refused` it is why
    llama.cpp would not load the pair with these settings.
    """

    by_device: Mapping[str, Parts]
    llm: Path
    mmproj: Path | None
    settings: EngineSettings
    ctx: int
    layers: tuple[str, ...] = ()
    note: str | None = None
    refused: bool = False


def estimate_room(llm: Path, mmproj: Path | None, settings: EngineSettings) -> Estimate:
    """What a pair will take with these settings. Takes a second or two. Raises ModelNotFound, ModelUnreadable."""
    return estimate_rooms(llm, mmproj, [settings])[0]


def estimate_rooms(llm: Path, mmproj: Path | None, setups: Sequence[EngineSettings]) -> list[Estimate]:
    """`estimate_room` for several settings of one pair, in little more time than for one."""
    headers = [read_header(part) for part in parts_of(llm)]
    vision = None if mmproj is None else read_header(mmproj)
    vision_weights = 0 if vision is None else sum(-(-_size(one) // _ALIGNMENT) * _ALIGNMENT for one in vision.tensors)
    setups = [one.model_copy(update={"model": llm, "mmproj": mmproj}) for one in setups]
    try:
        all_reserved = reserve(setups, vision_weights)
    except ModelError as error:  # the child died: there is nothing but arithmetic
        all_reserved = [Reserved(error=str(error)) for _ in setups]
    return [
        _join(headers, vision, vision_weights, settings, reserved)
        for settings, reserved in zip(setups, all_reserved, strict=True)
    ]


def _join(
    headers: list[GgufHeader],
    vision: GgufHeader | None,
    vision_weights: int,
    settings: EngineSettings,
    reserved: Reserved,
) -> Estimate:
    note, refused = reserved.error, reserved.error is not None
    if note is not None:
        reserved = by_hand(headers[0], vision, settings)
    elif vision is not None and not reserved.vision_compute:
        note = "mtmd did not lay the encoder out, so its buffer is arithmetic"
        reserved.vision_compute = {reserved.vision_device: _vision_by_hand(vision, settings)}
    weights = weights_by_device(headers, reserved.layers, reserved.not_repacked)
    growth = _growth(vision, reserved)
    names = sorted({*weights, *reserved.kv, *reserved.compute, *reserved.vision_compute, HOST})
    by_device = {
        name: Parts(
            weights=weights.get(name, 0),
            kv=reserved.kv.get(name, 0),
            compute=reserved.compute.get(name, 0),
            vision_weights=vision_weights if name == reserved.vision_device else 0,
            vision_compute=growth(reserved.vision_compute.get(name, 0)),
            pictures=settings.picture_cache_bytes if name == HOST and vision is not None else 0,
            rest=_rest(headers[0], vision, settings, reserved) if name == HOST else 0,
        )
        for name in names
    }
    assert settings.model is not None, "set by estimate_rooms"
    ctx = reserved.cells * max(1, reserved.streams - 1)  # of several memories one is to spare
    return Estimate(by_device, settings.model, settings.mmproj, settings, ctx, tuple(reserved.layers), note, refused)


# ---- weights


def _size(tensor: TensorHead) -> int:
    """Bytes of its data, 0 for a type that is not known here."""
    if tensor.type is None:
        return 0
    values, size = _TYPES[tensor.type]
    return math.prod(tensor.shape) // values * size


def weights_by_device(headers: Sequence[GgufHeader], layers: Sequence[str], not_repacked: int | None) -> dict[str, int]:
    """Bytes of the language model's weights by device; `layers` and `not_repacked` as in `Reserved`.

    On the host the files are mapped, and a mapping reaches from its first tensor to its last: weights that are
    repacked for the CPU lie there a second time.
    """
    found: dict[str, int] = {}
    on_host: list[TensorHead] = []
    tensors = [tensor for header in headers for tensor in header.tensors]
    tied = not any(tensor.name == "output.weight" for tensor in tensors)
    for tensor in tensors:
        device = _device_of(tensor.name, layers)
        if device == HOST:
            on_host.append(tensor)
        else:
            found[device] = found.get(device, 0) + _size(tensor)
        if tied and tensor.name == "token_embd.weight" and layers and layers[-1] != HOST:
            found[layers[-1]] = found.get(layers[-1], 0) + _size(tensor)
    if not found and not_repacked is not None:
        again = [tensor for tensor in on_host if tied and tensor.name == "token_embd.weight"]
        repacked = _repacked(on_host, again, len(on_host) + len(again) - not_repacked)
        kept = [tensor for tensor in on_host if tensor not in repacked or tensor in again]
        found[HOST] = _mapped(kept) + sum(map(_size, repacked))
    else:
        found[HOST] = _mapped(on_host) if not found and len(headers) == 1 else sum(map(_size, on_host))
    return found


def _device_of(name: str, layers: Sequence[str]) -> str:
    if not layers or name.startswith(_ON_HOST):
        return HOST
    block = _BLOCK.match(name)
    return layers[min(int(block[1]), len(layers) - 1)] if block else layers[-1]


def _repacked(tensors: Sequence[TensorHead], again: Sequence[TensorHead], count: int) -> list[TensorHead]:
    """The `count` tensors that are repacked: llama.cpp says how many, and which types it can depends on the CPU.

    `again` are multiplied with, too, though they are looked up.
    """
    able = [
        tensor
        for tensor in (*tensors, *again)
        if len(tensor.shape) > 1 and tensor.type not in {None, "F32", "F16", "BF16"}
        if not tensor.name.startswith(_ON_HOST)
    ] + list(again)
    types = sorted({str(tensor.type) for tensor in able})
    sets = chain.from_iterable(combinations(types, size) for size in range(1, len(types) + 1))
    chosen = min(sets, key=lambda kinds: abs(sum(tensor.type in kinds for tensor in able) - count), default=())
    return [tensor for tensor in able if tensor.type in chosen]


def _mapped(tensors: Sequence[TensorHead]) -> int:
    ends = [(tensor.end - _size(tensor), tensor.end) for tensor in tensors if tensor.end is not None]
    return max(end for _, end in ends) - min(start for start, _ in ends) if ends else 0


# ---- the encoder's largest picture


def _growth(vision: GgufHeader | None, reserved: Reserved) -> Callable[[int], int]:
    """From the buffer for the picture that was laid out to that for the largest one: scores grow with its square."""
    if vision is None or not (reserved.vision_pixels and reserved.vision_edge):
        return lambda size: size
    ratio = reserved.vision_pixels / reserved.vision_edge**2
    scores = 0 if reserved.vision_flash else _scores(vision, reserved.vision_edge)
    return lambda size: round(max(0, size - scores) * ratio + min(size, scores) * ratio**2)


def _scores(vision: GgufHeader, edge: int) -> int:
    patches = (edge // (vision.integer("clip.vision.patch_size") or 14)) ** 2
    return patches**2 * (vision.integer("clip.vision.attention.head_count") or 1) * 4


def _rest(header: GgufHeader, vision: GgufHeader | None, settings: EngineSettings, reserved: Reserved) -> int:
    """About what the log does not tell. On a CPU attention without flash has its scores a second time, in 16 bits."""
    rows, architecture = reserved.rows, header.text("general.architecture")
    converted = rows * (header.integer(f"{architecture}.feed_forward_length") or 0) * 34 // 32
    if HOST in reserved.layers and not reserved.flash and settings.kv_type != "f32":
        heads = header.integer(f"{architecture}.attention.head_count") or 1
        converted = rows * max(reserved.cells, reserved.beside) * heads * 2
    if vision is not None and reserved.vision_device == HOST and not reserved.vision_flash:
        converted += _scores(vision, reserved.vision_edge) // 2
    return _BOOKKEEPING + _TOKEN * header.lengths.get("tokenizer.ggml.tokens", 0) + converted


# ---- arithmetic, where llama.cpp cannot be asked


def by_hand(header: GgufHeader, vision: GgufHeader | None, settings: EngineSettings) -> Reserved:
    """What llama.cpp would reserve on the host, from the files' headers alone; good to about a fifth.

    The mask, and rows of a micro-batch times what the widest step holds at once, without flash attention its scores.
    """

    def value(key: str, default: int) -> int:
        return header.integer(f"{header.text('general.architecture')}.{key}") or default

    width, n_layer, heads = value("embedding_length", 0), value("block_count", 0), value("attention.head_count", 1)
    kv_width = value("attention.key_length", width // heads) * value("attention.head_count_kv", heads)
    parallel = settings.parallel
    ctx = settings.ctx or min(value("context_length", CTX_PER_SEQUENCE), CTX_PER_SEQUENCE) * parallel
    split = parallel > 1 and ctx // parallel >= (1024 if settings.ctx else 4096) and "q" not in settings.kv_type
    cells, streams = (-(-(ctx // parallel) // 256) * 256, parallel + 1) if split else (ctx, 1)
    common, fill = cells_beside(cells) if split else (0, 0)
    fill *= settings.flash_attention is None
    rows = min(settings.ubatch, ctx, 256 if split and "ubatch" not in settings.model_fields_set else ctx)
    flash = settings.flash_attention if settings.flash_attention is not None else not split
    vocabulary = header.lengths.get("tokenizer.ggml.tokens", 0)
    forward = rows * 3 * (value("feed_forward_length", 4 * width) + width) * 4
    compute = 0
    for seen, scores in (cells, not flash), (common, not flash), (fill, False):
        if seen:
            attention = rows * 4 * width * 4 + (rows * seen * heads * 4 if scores else 0)
            compute += rows * seen * (4 if scores else 2) + max(attention, forward, 64 * vocabulary * 4)
            compute += min(64, parallel + 1) * vocabulary * 4
    kv_bytes = 2 * n_layer * kv_width * bytes_per_value(settings.kv_type)
    found = Reserved(
        layers=[HOST] * (n_layer + 1),
        kv={HOST: round(kv_bytes * (cells * streams + common + fill))},
        compute={HOST: compute},
        rows=rows,
        flash=flash,
        cells=cells,
        streams=streams,
        beside=common,
    )
    if vision is not None:
        found.vision_compute = {HOST: _vision_by_hand(vision, settings)}
    return found


def _vision_by_hand(vision: GgufHeader, settings: EngineSettings) -> int:
    edge = vision.integer("clip.vision.image_size") or 336
    rows = (edge // (vision.integer("clip.vision.patch_size") or 14)) ** 2
    width = vision.integer("clip.vision.embedding_length") or 1024
    flash = settings.flash_attention if settings.vision_flash_attention is None else settings.vision_flash_attention
    attention = rows * 4 * width * 4 + (_scores(vision, edge) if flash is False else 0)
    forward = rows * (2 * (vision.integer("clip.vision.feed_forward_length") or 4 * width) + width) * 4
    return max(attention, forward)


# ---- the checks

Estimator = Callable[[Path, Path | None, Sequence[EngineSettings]], list[Estimate]]


@dataclass(frozen=True, slots=True)
class _Memory:
    """What is free by device name; what the devices `in_host` take is taken from the host's memory, too."""

    free: Mapping[str, int]
    in_host: frozenset[str]

    def needed(self, estimate: Estimate) -> dict[str, int]:
        """Bytes by device, those that do not tell what is free left out."""
        needed = {name: parts.total for name, parts in estimate.by_device.items()}
        needed[HOST] = needed.get(HOST, 0) + sum(needed.get(name, 0) for name in self.in_host)
        return {name: size for name, size in needed.items() if name in self.free}


def room_checks(
    estimate: Estimate, devices: Sequence[Device], root: Path = Path("/"), estimator: Estimator = estimate_rooms
) -> list[Check]:
    """One `room.memory` for each device that takes part and tells what is free.

    Where one does not fit, what would is found by asking `estimator` about other settings.
    """
    # Metal's devices and those inside a CPU have no memory of their own.
    in_host = frozenset(one.name for one in devices if one.type == "igpu" or one.name.startswith("MTL"))
    memory = _Memory(free_memory(devices, root), in_host)
    free, needed = memory.free, memory.needed(estimate)
    checks = []
    changes: list[_Change] | None = None
    for name, parts in sorted(estimate.by_device.items()):
        if not needed.get(name):
            continue
        status, fix = _status(needed[name], free[name]), None
        message = f"{name} has {_gib(free[name])} free, and this setup needs {_gib(needed[name])} at most"
        if needed[name] > parts.total:
            message += f", {_gib(needed[name] - parts.total)} of it for {', '.join(sorted(in_host))}"
        if estimate.note:
            message += f" (by arithmetic: {estimate.note.rstrip('.')})"
        if status != "ok":
            changes = _changes(estimate, memory, estimator) if changes is None else changes
            what = {"warn": "that is tight", "fail": "that does not fit"}[status]
            message += f" ({_largest(parts)}): {what}, {_advice(changes)}"
            fix = serve_command(changes[0].settings) if changes else None
        elif estimate.refused:
            status = "warn"
        evidence: dict[str, Any] = {
            "device": name,
            **{f"{key}_bytes": size for key, size in asdict(parts).items()},
            "needed_bytes": needed[name],
            "free_bytes": free[name],
            "context_tokens": estimate.ctx,
        }
        checks.append(Check("room.memory", status, message + ".", evidence, fix))
    return checks


def _status(needed: int, free: int) -> Status:
    return "fail" if needed > free else "warn" if needed > FULL * free else "ok"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _largest(parts: Parts) -> str:
    names = {"kv": "KV memory", "vision_weights": "vision weights", "vision_compute": "vision compute"}
    rows = sorted(((size, names.get(key, key)) for key, size in asdict(parts).items() if size), reverse=True)
    return ", ".join(f"{name} {_gib(size)}" for size, name in rows[:3])


# ---- what to change


@dataclass(frozen=True, slots=True)
class _Change:
    words: str
    settings: EngineSettings


def _advice(changes: Sequence[_Change]) -> str:
    if not changes:
        return "and no setting makes it fit: use a smaller quantisation or a smaller model"
    return "and " + ", or ".join(change.words for change in changes) + " would fit"


def _changes(estimate: Estimate, memory: _Memory, estimator: Estimator) -> list[_Change]:
    """What fits with room to spare: of each kind of change the mildest; several at once only where none alone does."""
    ladders = [ladder for ladder in _ladders(estimate, memory) if ladder]
    both = [
        _Change(f"{first.words} with {second.words}", second.settings.model_copy(update=_difference(estimate, first)))
        for first in next((ladder for ladder in ladders if "--ctx" in ladder[0].words), [])
        for second in (ladder[-1] for ladder in ladders if "--ctx" not in ladder[0].words)
    ]
    candidates = [change for ladder in (*ladders, both) for change in ladder]
    if not candidates:
        return []
    estimates = estimator(estimate.llm, estimate.mmproj, [change.settings for change in candidates])
    fitting = {
        id(change)
        for change, tried in zip(candidates, estimates, strict=True)
        if all(size <= FULL * memory.free[name] for name, size in memory.needed(tried).items())
    }
    mildest = [next((one for one in ladder if id(one) in fitting), None) for ladder in ladders]
    return [one for one in mildest if one] or [one for one in both if id(one) in fitting][:1]


def _difference(estimate: Estimate, change: _Change) -> dict[str, Any]:
    return {
        name: value
        for name in change.settings.model_fields_set
        if (value := getattr(change.settings, name)) != getattr(estimate.settings, name)
    }


def _ladders(estimate: Estimate, memory: _Memory) -> list[list[_Change]]:
    """Changes of one kind each, the mildest first; the kinds in the order of how little they cost."""
    settings = estimate.settings

    def changed(words: str, **update: Any) -> _Change:
        return _Change(words, settings.model_copy(update=update))

    over = {name: size - int(FULL * memory.free[name]) for name, size in memory.needed(estimate).items()}
    pictures = max(0, settings.picture_cache_bytes - max(0, over.get(HOST, 0)))
    cache = [changed(f"--picture-cache-bytes {pictures}", picture_cache_bytes=pictures)]
    parallel = settings.parallel
    smaller = []
    size = estimate.ctx // 2
    while size >= _LEAST_CTX * parallel:
        smaller.append(changed(f"--ctx {size}", ctx=size))
        size //= 2
    quantised = [changed("--kv-type q8_0", kv_type="q8_0")] if "q" not in settings.kv_type else []
    fewer = []
    count = parallel // 2
    while count:
        ctx = estimate.ctx * count // parallel
        fewer.append(changed(f"--parallel {count} --ctx {ctx}", parallel=count, ctx=ctx))
        count //= 2
    return [
        cache if pictures < settings.picture_cache_bytes else [],
        smaller,
        quantised,
        fewer,
        _fewer_layers(estimate, over, changed),
    ]


def _fewer_layers(estimate: Estimate, over: Mapping[str, int], changed: Callable[..., _Change]) -> list[_Change]:
    """Fewer layers on the GPUs: as many as weights and KV memory of the layers say, and then one by one."""
    on_gpu = [name for name in estimate.layers if name != HOST]
    crowded = [name for name in set(on_gpu) if over.get(name, 0) > 0]
    if not crowded:
        return []
    counts = [len(on_gpu) - 1]
    for name in crowded:
        parts = estimate.by_device[name]
        each = (parts.weights + parts.kv) / on_gpu.count(name)
        counts.append(len(on_gpu) - math.ceil(over[name] / each))
    first = min(counts)
    return [changed(f"--gpu-layers {count}", gpu_layers=count) for count in range(first, max(-1, first - 4), -1)]
