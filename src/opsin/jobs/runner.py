"""Asks the rows of an input: reads and decodes ahead, keeps the engine's slots full, writes in groups."""

import asyncio
import contextlib
import hashlib
import heapq
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path

from opsin.core.answer import Stages
from opsin.core.errors import BadInput, EngineClosed, EngineDied, OpsinError, copy_of
from opsin.jobs.asker import Asked, Asker, thumbnail
from opsin.jobs.item import Item
from opsin.jobs.ledger import DONE, FAILED, Ended, Ledger, LedgerBroken
from opsin.jobs.output import Output, OutputFailed
from opsin.jobs.row import Row, answer_row
from opsin.worker import NotReady

SAMPLES = 24
"""Images that the report shows."""
_AT_ONCE = 256  # rows that are read from the input together
_GROUP_ROWS, _GROUP_SECONDS = 256, 1.0
_DEATHS = 2  # of the engine under a row, after which it is asked alone
_AGAIN_SECONDS = 0.2


class DuplicateId(BadInput):
    """Another row of the input has the same id."""


@dataclass(slots=True)
class Figures:
    """How a run goes. `before` rows were there when it began; `same` were answered by another row's answer."""

    total: int | None = None
    before: int = 0
    done: int = 0
    same: int = 0
    images: int = 0
    cached: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    began: float = field(default_factory=time.monotonic)


class _Slots:
    """Room for so many rows in the engine, first come, first served."""

    def __init__(self, room: int) -> None:
        self._room, self._free, self._line = room, asyncio.Semaphore(room), asyncio.Lock()

    @contextlib.asynccontextmanager
    async def take(self, *, alone: bool = False) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as taken:
            async with self._line:
                for _ in range(self._room if alone else 1):
                    await taken.enter_async_context(self._free)
            yield


