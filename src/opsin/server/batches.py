"""/v1/files and /v1/batches: many requests in one file, answered beside live ones.

Uploads and downloads pass through in pieces.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from operator import methodcaller
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from opsin.core.errors import Cancelled
from opsin.core.settings import ServerSettings
from opsin.server.batch_runner import BatchRunner, owner_of
from opsin.server.errors import BadField, ErrorResponse, StoreFailed
from opsin.server.middleware import LEAST_BYTES_PER_SECOND
from opsin.server.parts import Sent

MAX_UPLOADS = 4
"""Files that arrive at the same time; each lies in the folder for temporary files until it is whole."""
_FORM_BYTES = 64 * 2**10  # what a form may have beside its file
LEAST_KEPT_SECONDS = 3_600
"""The shortest time that a client may have a file kept for."""
_WINDOW_SECONDS = 86_400

router = APIRouter(tags=["Batch"])


class ExpiresAfter(Sent):
    """How long a file is kept."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=LEAST_KEPT_SECONDS)


class BatchRequest(Sent):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    output_expires_after: ExpiresAfter | None = None


class Client:
    """Who asks, and what works on batches here."""

    def __init__(self, request: Request) -> None:
        self.owner = owner_of(request.state.key)
        self.runner: BatchRunner = request.app.state.batches

    def kept_seconds(self, wanted: ExpiresAfter | None) -> int:
        """How long a file is kept: as long as a client wants, but not longer than the settings say."""
        most = self.runner.settings.keep_days * 86_400
        return most if wanted is None else min(most, wanted.seconds)


Asking = Annotated[Client, Depends()]


@router.post("/v1/batches")
async def create(body: BatchRequest, client: Asking) -> dict[str, Any]:
    """Begin a batch."""
    runner = client.runner
    values = body.model_dump(exclude={"output_expires_after"})
    values |= {"model": runner.model.name, "output_seconds": client.kept_seconds(body.output_expires_after)}
    made = await runner.call(lambda store: store.create(client.owner, _WINDOW_SECONDS, **values))
    runner.wake()
    return _shown(made)


