"""The one thread that owns the backend: inbox, plan, run, absorb, deliver; and what happens when it dies."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from opsin.cache import PictureCache
from opsin.core.answer import Finished
from opsin.core.backend import Backend
from opsin.core.errors import DecodeFailed, EngineClosed, EngineDied, EngineError, OpsinError, again
from opsin.core.parts import TextPart
from opsin.core.stages import Stage
from opsin.engine.absorb import Absorber, check_deadline
from opsin.engine.native_calls import Watch, unwatched
from opsin.engine.plan import Encode, Step, Tokens, members_of
from opsin.engine.policy import Policy
from opsin.engine.runner import Drawn, Runner
from opsin.engine.scheduler import Scheduler
from opsin.engine.sequence import Sequence, State
from opsin.engine.stats import Stats

log = logging.getLogger(__name__)
T = TypeVar("T")
_IDLE_SECONDS = 0.01  # between two questions of one user there is more


class Loop:
    """Runs `open_backend` and all that follows in a thread of its own.

    Any thread may call the public methods. When the thread dies, everybody who waits is told, and every later call
    raises EngineDied.
    """

    def __init__(
        self,
        open_backend: Callable[[], Backend],
        policy: Policy,
        pictures: PictureCache,
        now: Callable[[], float] = time.perf_counter,
        watch: Watch = unwatched,
    ) -> None:
        self._watch = watch
        self._open_backend = open_backend
        self._policy = policy
        self._pictures = pictures
        self._now = now
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._opened: Future[Backend] = Future()
        self._lock = threading.Lock()
        self._closing = False
        self._error: OpsinError | None = None
        self._thread = threading.Thread(target=self._main, name="opsin-engine", daemon=True)
        self._scheduler: Scheduler
        self._runner: Runner
        self._absorber: Absorber
        self._in_turn = False
        self.stats = Stats()

    def start(self) -> Backend:
        """Load the model and give the backend. Raises what the loading raised."""
        self._thread.start()
        return self._opened.result()

    def put(self, sequence: Sequence) -> None:
        """Hand a request over. Raises EngineClosed or EngineDied."""
        self._post(lambda: self._scheduler.add(sequence))

    def wake(self) -> None:
        """Look at cancellations now."""
        self._inbox.put(None)

    def call(self, work: Callable[[Backend], T]) -> Future[T]:
        """Run `work` on the engine's thread between two steps. Raises EngineClosed or EngineDied."""
        future: Future[T] = Future()

        def run() -> None:
            if self._error is not None:  # the inbox is emptied after the end, too
                future.set_exception(again(self._error))
                return
            try:
                future.set_result(work(self._opened.result()))
            except Exception as error:  # noqa: BLE001 - it belongs to the caller, who waits for the future
                future.set_exception(error)

        self._post(run)
        return future

    def close(self) -> None:
        """Fail what still runs, free the backend, and wait for the thread; twice does no harm."""
        with self._lock:
            self._closing = True
        self._inbox.put(None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def error(self) -> OpsinError | None:
        """Why nothing can be asked any more; None while all is well."""
        return self._error

    def _post(self, item: Callable[[], None]) -> None:
        with self._lock:
            if self._error is not None:
                raise again(self._error)
            if self._closing:
                raise EngineClosed("The engine is closed: open a new one.")
            self._inbox.put(item)

    def _main(self) -> None:
        try:
            backend = self._open_backend()
        except BaseException as error:  # noqa: BLE001 - whoever opened the engine gets it
            self._opened.set_exception(error)
            return
        self._attach(backend)
        self._opened.set_result(backend)
        end: OpsinError = EngineClosed("The engine was closed before the answer was complete.")
        try:
            while self._receive():
                with self._watch(()):
                    self._step()
        except BaseException as cause:
            log.exception("the engine's thread died")
            end = EngineDied(f"The engine died ({type(cause).__name__}: {cause}): start it again.")
        finally:
            self._fail_all(end)
            backend.close()

    def _attach(self, backend: Backend) -> None:
        self._runner = Runner(backend, self._pictures, self._watch)
        self._scheduler = Scheduler(backend.limits, self._policy)
        self.stats.watch(self._scheduler)
        self._absorber = Absorber(
            backend.piece, backend.eog_tokens, backend.limits.n_ctx_seq, lambda s: _closing_tokens(backend, s)
        )

    def _receive(self) -> bool:
        """Take the inbox in, waiting while there is nothing else to do; False when the loop shall end."""
        block = self._scheduler.idle
        if block:
            self._self_check()
        while not self._closing:
            try:
                item = self._next(block=block)
            except queue.Empty:
                break
            if item is not None:
                item()
            block = False
        return not self._closing

    def _next(self, *, block: bool) -> Callable[[], None] | None:
        """The next of the inbox; an engine that waits for long lets its threads go. Raises queue.Empty."""
        if not block:
            return self._inbox.get_nowait()
        try:
            return self._inbox.get(timeout=_IDLE_SECONDS)
        except queue.Empty:
            self._opened.result().rest()
            return self._inbox.get()

    def _self_check(self) -> None:
        """With nobody waiting there is time to ask the backend whether it holds what the books say."""
        self._scheduler.check()
        for seq_id, expected in self._scheduler.expected_positions().items():
            last = self._runner.last_position(seq_id)
            assert last == expected, f"sequence {seq_id} ends at {last}, the books say {expected}"

    def _step(self) -> None:
        self._sweep()
        plan = self._scheduler.plan(self._now())
        self._runner.remember(plan.memory)
        running = self._scheduler.running
        self._rest(running)
        for sequence in running:
            if sequence.sampler is None:
                self._begin(sequence)
        self._sweep_done()
        step = plan.step
        if step is not None and all(s.state is not State.DONE for s in members_of(step)):
            self._run(step)

    def _rest(self, running: tuple[Sequence, ...]) -> None:
        """What a sequence's time between steps is: waiting for others, or the engine's own work on its next token."""
        rest = Stage.OTHER
        if len(running) > 1:
            rest = Stage.QUEUE
        elif running and running[0].state is State.DECODE:
            rest = Stage.DECODE
        if rest is not self._runner.rest:
            self._runner.rest = rest
            for sequence in running:
                sequence.clock.switch(rest)

    def _run(self, step: Step) -> None:
        started, encodes = self._now(), self._runner.encodes
        try:
            room = self._runner.run(step, self._between(step))
        except OpsinError as error:
            for sequence in members_of(step):
                self._fail(sequence, error)
            return
        if not room:
            self._give_up_something(step)
            return
        now = self._now()
        self._scheduler.ran(step, now, now - started)
        encoded = self._runner.encodes - encodes
        if not isinstance(step, Encode) or encoded:  # a known picture is no encode
            self.stats.ran(step, now - started, encoded)
        elif step.run.picture not in step.sequence.encoded_pictures:
            self.stats.picture_known()
        self._absorb(step, now)
        self._sweep_done()

    def _between(self, step: Step) -> Callable[[], None] | None:
        """What runs between two layers of an encode: everyone's next token; nothing while nobody answers."""
        if not isinstance(step, Encode) or not any(s.state is State.DECODE for s in self._scheduler.running):
            return None
        return lambda: self._turn(step.sequence)

    def _turn(self, encoding: Sequence) -> None:
        """A nested decode step: it only decodes and samples. Who ends in it is freed after the encode."""
        started = self._now()
        step = self._scheduler.plan_turn(started)
        if step is not None:
            with encoding.clock.stage(Stage.QUEUE):  # its encode stands still for the others
                self._nested(step, started)

    def _nested(self, step: Tokens, started: float) -> None:
        try:
            room = self._runner.run(step)
        except EngineError as error:
            # The picture being encoded is not at fault: its encode goes on.
            for sequence in step.decode:
                sequence.error = error
                sequence.end("cancelled")
            return
        if room:
            now = self._now()
            self._scheduler.ran(step, now, now - started)
            self.stats.ran(step, 0.0)
            self._absorb(step, now)

    def _absorb(self, step: Step, now: float) -> None:
        # All are drawn before any is delivered: readers that wake in between take this thread's turns.
        tokens: list[tuple[Sequence, Drawn]] = []
        for sequence, row in self._runner.drawing(step):
            with _own_errors(sequence):
                tokens.append((sequence, self._runner.draw(sequence, row)))
                self.stats.drew()
        for sequence, drawn in tokens:
            with _own_errors(sequence):
                self._take_in(sequence, drawn, now)

    def _take_in(self, sequence: Sequence, drawn: Drawn, now: float) -> None:
        thinking = sequence.output.thinking
        self._absorber.absorb(sequence, drawn.token, drawn.logprob, now)
        if thinking and not sequence.output.thinking and sequence.state is not State.DONE:
            self._runner.leave_reasoning(sequence)

    def _give_up_something(self, step: Step) -> None:
        """The backend had no room although the books said so: evict or preempt, or fail who cannot be helped."""
        operations = self._scheduler.relieve()
        if operations:
            self._runner.remember(operations)
            return
        for sequence in members_of(step):
            self._fail(
                sequence,
                DecodeFailed(
                    f"The KV memory is full at {sequence.n_cells} tokens: ask for a larger context (--ctx), "
                    "or for shorter answers."
                ),
            )

    def _sweep(self) -> None:
        """Drop who went away, and end who is out of time."""
        now = self._now()
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            if sequence.stream.cancelled:
                sequence.end("cancelled")
                self._release(sequence, keep=sequence.error is None)
            else:
                check_deadline(sequence, now)
        self._sweep_done()

    def _sweep_done(self) -> None:
        """Free and answer all that ended."""
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            if sequence.state is State.DONE:
                if sequence.error is not None:
                    self._fail(sequence, sequence.error)
                elif sequence.stream.cancelled:
                    self._release(sequence)
                else:
                    self._finish(sequence)

    def _begin(self, sequence: Sequence) -> None:
        sequence.clock.switch(self._runner.rest)
        self.stats.admitted(sequence.layout.n_tokens, sequence.cached)
        try:
            self._runner.begin(sequence)
        except OpsinError as error:
            self._fail(sequence, error)

    def _finish(self, sequence: Sequence) -> None:
        with sequence.clock.stage(Stage.DETOKENIZE):
            for delta in sequence.output.finish():
                sequence.stream.deliver(delta)
        answer = sequence.answer()
        self._release(sequence)
        self.stats.finished(answer)
        sequence.stream.deliver(Finished(answer))

    def _fail(self, sequence: Sequence, error: OpsinError) -> None:
        sequence.state = State.DONE
        self._release(sequence, keep=False)
        self.stats.failed += 1
        sequence.stream.fail(error)

    def _release(self, sequence: Sequence, *, keep: bool = True) -> None:
        self._runner.end(sequence)
        self._runner.remember(self._scheduler.release(sequence, keep=keep))

    def _fail_all(self, error: OpsinError) -> None:
        with self._lock:
            self._error = error
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                item()
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            sequence.stream.fail(again(error))
            try:
                self._release(sequence, keep=False)
            except Exception:  # a backend that just failed may fail again; the waiters come first
                log.exception("a sequence could not be freed")


def _closing_tokens(backend: Backend, sequence: Sequence) -> list[int]:
    style = sequence.request.prompt.reasoning
    if style is None:
        return []
    layout = backend.layout([TextPart(style.closing)], add_bos=False)
    try:
        return [token for run in layout.runs for token in getattr(run, "tokens", ())]
    finally:
        layout.close()


@contextmanager
def _own_errors(sequence: Sequence) -> Iterator[None]:
    """A grammar that leaves no token, a logit that is no number: nobody else's answer ends by it."""
    try:
        yield
    except OpsinError as error:
        sequence.error = error
        sequence.end("cancelled")
