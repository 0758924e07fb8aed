"""Getting one file of a row, in a process of the decoder pool: nothing that a file or a host does holds up a job."""

import asyncio
import dataclasses
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from opsin.core.errors import BadImage, BadParameter, FetchFailed
from opsin.core.image_options import ImageOptions, ImageSizes
from opsin.core.request import Image
from opsin.core.settings import ImageSettings
from opsin.images import is_pdf, read_data_url
from opsin.images.fetch import AddressPolicy, fetch, system_addresses
from opsin.images.metadata import read_metadata
from opsin.images.source import check_bytes, read_file, show
from opsin.jobs.item import FilePart, ImageRef
from opsin.worker import decoders

_public = AddressPolicy(where="ports 80 and 443 of public hosts", instead="or allow any with --fetch-private.")


def load(ref: ImageRef, options: ImageOptions, sizes: ImageSizes, limits: ImageSettings, private: bool) -> list[Image]:
    """What the model gets of it, in memory that a worker can map; `private` allows any host.

    Raises BadImage and its kinds, FetchFailed, and BadParameter for a part that is not there.
    """
    begin = time.perf_counter()
    data = _read(ref, limits, private)
    fetch_ms = (time.perf_counter() - begin) * 1e3
    first, *others = decoders.decode(data, limits, options, sizes)
    return [dataclasses.replace(first, fetch_ms=fetch_ms), *others]


def metadata(ref: ImageRef, limits: ImageSettings, private: bool) -> dict[str, str]:
    """What the file says of itself: nothing, if it is a document. Raises as `load` does."""
    data = _read(ref, limits, private)
    return {} if is_pdf(data) else read_metadata(data, limits)


def _read(ref: ImageRef, limits: ImageSettings, private: bool) -> bytes:
    """The bytes of the file. Raises BadImage, ImageTooLarge, FetchFailed."""
    if not isinstance(ref, str):
        return _inside(ref, limits)
    if ref[:5].lower() == "data:":
        return read_data_url(ref, limits)
    scheme = ref.partition("://")[0].lower() if "://" in ref[:20] else "file"
    if scheme in {"http", "https"}:
        return asyncio.run(fetch(ref, limits, system_addresses if private else _public))
    if scheme != "file":
        return _remote(ref, scheme, limits)
    return read_file(unquote(urlsplit(ref).path) if ref[:7].lower() == "file://" else ref, limits)


def _inside(ref: bytes | FilePart, limits: ImageSettings) -> bytes:
    """Bytes of a table's cell, or of a part of a file."""
    check_bytes(len(ref) if isinstance(ref, bytes) else ref.size, "The image", limits)
    if isinstance(ref, bytes):
        return ref
    try:
        with Path(ref.path).open("rb") as file:
            file.seek(ref.offset)
            return file.read(ref.size)
    except OSError as error:
        raise BadImage(f"{show(ref.path)} cannot be read ({error.strerror}): check the file.") from None


def _remote(ref: str, scheme: str, limits: ImageSettings) -> bytes:
    """A file that fsspec knows how to read."""
    try:
        import fsspec
    except ImportError:
        raise BadParameter("Addresses other than http(s) need fsspec: pip install 'opsin[batch]'.") from None
    try:
        with fsspec.open(ref, "rb") as file:
            data: bytes = file.read(limits.max_bytes + 1)
    except Exception as error:  # noqa: BLE001 - each file system of fsspec has errors of its own
        why = str(error).partition("\n")[0] or type(error).__name__
        raise FetchFailed(f"{show(ref)} cannot be read by fsspec ({scheme}: {why}): check the address.") from None
    check_bytes(len(data), show(ref), limits)
    return data
