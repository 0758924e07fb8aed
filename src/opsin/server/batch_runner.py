"""Checks batches, answers their rows beside live requests, and writes their results."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import methodcaller
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from platformdirs import user_data_path
from starlette.types import ASGIApp, Receive, Scope, Send

from opsin.core.errors import OpsinError
from opsin.core.settings import ServerSettings
from opsin.server.errors import BadField
from opsin.server.handler import ModelManager
from opsin.server.middleware import wrong_json
from opsin.server.schema import dumps

if TYPE_CHECKING:  # SQLAlchemy takes long to import, and most servers never need it
    from sqlalchemy import RowMapping

    from opsin.server.batch_store import BatchStore
    from opsin.server.batch_tables import Row

T = TypeVar("T")
_LOG = logging.getLogger("opsin.server")
MAX_CUSTOM_ID = 512
"""Characters of a row's custom_id."""
MAX_ERRORS = 50
"""Wrong lines that a batch names."""
MOST_RETRIES = 3
"""How often a row is asked again when the model's process died under it."""
_POLL_SECONDS, _RENEW_SECONDS, _CLEAN_SECONDS = 1.0, 5.0, 300.0
# Nothing that a row could help: it does not count as an attempt.
_NOT_ITS_FAULT = frozenset(("not_ready", "engine_closed"))


def default_file() -> Path:
    """`$XDG_DATA_HOME/opsin/batches.sqlite`, or its like on macOS and Windows."""
    return user_data_path("opsin", appauthor=False) / "batches.sqlite"


def owner_of(key: str) -> str:
    """What stands in the store for a key's label."""
    return hashlib.sha256(f"opsin batches {key}".encode()).hexdigest()[:32]


