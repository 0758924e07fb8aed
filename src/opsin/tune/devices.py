"""The devices of `devices.toml`: what they can do by their data sheets, and the share that llama.cpp reaches of it."""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from opsin.core.errors import BadParameter
from opsin.core.files import read_table

Group = Literal["cuda", "hbm", "metal", "ultra", "cpu", "measured-cpu"]

THIS = "this"  # the machine at hand
_GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Device:
    """One device. `bandwidth` in bytes a second, `rate` in floating-point operations a second, `memory` in bytes.

    `memory` is the largest that is sold; 0 where it is unknown.
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


_TABLE = read_table(__file__, "devices.toml")
REACHED: dict[Group, dict[str, float]] = _TABLE["reached"]
"""Shares of a device's rate (encode, prefill) and of its bandwidth (decode) that llama.cpp reaches."""
DEVICES: dict[str, Device] = {
    name: Device(name, row["title"], row["group"], row["gb_s"] * 1e9, row["tflops"] * 1e12, row["gib"] * _GIB)
    for name, row in _TABLE["devices"].items()
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
