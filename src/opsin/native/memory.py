"""How much memory a pair takes, and which layers, context and ubatch fit, told from header facts before a load.

Weights and KV cache are counted exactly. Compute buffers follow the widest step of llama.cpp's graphs; their factors
were fitted to what the pinned version reserves, and a test compares the sum with what a process really takes.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import accumulate

from opsin.core.errors import BadParameter
from opsin.core.ggml_types import bytes_per_value
from opsin.core.model_info import HOST, PairFacts, ProjectorFacts
from opsin.core.settings import CTX_PER_SEQUENCE, EngineSettings, as_flags
from opsin.native.devices import Device, pick

FULL = 0.9
"""Share of the free memory that is planned with: drivers, images being read and other programs need some."""

_MAX_CTX = 2**31 - 1  # positions are 32-bit
_LEAST_CTX = 512  # tokens a sequence; less is no use with images
_TEXT_TOKENS = 320  # of a question and a short answer, beside an image
_COMFORTABLE_CTX = 2048  # tokens a sequence, for which layers stay on the GPU
_UBATCHES = (512, 256)  # tried where the default one does not fit
OUTPUTS = 64  # rows of a ubatch that may have logits, at least
# With a unified cache a sequence id costs nothing, so idle prefixes get ids of their own beside the running answers.
SPARE_SEQUENCES = 32
# Growth of resident memory beyond all that llama.cpp logs, with pairs of 0.02 to 0.2 B parameters.
_BOOKKEEPING, _TOKEN = 12 * 2**20, 300
# Types that the CPU backend repacks (ggml-cpu/repack.cpp), by the instructions that it uses.
_REPACKED = {
    "AVX2": {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"},
    "AVX512": {"Q2_K"},
    "DOTPROD": {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4"},
}
# Changes of settings that are tried when nothing fits, the mildest first.
_SMALLER: dict[str, object] = {"ctx": None, "gpu_layers": None}
_CHANGES: tuple[dict[str, object], ...] = (
    {"swa_full": False},
    {"ctx": None},
    {"gpu_layers": None},
    _SMALLER,
    {**_SMALLER, "kv_type": "q8_0"},
    {**_SMALLER, "parallel": 1},
    {**_SMALLER, "parallel": 1, "image_cache_bytes": 0},
    {**_SMALLER, "parallel": 1, "mmproj_device": "none", "device": "none"},
)


@dataclass(frozen=True, slots=True)
class Needs:
    """What goes into one device, in bytes. `images` is the full image cache, `rest` what llama.cpp does not log.

    `mapped` weights are read from the file as needed, so they need not fit; `repacked` are copied into another order.
    """

    weights: int = 0
    mapped: int = 0
    repacked: int = 0
    kv: int = 0
    compute: int = 0
    vision_weights: int = 0
    vision_compute: int = 0
    images: int = 0
    rest: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))

    @property
    def least(self) -> int:
        """What must be there to load: without what is mapped, and with an empty image cache."""
        return self.total - self.mapped - self.images


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Settings and what they need on each device ("CPU" is the host).

    `ctx` is the context in tokens of all sequences. `gpu_layers` counts the output layer, None where no GPU takes part.
    `layers` are the devices of the layers, the output last.
    """

    ctx: int
    ubatch: int
    gpu_layers: int | None
    layers: tuple[str, ...]
    by_device: Mapping[str, Needs]

    def applied(self, settings: EngineSettings) -> EngineSettings:
        """The settings with what was planned."""
        layers = settings.gpu_layers if self.gpu_layers is None else self.gpu_layers
        return settings.model_copy(update={"ctx": self.ctx, "ubatch": self.ubatch, "gpu_layers": layers})


