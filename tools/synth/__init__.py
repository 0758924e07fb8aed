"""Random-weight pairs of real shapes: speed can be measured, and every family tested, without a download.

    from synth import write_pair
    pair = write_pair("tiny", folder)

`tools/synth.py` is the command. Nothing in the package `opsin` needs this folder, and the wheel does not hold it.
"""

from synth.families import FAMILIES
from synth.files import LLM_TYPES, MMPROJ_TYPES, write_pair, write_shape
from synth.shapes import SHAPES

__all__ = ["FAMILIES", "KINDS", "LLM_TYPES", "MMPROJ_TYPES", "SHAPES", "write_pair", "write_shape"]

KINDS = tuple(name for name in SHAPES if name.endswith("tiny"))
"""The tiny shapes, of which every family has one."""
