"""How much memory a pair takes, and which layers, context and ubatch fit: arithmetic on header facts, before a load.

Weights and KV cache are counted exactly. Compute buffers follow the widest step of llama.cpp's graphs; their factors
were fitted to what the pinned version reserves, and a test compares the sum with what a process really takes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate

from opsin.core.errors import BadParameter
from opsin.core.model_facts import ModelFacts, PairFacts, ProjectorFacts
from opsin.core.settings import CTX_PER_SEQUENCE, EngineSettings
from opsin.native.devices import HOST, Device, free_memory, pick

FULL = 0.9
"""Share of the free memory that is planned with: drivers, images being read and other programs need some."""

_KV_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
_MAX_CTX = 2**31 - 1  # positions are 32-bit
_LEAST_CTX = 512  # tokens a sequence; less is no use with images
_TEXT_TOKENS = 320  # of a question and a short answer, beside an image
_COMFORTABLE_CTX = 2048  # tokens a sequence, for which layers stay on the GPU
_UBATCHES = (512, 256)  # tried where the default one does not fit
_OUTPUTS = 64  # rows of a ubatch that may have logits
_SPARE_SEQUENCES = 32  # that hold idle prefixes
# Growth of resident memory beyond all that llama.cpp logs, with pairs of 0.02 to 0.2 B parameters.
_BOOKKEEPING, _TOKEN = 12 * 2**20, 300
# Types that the CPU backend repacks (ggml-cpu/repack.cpp), by the instructions that it uses.
_REPACKED = {
    "AVX2": {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"},
    "AVX512": {"Q2_K"},
    "DOTPROD": {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4"},
}


@dataclass(frozen=True, slots=True)
class Needs:
    """What goes into one device, in bytes. `images` is the full image cache, `rest` what llama.cpp does not log.

    `mapped` are weights that are mapped from the file: the system may drop and read them again, so that they need not
    fit. `repacked` are weights that the CPU backend copies into an order of its own.
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
    """Settings that fit, and what they need on each device ("CPU" is the host).

    `ctx` is the context in tokens of all sequences, `ctx_seq` the most that one sequence may use of it. `gpu_layers`
    counts the output layer, None where no GPU takes part. `layers` are the devices of the layers, the output last.
    """

    ctx: int
    ctx_seq: int
    ubatch: int
    gpu_layers: int | None
    layers: tuple[str, ...]
    by_device: Mapping[str, Needs]

    def applied(self, settings: EngineSettings) -> EngineSettings:
        """The settings with what was planned."""
        planned = {"ctx": self.ctx, "ubatch": self.ubatch}
        if self.gpu_layers is not None:
            planned["gpu_layers"] = self.gpu_layers
        return settings.model_copy(update={k: v for k, v in planned.items() if getattr(settings, k) != v})


def plan_memory(
    pair: PairFacts,
    devices: Sequence[Device],
    settings: EngineSettings,
    *,
    free: Mapping[str, int] | None = None,
    cpu_features: frozenset[str] = frozenset(),
) -> MemoryPlan:
    """The best layers, context and ubatch that fit; what the settings ask for is kept.

    `free` are bytes by device name (None: this machine is asked; a device that is missing has no limit), and
    `cpu_features` what the CPU backend uses, in ggml's names: they decide which weights it repacks. An ubatch that is
    smaller than an image that must be read at once is raised.

    Raises BadParameter when nothing fits; its sentence names flags that would, where there are any.
    """
    planner = _Planner(pair, devices, settings, free_memory(devices) if free is None else free, cpu_features)
    plan = planner.best()
    if plan is None:
        raise BadParameter(planner.refusal())
    return plan


def needed_memory(
    pair: PairFacts, devices: Sequence[Device], settings: EngineSettings, cpu_features: frozenset[str] = frozenset()
) -> MemoryPlan:
    """What the settings need whatever is free: with the context and the layers of a machine that has enough."""
    planner = _Planner(pair, devices, settings, {}, cpu_features)
    return planner.planned(next(planner.choices()))


def advice(
    pair: PairFacts,
    devices: Sequence[Device],
    settings: EngineSettings,
    *,
    free: Mapping[str, int],
    cpu_features: frozenset[str] = frozenset(),
) -> dict[str, object] | None:
    """The smallest change of the settings that fits with room to spare, by name; None where there is none."""
    return _Planner(pair, devices, settings, free, cpu_features).change()


