"""How much memory a setup takes, told by llama.cpp itself without a weight being read.

A hollow load (`no_alloc`) lays out tensors, KV memory and graphs of the language model, and allocates nothing of them.
mtmd has no such switch in C: its graph is reserved on a copy of the projector's header with the first few layers and
holes for weights, because the layers of an encoder use one compute buffer in turn. What was reserved is in the log
only, so all of it runs in a child process that reads its own log; a file that ends the process ends that one.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from opsin.core.errors import ModelError, ModelUnreadable, OpsinError
from opsin.core.settings import EngineSettings
from opsin.native import logs
from opsin.native.context import _KV_SHARE, _cell_bytes, default_context
from opsin.native.devices import devices
from opsin.native.ggml import GgufInitParams
from opsin.native.handles import Owned
from opsin.native.library import library
from opsin.native.model import _ROPE_WITH_SECTIONS, Model, _placement
from opsin.native.places import Places
from opsin.native.trial import child_command
from opsin.native.vision import _device

_SECONDS = 120
_COMMAND = child_command("opsin.native.memory")
_LOAD_NOTHING = 0  # LLAMA_LOAD_MODE_NONE: a mapped file and `no_alloc` together abort
_KEPT_LAYERS = 3  # LLaVA leaves the last one out, and two use the compute buffer as many do
HOST = "CPU"


@dataclass(slots=True)
class Reserved:
    """What llama.cpp said it would allocate, in bytes by device name ("CPU" is the host).

    `layers` are the devices of the language model's layers, the output layer last. `not_repacked` counts the
    tensors that are not repacked for the CPU, None where nothing is. `compute` includes the logits. A micro-batch has
    up to `rows`, and `flash` says whether the scores of their attention are kept out of memory. Each of the `streams`
    memories that sequences have of their own (1: all share it) has `cells`, and the largest beside them `beside`.
    `vision_compute` was reserved for a picture of `vision_edge` pixels a side; the encoder takes up to `vision_pixels`
    (0: always that size); `vision_flash` is to the encoder what `flash` is to the language model.
    `error` is why nothing is known: the sentence that loading would end with.
    """

    layers: list[str] = field(default_factory=list)
    not_repacked: int | None = None
    kv: dict[str, int] = field(default_factory=dict)
    compute: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    flash: bool = True
    cells: int = 0
    streams: int = 1
    beside: int = 0
    vision_device: str = HOST
    vision_compute: dict[str, int] = field(default_factory=dict)
    vision_edge: int = 0
    vision_pixels: int = 0
    vision_flash: bool = True
    error: str | None = None


def reserve(setups: Sequence[EngineSettings], vision_bytes: int = 0) -> list[Reserved]:
    """What each setup would allocate, in the same order. Each names its model; projectors may be None.

    `vision_bytes` are the encoder's weights: they are loaded before a context size is chosen by what is free.
    Raises ModelError when the child process died or hung; what is wrong with one setup is in its `error`.
    """
    asked = {"setups": [one.model_dump(mode="json", exclude_unset=True) for one in setups], "vision": vision_bytes}
    try:
        child = subprocess.run(  # noqa: S603 - our own module
            _COMMAND, input=json.dumps(asked).encode(), capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"llama.cpp laid this pair out for {_SECONDS} s without an end: try a smaller --ctx."
        ) from None
    if child.returncode != 0:
        said = child.stderr.decode("utf-8", "replace").strip()
        last = (said.splitlines() or [f"exit code {child.returncode}"])[-1]
        raise ModelError(f"llama.cpp ended while it laid this pair out ({last}): check that both files are whole.")
    return [Reserved(**row) for row in json.loads(child.stdout)]


# ---- reading the log

_CONTEXT = re.compile(r"llama_context: constructing llama_context")
_LAYER = re.compile(r"load_tensors: layer +\d+ assigned to device (.+?),")
_NOT_REPACKED = re.compile(r"\(and (\d+) others\) cannot be used with preferred buffer type")
_REPACKS = re.compile(r"load_tensors: +(?:CPU_REPACK|AMX) model buffer size")
_CACHE = re.compile(r"layer +\d+: dev = (\S+)|size = +([\d.]+) MiB \( *(\d+) cells, +\d+ layers, +\d+(?:/(\d+))? seqs")
_COMPUTE = re.compile(r"sched_reserve: +(\S+) compute buffer size = +([\d.]+) MiB")
_OUTPUT = re.compile(r"llama_context: +(\S+) +output buffer size = +([\d.]+) MiB")
_VISION = re.compile(r"reserve_compute_meta: +(\S+) compute buffer size = +([\d.]+) MiB")
_ROWS = re.compile(r"llama_context: n_ubatch += (\d+)")
_NO_FLASH = re.compile(
    r"llama_context: flash_attn += disabled|Flash Attention (?:was auto, set to )?(?:disabled|not supported)"
)
_EDGE = re.compile(r"warmup with image size = (\d+) x")
_PIXELS = re.compile(r"image_max_pixels: +(\d+)")


def device_of(buffer: str) -> str:
    """The device of a buffer type by its name: "MTL0_Mapped" is on MTL0, "CUDA_Host" and "CPU_REPACK" on the host."""
    name, _, kind = buffer.partition("_")
    return HOST if kind == "Host" or name in {HOST, "AMX", "BLAS"} else name


def read_log(lines: Iterable[str]) -> Reserved:
    """What the log of a load says was reserved, in llama.cpp's own words of the pinned version."""
    text = "\n".join(lines)
    found = Reserved(layers=_LAYER.findall(text))
    if _REPACKS.search(text):
        others = _NOT_REPACKED.search(text)
        found.not_repacked = int(others[1]) + 1 if others else 0
    first, *beside = _CONTEXT.split(text)[1:] or [text]
    found.cells, found.streams = _read_context(first, found)
    found.beside = max((_read_context(context, found)[0] for context in beside), default=0)
    found.vision_compute = {device_of(buffer): _bytes(mib) for buffer, mib in _VISION.findall(text)}
    found.flash = not _NO_FLASH.search(text)
    found.vision_flash = "warmup: flash attention is disabled" not in text
    found.rows, found.vision_edge, found.vision_pixels = (
        int(match[1]) if (match := pattern.search(text)) else 0 for pattern in (_ROWS, _EDGE, _PIXELS)
    )
    return found