class BatchRunner:
    """The store of one server, opened when it is first needed, and the tasks that work on its batches.

    `keys` are the labels of all keys. `make_app` makes the application that answers rows; of a row's key it knows what
    stands in `scope["state"]["key"]`. Used on one event loop.
    """

    def __init__(
        self, settings: ServerSettings, model: ModelManager, keys: Sequence[str], make_app: Callable[[], ASGIApp]
    ) -> None:
        self.settings = settings
        self.model = model
        self._keys = {owner_of(key): key for key in ("", *keys)}
        self._make_app = make_app
        self._app: ASGIApp | None = None
        self._store: BatchStore | None = None
        self._opening = Lock()
        self._threads = ThreadPoolExecutor(4, "opsin-batches")
        self._tasks: list[asyncio.Task[None]] = []
        self._running: dict[asyncio.Task[None], Row] = {}
        self._feed_now, self._keep_now = asyncio.Event(), asyncio.Event()

    async def start(self) -> None:
        """Go on with what an earlier run left, if there is a store. Raises BadParameter if it cannot be opened."""
        place = self.settings.batch_store
        if place != "none" and (place or default_file().exists()):
            await self.call(bool)

    async def close(self) -> None:
        """End all work; what is not finished is given back."""
        tasks = [*self._tasks, *self._running]
        rows = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if (store := self._store) is not None:

            def end() -> None:
                with contextlib.suppress(OpsinError):  # else they come back when their leases end
                    for row in rows:
                        store.give_back(row, 0, counted=False)
                store.close()

            await asyncio.to_thread(end)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def call(self, work: Callable[[BatchStore], T]) -> T:
        """What `work` makes of the store, in a thread. Raises StoreFailed, and BadParameter if it cannot be opened."""

        def do() -> T:
            with self._opening:
                if self._store is None:
                    from opsin.server.batch_store import BatchStore

                    self._store = BatchStore(self.settings.batch_store or default_file())
            return work(self._store)

        done = await asyncio.get_running_loop().run_in_executor(self._threads, do)
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._feed()), asyncio.create_task(self._keep())]
        return done

    def wake(self) -> None:
        """There is something new to do."""
        self._keep_now.set()

    async def _feed(self) -> None:
        """Keep as many rows running as there are slots, and renew their leases."""
        renewed = 0.0
        while True:
            self._feed_now.clear()
            found: list[Row] = []
            with _complaining():
                if time.monotonic() - renewed >= _RENEW_SECONDS:
                    held = tuple(self._running.values())
                    await self.call(methodcaller("renew", held))
                    renewed = time.monotonic()
                if self.model.ready and (room := self.model.slots - len(self._running)) > 0:
                    found = await self.call(methodcaller("claim", self.model.name, room))
            for row in found:
                task = asyncio.create_task(self._answer(row))  # one each: it enters the model as a request does
                self._running[task] = row
                task.add_done_callback(self._answered)
            await _wait(self._feed_now)

    def _answered(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._feed_now.set()

    async def _answer(self, row: Row) -> None:
        with _complaining():
            status, request_id, body = await self._ask(row)
            if status in {429, 503}:
                code = json.loads(body)["error"]["code"]
                counted = code not in _NOT_ITS_FAULT
                if not counted or row.attempt < MOST_RETRIES:
                    wait = 2.0**row.attempt
                    await self.call(lambda store: store.give_back(row, wait, counted=counted))
                    return
            response = dumps({"status_code": status, "request_id": request_id})[:-1] + b',"body":' + body + b"}"
            line = _result_line(row.batch_id, row.n, row.custom_id, response, b"null")
            if await self.call(lambda store: store.finish(row, line, good=status == 200)):
                self.wake()

    async def _ask(self, row: Row) -> tuple[int, str, bytes]:
        """Status, id and body of the answer to a row, by the way that live requests take from their limits on."""
        app = self._app = self._app or self._make_app()
        key = self._keys.get(row.owner, row.owner)

        async def as_owner(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "state": {"key": key}}, receive, send)

        # A line that was cut off, because its file was damaged, is answered as any body that is no JSON.
        body = await asyncio.to_thread(_body_of, row.line)
        request = httpx.Request("POST", f"http://127.0.0.1{row.endpoint}", content=body, headers=_JSON)
        response = await httpx.ASGITransport(as_owner, raise_app_exceptions=False).handle_async_request(request)
        return response.status_code, response.headers.get("x-request-id", ""), await response.aread()

    async def _keep(self) -> None:
        """Check new batches, end those that are through, and clean up."""
        cleaned = 0.0
        while True:
            self._keep_now.clear()
            with _complaining():
                if time.monotonic() - cleaned >= _CLEAN_SECONDS or not cleaned:
                    await self.call(lambda store: store.clean_up(self.settings.keep_days * 86_400))
                    cleaned = time.monotonic()
                while await self.call(self._work_on_one):
                    self._feed_now.set()
            await _wait(self._keep_now)

    def _work_on_one(self, store: BatchStore) -> bool:
        """Check or end one batch; False when there is none."""
        batch = store.take_batch()
        if batch is None:
            return False
        if batch["status"] == "validating":
            errors: list[dict[str, Any]] = []
            try:
                total = store.begin_rows(batch, self._rows(store, batch, errors))
            except BadField as error:  # its file's time is over
                errors = [_wrong(None, "file_not_found", str(error), None)]
            if errors:
                store.move(batch, "failed", errors=errors)
            else:
                store.move(batch, "in_progress", total=total)
            return True
        expired = batch["status"] == "finalizing" and batch["completed"] + batch["failed"] < batch["total"]

        def missing(n: int, custom_id: str) -> bytes:
            return _result_line(batch["id"], n, custom_id, b"null", dumps(_EXPIRED))

        files = {
            "output_file_id": store.write_results(batch, good=True),
            "error_file_id": store.write_results(batch, good=False, missing=missing if expired else None),
        }
        if batch["status"] == "cancelling":
            store.move(batch, "cancelled", **files)
        elif expired:
            store.move(batch, "expired", failed=batch["total"] - batch["completed"], **files)
        else:
            store.move(batch, "completed", **files)
        return True

    def _rows(
        self, store: BatchStore, batch: RowMapping, errors: list[dict[str, Any]]
    ) -> Iterator[tuple[str, int, int]]:
        """The rows of a batch's input; none come behind a wrong line, and `errors` says what is wrong with those."""
        seen: set[str] = set()
        settings, count = self.settings, 0
        for number, (start, line) in enumerate(store.lines(batch, settings.max_body_bytes), 1):
            if not line.strip():
                continue
            count += 1
            if count > settings.max_batch_rows:
                text = f"The file has more than {settings.max_batch_rows:,} rows, the limit: split it."
                errors.append(_wrong(number, "too_many_rows", text, None))
            elif len(line) > settings.max_body_bytes:
                text = f"The line has more than {settings.max_body_bytes:,} bytes, the limit: send smaller images."
                errors.append(_wrong(number, "line_too_long", text, None))
            elif isinstance(found := _read_line(line, batch["endpoint"], seen), str):
                seen.add(found)
                if not errors:
                    yield found, start, len(line)
            else:
                errors.append(_wrong(number, *found))
            if len(errors) >= MAX_ERRORS or count > settings.max_batch_rows:
                return
        if not count:
            errors.append(_wrong(None, "empty_file", "The file has no rows: write one JSON object a line.", None))