@router.get("/v1/batches")
async def batches(
    client: Asking, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    """The key's batches, newest first."""
    return page(*await client.runner.call(lambda store: store.page("batch", client.owner, after, limit)), _shown)


@router.get("/v1/batches/{batch_id}")
async def batch(batch_id: str, client: Asking) -> dict[str, Any]:
    """How far a batch is."""
    return _shown(await client.runner.call(lambda store: store.find("batch", client.owner, batch_id)))


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel(batch_id: str, client: Asking) -> dict[str, Any]:
    """Begin no more requests of a batch; what is answered becomes its output."""
    cancelled = await client.runner.call(lambda store: store.cancel(client.owner, batch_id))
    client.runner.wake()
    return _shown(cancelled)


def page(rows: Sequence[Any], more: bool, shown: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A part of a list, as OpenAI's clients page through it."""
    data = [shown(row) for row in rows]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **ends, "has_more": more}


_SAME = (
    "id", "endpoint", "model", "input_file_id", "completion_window", "status", "output_file_id", "error_file_id",
    "created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at",
    "cancelling_at", "cancelled_at", "metadata",
)  # fmt: skip


def _shown(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        "object": "batch",
        **{name: row[name] for name in _SAME},
        "errors": row["errors"] and {"object": "list", "data": row["errors"]},
        "request_counts": {name: row[name] for name in ("total", "completed", "failed")},
    }


class TooLarge(BadField, http_status=413):
    """The file has too many bytes."""

    def __init__(self, most: int) -> None:
        super().__init__(f"The file is larger than {most:,} bytes, the limit: split it.", "file")


@router.post("/v1/files", response_model=None)
async def upload(request: Request, client: Asking) -> Response | dict[str, Any]:
    """Keep a file for a batch."""
    uploads = request.app.state.uploads
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return ErrorResponse(415, "Send a form, with Content-Type: multipart/form-data.", "wrong_content_type")
    if uploads.locked():
        wait = {"Retry-After": "1"}
        return ErrorResponse(503, f"{MAX_UPLOADS} files arrive already: try again.", "busy", headers=wait)
    async with uploads:
        try:
            pieces = _pieces(request, client.runner.settings)
            form = await MultiPartParser(request.headers, pieces, max_files=1, max_fields=8).parse()
        except TimeoutError:
            return ErrorResponse(408, "The file came too slowly: send it faster, or in parts.", "timeout")
        except ClientDisconnect:
            raise Cancelled("The client left before its file was whole.") from None
        except MultiPartException as error:
            reason = error.message.rstrip(".")
            raise BadField(f"The form cannot be read ({reason}): send it as curl -F does.", None) from None
        except OSError as error:
            raise StoreFailed(f"The file cannot be kept now ({error.strerror}): try again later.") from None
        try:
            return await _keep(client, form)
        finally:
            await form.close()


async def _pieces(request: Request, settings: ServerSettings) -> AsyncGenerator[bytes, None]:
    """The body as it comes. Raises TooLarge, TimeoutError, and ClientDisconnect."""
    size, began, patience = 0, time.monotonic(), settings.slow_reader_seconds
    most, stream = settings.max_file_bytes + _FORM_BYTES, aiter(request.stream())
    while max(size, int(request.headers.get("content-length", "0"))) <= most:
        left = began + patience + size / LEAST_BYTES_PER_SECOND - time.monotonic()
        async with asyncio.timeout(min(patience, left)):
            piece = await anext(stream, None)
        if piece is None:
            return
        size += len(piece)
        yield piece
    raise TooLarge(settings.max_file_bytes)


async def _keep(client: Client, form: FormData) -> dict[str, Any]:
    settings, file = client.runner.settings, form.get("file")
    if not isinstance(file, UploadFile):
        raise BadField("The field 'file' is missing: send the file in it.", "file")
    if form.get("purpose") != "batch":
        raise BadField("The purpose must be batch: files serve nothing else here.", "purpose")
    if (file.size or 0) > settings.max_file_bytes:
        raise TooLarge(settings.max_file_bytes)
    wanted = {name: form.get(f"expires_after[{name}]") for name in ("anchor", "seconds")}
    try:
        after = ExpiresAfter.model_validate(wanted, strict=False) if any(wanted.values()) else None
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    name = "".join(sign if sign.isprintable() else "?" for sign in (file.filename or "")[-255:])
    limits = {"seconds": client.kept_seconds(after), "most_stored": settings.max_stored_bytes}
    return _shown_file(await client.runner.call(lambda store: store.put(client.owner, name, file.file, **limits)))


@router.get("/v1/files")
async def files(
    client: Asking,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str = "",
) -> dict[str, Any]:
    """The key's files."""
    which: dict[str, Any] = {"oldest_first": order == "asc", "purpose": purpose}
    found = await client.runner.call(lambda store: store.page("file", client.owner, after, limit, **which))
    return page(*found, _shown_file)


@router.get("/v1/files/{file_id}")
async def file_by_id(file_id: str, client: Asking) -> dict[str, Any]:
    """What is known of a file."""
    return _shown_file(await client.runner.call(lambda store: store.find("file", client.owner, file_id)))


@router.delete("/v1/files/{file_id}")
async def delete(file_id: str, client: Asking) -> dict[str, Any]:
    """Delete a file that no running batch reads."""
    await client.runner.call(lambda store: store.delete_file(client.owner, file_id))
    return {"id": file_id, "object": "file", "deleted": True}


@router.get("/v1/files/{file_id}/content")
async def content(file_id: str, client: Asking) -> Response:
    """The file itself."""
    file = await client.runner.call(lambda store: store.find("file", client.owner, file_id))

    async def pieces() -> AsyncGenerator[bytes, None]:
        n = 0
        while data := await client.runner.call(methodcaller("chunk", file["number"], n)):
            yield data
            n += 1

    headers = {"Content-Length": str(file["bytes"]), "Cache-Control": "no-store"}
    return StreamingResponse(pieces(), headers=headers, media_type="application/octet-stream")


def _shown_file(row: Mapping[Any, Any]) -> dict[str, Any]:
    same = ("id", "bytes", "created_at", "expires_at", "filename", "purpose")
    return {"object": "file", **{name: row[name] for name in same}, "status": "processed", "status_details": None}
