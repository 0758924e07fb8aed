"""/v1/files: inputs and outputs of batches. Uploads and downloads pass through in pieces."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from opsin.core.settings import ServerSettings
from opsin.server.batches import ExpiresAfter, kept_seconds, of, page, reply
from opsin.server.errors import BadField, ErrorResponse, StoreFailed
from opsin.server.middleware import LEAST_BYTES_PER_SECOND

MAX_UPLOADS = 4
"""Files that arrive at the same time; each lies in the folder for temporary files until it is whole."""
_FORM_BYTES = 64 * 2**10  # what a form may have beside its file
_PIECE = 2**20

router = APIRouter(tags=["Batch"])


class _TooLarge(Exception):
    pass


@router.post("/v1/files")
async def upload(request: Request) -> Response:
    """Keep a file for a batch."""
    runner, _ = of(request)
    settings, uploads = runner.settings, request.app.state.uploads
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        return ErrorResponse(415, "Send a form, with Content-Type: multipart/form-data.", "wrong_content_type")
    if uploads.locked():
        wait = {"Retry-After": "1"}
        return ErrorResponse(503, f"{MAX_UPLOADS} files arrive already: try again.", "busy", headers=wait)
    async with uploads:
        try:
            parser = MultiPartParser(request.headers, _pieces(request, settings), max_files=1, max_fields=8)
            form = await parser.parse()
        except _TooLarge:
            message = f"The file is larger than {settings.max_file_bytes:,} bytes, the limit: split it."
            return ErrorResponse(413, message, "too_large")
        except TimeoutError:
            return ErrorResponse(408, "The file came too slowly: send it faster, or in parts.", "timeout")
        except ClientDisconnect:
            return ErrorResponse(499, "The client left before its file was whole.", "cancelled")
        except MultiPartException as error:
            reason = error.message.rstrip(".")
            raise BadField(f"The form cannot be read ({reason}): send it as curl -F does.", None) from None
        except OSError as error:
            raise StoreFailed(f"The file cannot be kept now ({error.strerror}): try again later.") from None
        async with contextlib.AsyncExitStack() as held:
            held.push_async_callback(form.close)
            return await _keep(request, form)


async def _keep(request: Request, form: Any) -> Response:
    runner, owner = of(request)
    settings, file = runner.settings, form.get("file")
    if not isinstance(file, UploadFile):
        raise BadField("The field 'file' is missing: send the file in it.", "file")
    if form.get("purpose") != "batch":
        raise BadField("The purpose must be batch: files serve nothing else here.", "purpose")
    size = file.size or 0
    if size > settings.max_file_bytes:
        message = f"The file is larger than {settings.max_file_bytes:,} bytes, the limit: split it."
        return ErrorResponse(413, message, "too_large", "file")
    wanted = {"anchor": form.get("expires_after[anchor]"), "seconds": form.get("expires_after[seconds]")}
    try:
        after = ExpiresAfter.model_validate(wanted, strict=False) if any(wanted.values()) else None
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    name = "".join(sign if sign.isprintable() else "?" for sign in (file.filename or "")[-255:])
    kept = await runner.call(
        lambda store: store.put(
            owner,
            name,
            iter(functools.partial(file.file.read, _PIECE), b""),
            size=size,
            seconds=kept_seconds(settings, after),
            most_stored=settings.max_stored_bytes,
        )
    )
    return reply(_shown(kept))


async def _pieces(request: Request, settings: ServerSettings) -> AsyncGenerator[bytes, None]:
    """The body as it comes. Raises _TooLarge, TimeoutError, and ClientDisconnect."""
    most = settings.max_file_bytes + _FORM_BYTES
    size, began, patience = 0, time.monotonic(), settings.slow_reader_seconds
    stream = aiter(request.stream())
    while int(request.headers.get("content-length", "0")) <= most and size <= most:
        left = began + patience + size / LEAST_BYTES_PER_SECOND - time.monotonic()
        async with asyncio.timeout(min(patience, left)):
            piece = await anext(stream, None)
        if piece is None:
            return
        size += len(piece)
        yield piece
    raise _TooLarge


@router.get("/v1/files")
async def files(
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str = "",
) -> Response:
    """The key's files."""
    runner, owner = of(request)
    oldest = order == "asc"
    found = await runner.call(
        lambda store: store.page("file", owner, after, limit, oldest_first=oldest, purpose=purpose)
    )
    return page(*found, _shown)


@router.get("/v1/files/{file_id}")
async def file_by_id(file_id: str, request: Request) -> Response:
    """What is known of a file."""
    runner, owner = of(request)
    return reply(_shown(await runner.call(lambda store: store.find("file", owner, file_id))))


@router.delete("/v1/files/{file_id}")
async def delete(file_id: str, request: Request) -> Response:
    """Delete a file that no running batch reads."""
    runner, owner = of(request)
    await runner.call(lambda store: store.delete_file(owner, file_id))
    return reply({"id": file_id, "object": "file", "deleted": True})


@router.get("/v1/files/{file_id}/content")
async def content(file_id: str, request: Request) -> Response:
    """The file itself."""
    runner, owner = of(request)
    file = await runner.call(lambda store: store.find("file", owner, file_id))
    number = file["number"]

    async def pieces() -> AsyncIterator[bytes]:
        n = 0
        while data := await runner.call(lambda store, n=n: store.chunk(number, n)):  # type: ignore[misc]
            yield data
            n += 1

    headers = {"Content-Length": str(file["bytes"]), "Cache-Control": "no-store"}
    return StreamingResponse(pieces(), headers=headers, media_type="application/octet-stream")


def _shown(row: Mapping[Any, Any]) -> dict[str, Any]:
    same = ("id", "bytes", "created_at", "expires_at", "filename", "purpose")
    return {"object": "file", **{name: row[name] for name in same}, "status": "processed", "status_details": None}
