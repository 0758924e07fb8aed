"""The engine's loop without its thread: the test says when a step is taken, and looks at everything after it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from opsin.cache import EmbeddingCache, salted
from opsin.cache.kv_cache import KVOp
from opsin.core.answer import Answer, Event, Finished, TextDelta
from opsin.core.backend import BackendLimits
from opsin.core.errors import Cancelled, OpsinError
from opsin.core.request import (
    Embedding,
    EmbeddingRows,
    ImageChunk,
    ImagePart,
    Part,
    Prompt,
    SamplingParams,
    TextPart,
    TokenBatch,
)
from opsin.engine import Policy
from opsin.engine.clock import StageClock
from opsin.engine.loop import Loop
from opsin.engine.output import AnswerText
from opsin.engine.request import Request, Sequence, State
from opsin.engine.scheduler import Scheduler
from opsin.engine.step import Step, Tokens, members_of
from opsin.engine.stream import AnswerStream
from opsin.testing import FakeBackend, FakeClock, image
from opsin.testing.fake_backend import TURN_TEXT


def limits(n_ctx: int = 256, n_ubatch: int = 16, n_seq_max: int = 6) -> BackendLimits:
    return BackendLimits(n_ctx, n_ubatch, n_seq_max, n_vocab=259, n_embd=4, n_ctx_seq=n_ctx)


def reply(text: str) -> str:
    """An answer of 0 to 31 letters that depends on every cell of the prompt."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return digest[: int(digest[-2:], 16) % 32]


def prompt_of(*parts: str | int) -> Prompt:
    """Text, and images by number."""
    made: list[Part] = [TextPart(part) if isinstance(part, str) else ImagePart(image(part)) for part in parts]
    return Prompt((*made, TextPart(TURN_TEXT)))


class Backend(FakeBackend):
    """A fake that can also be out of room, calls back more than once in an encode, and lets others arrive in it."""

    layers = 1
    out_of_room = 0
    arriving: Callable[[], object] = staticmethod(lambda: None)

    def decode(self, rows: TokenBatch | EmbeddingRows, *, may_stop: bool = False) -> bool:
        if self.out_of_room:
            self.out_of_room -= 1
            return False
        return super().decode(rows, may_stop=may_stop)

    def encode(self, run: ImageChunk, between=None):  # type: ignore[no-untyped-def]
        def layers() -> None:
            for _ in range(self.layers):
                self.clock.spend(self.encode_ms / self.layers)
                self.arriving()
                between()

        return super().encode(run, None if between is None else layers)


class Stream(AnswerStream):
    """Remembers all that the engine said, and how often it said an end."""

    def __init__(self, loop: Loop) -> None:
        self.said: list[Event | BaseException] = []
        super().__init__(loop.wake)

    def add(self, event: Event) -> None:
        self.said.append(event)
        super().add(event)

    def fail(self, error: BaseException) -> None:
        self.said.append(error)
        super().fail(error)

    def cancel(self) -> None:
        late = self.done
        super().cancel()
        if late:  # the caller's own word, which nobody hears any more
            self.said.pop()


@dataclass(eq=False)
class Asked:
    """A request and everything that came of it."""

    sequence: Sequence
    stream: Stream
    started_at: int | None = None
    first_token_at: int | None = None
    ended_at: int | None = None

    @property
    def said(self) -> list[Event | BaseException]:
        return self.stream.said

    @property
    def ends(self) -> list[Finished | BaseException]:
        return [event for event in self.said if isinstance(event, (Finished, BaseException))]

    @property
    def answer(self) -> Answer:
        (end,) = self.ends
        assert isinstance(end, Finished), end
        return end.answer

    @property
    def text(self) -> str:
        """What was shown so far."""
        return "".join(event.text for event in self.said if isinstance(event, TextDelta))


class Plan(NamedTuple):
    """What a step of the loop begins with."""

    memory: tuple[KVOp, ...]
    step: Step | None


