"""Checks batches, answers their rows beside live requests, and writes their results."""

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import httpx
from platformdirs import user_data_path
from pydantic import Field, ValidationError
from starlette.types import ASGIApp

from opsin.core.errors import OpsinError, found_wrong
from opsin.core.settings import ServerSettings
from opsin.server.errors import StoreFailed
from opsin.server.handler import ModelManager
from opsin.server.middleware import wrong_json
from opsin.server.parts import Sent
from opsin.server.schema import dumps

if TYPE_CHECKING:  # SQLAlchemy takes long to import, and most servers never need it
    from opsin.server.batch_store import BatchStore, Row

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
_JSON = {"content-type": "application/json"}
_EXPIRED = {
    "code": "batch_expired",
    "message": "The batch's completion window ended before this request was answered: send it in a new batch.",
}


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
        self._make_app = functools.cache(make_app)
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
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        if self._store is not None:
            await asyncio.to_thread(self._store.close)

    async def call(self, work: "Callable[[BatchStore], T]") -> T:
        """What `work` makes of the store, in a thread. Raises StoreFailed, and BadParameter if it cannot be opened."""

        def do() -> T:
            with self._opening:
                if self._store is None:
                    from opsin.server.batch_store import BatchStore

                    self._store = BatchStore(self.settings.batch_store or default_file())
            return work(self._store)

        try:
            answer = asyncio.get_running_loop().run_in_executor(self._threads, do)
        except RuntimeError as error:  # no memory for a thread
            raise StoreFailed(f"The store of files and batches cannot be used now: {error}.") from None
        done = await answer
        if not self._tasks:
            works = (
                (self._feed, self._feed_now, _POLL_SECONDS),
                (self._keep, self._keep_now, _POLL_SECONDS),
                (self._renew, asyncio.Event(), _RENEW_SECONDS),
                (self._clean_up, asyncio.Event(), _CLEAN_SECONDS),
            )
            self._tasks = [asyncio.create_task(_repeat(*one)) for one in works]
        return done

    def wake(self) -> None:
        """There is something new to do."""
        self._keep_now.set()

    async def _renew(self) -> None:
        rows = tuple(self._running.values())
        await self.call(lambda store: store.renew(rows))

    async def _clean_up(self) -> None:
        await self.call(lambda store: store.clean_up(self.settings.keep_days * 86_400))

    async def _feed(self) -> None:
        """Keep as many rows running as there are slots."""
        room = self.model.slots - len(self._running)
        if self.model.ready and room > 0:
            for row in await self.call(lambda store: store.claim(self.model.name, room)):
                task = asyncio.create_task(self._answer(row))  # one each: it enters the model as a request does
                self._running[task] = row
                task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._feed_now.set()

    async def _answer(self, row: "Row") -> None:
        with _complaining():
            response = await self._ask(row)
            status, body = response["status_code"], response["body"]
            if status in {429, 503}:
                counted = body["error"]["code"] not in _NOT_ITS_FAULT
                if not counted or row.attempt < MOST_RETRIES:
                    wait = 2.0**row.attempt
                    await self.call(lambda store: store.give_back(row, wait, counted=counted))
                    return
            line = _result(row.custom_id, response=response)
            if await self.call(lambda store: store.finish(row, line, good=status == 200)):
                self.wake()

    async def _ask(self, row: "Row") -> dict[str, Any]:
        """The answer to a row."""
        key = self._keys.get(row.owner, row.owner)
        body = await asyncio.to_thread(lambda: json.dumps(json.loads(row.line)["body"]).encode())
        reply = await post(self._make_app(), key, row.endpoint, content=body, headers=_JSON)
        request_id = reply.headers.get("x-request-id", "")
        return {"status_code": reply.status_code, "request_id": request_id, "body": json.loads(reply.content)}

    async def _keep(self) -> None:
        """Check new batches, and end those that are through."""
        while await self.call(self._work_on_one):
            self._feed_now.set()

    def _work_on_one(self, store: "BatchStore") -> bool:
        """Check or end one batch; False when there is none."""
        batch = store.take_batch()
        if batch is not None and batch["status"] == "validating":
            rows, errors = self._read(store.lines(batch, self.settings.max_body_bytes), batch["endpoint"])
            store.begin(batch, rows, errors)
        elif batch is not None:
            store.end(batch, functools.partial(_result, error=_EXPIRED))
        return batch is not None

    def _read(
        self, lines: Iterable[tuple[int, bytes]], endpoint: str
    ) -> tuple[Iterable[tuple[str, int, int]], list[dict[str, Any]]]:
        """The rows of a batch's input, or what is wrong with them, as the batch's `errors` say it."""
        rows: dict[str, tuple[str, int, int]] = {}
        errors: list[dict[str, Any]] = []
        for number, (start, line) in enumerate(lines, 1):
            found = self._read_line(line, endpoint, rows) if line.strip() else None
            if isinstance(found, str):
                rows[found] = found, start, len(line)
            elif found is not None:
                errors.append({**found, "line": number})
                if len(errors) == MAX_ERRORS or found["code"] == "too_many_rows":
                    break
        if not rows and not errors:
            errors.append(_wrong("empty_file", "The file has no rows: write one JSON object a line."))
        return rows.values(), errors

    def _read_line(self, line: bytes, endpoint: str, known: Collection[str]) -> str | dict[str, Any]:
        """The custom_id of a row, or what is wrong with it."""
        if len(known) == self.settings.max_batch_rows:
            return _wrong("too_many_rows", f"The file has more than {len(known):,} rows, the limit: split it.")
        if len(line) > (most := self.settings.max_body_bytes):
            return _wrong("line_too_long", f"The line has more than {most:,} bytes, the limit: send smaller images.")
        if wrong_json(line):
            return _wrong("invalid_json_line", "The line has NUL bytes, or too many keys or elements: split it.")
        try:
            row = _Line.model_validate_json(line)
        except ValidationError as error:
            found = error.errors()[0]
            param = str(found["loc"][0]) if found["loc"] else None
            return _wrong(f"invalid_{param or 'json_line'}", f"{found_wrong(param or 'line', found['msg'])}.", param)
        url = f"The url must be {endpoint}, the endpoint of the batch."
        checks = (
            (row.custom_id in known, "duplicate_custom_id", "custom_id", "An earlier line has this custom_id."),
            (row.url != endpoint, "invalid_url", "url", url),
            (row.body.get("stream"), "streaming_unsupported", "body.stream", "Leave stream out: a batch does not."),
        )
        return next((_wrong(code, said, field) for wrong, code, field, said in checks if wrong), row.custom_id)


