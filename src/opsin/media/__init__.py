"""Pictures: bytes from a file, an address or an array in, a checked `Picture` out.

This room recognises files by their bytes, bounds them before they are decoded, turns them upright, lays them on white
and hashes their pixels. It knows no models, prompts or HTTP servers.
"""

from __future__ import annotations

from opsin.media.decode import OpenPicture, picture_sha256
from opsin.media.load import Source, load_picture, read_data_url

__all__ = ["OpenPicture", "Source", "load_picture", "picture_sha256", "read_data_url"]
