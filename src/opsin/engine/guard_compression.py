"""Compression: the latest text says almost nothing that the text before it did not."""

from __future__ import annotations

import zlib

# Looked at every STRIDE tokens: the last LATEST characters, packed with the CONTEXT before them as a dictionary. What
# a cycle with small slips costs is 2 to 4 bytes of 100; logs, tables and counted verses, which differ in a number a
# line, cost 8 and more.
STRIDE = 64
LATEST = 768
CONTEXT = 1280
MAX_RATIO = 0.045


def packs_too_well(text: str) -> bool:
    """Whether the end of the text is nearly free given what stands before it."""
    if len(text) < LATEST + CONTEXT:
        return False
    latest = text[-LATEST:].encode("utf-8", "replace")
    context = text[-LATEST - CONTEXT : -LATEST].encode("utf-8", "replace")
    packer = zlib.compressobj(6, zlib.DEFLATED, -15, 8, zlib.Z_DEFAULT_STRATEGY, context)
    packed = len(packer.compress(latest)) + len(packer.flush())
    return packed <= MAX_RATIO * len(latest)