@dataclass
class Run:
    """One run of a job over an input.

    `items` are asked unless the ledger says that they were; `open_asker` is called when the first is to be asked.
    As many rows as the engine has slots are asked, as many again wait there, and `ahead` are loaded meanwhile. `dead`
    tells why nothing can be asked any more, None while the engine lives. `sidecar` writes a row beside its image.
    """

    job: str
    items: Iterable[Item]
    open_asker: Callable[[], Awaitable[Asker]]
    ledger: Ledger
    output: Output
    _: KW_ONLY
    ahead: int
    dead: Callable[[], OpsinError | None]
    total: int | None = None
    sidecar: Callable[[Item, Row], None] | None = None
    tell: Callable[[Figures], None] = lambda _: None

    def __post_init__(self) -> None:
        self._asker: Asker
        self.figures = Figures(self.total)
        self._slots: _Slots
        self._places: asyncio.Semaphore
        self._tasks: set[asyncio.Task[None]] = set()
        self._fault: BaseException | None = None
        self._asking: dict[bytes, asyncio.Future[Row | None]] = {}
        self._group: list[Ended] = []
        self._recent: dict[bytes, Row] = {}  # rows of the group, by question
        self._flushed = time.monotonic()
        ranks = self.ledger.query("SELECT rank FROM samples WHERE job = ? ORDER BY rank LIMIT ?", self.job, SAMPLES)
        self._ranks = [-int(rank) for (rank,) in ranks]  # a heap with the largest rank first
        heapq.heapify(self._ranks)
        self._samples: dict[str, tuple[int, bytes]] = {}

    async def run(self) -> Figures:
        """Ask all rows. What was answered is written also when this is cancelled or fails.

        Raises OutputFailed, LedgerBroken, and why the engine cannot be asked.
        """
        try:
            async for item, attempt in self._to_ask():
                if not hasattr(self, "_asker"):
                    await self._open()
                await self._places.acquire()
                if self._fault is not None:
                    break
                task = asyncio.create_task(self._one(item, attempt + 1))
                self._tasks.add(task)
                task.add_done_callback(self._done)
            while self._tasks and self._fault is None:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._fault is not None:
                raise self._fault
        finally:
            for task in self._tasks:
                task.cancel()
            if not isinstance(self._fault, OutputFailed):
                self._flush()
        return self.figures

    async def _open(self) -> None:
        self._asker = asker = await self.open_asker()
        self._slots, self._places = _Slots(2 * asker.slots), asyncio.Semaphore(2 * asker.slots + self.ahead)
        self.figures.began = time.monotonic()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._places.release()
        if not task.cancelled() and task.exception() is not None:
            self._fault = self._fault or task.exception()

    async def _to_ask(self) -> AsyncIterator[tuple[Item, int]]:
        """The rows that were not asked, and how often they were tried. Reading is done in a thread."""
        source = enumerate(self.items, 1)
        while chunk := await asyncio.to_thread(lambda: list(itertools.islice(source, _AT_ONCE))):
            states = self.ledger.claim(self.job, [(item.id, place) for place, item in chunk])
            for (place, item), (state, attempt) in zip(chunk, states, strict=True):
                row, tried = item, (state, attempt)
                if state == "seen":
                    error = DuplicateId(f"The id {item.id!r} is that of an earlier row: give each row its own (--id).")
                    row = Item(f"{item.id} (row {place})", item.source, error=error)
                    (tried,) = self.ledger.claim(self.job, [(row.id, place)])
                if tried[0] in {"new", "pending"}:
                    yield row, tried[1]
                else:
                    self.figures.before += 1

    async def _one(self, item: Item, attempt: int) -> None:
        asked, state = Asked(item), DONE
        begin: Row = {"id": item.id, "source": item.source, "output": None}
        end: Row = {"attempt": attempt, "job": self.job}
        try:
            if item.error is not None:
                raise copy_of(item.error)
            asked = await self._asker.prepare(item)
            self._sample(asked)
            row = {**begin, **await self._answer(asked), **end}
            if self.sidecar is not None:
                await asyncio.to_thread(self.sidecar, item, row)
        except OpsinError as error:
            if self.dead() is not None or isinstance(error, (LedgerBroken, OutputFailed)):
                raise
            row, state = {**begin, **answer_row(error), **end}, FAILED
            self.figures.errors[error.code] += 1
        finally:
            self._asker.drop(asked)
        self._add(Ended(item.id, state, attempt, row, asked.question))

    async def _answer(self, asked: Asked) -> Row:
        """Ask, unless the same was asked about equal pixels; then its answer is this one's, too."""
        question = asked.question
        if question is None:
            return await self._ask(asked)
        while question in self._asking:
            row = await asyncio.shield(self._asking[question])
            if row is not None:
                return self._same(row)
        if (known := self._known(question)) is not None:
            return self._same(known)
        running = self._asking[question] = asyncio.get_running_loop().create_future()
        row = None
        try:
            row = await self._ask(asked)
        finally:
            del self._asking[question]
            running.set_result(row if row is None else {**row, "id": asked.item.id})
        return row

    def _known(self, question: bytes) -> Row | None:
        if question in self._recent:
            return self._recent[question]
        if (place := self.ledger.answered(self.job, question)) is not None:
            with contextlib.suppress(ValueError, KeyError, StopIteration, TypeError):  # somebody has changed the file
                return self.output.read(*place)
        return None

    def _same(self, row: Row) -> Row:
        """A row's answer for another one: it took no time."""
        self.figures.same += 1
        kept = {name: value for name, value in row.items() if name not in {"id", "source", "attempt", "job"}}
        return {**kept, "stages": asdict(Stages()), "timings": None, "same_as": row.get("same_as", row.get("id"))}

    async def _ask(self, asked: Asked) -> Row:
        """Ask until there is an answer, or the engine died while it had nothing but this row."""
        deaths = 0
        while True:
            alone = deaths >= _DEATHS
            try:
                async with self._slots.take(alone=alone):
                    return await self._asker.ask(asked)
            except NotReady:
                if self.dead() is not None:
                    raise
                await asyncio.sleep(_AGAIN_SECONDS)
            except (EngineDied, EngineClosed):
                if alone or self.dead() is not None:
                    raise
                deaths += 1

    def _add(self, ended: Ended) -> None:
        figures, usage = self.figures, ended.row.get("usage") or {}
        figures.done += 1
        if "same_as" not in ended.row:
            figures.images += len(ended.row.get("images") or ())
            figures.tokens += usage.get("completion_tokens", 0)
            stages = ended.row.get("stages") or {}
            figures.cached += bool(ended.row.get("images")) and not stages.get("encode_ms")
        self._group.append(ended)
        if ended.question is not None and ended.state == DONE:
            self._recent[ended.question] = dict(ended.row)
        if len(self._group) >= _GROUP_ROWS or time.monotonic() - self._flushed >= _GROUP_SECONDS:
            self._flush()

    def _flush(self) -> None:
        """Write what has ended since the last time: the output first, then the ledger."""
        group, self._group = self._group, []
        if group:
            placed = []
            for one in group:
                at, length, stored = self.output.add(dict(one.row))
                placed.append(replace(one, at=at, length=length, stored=stored))
            self.output.flush()
            self.ledger.end(self.job, placed, self.output.size, self._samples)
        self._recent.clear()
        self._samples.clear()
        self._flushed = time.monotonic()
        self.tell(self.figures)

    def _sample(self, asked: Asked) -> None:
        """Keep a small copy of the images whose ids have the smallest hashes: a fair sample, the same in each run."""
        rank = rank_of(asked.item.id)
        if len(self._ranks) == SAMPLES and -rank <= self._ranks[0]:
            return
        if (jpeg := thumbnail(asked.images)) is not None:
            self._samples[asked.item.id] = rank, jpeg
            (heapq.heappush if len(self._ranks) < SAMPLES else heapq.heapreplace)(self._ranks, -rank)


def rank_of(name: str) -> int:
    """An id's place in a random order that is always the same."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:6])


def sample(items: Iterable[Item], count: int) -> list[Item]:
    """So many items of the input, chosen by their ids, in the input's order."""
    numbered = heapq.nsmallest(count, enumerate(items), key=lambda one: rank_of(one[1].id))
    return [item for _, item in sorted(numbered, key=lambda one: one[0])]


def without_sidecars(items: Iterable[Item], path_of: Callable[[Path], Path], skipped: Counter[str]) -> Iterator[Item]:
    """The items that have no sidecar yet; the others are counted."""
    for item in items:
        if item.images and isinstance(item.images[0], str) and path_of(Path(item.images[0])).exists():
            skipped["sidecar"] += 1
        else:
            yield item