@dataclass
class Driver:
    """Give it requests, then let it step."""

    limits: BackendLimits = field(default_factory=limits)
    policy: Policy = field(default_factory=lambda: Policy(parallel=4))
    backend: Backend = None  # type: ignore[assignment]
    images: EmbeddingCache = field(default_factory=lambda: EmbeddingCache(2**20))
    asked: list[Asked] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    turns: list[Tokens] = field(default_factory=list)
    steps: int = 0
    _fruitless: int = 0

    def __post_init__(self) -> None:
        if self.backend is None:
            self.backend = Backend(reply, limits=self.limits, clock=FakeClock())
        self.loop = Loop(lambda: self.backend, self.policy, self.images, self.backend.clock)
        self.loop._attach(self.backend)
        scheduler = self.scheduler
        plan, plan_turn = scheduler.plan, scheduler.plan_turn

        def noted(now: float) -> Step | None:
            step = plan(now)
            self.plans.append(Plan(tuple(scheduler.kv._ops), step))
            return step

        def noted_turn(now: float, priority: int = 0) -> Tokens | None:
            step = plan_turn(now, priority)
            if step is not None:
                self.turns.append(step)
            return step

        scheduler.plan, scheduler.plan_turn = noted, noted_turn  # type: ignore[method-assign]

    @property
    def scheduler(self) -> Scheduler:
        return self.loop._scheduler

    def ask(
        self, prompt: Prompt | str, *, priority: int = 0, salt: str = "", seconds: float | None = None, **params: object
    ) -> Asked:
        if isinstance(prompt, str):
            prompt = prompt_of(prompt)
        clock = self.backend.clock
        chosen = SamplingParams(**{"guard": False, "max_tokens": 20, **params})  # type: ignore[arg-type]
        request = Request(
            prompt=prompt,
            params=chosen,
            max_tokens=chosen.max_tokens or 20,
            seed=1,
            deadline=None if seconds is None else clock() + seconds,
            priority=priority,
            salt=salt,
            number=len(self.asked),
        )
        stream = Stream(self.loop)
        embeddings: dict[str, Embedding] = {}

        def known(identity: str) -> bool:
            embedding = self.images.get(salted(identity, salt))
            if embedding is not None:
                embeddings[identity] = embedding
            return embedding is not None

        tokenized = self.backend.tokenize(prompt.parts, add_bos=True, known=known)
        assert tokenized.n_tokens < self.limits.n_ctx, "the façade refuses such a prompt"
        sequence = Sequence(request, stream, StageClock(clock), AnswerText(chosen.stop), tokenized, embeddings)
        sequence.cached_images |= {run.image for run in tokenized.chunks if getattr(run, "placeholder", False)}
        self.asked.append(Asked(sequence, stream))
        self.loop.put(sequence)
        return self.asked[-1]

    def step(self) -> None:
        """One turn of the loop, then every invariant."""
        if not (self.scheduler.idle and self.loop._inbox.empty()):
            before = self._progress()
            assert self.loop._receive()
            self.loop._step()
            self._fruitless = 0 if self._progress() != before else self._fruitless + 1
        self.steps += 1
        self.check()

    def _progress(self) -> object:
        return [(a.sequence.state, a.sequence.n_cells, len(a.said), a.sequence.embedding is None) for a in self.asked]

    def check(self) -> None:
        self.scheduler.check()
        assert self.backend.cells_used == self.scheduler.kv.cells.used
        assert self._fruitless < 3, "steps that get nobody on"
        for asked in self.asked:
            state = asked.sequence.state
            if asked.started_at is None and state is not State.WAITING:
                asked.started_at = self.steps
            if asked.first_token_at is None and asked.sequence.output.tokens:
                asked.first_token_at = self.steps
            if asked.ended_at is None and asked.stream.done:
                asked.ended_at = self.steps
            assert len(asked.ends) == asked.stream.done, "an end is told once"
            if state is State.DONE:
                assert asked.stream.done
                assert asked.sequence.sampler is None

    def run(self, until: int = 10_000) -> None:
        """Step until nobody waits."""
        while not all(asked.stream.done for asked in self.asked):
            self.step()
            assert self.steps < until, "somebody starves"
        self.step()

    def close(self) -> None:
        """Everything was given back."""
        self.loop._self_check()
        self.backend.close()

    def last_step(self) -> tuple[Sequence, ...]:
        """Who the last plan computed for."""
        step = self.plans[-1].step
        return () if step is None else members_of(step)


def expected(prompt: Prompt, max_tokens: int, n_ctx: int, image_tokens: int = 4) -> str:
    """The text of an answer, told from its request alone."""
    backend = FakeBackend(reply, limits=limits(n_ctx), image_tokens=image_tokens)
    tokenized = backend.tokenize(prompt.parts, add_bos=True)
    cells: list[str] = []
    for run in tokenized.chunks:
        if isinstance(run, ImageChunk):
            cells += [f"<{int(row[0])}.{int(row[1])}>" for row in backend.encode(run)]
        else:
            cells += [chr(token) if token < 256 else TURN_TEXT if token == 258 else "" for token in run.tokens]
    return reply("".join(cells))[: min(max_tokens, n_ctx - tokenized.n_tokens + 1)]


__all__ = ["Asked", "Backend", "Cancelled", "Driver", "OpsinError", "expected", "limits", "prompt_of", "reply"]