@dataclass(frozen=True)
class MemoryPlanner:
    """Plans a pair on `devices`; what the settings ask for is kept.

    `free` are bytes by device name; a missing device has no limit. `cpu_features` are those of the CPU backend, which
    decide what it repacks.
    """

    pair: PairFacts
    devices: Sequence[Device]
    settings: EngineSettings
    free: Mapping[str, int]
    cpu_features: frozenset[str] = frozenset()

    def plan(self) -> MemoryPlan:
        """The best layers, context and ubatch that fit. An ubatch too small for an image read at once is raised.

        Raises BadParameter, with flags that fit, when nothing does.
        """
        if plan := self.best():
            return plan
        *_, smallest = self.plans()
        needed = needed_by_device(smallest, self.devices, least=True)
        told = " and ".join(
            f"{size_text(size)} on {name}, where {size_text(self.free[name])} are free"
            for name, size in needed.items()
            if size > self.free.get(name, size)
        )
        change = self.advice()
        advice = f"give {' '.join(as_flags(change))}" if change else "use a smaller quantisation or a smaller model"
        told = told or f"more than {_MAX_CTX:,} tokens of context"
        raise BadParameter(f"{self.pair.model.name} with {smallest.ctx:,} tokens of context needs {told}: {advice}.")

    def needed(self) -> MemoryPlan:
        """What the settings need, with the context and the layers of a machine that has enough."""
        return next(replace(self, free={}).plans())

    def advice(self) -> dict[str, object] | None:
        """The mildest change of the settings that fits with room to spare, by name; None where there is none."""
        for step in _CHANGES:
            changed = self.settings.model_copy(update=step)
            other = replace(self, settings=changed)
            plan = other.best()
            if plan is None or not other.fits(plan, FULL):
                continue
            found = plan.applied(changed)
            return {
                name: value
                for name in dict.fromkeys((*step, "ctx", "gpu_layers", "ubatch"))
                if (value := getattr(found, name)) is not None and value != getattr(self.settings, name)
            }
        return None

    @property
    def _gpus(self) -> list[Device]:
        return pick(self.settings.device, "--device", self.devices)

    @property
    def _vision_device(self) -> str:
        return next((one.name for one in pick(self.settings.mmproj_device, "--mmproj-device", self.devices)), HOST)

    def plans(self) -> Iterator[MemoryPlan]:
        """All layers with a shrinking context, then fewer layers, then a context that is uncomfortable."""
        contexts, count = self._contexts(), len(self.pair.model.layers) + 1
        large = [ctx for ctx in contexts if ctx >= self._comfortable] or contexts[:1]
        layers = list(range(count, -1, -1)) if self._gpus else [0]
        if self._gpus and self.settings.gpu_layers is not None:
            layers = [min(self.settings.gpu_layers, count)]
        choices = [(ctx, layers[0]) for ctx in large] + [(large[-1], n) for n in layers[1:]]
        choices += [(ctx, n) for ctx in contexts[len(large) :] for n in layers]
        for ctx, n in choices:
            for ubatch in self._ubatches(ctx):
                plan = MemoryPlan(ctx, ubatch, n if self._gpus else None, self._layers(n), {})
                yield replace(plan, by_device=self._needs(plan))

    @property
    def _image_tokens(self) -> int:
        return 0 if self.pair.projector is None else self.pair.projector.tokens or 0

    @property
    def _comfortable(self) -> int:
        return max(_COMFORTABLE_CTX, self._image_tokens + 2 * _TEXT_TOKENS) * self.settings.parallel

    def _contexts(self) -> list[int]:
        if self.settings.ctx is not None:
            return [self.settings.ctx]
        parallel = self.settings.parallel
        usual = max(CTX_PER_SEQUENCE, self._image_tokens + 2 * _TEXT_TOKENS)
        each = min(self.pair.model.context or CTX_PER_SEQUENCE, usual)
        least = min(max(_LEAST_CTX, self._image_tokens + _TEXT_TOKENS), each) * parallel
        sizes, size = [], each * parallel
        while size >= least:
            sizes += [size, size * 3 // 4 // 256 * 256]
            size = size // 2 // 256 * 256
        return [size for size in sizes if size >= least] or [each * parallel]

    def _ubatches(self, ctx: int) -> list[int]:
        least, projector = self.settings.parallel, self.pair.projector
        if projector is not None and not projector.causal:
            least = max(least, projector.tokens or projector.patches)
        asked = self.settings.ubatch
        default = EngineSettings.model_fields["ubatch"].default
        sizes = [asked, *(size for size in _UBATCHES if size < asked == default)]
        padded = -(-least // 64) * 64
        return list(dict.fromkeys(min(size if size >= least else padded, ctx) for size in sizes))

    def _layers(self, on_gpu: int) -> tuple[str, ...]:
        """The devices of the layers: llama.cpp fills the GPUs from the end, in the proportion of their free memory."""
        count, gpus = len(self.pair.model.layers) + 1, self._gpus
        if not gpus:
            return (HOST,) * count
        first = max(0, count - on_gpu)
        room = [max(1, self.free.get(one.name, one.memory_free)) for one in gpus]
        ends = [end / sum(room) for end in accumulate(room)]
        places = (bisect_right(ends, (at - first) / max(1, count - first)) for at in range(first, count))
        return (HOST,) * first + tuple(gpus[min(place, len(gpus) - 1)].name for place in places)

    def _needs(self, plan: MemoryPlan) -> dict[str, Needs]:
        settings, model, projector, layers = self.settings, self.pair.model, self.pair.projector, plan.layers
        found: dict[str, Counter[str]] = {HOST: Counter()}

        def add(device: str, part: str, size: float) -> None:
            found.setdefault(device, Counter())[part] += round(size)

        repacked = set[str]()
        if not self._gpus:  # beside a GPU the weights on the host stay as they are
            repacked = repacked.union(*(_REPACKED.get(name, ()) for name in self.cpu_features))
        for device, layer in zip(layers, (*model.layers, model.output), strict=True):
            # On the CPU the output layer that is the embeddings again is not there twice.
            if device != HOST or not (model.tied and layer is model.output):
                add(device, "mapped" if device == HOST else "weights", layer.bytes)
            cells = plan.ctx
            if layer.window and not settings.swa_full:
                cells = min(cells, layer.window * settings.parallel + plan.ubatch)
            add(device, "kv", layer.kv_values * -(-cells // 256) * 256 * bytes_per_value(settings.kv_type))
            if device == HOST:
                add(HOST, "repacked", sum(size for kind, size in layer.matrices.items() if kind in repacked))
        add(HOST, "mapped", model.input_bytes)
        outputs = min(max(OUTPUTS, settings.parallel + SPARE_SEQUENCES), plan.ubatch) * model.vocabulary * 4
        for device in set(layers):
            add(device, "compute", self._compute(plan, outputs if device == layers[-1] else 0))
        if set(layers) != {HOST}:
            add(HOST, "compute", plan.ubatch * (plan.ctx * 2 + model.width * 4))
        add(HOST, "compute", outputs * (4 if settings.device_sampling else 1))
        if projector is not None:
            add(self._vision_device, "vision_weights", projector.bytes)
            add(self._vision_device, "vision_compute", _vision_compute(projector, flash=self._vision_flash))
            add(HOST, "images", settings.image_cache_bytes)
        add(HOST, "rest", self._rest(plan))
        return {device: Needs(**parts) for device, parts in found.items()}

    @property
    def _vision_flash(self) -> bool:
        chosen = self.settings.vision_flash_attention
        return (self.settings.flash_attention if chosen is None else chosen) is not False

    def _compute(self, plan: MemoryPlan, outputs: int) -> float:
        """The mask, and rows of a ubatch times what the widest step holds at once; without flash its scores."""
        parts = self.settings.parallel if self.settings.kv_unified is False else 1
        model, rows, cells = self.pair.model, plan.ubatch, -(-plan.ctx // parts // 256) * 256
        flash = self.settings.flash_attention is not False
        attention = rows * 6 * model.width * 4 + (0 if flash else rows * cells * model.heads * 4)
        forward = rows * (3 * model.feed_forward + 4 * model.width) * 4
        mask = rows * cells * (2 if flash else 4) * (2 if model.slides else 1)
        return mask + max(attention, forward, outputs)

    def _rest(self, plan: MemoryPlan) -> float:
        """On a CPU rows are converted to the type of the weights, and scores without flash attention to 16 bits."""
        model, projector, rest = self.pair.model, self.pair.projector, 0.0
        if HOST in plan.layers:
            rest = plan.ubatch * model.feed_forward * 34 / 32
            if self.settings.flash_attention is False and self.settings.kv_type != "f32":
                rest = plan.ubatch * plan.ctx * model.heads * 2
        if projector is not None and self._vision_device == HOST and not self._vision_flash:
            rest += projector.patches**2 * projector.heads * 2
        return _BOOKKEEPING + _TOKEN * model.vocabulary + rest

    def best(self) -> MemoryPlan | None:
        """The first that fits with room to spare; else one of comfortable size whose mapped weights need not fit.

        At last, the smallest that just fits.
        """
        if (self.settings.ctx or 0) > _MAX_CTX:
            return None
        plans: list[MemoryPlan] = []
        for plan in self.plans():
            plans.append(plan)
            if self.fits(plan, FULL):
                return plan
        modest = [plan for plan in plans if plan.ctx <= max(self._comfortable, self.settings.ctx or 0)]
        found = next((plan for plan in modest if self.fits(plan, FULL, least=True)), plans[-1])
        return found if self.fits(found, 1.0, least=True) else None

    def fits(self, plan: MemoryPlan, share: float, *, least: bool = False) -> bool:
        """Every device has that share of its free memory for the plan."""
        needed = needed_by_device(plan, self.devices, least=least)
        return all(size <= share * self.free.get(name, math.inf) for name, size in needed.items())


def needed_by_device(plan: MemoryPlan, devices: Sequence[Device], *, least: bool = False) -> dict[str, int]:
    """Bytes by device name; Metal's devices and those inside a CPU take from the host's memory, too."""
    needed = {name: needs.least if least else needs.total for name, needs in plan.by_device.items()}
    shared = (one.name for one in devices if one.type == "igpu" or one.name.startswith("MTL"))
    needed[HOST] += sum(needed.get(name, 0) for name in shared)
    return needed


def _vision_compute(projector: ProjectorFacts, *, flash: bool) -> float:
    rows, width = projector.patches, projector.width
    attention = rows * 6 * width * 4 + (0 if flash else rows**2 * projector.heads * 4)
    forward = rows * (2 * projector.feed_forward + width) * 4
    pixels = rows * (projector.patch_values * 3 // 2 + width) * 4  # once as they are and once in 16 bits
    return max(attention, forward, pixels)


def size_text(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
