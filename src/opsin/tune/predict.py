"""Expected times of a pair on a device: bytes over bandwidth, operations over rate, and whether it fits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from opsin.bench.cost import SIZE_NOTE, Ceiling, ModelCost, image_cost, read_cost
from opsin.bench.report import rounded
from opsin.core.errors import BadInput, BadParameter
from opsin.core.ggml_types import bytes_per_value
from opsin.models import read_info
from opsin.models.registry import KnownModel
from opsin.models.shapes import KNOWN_SHAPES, PairShape
from opsin.tune.devices import REACHED, Device
from opsin.tune.measure import ANSWER, question

if TYPE_CHECKING:
    from opsin.compose import Runtime

# Bytes of a weight, largest first. The "k_m" mixtures by whole files: 4.58 and 5.33 GiB of 8.03 billion weights.
WEIGHT_BYTES = {"f16": 2, "bf16": 2, "q8_0": 1.0625, "q6_k": 0.8203, "q5_k_m": 0.713, "q4_k_m": 0.612, "q4_0": 0.5625}
ROUNDS = 3
_UBATCH = 1024
_ENCODE_BYTES = 64 * 2**20
_QUESTION = "What is in this image, and where is it? Tell me all about it."
# What a model may take of a GPU's memory or of the main memory, and its parameters where there is no GPU.
_GPU_SHARE, _HOST_SHARE, _MOST_ON_CPU = 0.9, 1 / 3, 4.5e9


@dataclass(frozen=True, slots=True)
class Needs:
    """What a pair needs, in bytes; `width` of the embeddings; tokens of an image and parameters (0: not known)."""

    name: str
    cost: ModelCost
    model_bytes: float
    projector_bytes: float
    width: int
    image_tokens: int
    notes: tuple[str, ...] = ()
    parameters: int = 0

    def memory(self, ctx: int) -> dict[str, float]:
        """Bytes by what takes them; compute by a rule of thumb (`opsin doctor` plans the memory of this machine)."""
        compute = 4.0 * 10 * self.width * _UBATCH + (_ENCODE_BYTES if self.projector_bytes else 0)
        kv = ctx * self.cost.kv_values * self.cost.kv_value_bytes
        return {"model": self.model_bytes, "projector": self.projector_bytes, "kv": kv, "compute": compute}


@dataclass(frozen=True, slots=True)
class Request:
    """One image and `text_tokens` of text, answered in `answer_tokens`, with memory kept for `ctx` tokens."""

    text_tokens: int = 64
    answer_tokens: int = 128
    ctx: int = 4096


@dataclass(frozen=True, slots=True)
class Prediction:
    """Expected times of one request in milliseconds, and the memory it takes, in bytes."""

    needs: Needs
    device: Device
    request: Request
    encode_ms: float
    image_prefill_ms: float
    text_prefill_ms: float
    decode_token_ms: float
    memory: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def prefill_ms(self) -> float:
        """Image and text prefill."""
        return self.image_prefill_ms + self.text_prefill_ms

    @property
    def first_token_ms(self) -> float:
        """From the question to the first token."""
        return self.encode_ms + self.prefill_ms

    @property
    def answer_ms(self) -> float:
        """From the question to the last token; the first one comes with the prefill."""
        return self.first_token_ms + max(0, self.request.answer_tokens - 1) * self.decode_token_ms

    def as_dict(self) -> dict[str, Any]:
        """Plain values; times in milliseconds, memory in bytes."""
        needed, there = sum(self.memory.values()), self.device.usable
        times = ("encode_ms", "image_prefill_ms", "text_prefill_ms", "first_token_ms", "decode_token_ms", "answer_ms")
        return {
            "model": self.needs.name,
            "device": self.device.title,
            **{name: round(getattr(self, name), 3) for name in times},
            "decode_tokens_s": round(1e3 / self.decode_token_ms, 2),
            "image_tokens": self.needs.image_tokens,
            **asdict(self.request),
            "memory_bytes": {name: round(size) for name, size in self.memory.items()},
            "memory_total_bytes": round(needed),
            "device_memory_bytes": round(there) or None,
            "fits": needed <= there if there else None,
            "notes": list(self.notes),
        }


def shape_needs(shape: PairShape, weight_type: str, kv_type: str = "f16") -> Needs:
    """The needs of a shape without a file; its projector is f16. Raises BadParameter for unknown types."""
    if weight_type not in WEIGHT_BYTES:
        raise BadParameter(f"--type cannot be {weight_type!r}: choose one of {', '.join(WEIGHT_BYTES)}.")
    text, size, notes = shape.text, WEIGHT_BYTES[weight_type], (shape.note,) if shape.note else ()
    used, head = text.weights(text.experts_used), text.width * text.vocabulary
    values = text.weights(text.experts) + head * (1 if text.tied else 2)
    seen, tokens, ops = _vision_needs(shape)
    kv, queries = text.kv_width * text.layers, text.kv_width * text.layers * text.heads // text.kv_heads
    cost = ModelCost(size * (used + head), used, head, 2 * kv, queries, ops, bytes_per_value(kv_type))
    if shape.vision.tiles > 1 or not shape.vision.image_size:
        notes = (SIZE_NOTE, *notes)
    name = f"{shape.name} as {weight_type}"
    return Needs(name, cost, size * values, 2.0 * seen, text.width, tokens, notes, values + seen)


def _vision_needs(shape: PairShape) -> tuple[int, int, int]:
    """Values of encoder and projector, tokens of one image, and operations to encode it."""
    vision, patches = shape.vision, shape.vision.patches
    widths = vision.projector or (vision.width, shape.text.width, shape.text.width)
    projector = vision.extra + sum(one * after for one, after in pairwise(widths))
    block = 4 * vision.width**2 + (3 if vision.gated else 2) * vision.width * vision.feed_forward
    kernel, tokens = 3 * vision.patch_size**2 * vision.width, vision.tiles * (vision.tile_tokens or patches)
    # llama.cpp runs all but the last of a LLaVA file's blocks (`tools/mtmd/models/llava.cpp`).
    blocks = vision.layers if vision.projector else vision.layers - 1
    ops = vision.tiles * patches * (blocks * (block + 2 * patches * vision.width) + kernel) + tokens * projector
    return vision.layers * block + kernel + projector + patches * vision.width, tokens, 2 * ops


def known_sizes(known: KnownModel, tag: str = "") -> dict[str, int]:
    """Parameters, and bytes to download and to have as memory, as an estimate; `tag` is another quantisation."""
    needs = shape_needs(KNOWN_SHAPES[known.name], tag.lower() or known.weights)
    return {
        "parameters": needs.parameters,
        "download_bytes": round(needs.model_bytes + needs.projector_bytes),
        "memory_bytes": round(sum(needs.memory(Request().ctx).values())),
    }


def first_choice(rows: Sequence[Mapping[str, Any]], memory: float, *, is_gpu: bool) -> str | None:
    """The name of the largest known model that a device has memory for, and without a GPU also time."""
    room = memory * (_GPU_SHARE if is_gpu else _HOST_SHARE)
    most = math.inf if is_gpu else _MOST_ON_CPU
    fitting = [row for row in rows if row["memory_bytes"] <= room and row["parameters"] <= most]
    return max(fitting, key=lambda row: (not row["ocr"], row["parameters"]))["name"] if fitting else None


def file_needs(llm: Path, mmproj: Path | None, name: str, kv_type: str = "f16") -> Needs:
    """The needs of a pair of files, by their headers. Raises ModelNotFound, ModelUnreadable and BadParameter."""
    info, cost = read_info(llm), read_cost(llm, None, kv_type)
    if mmproj is None:
        return Needs(name, cost, info.size, 0, info.width or 0, 0)
    image = image_cost(mmproj)
    cost, notes = replace(cost, encode_ops=image.ops), (image.note,) if image.note else ()
    return Needs(name, cost, info.size, read_info(mmproj).size, info.width or 0, image.tokens, notes)


def predict(needs: Needs, device: Device, request: Request) -> Prediction:
    """The times on a device. Raises BadParameter for a request that its context cannot hold."""
    cost, image, text = needs.cost, needs.image_tokens, request.text_tokens
    total = image + text + request.answer_tokens
    if total > request.ctx:
        raise BadParameter(
            f"The request takes {total} tokens ({image} of the image) and --ctx is {request.ctx}: give a larger --ctx."
        )
    reached = REACHED[device.group]
    ceiling = Ceiling(device.name, device.bandwidth * reached["decode"], device.rate * reached["prefill"])

    def prefill_ms(tokens: int, before: int) -> float:
        """A prefill of few tokens is bound by reading the weights, as a decode step is."""
        least = cost.decode_bytes([before]) / ceiling.read_bytes_s if tokens else 0.0
        return 1e3 * max(cost.prompt_seconds(ceiling, tokens, before), least)

    context = image + text + request.answer_tokens // 2
    notes = needs.notes
    if device.usable < device.memory:
        gib = f"{device.usable / 2**30:.0f} of {device.memory / 2**30:.0f} GiB"
        notes += (f"Metal gives models about {gib}; the most memory that is sold is taken unless --memory tells",)
    return Prediction(
        needs=needs,
        device=device,
        request=request,
        encode_ms=1e3 * (cost.encode_ops or 0.0) / (device.rate * reached["encode"]),
        image_prefill_ms=prefill_ms(image, 0),
        text_prefill_ms=prefill_ms(text, image),
        decode_token_ms=1e3 * cost.step_seconds(ceiling, [context]),
        memory=needs.memory(request.ctx),
        notes=notes,
    )


def check_fits(prediction: Prediction) -> None:
    """Raises BadInput when the pair does not fit, and says what would."""
    needs = prediction.needs
    needed, there, ctx = sum(prediction.memory.values()), prediction.device.usable, prediction.request.ctx
    if not there or needed <= there:
        return
    weight = needs.cost.weight_bytes / (needs.cost.weights + needs.cost.head)
    smaller = {kind: needed - needs.model_bytes * (1 - size / weight) for kind, size in WEIGHT_BYTES.items()}
    ways = [f"the model as {kind} ({size / 1e9:.1f} GB)" for kind, size in smaller.items() if size <= there][:1]
    halved = needed - prediction.memory["kv"] / 2
    if halved <= there:
        ways.append(f"--ctx {ctx // 2} ({halved / 1e9:.1f} GB)")
    raise BadInput(
        f"{needs.name} needs {needed / 1e9:.1f} GB with a context of {ctx} tokens, and {prediction.device.title} "
        f"has {there / 1e9:.1f} GB: what would fit is {' or '.join(ways) or 'a smaller model or a larger device'}."
    )


def measure_pair(runtime: "Runtime", prediction: Prediction) -> dict[str, Any]:
    """Ask the pair itself, and compare: milliseconds by stage, and errors as shares. Raises EngineError, BadInput."""
    needs = prediction.needs
    seen = bool(needs.cost.encode_ops)
    # The first question warms up; a salt of its own keeps what one leaves in the caches from the next.
    prompts = [question(runtime, number if seen else None, _QUESTION) for number in range(ROUNDS + 1)]
    answers = [runtime.engine.submit(one, ANSWER, salt=f"{i}").result() for i, one in enumerate(prompts)][1:]
    usage, stages = answers[0].usage, [answer.stages for answer in answers]
    image, text, tokens = usage.image_tokens, usage.prompt_tokens - usage.image_tokens, usage.completion_tokens
    same = Request(text, tokens, max(prediction.request.ctx, usage.prompt_tokens + tokens))
    found = predict(replace(needs, image_tokens=image), prediction.device, same)
    predicted = {name: float(getattr(found, name)) for name in ("encode_ms", "prefill_ms", "decode_token_ms")}
    measured = {
        "encode_ms": median(one.encode_ms for one in stages),
        "prefill_ms": median(one.image_prefill_ms + one.text_prefill_ms for one in stages),
        "decode_token_ms": median((one.decode_ms + one.sample_ms) / max(1, tokens - 1) for one in stages),
    }
    return {
        "image_tokens": image,
        "text_tokens": text,
        "predicted_ms": rounded(predicted),
        "measured_ms": rounded(measured),
        "errors": rounded({name: predicted[name] / value - 1 for name, value in measured.items() if value}),
    }
