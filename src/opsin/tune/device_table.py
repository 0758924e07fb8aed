"""What devices can do by their makers' word, and what llama.cpp was seen to reach on some of them.

`DEVICES` is arithmetic from data sheets; `ANCHORS` are measurements, each with where it was published. The shares of
the roofline that predictions use are computed from the two (`opsin.tune.predict`), never written down.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from opsin.core.errors import BadParameter
from opsin.models.shapes import SHAPES, TextShape
from opsin.tune.predict_needs import shape_needs

Kind = Literal["cuda", "metal", "cpu"]
Stage = Literal["encode", "prefill", "decode"]

GB = 1e9
GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Device:
    """One device. `bandwidth` in bytes a second, `rate` in floating-point operations a second.

    `rate` is what matrices are multiplied with: dense fp16/bf16 tensor cores with fp32 accumulation on CUDA, the GPU's
    fp32 rate on Apple silicon, all cores' fp32 vector rate at base clock on CPUs (`rate_of` says which). `memory` is
    in bytes, the largest that is sold where there is a choice; 0 where the machine decides.
    """

    name: str
    title: str
    kind: Kind
    bandwidth: float
    rate: float
    memory: float
    source: str

    @property
    def group(self) -> str:
        """Devices that reach alike shares: HBM and two joined chips are more than one answer at a time can use."""
        if self.name.startswith(("a100", "h100", "h200")):
            return "hbm"
        return "ultra" if self.name.endswith("-ultra") else self.kind

    @property
    def usable(self) -> float:
        """Bytes that models can have: macOS leaves the GPU two thirds up to 36 GiB, else three quarters.

        Source: `recommendedMaxWorkingSetSize` in logs of llama.cpp; newer macOS gives somewhat more.
        """
        return self.memory if self.kind != "metal" else self.memory * (2 / 3 if self.memory <= 36 * GIB else 3 / 4)

    @property
    def rate_of(self) -> str:
        """What `rate` is the rate of."""
        return {"cuda": "fp16 dense tensor", "metal": "GPU fp32", "cpu": "vector fp32 at base clock"}[self.kind]


def _cuda(  # noqa: PLR0917 - a row of the table
    name: str, title: str, gb_s: float, tflops: float, memory: float, source: str
) -> Device:
    """`tflops` is the fp16 rate in 10^12 operations a second, memory in GiB."""
    return Device(name, title, "cuda", gb_s * GB, tflops * 1e12, memory * GIB, source)


def _metal(  # noqa: PLR0917 - a row of the table
    name: str, cores: int, gb_s: float, tflops: float, memory: float, source: str
) -> Device:
    title = f"Apple {name.replace('-', ' ').title()} ({cores} GPU cores)"
    return Device(name, title, "metal", gb_s * GB, tflops * 1e12, memory * GIB, source)


def _cpu(  # noqa: PLR0917 - a row of the table
    name: str, title: str, cores: str, width: int, channels: int, transfers: int, source: str
) -> Device:
    """`cores` is "8x3.0" (number and base clock in GHz), with "+16x2.2" for cores of half the vector width.

    `width` is the vector width in bits that a core really multiplies with each cycle, in two units; `transfers` are
    millions a second on each of `channels` of 64 bits.
    """
    rate = 0.0
    for share, group in zip((1.0, 0.5), cores.split("+"), strict=False):
        number, clock = group.split("x")
        rate += int(number) * float(clock) * 1e9 * share * (width / 32) * 2 * 2  # lanes, units, multiply and add
    return Device(name, title, "cpu", channels * transfers * 8e6, rate, 0.0, source)


_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper, 2021"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, 2022"
_RTX50 = "NVIDIA RTX Blackwell GPU Architecture whitepaper, 2025"
_A100, _H100 = "NVIDIA A100 datasheet, 2021", "NVIDIA H100 datasheet, 2022 (dense is half of the sparse rate)"
_H200, _L4 = "NVIDIA H200 datasheet, 2023 (dense is half of the sparse rate)", "NVIDIA L4 datasheet, 2023"
_APPLE = "Apple press release, {}"
_CLOCK = "; the rate is cores x 256 operations x {} GHz, as Apple publishes none"
_TWO_CORES = "25.4 GB/s by `opsin bench engine` (docs/results/bench_engine_all.json), base clock by AMD, 2021"
_M2, _M3, _M4 = _CLOCK.format(1.4), _CLOCK.format(1.4), _CLOCK.format(1.5)

# fmt: off
_ALL = (
    _cuda("rtx-3090", "NVIDIA GeForce RTX 3090", 936, 71, 24, _GA102),
    _cuda("rtx-4090", "NVIDIA GeForce RTX 4090", 1008, 165.2, 24, _ADA),
    _cuda("rtx-5090", "NVIDIA GeForce RTX 5090", 1792, 209.5, 32, _RTX50),
    _cuda("a100-40gb", "NVIDIA A100 40 GB", 1555, 312, 40, "NVIDIA A100 datasheet, 2020"),
    _cuda("a100-80gb-pcie", "NVIDIA A100 80 GB PCIe", 1935, 312, 80, _A100),
    _cuda("a100-80gb-sxm", "NVIDIA A100 80 GB SXM", 2039, 312, 80, _A100),
    _cuda("h100-pcie", "NVIDIA H100 PCIe", 2000, 756, 80, _H100),
    _cuda("h100-sxm", "NVIDIA H100 SXM", 3350, 989, 80, _H100),
    _cuda("h200", "NVIDIA H200 SXM", 4800, 989, 141, _H200),
    _cuda("l4", "NVIDIA L4", 300, 121, 24, _L4 + " (dense is half of the sparse rate)"),
    _metal("m1", 8, 68.25, 2.6, 16, _APPLE.format("November 2020") + "; bandwidth of 128 bit LPDDR4X-4266"),
    _metal("m1-pro", 16, 200, 5.2, 32, _APPLE.format("October 2021")),
    _metal("m1-max", 32, 400, 10.4, 64, _APPLE.format("October 2021")),
    _metal("m1-ultra", 64, 800, 21.0, 128, _APPLE.format("March 2022")),
    _metal("m2", 10, 100, 3.6, 24, _APPLE.format("June 2022")),
    _metal("m2-pro", 19, 200, 6.8, 32, _APPLE.format("January 2023") + _M2),
    _metal("m2-max", 38, 400, 13.6, 96, _APPLE.format("January 2023") + _M2),
    _metal("m2-ultra", 76, 800, 27.2, 192, _APPLE.format("June 2023") + _M2),
    _metal("m3", 10, 100, 3.6, 24, _APPLE.format("October 2023") + _M3),
    _metal("m3-pro", 18, 150, 6.5, 36, _APPLE.format("October 2023") + _M3),
    _metal("m3-max", 40, 400, 14.3, 128, _APPLE.format("October 2023") + _M3),
    _metal("m3-ultra", 80, 819, 28.7, 512, _APPLE.format("March 2025") + _M3),
    _metal("m4", 10, 120, 3.8, 32, _APPLE.format("May 2024") + _M4),
    _metal("m4-pro", 20, 273, 7.7, 64, _APPLE.format("October 2024") + _M4),
    _metal("m4-max", 40, 546, 15.4, 128, _APPLE.format("October 2024") + _M4),
    _cpu("ryzen-5950x", "AMD Ryzen 9 5950X, DDR4-3200", "16x3.4", 256, 2, 3200, "AMD product page, 2020"),
    _cpu("ryzen-7950x", "AMD Ryzen 9 7950X, DDR5-5200", "16x4.5", 256, 2, 5200, "AMD product page, 2022"),
    _cpu("core-i7-12700", "Intel Core i7-12700, DDR5-4800", "8x2.1+4x1.6", 256, 2, 4800, "Intel ARK, 2022"),
    _cpu("core-i9-13900k", "Intel Core i9-13900K, DDR5-5600", "8x3.0+16x2.2", 256, 2, 5600, "Intel ARK, 2022"),
    _cpu("core-i7-7820hq", "Intel Core i7-7820HQ, DDR4-2400", "4x2.9", 256, 2, 2400, "Intel ARK, 2017"),
    _cpu("xeon-w-3245", "Intel Xeon W-3245 (Mac Pro 2019), DDR4-2933", "16x3.2", 512, 6, 2933, "Intel ARK, 2019"),
    _cpu("xeon-gold-6338", "Intel Xeon Gold 6338, DDR4-3200", "32x2.0", 512, 8, 3200, "Intel ARK, 2021"),
    _cpu("xeon-8480", "Intel Xeon Platinum 8480+, DDR5-4800", "56x2.0", 512, 8, 4800, "Intel ARK, 2023"),
    _cpu("epyc-7443", "AMD EPYC 7443 (Zen 3), DDR4-3200", "24x2.85", 256, 8, 3200, "AMD product page, 2021"),
    _cpu("epyc-7763", "AMD EPYC 7763 (Zen 3), DDR4-3200", "64x2.45", 256, 8, 3200, "AMD product page, 2021"),
    _cpu("epyc-9354", "AMD EPYC 9354 (Zen 4), DDR5-4800", "32x3.25", 256, 12, 4800, "AMD product page, 2022"),
    _cpu("epyc-9654", "AMD EPYC 9654 (Zen 4), DDR5-4800", "96x2.4", 256, 12, 4800, "AMD product page, 2022"),
    _cpu("epyc-zen3-2-cores", "Two cores of an AMD EPYC (Zen 3)", "2x2.45", 256, 1, 3175, _TWO_CORES),
)
# fmt: on

DEVICES: dict[str, Device] = {device.name: device for device in _ALL}
_SHORT = {"a100": "a100-80gb-sxm", "h100": "h100-sxm"}


def find_device(name: str) -> Device:
    """The device of a name, forgiving about case, dashes, spaces and makers. Raises BadParameter with nearest names."""
    keys = {_plain(word): device for device in _ALL for word in (device.name, device.title)}
    keys |= {short: DEVICES[full] for short, full in _SHORT.items()}
    wanted = re.sub(r"^(nvidia|geforce|apple|amd|intel)+", "", _plain(name)) or _plain(name)
    # Whole words: "480" ends a name, too.
    words = [(device, _plain(device.name.split("-", cut)[-1])) for device in _ALL for cut in (1, 2)]
    ends = [device for device, word in dict.fromkeys(words) if word == wanted]
    found = keys.get(wanted) or keys.get(_plain(name)) or (ends[0] if len(ends) == 1 else None)
    if found is not None:
        return found
    near = difflib.get_close_matches(wanted, [_plain(device.name) for device in _ALL], 3, 0.3)
    names = [device.name for plain in near for device in _ALL if _plain(device.name) == plain]
    raise BadParameter(
        f"There is no device {name!r} in the table: the nearest are {', '.join(names or list(DEVICES)[:3])}; "
        "`opsin predict --devices` lists all, and `--device this` measures the machine at hand."
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@dataclass(frozen=True, slots=True)
class Anchor:
    """One measurement. `per_s` is pictures or tokens a second; `context` tokens stand before the ones measured.

    `text` is the language model of prefill and decode, or `read_bytes` the file that each step of a decode read;
    `picture_ops` says how many operations a picture took.
    """

    device: str
    stage: Stage
    weight_type: str
    per_s: float
    source: str
    text: TextShape | None = None
    tokens: int = 512
    context: int = 0
    read_bytes: float = 0.0
    picture_ops: float = 0.0


def _picture(shape: str) -> float:
    return shape_needs(SHAPES[shape], "q8_0", "f16").cost.encode_ops or 0.0


def _text(layers: int, kv_heads: int, feed_forward: int, vocabulary: int) -> TextShape:
    return TextShape(4096, layers, 32, kv_heads, feed_forward, vocabulary, 8192)


_7B, _8B, _QWEN = _text(32, 32, 11_008, 32_000), _text(32, 8, 14_336, 128_256), _text(36, 8, 12_288, 151_936)
_PR = "github.com/ggml-org/llama.cpp/pull/{}"
_M2_ENCODE = "github.com/ggml-org/llama.cpp/issues/6883, April 2024 (an M2 Max by its decode rate)"
_CUDA_24, _METAL_23 = _PR.format("4766, January 2024"), _PR.format("3084, September 2023")
_NORMIE = "github.com/brand-o/normiebench/issues/{}"
_DAI = "github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference/issues/1, August 2023"
_A100_24 = _PR.format("6017, March 2024 (eight of them, one after another)")
# SigLIP-400M on 1,024 patches: 27 blocks of width 1152 with 4304 in between, and their attention.
_SIGLIP_OPS = 27 * (2 * 1024 * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * 1024**2 * 1152)
_OMNI = "github.com/tc-mb/llama.cpp-omni/pull/55, June 2026 (slices one by one, taken to be of 1,024 patches)"
_IK = "github.com/ikawrakow/ik_llama.cpp/pull/54, September 2024 (its column for llama.cpp)"
_KHMEL = "pavlokhmel.com/llm_throughput_benchmark_on_13_gpus_and_10_models.html, June 2026"
# Dense models of that page, Qwen3.5-9B (5.7 GB) and gemma-4-31B (18.3 GB): tokens a second of each.
_KHMEL_ROWS = (
    ("a100-40gb", 113, 37), ("a100-80gb-sxm", 123, 43), ("rtx-4090", 137, 35), ("h100-sxm", 190, 68), ("h200", 197, 71),
)  # fmt: skip
# Llama 2 7B by chip: prefill of f16 and q4_0, decode of f16, q8_0 and q4_0; 0 where the row has none.
_APPLES = "github.com/ggml-org/llama.cpp/discussions/4167, its table of a build of November 2023"
_APPLE_COLUMNS: tuple[tuple[Stage, str], ...] = (
    ("prefill", "f16"), ("prefill", "q4_0"), ("decode", "f16"), ("decode", "q8_0"), ("decode", "q4_0"),
)  # fmt: skip
_APPLE_ROWS = (
    ("m1-ultra", (0.0, 1030.0, 0.0, 0.0, 83.7)),
    ("m2", (201.34, 179.57, 6.72, 12.21, 21.91)),
    ("m2-ultra", (1401.85, 1238.48, 41.02, 66.64, 94.27)),
    ("m3-pro", (357.45, 341.67, 9.89, 17.53, 30.74)),
    ("m3-ultra", (0.0, 1471.0, 0.0, 0.0, 92.1)),
    ("m4", (230.18, 221.29, 7.43, 13.54, 24.11)),
    ("m4-pro", (464.48, 439.78, 17.18, 30.69, 50.74)),
    ("m4-max", (922.83, 885.68, 31.64, 54.05, 83.06)),
)
_SMALL, _MEDIUM = (f"docs/results/{name}.json, November 2026 (a slow hour)" for name in ("predict", "predict_medium"))
_OURS = "docs/results/bench_engine_all.json, W1, November 2026"
_UB1 = " (prefill in micro-batches of one token)"

# fmt: off
ANCHORS: tuple[Anchor, ...] = (
    Anchor("rtx-4090", "prefill", "f16", 11048.22, _CUDA_24, _7B),
    Anchor("rtx-4090", "prefill", "q8_0", 7664.0, _CUDA_24, _7B),
    Anchor("rtx-4090", "prefill", "q4_0", 10358.75, _PR.format("7676, June 2024"), _8B),
    Anchor("rtx-3090", "prefill", "q5_0", 3654.78, _PR.format("7676, June 2024"), _8B),
    Anchor("rtx-5090", "prefill", "iq4_nl", 14925.08, _PR.format("24127, 2026"), _8B),
    Anchor("a100-80gb-pcie", "prefill", "f16", 8381.22, _A100_24, _7B),
    Anchor("rtx-4090", "encode", "f16", 8e3 / 541.7, _OMNI, picture_ops=_SIGLIP_OPS),
    Anchor("rtx-4090", "decode", "f16", 61.03, _CUDA_24, _7B, 128),
    Anchor("rtx-4090", "decode", "q8_0", 98.13, _CUDA_24, _7B, 128),
    Anchor("rtx-4090", "decode", "q4_0", 193.09, _PR.format("20586, 2026") + _UB1, _8B),
    Anchor("rtx-3090", "decode", "q4_0", 156.56, _PR.format("15802, 2025") + _UB1, _8B),
    Anchor("rtx-5090", "decode", "q4_k_m", 221.7, "github.com/CambrianTech/continuum/pull/1627, June 2026", _QWEN, 128),
    *(Anchor(name, "decode", "q4_k_m", nine, _KHMEL, read_bytes=5.7 * GB) for name, nine, _ in _KHMEL_ROWS),
    *(Anchor(name, "decode", "q4_k_m", many, _KHMEL, read_bytes=18.3 * GB) for name, _, many in _KHMEL_ROWS),
    *(
        Anchor(name, stage, kind, rate, _APPLES, _7B, 512 if stage == "prefill" else 128)
        for name, rates in _APPLE_ROWS
        for (stage, kind), rate in zip(_APPLE_COLUMNS, rates, strict=True)
        if rate
    ),
    Anchor("m2-ultra", "prefill", "q8_0", 1142.84, _METAL_23, _7B),
    Anchor("m1-max", "prefill", "q4_k_m", 499.58, _NORMIE.format("40, March 2026"), _8B),
    Anchor("m4", "prefill", "q4_k_m", 224.81, _NORMIE.format("3, March 2026"), _8B),
    Anchor("m1-max", "decode", "q4_k_m", 46.2, _NORMIE.format("40, March 2026"), _8B, 128),
    Anchor("m4", "decode", "q4_k_m", 20.87, _NORMIE.format("3, March 2026"), _8B, 128),
    Anchor("m2-pro", "decode", "q4_0", 1e3 / 28.91, _DAI, _7B, 128),
    Anchor("m2-pro", "decode", "f16", 1e3 / 92.15, _DAI, _7B, 128),
    # The report says "M2" only; 66 tokens of 3.8 GB a second need more than the 200 GB/s of an M2 Pro.
    Anchor("m2-max", "encode", "f16", 1e3 / 129.36, _M2_ENCODE, picture_ops=_picture("llava-1.5-7b")),
    Anchor("xeon-w-3245", "decode", "q4_0", 1e3 / 58.76, _DAI, _7B, 128),
    Anchor("ryzen-7950x", "prefill", "q4_0", 123.46, _IK, _8B),
    Anchor("ryzen-7950x", "prefill", "q8_0", 141.3, _IK, _8B),
    Anchor("ryzen-7950x", "decode", "q4_0", 11.25, _IK + ", four threads", _8B, 128),
    Anchor("ryzen-7950x", "decode", "q8_0", 7.56, _IK + ", four threads", _8B, 128),
    Anchor("core-i7-7820hq", "prefill", "q4_k_m", 22.53, _NORMIE.format("42, March 2026"), _8B),
    Anchor("core-i7-7820hq", "decode", "q4_k_m", 5.62, _NORMIE.format("42, March 2026"), _8B, 128),
    Anchor("epyc-zen3-2-cores", "encode", "f16", 1e3 / 1084.849, _SMALL, picture_ops=_picture("small")),
    Anchor("epyc-zen3-2-cores", "encode", "f16", 1e3 / 1087.187, _MEDIUM, picture_ops=_picture("medium")),
    Anchor("epyc-zen3-2-cores", "prefill", "q8_0", 680e3 / 2766.928, _SMALL, SHAPES["small"].text, 680),
    Anchor("epyc-zen3-2-cores", "prefill", "q8_0", 680e3 / 6972.924, _MEDIUM, SHAPES["medium"].text, 680),
    Anchor("epyc-zen3-2-cores", "decode", "q8_0", 1e3 / 14.9342, _OURS, SHAPES["small"].text, 32, 647),
    Anchor("epyc-zen3-2-cores", "decode", "q8_0", 1e3 / 24.9053, _SMALL, SHAPES["small"].text, 32, 680),
    Anchor("epyc-zen3-2-cores", "decode", "q8_0", 1e3 / 43.0016, _MEDIUM, SHAPES["medium"].text, 32, 680),
)
# fmt: on
