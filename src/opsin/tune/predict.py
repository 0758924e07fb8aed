"""Expected stage times of a pair on a device, from bytes, operations and what was reached so far.

Two ways. For a device of the table: the roofline of its data sheet times the share of it that measurements of such
devices reached. For the machine at hand: a slice of the pair (its widths and types, fewer layers, random weights) is
asked a few questions, and its times are scaled by bytes and operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from opsin.bench.cost import ModelCost
from opsin.core.errors import BadInput, BadParameter
from opsin.models.shapes import TextShape
from opsin.tune.device_table import ANCHORS, DEVICES, Anchor, Device, Kind, Stage
from opsin.tune.predict_needs import Needs

# Bytes of a weight in types of which whole models are measured. "K" mixtures by their files: 4.58 GiB of 8.03 billion.
_WEIGHT_BYTES = {
    "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_0": 22 / 32, "q4_0": 18 / 32, "iq4_nl": 18 / 32,
    "q4_k_m": 0.612,
}  # fmt: skip
_LIKE = {"q4_k": "q4_k_m", "bf16": "f16"}


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: one picture, `text_tokens` around it, behind `ctx_used` tokens, answered in `answer_tokens`."""

    text_tokens: int = 64
    ctx_used: int = 0
    answer_tokens: int = 128
    ctx: int = 4096


@dataclass(frozen=True, slots=True)
class Times:
    """Stage times of a request in milliseconds; `token_ms` is one decode step in the middle of the answer.

    `image_tokens` and `text_tokens` are what the prefills were of, and `context` what the decode steps had behind them.
    """

    encode_ms: float
    image_prefill_ms: float
    text_prefill_ms: float
    token_ms: float
    image_tokens: int
    text_tokens: int
    context: int

    @property
    def prefill_ms(self) -> float:
        """Image and text prefill."""
        return self.image_prefill_ms + self.text_prefill_ms


@dataclass(frozen=True, slots=True)
class Share:
    """The share of the roofline that a stage is expected to reach: the median of anchors, their range and sources."""

    value: float
    least: float
    most: float
    sources: tuple[str, ...]
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """Expected times of one pair on one device. `shares` is empty for the machine at hand, whose times are scaled."""

    model: str
    device: str
    times: Times
    request: Request
    memory: dict[str, float]
    memory_there: float
    shares: dict[str, Share]
    notes: tuple[str, ...] = ()

    @property
    def first_token_ms(self) -> float:
        """From the question to the first token."""
        return self.times.encode_ms + self.times.prefill_ms

    @property
    def answer_ms(self) -> float:
        """From the question to the last token; the first one comes with the prefill."""
        return self.first_token_ms + max(0, self.request.answer_tokens - 1) * self.times.token_ms

    def as_dict(self) -> dict[str, Any]:
        """Plain values; times in milliseconds, memory in bytes."""
        times, tokens = self.times, self.times.image_tokens + self.times.text_tokens
        return {
            "model": self.model,
            "device": self.device,
            "encode_ms": round(times.encode_ms, 3),
            "image_prefill_ms": round(times.image_prefill_ms, 3),
            "text_prefill_ms": round(times.text_prefill_ms, 3),
            "decode_token_ms": round(times.token_ms, 4),
            "first_token_ms": round(self.first_token_ms, 3),
            "answer_ms": round(self.answer_ms, 3),
            "answer_tokens": self.request.answer_tokens,
            "image_tokens": times.image_tokens,
            "text_tokens": times.text_tokens,
            "ctx_used": self.request.ctx_used,
            "prefill_tokens_s": round(tokens / times.prefill_ms * 1e3, 2) if times.prefill_ms else None,
            "decode_tokens_s": round(1e3 / times.token_ms, 2) if times.token_ms else None,
            "ctx": self.request.ctx,
            "memory_bytes": {name: round(size) for name, size in self.memory.items()},
            "memory_total_bytes": round(sum(self.memory.values())),
            "device_memory_bytes": round(self.memory_there) or None,
            "fits": sum(self.memory.values()) <= self.memory_there if self.memory_there else None,
            "shares": {
                name: {"share": round(s.value, 4), "range": [round(s.least, 4), round(s.most, 4)], "sources": s.sources}
                for name, s in self.shares.items()
            },
            "notes": list(self.notes),
        }


