"""Pictures: bytes from a file, an address or an array in, checked `Picture` out.

What this room is for: telling what a file is by its bytes, bounding it before it is decoded, turning it upright, laying
it on white, and giving it the identity of its pixels. It refuses to know models, prompts, tokens, llama.cpp and HTTP
servers; what a model makes of a picture's size is not its business.
"""

from __future__ import annotations

from opsin.media.load import Source, load_picture, picture_sha256

__all__ = ["Source", "load_picture", "picture_sha256"]
