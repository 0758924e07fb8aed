"""Images: bytes from a file, an address or an array in, a checked `Image` out, or those of a document's pages.

This room recognises files by their bytes, bounds them before they are decoded, turns them upright, converts
them to sRGB without transparency and hashes their pixels. It knows no models, prompts or HTTP servers.
"""

from opsin.images.decode import OpenImage, load_image, load_images
from opsin.images.documents import OpenPages
from opsin.images.sniff import ENDINGS, is_pdf
from opsin.images.source import read_data_url

__all__ = ["ENDINGS", "OpenImage", "OpenPages", "is_pdf", "load_image", "load_images", "read_data_url"]