def _read_context(text: str, found: Reserved) -> tuple[int, int]:
    """Add what one context reserved; the cells of each of its memories, and how many they are."""
    most, memories = 0, 1
    layers: Counter[str] = Counter()
    for device, mib, cells, streams in _CACHE.findall(text):
        if device:
            layers[device_of(device)] += 1
            continue
        for name, count in layers.items():
            found.kv[name] = found.kv.get(name, 0) + _bytes(mib) * count // layers.total()
        most, memories, layers = max(most, int(cells)), int(streams or 1), Counter()
    # The last word on a buffer counts: a graph is reserved again where flash attention turns out not to work.
    buffers = {buffer: _bytes(mib) for buffer, mib in _COMPUTE.findall(text)}
    for buffer, size in (*buffers.items(), *((name, _bytes(mib)) for name, mib in _OUTPUT.findall(text))):
        found.compute[device_of(buffer)] = found.compute.get(device_of(buffer), 0) + size
    return most, memories


def _bytes(mib: str) -> int:
    return round(float(mib) * 2**20)


# ---- the child process


class _Hollow(Model):
    """A language model with its sizes and its vocabulary, and without weights: enough to make a context of."""

    def __init__(self, path: Path, settings: EngineSettings) -> None:  # not Model's own, which reads the weights
        lib = self.lib = library()
        self.path = path
        self.device, self.n_gpu_layers = _placement(path, settings, devices(lib))
        params = lib.llama.llama_model_default_params()
        params.n_gpu_layers, params.no_alloc, params.load_mode = self.n_gpu_layers, True, _LOAD_NOTHING
        chosen = (ctypes.c_void_p * 2)(self.device.handle if self.device else None, None)
        if settings.device is not None:
            params.devices = ctypes.cast(chosen, ctypes.c_void_p)
        mark = logs.SINK.mark()
        pointer = lib.llama.llama_model_load_from_file(str(path).encode(), params)
        if not pointer:
            raise ModelUnreadable(
                f"llama.cpp cannot lay out {path.name} ({logs.SINK.cause(mark) or 'no reason given'})."
            )
        self.handle = Owned("layout of a model", pointer, lib.llama.llama_model_free)
        llama = lib.llama
        self._vocab = llama.llama_model_get_vocab(pointer)
        self.n_vocab = llama.llama_vocab_n_tokens(self._vocab)
        self.n_embd = llama.llama_model_n_embd_inp(pointer)
        self.n_layer = llama.llama_model_n_layer(pointer)
        self.n_ctx_train = llama.llama_model_n_ctx_train(pointer)
        self.n_pos = 4 if llama.llama_model_rope_type(pointer) in _ROPE_WITH_SECTIONS else 1
        self.whole_states_only = llama.llama_model_is_recurrent(pointer) or llama.llama_model_is_hybrid(pointer)