@dataclass(frozen=True, slots=True)
class _Choice:
    ctx: int
    ubatch: int
    gpu_layers: int


class _Planner:
    def __init__(
        self,
        pair: PairFacts,
        devices: Sequence[Device],
        settings: EngineSettings,
        free: Mapping[str, int],
        cpu_features: frozenset[str],
    ) -> None:
        self.pair, self.devices, self.settings, self.free = pair, devices, settings, free
        self.model: ModelFacts = pair.model
        self.cpu_features = cpu_features
        gpus = [one for one in devices if one.is_gpu]
        chosen = None if settings.device is None else pick(settings.device, "--device", tuple(devices))
        self.gpus = gpus if settings.device is None else [chosen] if chosen else []
        self.vision_device = HOST
        if pair.projector is not None and settings.mmproj_device is None and gpus:
            self.vision_device = gpus[0].name
        elif pair.projector is not None and settings.mmproj_device is not None:
            named = pick(settings.mmproj_device, "--mmproj-device", tuple(devices))
            self.vision_device = HOST if named is None else named.name
        self.in_host = in_host_memory(devices)
        self.repacked = frozenset[str]()
        if not self.gpus:  # beside a GPU the weights on the host stay as they are
            self.repacked = frozenset().union(*(_REPACKED.get(name, ()) for name in cpu_features))

    # ---- what to try, the best first

    def choices(self) -> Iterator[_Choice]:
        """All layers with a shrinking context, then fewer layers, then a context that is uncomfortable."""
        contexts = list(self._contexts())
        large = [ctx for ctx in contexts if ctx >= self._comfortable] or contexts[:1]
        layers = self._layer_counts()
        yield from (_Choice(ctx, ubatch, layers[0]) for ctx in large for ubatch in self._ubatches(ctx))
        yield from (_Choice(large[-1], ubatch, n) for n in layers[1:] for ubatch in self._ubatches(large[-1]))
        rest = contexts[len(large) :]
        yield from (_Choice(ctx, ubatch, n) for ctx in rest for n in layers for ubatch in self._ubatches(ctx))

    @property
    def _image_tokens(self) -> int:
        return 0 if self.pair.projector is None else self.pair.projector.tokens or 0

    @property
    def _comfortable(self) -> int:
        return max(_COMFORTABLE_CTX, self._image_tokens + 2 * _TEXT_TOKENS) * self.settings.parallel

    def _contexts(self) -> Iterator[int]:
        if self.settings.ctx is not None:
            yield self.settings.ctx
            return
        parallel = self.settings.parallel
        each = min(self.model.context or CTX_PER_SEQUENCE, CTX_PER_SEQUENCE)
        least = min(max(_LEAST_CTX, self._image_tokens + _TEXT_TOKENS), each) * parallel
        sizes: list[int] = []
        size = each * parallel
        while size >= least:
            sizes += [size, size * 3 // 4 // 256 * 256]
            size = size // 2 // 256 * 256
        yield from [size for size in sizes if size >= least] or [each * parallel]

    def _layer_counts(self) -> list[int]:
        count = len(self.model.layers) + 1
        if not self.gpus:
            return [0]
        if self.settings.gpu_layers is not None:
            return [min(self.settings.gpu_layers, count)]
        return list(range(count, -1, -1))

    def _ubatches(self, ctx: int) -> list[int]:
        least = self.settings.parallel
        projector = self.pair.projector
        if projector is not None and not projector.causal:
            least = max(least, projector.tokens or projector.patches)
        asked = self.settings.ubatch
        default = EngineSettings.model_fields["ubatch"].default
        sizes = [asked, *(size for size in _UBATCHES if size < asked == default)]
        padded = -(-least // 64) * 64
        return list(dict.fromkeys(min(max(size, padded if size < least else size), ctx) for size in sizes))

    # ---- what a choice needs

    def planned(self, choice: _Choice) -> MemoryPlan:
        layers = self._layers(choice.gpu_layers)
        trained = self.model.context or choice.ctx
        return MemoryPlan(
            ctx=choice.ctx,
            ctx_seq=min(choice.ctx, trained),
            ubatch=choice.ubatch,
            gpu_layers=choice.gpu_layers if self.gpus else None,
            layers=layers,
            by_device=self._needs(choice, layers),
        )

    def _layers(self, on_gpu: int) -> tuple[str, ...]:
        """The devices of the layers: llama.cpp fills the GPUs from the end, in the proportion of their free memory."""
        count = len(self.model.layers) + 1
        first = max(0, count - on_gpu)
        if not self.gpus:
            return (HOST,) * count
        room = [max(1, self.free.get(one.name, one.memory_free)) for one in self.gpus]
        ends = [end / sum(room) for end in accumulate(room)]
        last = len(self.gpus) - 1
        places = (min(last, bisect_right(ends, (at - first) / max(1, count - first))) for at in range(first, count))
        return (HOST,) * first + tuple(self.gpus[place].name for place in places)

    def _needs(self, choice: _Choice, layers: tuple[str, ...]) -> dict[str, Needs]:
        settings, projector = self.settings, self.pair.projector
        found: dict[str, dict[str, int]] = {HOST: {}}

        def add(device: str, part: str, size: float) -> None:
            parts = found.setdefault(device, {})
            parts[part] = parts.get(part, 0) + round(size)

        cell = _KV_BYTES[settings.kv_type]
        for device, layer in zip(layers, (*self.model.layers, self.model.output), strict=True):
            # On the CPU the output layer that is the embeddings again is not there twice.
            if device != HOST or not (self.model.tied and layer is self.model.output):
                add(device, "mapped" if device == HOST else "weights", layer.bytes)
            add(device, "kv", layer.kv_values * -(-choice.ctx // 256) * 256 * cell)
            if device == HOST:
                add(HOST, "repacked", sum(size for kind, size in layer.matrices.items() if kind in self.repacked))
        add(HOST, "mapped", self.model.input_bytes)
        for device in set(layers):
            add(device, "compute", self._compute(choice, logits=device == layers[-1]))
        if set(layers) != {HOST}:
            add(HOST, "compute", choice.ubatch * (choice.ctx * 2 + self.model.width * 4))
        add(HOST, "compute", self._outputs(choice) * self.model.vocabulary * 4)
        if projector is not None:
            add(self.vision_device, "vision_weights", projector.bytes)
            add(self.vision_device, "vision_compute", _vision_compute(projector, flash=self._vision_flash))
            add(HOST, "images", settings.picture_cache_bytes)
        add(HOST, "rest", self._rest(choice, layers))
        return {device: Needs(**parts) for device, parts in found.items()}

    @property
    def _vision_flash(self) -> bool:
        settings = self.settings
        flash = settings.flash_attention if settings.vision_flash_attention is None else settings.vision_flash_attention
        return flash is not False

    def _outputs(self, choice: _Choice) -> int:
        return min(max(_OUTPUTS, self.settings.parallel + _SPARE_SEQUENCES), choice.ubatch)

    def _compute(self, choice: _Choice, *, logits: bool) -> float:
        """The mask, and rows of a ubatch times what the widest step holds at once; without flash its scores."""
        model, rows, cells = self.model, choice.ubatch, -(-choice.ctx // 256) * 256
        flash = self.settings.flash_attention is not False
        attention = rows * 6 * model.width * 4 + (0 if flash else rows * cells * model.heads * 4)
        forward = rows * (3 * model.feed_forward + 4 * model.width) * 4
        head = self._outputs(choice) * model.vocabulary * 4 if logits else 0
        mask = rows * cells * (2 if flash else 4) * (2 if model.slides else 1)
        return mask + max(attention, forward, head)

    def _rest(self, choice: _Choice, layers: tuple[str, ...]) -> float:
        """On a CPU rows are converted to the type of the weights, and scores without flash attention to 16 bits."""
        model, rest = self.model, 0.0
        if HOST in layers:
            rest = choice.ubatch * model.feed_forward * 34 / 32
            if self.settings.flash_attention is False and self.settings.kv_type != "f32":
                rest = choice.ubatch * choice.ctx * model.heads * 2
        projector = self.pair.projector
        if projector is not None and self.vision_device == HOST and not self._vision_flash:
            rest += projector.patches**2 * projector.heads * 2
        return _BOOKKEEPING + _TOKEN * model.vocabulary + rest

    # ---- what fits

    def best(self) -> MemoryPlan | None:
        """The first choice that fits with room to spare; else one of comfortable size whose weights need not fit.

        At last, the smallest that just fits.
        """
        if (self.settings.ctx or 0) > _MAX_CTX:
            return None
        plans: list[MemoryPlan] = []
        for choice in self.choices():
            plans.append(self.planned(choice))
            if self.fits(plans[-1], FULL):
                return plans[-1]
        modest = [plan for plan in plans if plan.ctx <= max(self._comfortable, self.settings.ctx or 0)]
        found = next((plan for plan in modest if self.fits(plan, FULL, least=True)), plans[-1])
        return found if self.fits(found, 1.0, least=True) else None

    def fits(self, plan: MemoryPlan, share: float, *, least: bool = False) -> bool:
        return all(
            size <= share * self.free[name]
            for name, size in needed_by_device(plan, self.in_host, least=least).items()
            if name in self.free
        )

    def change(self) -> dict[str, object] | None:
        """The mildest change of settings with which a plan fits, as new values by name."""
        settings = self.settings
        smaller: dict[str, object] = {"ctx": None, "gpu_layers": None}
        steps: list[dict[str, object]] = [
            {"ctx": None},
            {"gpu_layers": None},
            smaller,
            {**smaller, "kv_type": "q8_0"},
            {**smaller, "parallel": max(1, settings.parallel // 2)},
            {**smaller, "parallel": 1},
            {**smaller, "parallel": 1, "picture_cache_bytes": 0},
            {**smaller, "parallel": 1, "mmproj_device": "none"},
            {**smaller, "parallel": 1, "mmproj_device": "none", "device": "none"},
        ]
        for step in steps:
            changed = settings.model_copy(update=step)
            other = _Planner(self.pair, self.devices, changed, self.free, self.cpu_features)
            plan = other.best()
            if plan is None or not other.fits(plan, FULL):
                continue
            found = plan.applied(changed)
            return {
                name: value
                for name in dict.fromkeys((*step, "ctx", "gpu_layers", "ubatch"))
                if (value := getattr(found, name)) is not None and value != getattr(settings, name)
            }
        return None

    def refusal(self) -> str:
        """Why it does not fit, and what would."""
        plan = self.planned(list(self.choices())[-1])
        needed = needed_by_device(plan, self.in_host, least=True)
        short = [name for name, size in needed.items() if size > self.free.get(name, size)]
        told = " and ".join(
            f"{size_text(needed[name])} on {name}, where {size_text(self.free[name])} are free" for name in short
        )
        told = told or f"more than {_MAX_CTX:,} tokens of context"
        change = self.change()
        flags = " ".join(as_flags(change)) if change else ""
        mend = f"give {flags}" if flags else "use a smaller quantisation or a smaller model"
        return f"{self.model.name} with a context of {plan.ctx:,} tokens needs {told}: {mend}."


def in_host_memory(devices: Iterable[Device]) -> frozenset[str]:
    """Names of the devices without a memory of their own: Metal's, and those inside a CPU."""
    return frozenset(one.name for one in devices if one.type == "igpu" or one.name.startswith("MTL"))


def needed_by_device(plan: MemoryPlan, in_host: Iterable[str], *, least: bool = False) -> dict[str, int]:
    """Bytes by device name; what the devices `in_host` take is taken from the host's memory, too."""
    needed = {name: needs.least if least else needs.total for name, needs in plan.by_device.items()}
    needed[HOST] = needed.get(HOST, 0) + sum(needed.get(name, 0) for name in in_host)
    return needed


def _vision_compute(projector: ProjectorFacts, *, flash: bool) -> float:
    rows, width = projector.patches, projector.width
    attention = rows * 6 * width * 4 + (0 if flash else rows**2 * projector.heads * 4)
    forward = rows * (2 * projector.feed_forward + width) * 4
    pixels = rows * (projector.patch_values * 3 // 2 + width) * 4  # once as they are and once in 16 bits
    return max(attention, forward, pixels)


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """Settings by name as the words of a command."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def size_text(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