def predict_on(device: Device, needs: Needs, request: Request) -> Prediction:
    """The times on a device of the table. Raises BadParameter for a request that its context cannot hold."""
    check_request(needs, request)
    cost, image, text = needs.cost, needs.image_tokens, request.text_tokens
    prefill = share_of(device, "prefill", needs.llm_type)
    decode = share_of(device, "decode", needs.llm_type)
    shares = {"prefill": prefill, "decode": decode}
    encode_ms = 0.0
    if cost.encode_ops:
        shares["encode"] = share_of(device, "encode", needs.mmproj_type or "f16")
        encode_ms = cost.encode_ops / (device.rate * shares["encode"].value) * 1e3
    bandwidth = device.bandwidth * decode.value

    def filled(tokens: int, before: int) -> float:
        """A prefill of few tokens is bound by reading the weights, as a decode step is."""
        if not tokens:
            return 0.0
        computed = _prefill_ops(cost, tokens, before) / (device.rate * prefill.value)
        return max(computed, cost.decode_bytes([before]) / bandwidth) * 1e3

    context = _middle(request, image + text)
    step = max(cost.decode_bytes([context]) / bandwidth, cost.decode_ops(context) / (device.rate * prefill.value)) * 1e3
    before = request.ctx_used
    times = Times(encode_ms, filled(image, before), filled(text, before + image), step, image, text, context)
    notes = (*needs.notes, *(share.note for share in shares.values() if share.note))
    if device.usable < device.memory:
        shared = f"{device.usable / 2**30:.0f} of {device.memory / 2**30:.0f} GiB"
        notes += (f"Metal gives models about {shared}; the most memory that is sold is taken unless --memory tells",)
    return Prediction(needs.name, device.title, times, request, needs.memory(request.ctx), device.usable, shares, notes)


def share_of(device: Device, stage: Stage, weight_type: str, anchors: Iterable[Anchor] = ANCHORS) -> Share:
    """What measurements say of such a device: of this one and this type if there are any, else of its kind.

    Several devices count alike, however many rows each has. Raises BadInput for a kind that nobody measured.
    """
    rows = [row for row in anchors if row.stage == stage and DEVICES[row.device].kind == device.kind]
    if not rows:
        raise BadInput(f"Nothing is known yet of {stage} on {device.title}: use `--device this` on such a machine.")
    same = [row for row in rows if _like(row.weight_type) == _like(weight_type)]
    own = [row for row in rows if row.device == device.name]
    group = [row for row in rows if DEVICES[row.device].group == device.group]
    # A rate of operations depends on the type first, what is reached of the bandwidth on the device.
    order = [[r for r in own if r in same], own, [r for r in group if r in same], group, same, rows]
    if stage != "decode":
        order[1], order[2] = order[2], order[1]
    chosen = next(found for found in order if found)
    reached: dict[str, list[float]] = {}
    for row in chosen:
        reached.setdefault(row.device, []).append(anchor_share(row))
    values = [value for of_one in reached.values() for value in of_one]
    said = [f"{stage} of {weight_type} is taken from measurements of other types"] if chosen[0] not in same else []
    if chosen[0] not in group:
        said += [f"{stage} is taken from devices of another sort: {', '.join(reached)}"]
    sources = tuple(dict.fromkeys(row.source for row in chosen))
    return Share(median(map(median, reached.values())), min(values), max(values), sources, "; ".join(said) or None)


