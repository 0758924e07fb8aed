"""The directories of TIFF files and EXIF blocks, read without trusting a number in them.

Older Pillows copy whatever a directory's entries claim, all of them over and over the same bytes if they say so: a
file of one megabyte can ask for gigabytes. So claims are added up here before Pillow sees the file, and orientation is
read here too. Sources: TIFF 6.0, section 2; EXIF 2.32, section 4.6; BigTIFF as libtiff writes it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ORIENTATION_TAG = 0x0112
MOST_PAGES = 10_000
_CHILDREN = frozenset((0x8769, 0x8825, 0xA005))
_MAGICS = (b"II*\x00", b"MM\x00*")
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_MOST_BLOCKS = 64
_MOST_NUMBERS = 2**20
_SLACK = 2**20


class _Entry(NamedTuple):
    tag: int
    kind: int
    number: int
    value: bytes


class _Reader:
    """One TIFF structure inside `data`, its offsets counted from `base`."""

    def __init__(self, data: bytes, base: int = 0) -> None:
        self._data = data
        self._base = base
        self.order = "<" if data[base : base + 2] == b"II" else ">"
        self._big = data[base + 2 : base + 4] in {b"+\x00", b"\x00+"}
        self._count, self._pointer, self._entry = ("Q", "Q", "HHQ8s") if self._big else ("H", "I", "HHI4s")

    def _number(self, code: str, at: int) -> int:
        (number,) = struct.unpack_from(self.order + code, self._data, self._base + at)
        return int(number)

    def first(self) -> int:
        """Offset of the first directory; raises struct.error outside of the data."""
        return self._number(self._pointer, 8 if self._big else 4)

    def following(self, at: int) -> int:
        """Offset of the directory after the one at `at`, 0 at the end; raises struct.error outside of the data."""
        size = struct.calcsize("<" + self._entry)
        return self._number(self._pointer, at + struct.calcsize(self._count) + size * self._number(self._count, at))

    def entries(self, at: int) -> Iterator[_Entry]:
        """Yield the entries of the directory at `at`, as many as the data hold."""
        size = struct.calcsize("<" + self._entry)
        start = self._base + at + struct.calcsize(self._count)
        whole = min(self._number(self._count, at), 65_535, max(0, len(self._data) - start) // size)
        for entry in struct.iter_unpack(self.order + self._entry, self._data[start : start + whole * size]):
            yield _Entry(*entry)

    def claims(self, at: int, depth: int = 0) -> int:
        """Bytes that the entries at `at` and the directories below claim, as far as one claim fits the data."""
        total, room = 0, len(self._data)
        for entry in self.entries(at):
            size = entry.number * _SIZES.get(entry.kind, 0)
            if size <= len(entry.value):
                if entry.tag in _CHILDREN and entry.kind in {4, 13} and depth < 2:
                    total += self.claims(self._number_in(entry.value), depth + 1)
            elif size <= room:
                total += size
                if entry.kind not in {1, 2, 6, 7} and entry.number > _MOST_NUMBERS:
                    total += 32 * entry.number
        return total

    def _number_in(self, value: bytes) -> int:
        (number,) = struct.unpack_from(self.order + "I", value)
        return int(number)


def claims_too_much(data: bytes, *, whole: bool) -> bool:
    """Whether directories in `data` claim more bytes than the file has, or more numbers than any picture needs.

    `whole`: the file is one TIFF; otherwise blocks that begin like one (EXIF) are looked for.
    """
    blocks = [0] if whole else []
    for magic in () if whole else _MAGICS:
        at = data.find(magic)
        while at >= 0 and len(blocks) <= _MOST_BLOCKS:
            blocks.append(at)
            at = data.find(magic, at + 1)
    if len(blocks) > _MOST_BLOCKS:
        return True
    limit = len(data) + _SLACK
    for base in blocks:
        reader = _Reader(data, base)
        try:
            if reader.claims(reader.first()) > limit:
                return True
        except (struct.error, OverflowError):
            continue  # it leads out of the file, where no decoder follows
    return False


def exif_orientation(block: bytes) -> int:
    """Orientation (1 to 8) in an EXIF block, with or without its `Exif` mark; 1 when it holds none that is valid."""
    block = block.removeprefix(b"Exif\x00\x00")
    if block[:4] not in _MAGICS:
        return 1
    reader = _Reader(block)
    try:
        for entry in reader.entries(reader.first()):
            if entry.tag == ORIENTATION_TAG:
                value: int = struct.unpack_from(reader.order + {3: "H", 4: "I"}.get(entry.kind, "B"), entry.value)[0]
                return value if 1 <= value <= 8 else 1
    except (struct.error, OverflowError):
        pass  # the directory leads out of the block: there is no orientation to be had
    return 1


def tiff_pages(data: bytes) -> int:
    """Pages in a TIFF, counted along its chain of directories up to MOST_PAGES; a chain that bites itself ends."""
    reader = _Reader(data)
    seen: set[int] = set()
    try:
        at = reader.first()
        while at and at not in seen and len(seen) < MOST_PAGES:
            following = reader.following(at)
            seen.add(at)
            at = following
    except (struct.error, OverflowError):
        pass  # the chain leads out of the file: what was seen up to there counts
    return max(1, len(seen))
