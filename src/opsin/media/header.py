"""Facts about a picture file that must be known before, or beside, Pillow's own reading of it.

The counts are bounded: a file that claims millions of frames costs no more than one with ten thousand.
"""

from __future__ import annotations

MOST_FRAMES = 10_000


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in a WebP file's first chunk, or None; libwebp makes its canvas as soon as it is opened."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return None


def png_frames(data: bytes) -> int:
    """Frames an animated PNG announces; 1 for a plain one."""
    at = 8
    for _ in range(64):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"acTL":
            return max(1, int.from_bytes(data[at + 8 : at + 12], "big"))
        if kind in {b"IDAT", b"IEND", b""}:
            return 1
        at += 12 + size
    return 1


def gif_frames(data: bytes) -> int:
    """Frames in a GIF, counted by their descriptors up to MOST_FRAMES, without decoding any."""

    def skip_blocks(at: int) -> int:
        while at < len(data) and data[at]:
            at += 1 + data[at]
        return at + 1

    frames, at = 0, 13
    if len(data) > 10 and data[10] & 0x80:
        at += 3 << ((data[10] & 7) + 1)
    while at + 9 < len(data) and frames < MOST_FRAMES:
        if data[at] == 0x21:
            at = skip_blocks(at + 2)
        elif data[at] == 0x2C:
            frames += 1
            table = 3 << ((data[at + 9] & 7) + 1) if data[at + 9] & 0x80 else 0
            at = skip_blocks(at + 11 + table)
        else:
            break
    return max(1, frames)
