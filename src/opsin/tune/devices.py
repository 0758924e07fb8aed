"""What devices can do by their data sheets, and the share of it that llama.cpp was seen to reach.

`DEVICES` and `REACHED` are plain data: a new device is a new row.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from opsin.core.errors import BadParameter

Group = Literal["cuda", "hbm", "metal", "ultra", "cpu", "measured-cpu"]

THIS = "this"
"""The name of the machine at hand."""
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

    `rate` is what matrices are multiplied with: dense fp16 tensor cores with fp32 accumulation on CUDA, the GPU's
    fp32 rate on Apple silicon, all cores' fp32 vector rate at base clock on CPUs. `memory` is the largest that is
    sold; 0 where it is unknown.
    """

    name: str
    title: str
    group: Group
    bandwidth: float
    rate: float
    memory: float

    @property
    def is_apple(self) -> bool:
        """Whether its GPU shares the memory of the machine."""
        return self.group in {"metal", "ultra"}

    @property
    def usable(self) -> float:
        """Bytes that models can have: macOS leaves the GPU two thirds up to 36 GiB, above that three quarters.

        Source: `recommendedMaxWorkingSetSize` in logs of llama.cpp; newer macOS gives somewhat more. At hand that is
        what ggml calls the device's memory.
        """
        if not self.is_apple or self.name == THIS:
            return self.memory
        return self.memory * (2 / 3 if self.memory <= 36 * _GIB else 3 / 4)


# Medians over devices of published measurements of llama.cpp, 7B to 31B models in q4 to f16, each divided by the data
# sheet. CUDA and Apple: llama.cpp's discussion 4167 and pull requests 3084, 4766, 6017, 7676, 15802, 20586 and 24127,
# pavlokhmel.com (June 2026, cards with HBM). CPU: ik_llama.cpp's pull request 54, normiebench's issue 42, and this
# project's two cores of an EPYC. Encodes are hardly published: one report each for CUDA (llama.cpp-omni's pull
# request 55) and Apple (llama.cpp's issue 6883). "measured-cpu" is a CPU at hand, by the rates that ggml's own
# f16 kernels reach there: the `small` pair on two cores of an EPYC, of which other programs used a part.
REACHED: dict[Group, Reached] = {
    "cuda": Reached(encode=0.09, prefill=0.87, decode=0.71),
    "hbm": Reached(encode=0.09, prefill=0.35, decode=0.36),
    "metal": Reached(encode=0.21, prefill=0.74, decode=0.79),
    "ultra": Reached(encode=0.21, prefill=0.64, decode=0.42),
    "cpu": Reached(encode=0.65, prefill=0.81, decode=0.55),
    "measured-cpu": Reached(encode=0.63, prefill=0.57, decode=0.45),
}

# name, title, group, 10^9 bytes/s, 10^12 operations/s, GiB
# Sources: NVIDIA's architecture whitepapers (GA102, Ada, RTX Blackwell) and data sheets (A100, H100, H200, L4; dense
# is half of the sparse rate). Apple's press releases; the rates of M2 Pro and later are cores x 256 x clock, as Apple
# publishes none. CPUs: makers' product pages; base clock x lanes x 2 units x 2 operations x cores, all channels.
# fmt: off
_ROWS: tuple[tuple[str, str, Group, float, float, float], ...] = (
    ("rtx-3090", "NVIDIA GeForce RTX 3090", "cuda", 936, 71, 24),
    ("rtx-4090", "NVIDIA GeForce RTX 4090", "cuda", 1008, 165.2, 24),
    ("rtx-5090", "NVIDIA GeForce RTX 5090", "cuda", 1792, 209.5, 32),
    ("l4", "NVIDIA L4", "cuda", 300, 121, 24),
    ("a100-40gb", "NVIDIA A100 40 GB", "hbm", 1555, 312, 40),
    ("a100-80gb-pcie", "NVIDIA A100 80 GB PCIe", "hbm", 1935, 312, 80),
    ("a100-80gb-sxm", "NVIDIA A100 80 GB SXM", "hbm", 2039, 312, 80),
    ("h100-pcie", "NVIDIA H100 PCIe", "hbm", 2000, 756, 80),
    ("h100-sxm", "NVIDIA H100 SXM", "hbm", 3350, 989, 80),
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
    ("ryzen-5950x", "AMD Ryzen 9 5950X, DDR4-3200", "cpu", 51.2, 1.74, 0),
    ("ryzen-7950x", "AMD Ryzen 9 7950X, DDR5-5200", "cpu", 83.2, 2.3, 0),
    ("core-i7-12700", "Intel Core i7-12700, DDR5-4800", "cpu", 76.8, 0.64, 0),
    ("core-i9-13900k", "Intel Core i9-13900K, DDR5-5600", "cpu", 89.6, 1.33, 0),
    ("core-i7-7820hq", "Intel Core i7-7820HQ, DDR4-2400", "cpu", 38.4, 0.37, 0),
    ("xeon-gold-6338", "Intel Xeon Gold 6338, DDR4-3200", "cpu", 204.8, 4.1, 0),
    ("xeon-8480", "Intel Xeon Platinum 8480+, DDR5-4800", "cpu", 307.2, 7.17, 0),
    ("epyc-7763", "AMD EPYC 7763 (Zen 3), DDR4-3200", "cpu", 204.8, 5.02, 0),
    ("epyc-9654", "AMD EPYC 9654 (Zen 4), DDR5-4800", "cpu", 460.8, 7.37, 0),
)
# fmt: on

DEVICES: dict[str, Device] = {
    name: Device(name, title, group, gb_s * 1e9, tera * 1e12, gib * _GIB)
    for name, title, group, gb_s, tera, gib in _ROWS
}
_SHORT = {"a100": "a100-80gb-sxm", "h100": "h100-sxm"}


def find_device(name: str) -> Device:
    """The device of a name, forgiving about case, dashes, spaces and makers. Raises BadParameter with nearest names."""
    wanted = re.sub(r"^(nvidia|geforce|apple|amd|intel)+", "", _plain(name)) or _plain(name)
    known = {_plain(word): device for device in DEVICES.values() for word in (device.name, device.title)}
    known |= {short: DEVICES[full] for short, full in _SHORT.items()}
    # "5090" and "7763" end a name: whole words of it only.
    ends = [
        device for device in DEVICES.values() if wanted in {_plain(device.name.split("-", cut)[-1]) for cut in (1, 2)}
    ]
    found = known.get(wanted) or known.get(_plain(name)) or (ends[0] if len(ends) == 1 else None)
    if found is not None:
        return found
    near = difflib.get_close_matches(wanted, list(known), 3, 0.3)
    names = dict.fromkeys(known[word].name for word in near) or list(DEVICES)[:3]
    raise BadParameter(
        f"There is no device {name!r} in the table: the nearest are {', '.join(names)}; "
        "`opsin predict --devices` lists all, and `--device this` measures the machine at hand."
    )


def gpu_group(description: str) -> Group:
    """The group of a GPU at hand, by its maker's name for it."""
    name = description.lower()
    if "apple" in name:
        return "ultra" if "ultra" in name else "metal"
    return "hbm" if re.search(r"a100|h100|h200", name) else "cuda"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