class _Lines(logging.Handler):
    """Keeps every line of the native log; the sink itself forgets the first ones of a large model."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def take(self) -> list[str]:
        logs.SINK.flush()
        taken, self.lines = self.lines, []
        return taken


def main() -> None:
    """The child: setups in, what they would allocate out, as JSON."""
    asked = json.load(sys.stdin)
    lines = _Lines()
    logs.LOGGER.addHandler(lines)
    logs.LOGGER.setLevel(logging.DEBUG)
    setups = [EngineSettings.model_validate(row) for row in asked["setups"]]
    visions: dict[object, list[str]] = {}
    rows = []
    for settings in setups:
        try:
            rows.append(_reserve(settings, lines, visions, asked["vision"]))
        except OpsinError as error:
            lines.take()
            rows.append(Reserved(error=str(error)))
    json.dump([asdict(row) for row in rows], sys.stdout)


def _reserve(settings: EngineSettings, lines: _Lines, visions: dict[object, list[str]], vision_bytes: int) -> Reserved:
    assert settings.model is not None, "whoever asks names the model"
    model = _Hollow(settings.model, settings)
    try:
        Places(model, settings, ctx=_ctx(model, settings, vision_bytes))
        log = lines.take()
    finally:
        model.close()
    if settings.mmproj is None:
        return read_log(log)
    key = (settings.mmproj, settings.mmproj_device, settings.flash_attention, settings.vision_flash_attention)
    if key not in visions:
        visions[key] = _reserve_vision(settings.mmproj, settings, lines)
    return replace(read_log([*log, *visions[key]]), vision_device=_vision_device(settings))


def _ctx(model: _Hollow, settings: EngineSettings, vision_bytes: int) -> int | None:
    """The size of context that a real load would choose: there the weights are in the device by now."""
    device = model.device
    if settings.ctx is not None or device is None or device.memory_free <= 0:
        return None  # on a host ggml takes all memory there is for free, before a load and after it
    weights = model.lib.llama.llama_model_size(model.pointer) * model.layers_offloaded // max(1, model.n_layer)
    taken = weights + (vision_bytes if _vision_device(settings) == device.name else 0)
    fits = int((device.memory_free - taken) * _KV_SHARE / _cell_bytes(model, settings)) // 256 * 256
    return min(default_context(model, settings), max(256, fits))


def _vision_device(settings: EngineSettings) -> str:
    chosen = _device(settings, library())
    if chosen is None:
        return HOST
    present = devices()
    named = next((one.name for one in present if one.handle == chosen), None)
    return named or next(one.name for one in present if one.is_gpu)


def _reserve_vision(path: Path, settings: EngineSettings, lines: _Lines) -> list[str]:
    """The log of an encoder's graph being reserved; empty when mtmd does not take the shortened file."""
    lib = library()
    params = lib.mtmd.mtmd_context_params_default()
    device = _device(settings, lib)
    params.use_gpu, params.device = device is not None, device or None
    params.print_timings, params.warmup = False, True  # its warm-up reserves the graph and computes nothing
    flash = settings.flash_attention if settings.vision_flash_attention is None else settings.vision_flash_attention
    params.flash_attn_type = -1 if flash is None else int(flash)
    params.image_min_tokens = settings.image_min_tokens or -1
    params.image_max_tokens = settings.image_max_tokens or -1
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "short.gguf"
        shorten(path, short, _KEPT_LAYERS)
        # Without a language model: with fewer layers the width handed to it may differ, and it is not needed here.
        pointer = lib.mtmd.mtmd_init_from_file(str(short).encode(), None, params)
    if not pointer:
        lines.take()
        return []
    lib.mtmd.mtmd_free(pointer)
    return lines.take()


_UINT32 = 4  # gguf_type
_ALIGNMENT = 32
_BLOCK = re.compile(rb"v\.blk\.(\d+)\.")
_LAYERS = b"clip.vision.block_count"


def shorten(source: Path, target: Path, layers: int) -> None:
    """A copy of a projector file with its first `layers` layers and without weights: holes of a sparse file.

    Raises ModelUnreadable for a file that is no projector in GGUF.
    """
    ggml, tensors = library().ggml, ctypes.c_void_p()
    wanted = ctypes.cast(ctypes.byref(tensors), ctypes.c_void_p)
    file = ggml.gguf_init_from_file(os.fsencode(source), GgufInitParams(True, wanted))
    if not file:
        raise ModelUnreadable(f"{source.name} is not a whole GGUF file: download it again.")
    short = ggml.gguf_init_empty()
    try:
        at = ggml.gguf_find_key(file, _LAYERS)
        if at < 0 or ggml.gguf_get_kv_type(file, at) != _UINT32:
            raise ModelUnreadable(f"{source.name} is no projector with a vision encoder: give another with --mmproj.")
        ggml.gguf_set_kv(short, file)
        ggml.gguf_set_val_u32(short, _LAYERS, min(layers, ggml.gguf_get_val_u32(file, at)))
        weights = 0
        for index in range(ggml.gguf_get_n_tensors(file)):
            name = ggml.gguf_get_tensor_name(file, index)
            block = _BLOCK.match(name)
            if block is None or int(block[1]) < layers:
                ggml.gguf_add_tensor(short, ggml.ggml_get_tensor(tensors, name))
                weights += -(-ggml.gguf_get_tensor_size(file, index) // _ALIGNMENT) * _ALIGNMENT
        if not ggml.gguf_write_to_file(short, os.fsencode(target), True):
            raise ModelUnreadable(f"{target} cannot be written: free some space for temporary files.")
        os.truncate(target, target.stat().st_size + weights)
    finally:
        ggml.gguf_free(short)
        ggml.gguf_free(file)
        ggml.ggml_free(tensors)