async def post(app: ASGIApp, key: str, path: str, **body: Any) -> httpx.Response:
    """What an application answers to a request of `key`, by the way that live ones take from their limits on."""
    state = {"key": key}
    transport = httpx.ASGITransport(
        lambda scope, receive, send: app({**scope, "state": state}, receive, send), raise_app_exceptions=False
    )
    response = await transport.handle_async_request(httpx.Request("POST", f"http://127.0.0.1{path}", **body))
    await response.aread()
    return response


class _Line(Sent):
    custom_id: str = Field(max_length=MAX_CUSTOM_ID, pattern=r"^[^\x00]+$")  # PostgreSQL keeps no NUL
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


def _wrong(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": param, "line": None}


def _result(custom_id: str, *, response: Any = None, error: Any = None) -> bytes:
    """A line of a batch's files."""
    name = f"batch_req_{secrets.token_hex(16)}"
    return dumps({"id": name, "custom_id": custom_id, "response": response, "error": error}) + b"\n"


async def _repeat(work: Callable[[], Awaitable[None]], now: asyncio.Event, seconds: float) -> None:
    """Work at once, whenever `now` is set, and after that many seconds without."""
    while True:
        now.clear()
        with _complaining():
            await work()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await now.wait()


@contextlib.contextmanager
def _complaining() -> Iterator[None]:
    """What fails here is tried again later."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, the next row must not wait for it
        _LOG.warning("batches: this is tried again: %s", error, exc_info=not isinstance(error, OpsinError))
