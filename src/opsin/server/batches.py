"""/v1/batches: many requests in one file, answered beside live ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field

from opsin.server.batch_runner import BatchRunner, owner_of
from opsin.server.schema import Sent

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


class Client(NamedTuple):
    """Who asks, and what works on batches here."""

    owner: str
    runner: BatchRunner

    def kept_seconds(self, wanted: ExpiresAfter | None) -> int:
        """How long a file is kept: as long as a client wants, but not longer than the settings say."""
        most = self.runner.settings.keep_days * 86_400
        return most if wanted is None else min(most, wanted.seconds)


def _client(request: Request) -> Client:
    return Client(owner_of(request.state.key), request.app.state.batches)


Asking = Annotated[Client, Depends(_client)]


@router.post("/v1/batches")
async def create(body: BatchRequest, client: Asking) -> dict[str, Any]:
    """Begin a batch."""
    owner, runner = client
    values = body.model_dump(exclude={"output_expires_after"})
    values |= {"model": runner.model.name, "output_seconds": client.kept_seconds(body.output_expires_after)}
    made = await runner.call(lambda store: store.create(owner, _WINDOW_SECONDS, **values))
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