_JSON = {"content-type": "application/json"}
_EXPIRED = {
    "code": "batch_expired",
    "message": "The batch's completion window ended before this request was answered: send it in a new batch.",
}


def _wrong(line: int | None, code: str, message: str, param: str | None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": param, "line": line}


def _result_line(batch: str, n: int, custom_id: str, response: bytes, error: bytes) -> bytes:
    name = hashlib.sha256(f"{batch} {n}".encode()).hexdigest()[:32]
    head = dumps({"id": f"batch_req_{name}", "custom_id": custom_id})[:-1]
    return head + b',"response":' + response + b',"error":' + error + b"}\n"


def _read_line(line: bytes, endpoint: str, seen: set[str]) -> str | tuple[str, str, str | None]:
    """The custom_id of a row, or code, sentence and field of what is wrong with it."""
    try:
        value = None if wrong_json(line) else json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return "invalid_json_line", "The line is no JSON object in UTF-8, or a too large one: write one a line.", None
    name, body = value.get("custom_id"), value.get("body")
    streams = [field for field in ("stream", "stream_options") if isinstance(body, dict) and body.get(field)]
    wrong: tuple[str, str, str] | None = None
    if not isinstance(name, str) or not 0 < len(name) <= MAX_CUSTOM_ID:
        said = f"The custom_id is no text of 1 to {MAX_CUSTOM_ID} characters: give each row one of its own."
        return "invalid_custom_id", said, "custom_id"
    if name in seen:
        wrong = "duplicate_custom_id", f"An earlier line has the custom_id {name[:100]!r}: change one.", "custom_id"
    elif value.get("method") != "POST":
        wrong = "invalid_method", "The method must be POST.", "method"
    elif value.get("url") != endpoint:
        wrong = "invalid_url", f"The url must be {endpoint}, the endpoint of the batch.", "url"
    elif not isinstance(body, dict):
        wrong = "invalid_body", "The body is no JSON object: give what the endpoint takes.", "body"
    elif streams:
        field = streams[0]
        wrong = "streaming_unsupported", f"Answers of a batch do not stream: leave {field} out.", f"body.{field}"
    return wrong or name


def _body_of(line: bytes) -> bytes:
    try:
        value: Mapping[str, Any] = json.loads(line)
        return json.dumps(value["body"]).encode()
    except (ValueError, RecursionError):
        return line


async def _wait(event: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_POLL_SECONDS):
            await event.wait()


@contextlib.contextmanager
def _complaining() -> Iterator[None]:
    """What fails here is tried again later."""
    try:
        yield
    except OpsinError as error:
        _LOG.warning("batches: %s", error)
    except Exception:  # noqa: BLE001 - whatever it is, the next row must not wait for it
        _LOG.exception("batches: this failed and is tried again")