def anchor_share(anchor: Anchor) -> float:
    """The share of its device's roofline that a measurement reached."""
    device = DEVICES[anchor.device]
    if anchor.read_bytes:
        return anchor.per_s * anchor.read_bytes / device.bandwidth
    if anchor.text is None:
        return anchor.per_s * anchor.picture_ops / device.rate
    cost = text_cost(anchor.text, anchor.weight_type)
    if anchor.stage == "decode":
        return anchor.per_s * cost.decode_bytes([anchor.context + anchor.tokens // 2]) / device.bandwidth
    return anchor.per_s * _prefill_ops(cost, anchor.tokens, anchor.context) / anchor.tokens / device.rate


def text_cost(text: TextShape, weight_type: str) -> ModelCost:
    """The needs of a language model of the llama kind whose weights all have one type."""
    layer = 2 * text.width**2 + 2 * text.width * text.kv_width + 3 * text.width * text.feed_forward
    weights, head, kv = text.layers * layer, text.width * text.vocabulary, 2 * text.kv_width * text.layers
    size = (weights + head) * _WEIGHT_BYTES[weight_type]
    return ModelCost(size, weights, head, kv, text.width * text.layers, None)


def scale(measured: Times, piece: Needs, needs: Needs, request: Request) -> Times:
    """The times of a pair from those of its slice: encode and prefill by operations, decode by bytes.

    The slice was measured behind an empty context, with `measured.image_tokens` and `measured.text_tokens`. However few
    its tokens, a prefill reads the weights as a decode step does.
    """
    ours, theirs = needs.cost, piece.cost
    image, text = needs.image_tokens, request.text_tokens
    context = _middle(request, image + text)
    step = measured.token_ms * ours.decode_bytes([context]) / theirs.decode_bytes([measured.context])

    def filled(took: float, counted: int, tokens: int, start: int, before: int) -> float:
        if not counted or not tokens:
            return 0.0
        return max(step, took * _prefill_ops(ours, tokens, before) / _prefill_ops(theirs, counted, start))

    encode = measured.encode_ms * ours.encode_ops / theirs.encode_ops if ours.encode_ops and theirs.encode_ops else 0.0
    before = request.ctx_used
    return Times(
        encode_ms=encode,
        image_prefill_ms=filled(measured.image_prefill_ms, measured.image_tokens, image, 0, before),
        text_prefill_ms=filled(
            measured.text_prefill_ms, measured.text_tokens, text, measured.image_tokens, before + image
        ),
        token_ms=step,
        image_tokens=image,
        text_tokens=text,
        context=context,
    )


def check_request(needs: Needs, request: Request) -> None:
    """Raises BadParameter when the context cannot hold the request."""
    total = request.ctx_used + needs.image_tokens + request.text_tokens + request.answer_tokens
    if total > request.ctx:
        raise BadParameter(
            f"The request takes {total} tokens ({request.ctx_used} before it, {needs.image_tokens} of the picture, "
            f"{request.text_tokens} of text, {request.answer_tokens} of the answer) and --ctx is {request.ctx}: "
            "give a larger --ctx, or fewer of the others."
        )


def check_room(prediction: Prediction, smaller: Iterable[tuple[str, float]], kind: Kind | None = None) -> None:
    """Raises BadInput when the pair does not fit, saying what would.

    `smaller` are other ways to have the pair, with their bytes; of the table's devices those of `kind` are named.
    """
    needed, there = sum(prediction.memory.values()), prediction.memory_there
    if not there or needed <= there:
        return
    ways = [f"{name} ({size / 1e9:.1f} GB)" for name, size in smaller if size <= there][:2]
    larger = sorted(
        (d for d in DEVICES.values() if d.usable >= needed and kind in {None, d.kind}), key=lambda d: d.usable
    )
    ways += [f"a device with more memory such as {larger[0].name}"] if larger else []
    raise BadInput(
        f"{prediction.model} needs {needed / 1e9:.1f} GB with a context of {prediction.request.ctx} tokens, and "
        f"{prediction.device} has {there / 1e9:.1f} GB: "
        + (f"what would fit is {' or '.join(ways)}." if ways else "choose a smaller model.")
    )


def _like(weight_type: str) -> str:
    return _LIKE.get(weight_type, weight_type)


def _prefill_ops(cost: ModelCost, tokens: int, before: int) -> float:
    return tokens * cost.prefill_ops(before + tokens // 2)


def _middle(request: Request, prompt: int) -> int:
    return request.ctx_used + prompt + request.answer_tokens // 2
