"""What devices can do by their data sheets, and the share of it that llama.cpp was seen to reach, as plain data."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from opsin.core.errors import BadParameter

Group = Literal["cuda", "hbm", "metal", "ultra", "cpu", "measured-cpu"]

THIS = "this"  # the machine at hand
_GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Reached:
    """Shares of a device's rate (encode, prefill) and of its bandwidth (decode) that llama.cpp reaches."""

    encode: float
    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Device:
    """One device. `bandwidth` in bytes a second, `rate` in floating-point operations a second, `memory` in bytes.

    `rate` is that of dense fp16 tensor cores with fp32 accumulation on CUDA, of the GPU's fp32 on Apple silicon, of all
    cores' fp32 vectors at base clock on CPUs. `memory` is the largest that is sold; 0 where it is unknown.
    """

    name: str
    title: str
    group: Group
    bandwidth: float
    rate: float
    memory: float

    @property
    def usable(self) -> float:
        """Bytes that models can have: macOS leaves the GPU two thirds up to 36 GiB, above that three quarters."""
        # Source: `recommendedMaxWorkingSetSize` in llama.cpp's logs. At hand ggml tells this part itself.
        if self.group not in {"metal", "ultra"} or self.name == THIS:
            return self.memory
        return self.memory * (2 / 3 if self.memory <= 36 * _GIB else 3 / 4)


# Medians over devices of published measurements of llama.cpp, 7B to 31B models in q4 to f16, each divided by the data
# sheet. CUDA and Apple: llama.cpp's discussion 4167 and pull requests 3084, 4766, 6017, 7676, 15802, 20586 and 24127,
# pavlokhmel.com (June 2026, cards with HBM). CPU: ik_llama.cpp's pull request 54, normiebench's issue 42. Encodes are
# hardly published: one report each for CUDA (llama.cpp-omni's pull request 55) and Apple (llama.cpp's issue 6883).
# "measured-cpu" is a CPU at hand, by the rates of ggml's own kernels: the `small` pair on two cores of an EPYC.
REACHED: dict[Group, Reached] = {
    "cuda": Reached(encode=0.09, prefill=0.87, decode=0.71),
    "hbm": Reached(encode=0.09, prefill=0.35, decode=0.36),
    "metal": Reached(encode=0.21, prefill=0.74, decode=0.79),
    "ultra": Reached(encode=0.21, prefill=0.64, decode=0.42),
    "cpu": Reached(encode=0.65, prefill=0.81, decode=0.55),
    "measured-cpu": Reached(encode=0.63, prefill=0.57, decode=0.45),
}

# name, title, group, 10^9 bytes/s, 10^12 operations/s, GiB
# Sources: NVIDIA's architecture whitepapers and data sheets (dense is half of the sparse rate; the rates of RTX 3060
# and 4060 are 112 and 96 tensor cores x 128 x 1.777 and 2.46 GHz, as the 3090 and 4090 give it; A10: 288 x 256 x 1.695,
# as the A40 does). Apple's press releases; the rates of M2 Pro and later are cores x 256 x clock, as Apple publishes
# none. CPUs: product pages, all channels.
# fmt: off
_ROWS: tuple[tuple[str, str, Group, float, float, float], ...] = (
    ("rtx-3060", "NVIDIA GeForce RTX 3060", "cuda", 360, 25.5, 12),
    ("rtx-3090", "NVIDIA GeForce RTX 3090", "cuda", 936, 71, 24),
    ("rtx-4060", "NVIDIA GeForce RTX 4060", "cuda", 272, 30.2, 8),
    ("rtx-4090", "NVIDIA GeForce RTX 4090", "cuda", 1008, 165.2, 24),
    ("rtx-5090", "NVIDIA GeForce RTX 5090", "cuda", 1792, 209.5, 32),
    ("a10", "NVIDIA A10", "cuda", 600, 125, 24),
    ("l4", "NVIDIA L4", "cuda", 300, 121, 24),
    ("l40s", "NVIDIA L40S", "cuda", 864, 362, 48),
    ("a100", "NVIDIA A100 80 GB", "hbm", 2039, 312, 80),
    ("h100", "NVIDIA H100 SXM", "hbm", 3350, 989, 80),
    ("h200", "NVIDIA H200 SXM", "hbm", 4800, 989, 141),
    ("m1", "Apple M1", "metal", 68.25, 2.6, 16),
    ("m1-pro", "Apple M1 Pro", "metal", 200, 5.2, 32),
    ("m1-max", "Apple M1 Max", "metal", 400, 10.4, 64),
    ("m1-ultra", "Apple M1 Ultra", "ultra", 800, 21.0, 128),
    ("m2", "Apple M2", "metal", 100, 3.6, 24),
    ("m2-pro", "Apple M2 Pro", "metal", 200, 6.8, 32),
    ("m2-max", "Apple M2 Max", "metal", 400, 13.6, 96),
    ("m2-ultra", "Apple M2 Ultra", "ultra", 800, 27.2, 192),
    ("m3", "Apple M3", "metal", 100, 3.6, 24),
    ("m3-pro", "Apple M3 Pro", "metal", 150, 6.5, 36),
    ("m3-max", "Apple M3 Max", "metal", 400, 14.3, 128),
    ("m3-ultra", "Apple M3 Ultra", "ultra", 819, 28.7, 512),
    ("m4", "Apple M4", "metal", 120, 3.8, 32),
    ("m4-pro", "Apple M4 Pro", "metal", 273, 7.7, 64),
    ("m4-max", "Apple M4 Max", "metal", 546, 15.4, 128),
    ("ryzen-7950x", "AMD Ryzen 9 7950X, DDR5-5200", "cpu", 83.2, 2.3, 0),
    ("epyc-9654", "AMD EPYC 9654 (Zen 4), DDR5-4800", "cpu", 460.8, 7.37, 0),
)
# fmt: on

DEVICES: dict[str, Device] = {
    name: Device(name, title, group, gb_s * 1e9, tera * 1e12, gib * _GIB)
    for name, title, group, gb_s, tera, gib in _ROWS
}


def find_device(name: str) -> Device:
    """The device of a name, forgiving about case, dashes, spaces and makers. Raises BadParameter with nearest names."""
    wanted = _plain(name)
    for device in DEVICES.values():  # "4090" and "9654" are the whole last word of a name
        if wanted in {_plain(device.name), _plain(device.title), device.name.rpartition("-")[2]}:
            return device
    near = ", ".join(difflib.get_close_matches(name.lower().replace(" ", "-"), DEVICES, 3, 0.3)) or "not known"
    raise BadParameter(
        f"There is no device {name!r} in the table: the nearest are {near}; "
        "`opsin predict --devices` lists all, and `--device this` measures the machine at hand."
    )


def gpu_group(description: str) -> Group:
    """The group of a GPU at hand, by its maker's name for it."""
    name = description.lower()
    if "apple" in name:
        return "ultra" if "ultra" in name else "metal"
    return "hbm" if re.search(r"a100|h100|h200", name) else "cuda"


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|apple|amd|[^a-z0-9]", "", name.lower())
