"""The one thread that owns the backend: inbox, plan, run, absorb, deliver; and what happens when it dies."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from opsin.core.answer import Finished
from opsin.core.backend import Backend
from opsin.core.errors import EngineClosed, EngineDied, EngineError, OpsinError
from opsin.core.parts import TextPart
from opsin.core.stages import Stage
from opsin.engine.absorb import Absorber, check_deadline
from opsin.engine.plan import Decode, Step
from opsin.engine.runner import Runner
from opsin.engine.scheduler import Scheduler
from opsin.engine.sequence import Sequence, State

log = logging.getLogger(__name__)
T = TypeVar("T")


class Loop:
    """Runs `open_backend` and all that follows in a thread of its own.

    Any thread may call the public methods. When the thread dies, everybody who waits is told, and every later call
    raises EngineDied.
    """

    def __init__(
        self, open_backend: Callable[[], Backend], parallel: int, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._open_backend = open_backend
        self._parallel = parallel
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
                raise self._error
            if self._closing:
                raise EngineClosed("The engine is closed: open a new one.")
            self._inbox.put(item)

    def _main(self) -> None:
        try:
            backend = self._open_backend()
        except BaseException as error:  # noqa: BLE001 - whoever opened the engine gets it
            self._opened.set_exception(error)
            return
        self._runner = Runner(backend)
        self._scheduler = Scheduler(backend.limits, self._parallel)
        self._absorber = Absorber(
            backend.piece, backend.eog_tokens, backend.limits.n_ctx, lambda s: _closing_tokens(backend, s)
        )
        self._opened.set_result(backend)
        end: OpsinError = EngineClosed("The engine was closed before the answer was complete.")
        try:
            while self._receive():
                self._step()
        except BaseException as cause:
            log.exception("the engine's thread died")
            end = EngineDied(f"The engine died ({type(cause).__name__}: {cause}): start it again.")
        finally:
            self._fail_all(end)
            backend.close()

    def _receive(self) -> bool:
        """Take the inbox in, waiting while there is nothing else to do; False when the loop shall end."""
        block = self._scheduler.idle
        while not self._closing:
            try:
                item = self._inbox.get(block=block)
            except queue.Empty:
                break
            if item is not None:
                item()
            block = False
        return not self._closing

    def _step(self) -> None:
        self._sweep()
        for sequence in self._scheduler.admit():
            self._begin(sequence)
        step = self._scheduler.plan()
        if step is None:
            return
        try:
            drawn = self._runner.run(step)
        except EngineError as error:
            for sequence in _members(step):
                self._fail(sequence, error)
            return
        for sequence, token, logprob in drawn:
            thinking = sequence.output.thinking
            self._absorber.absorb(sequence, token, logprob, self._now())
            if sequence.state is State.DONE:
                self._finish(sequence)
            elif thinking and not sequence.output.thinking:
                self._runner.leave_reasoning(sequence)

    def _sweep(self) -> None:
        """Drop who went away, and end who is out of time."""
        for sequence in self._scheduler.sequences:
            if sequence.stream.cancelled:
                sequence.end("cancelled")
                self._release(sequence)
                continue
            check_deadline(sequence, self._now())
            if sequence.state is State.DONE:
                self._finish(sequence)

    def _begin(self, sequence: Sequence) -> None:
        sequence.clock.switch(Stage.OTHER)
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
        sequence.stream.deliver(Finished(answer))

    def _fail(self, sequence: Sequence, error: OpsinError) -> None:
        sequence.state = State.DONE
        self._release(sequence)
        sequence.stream.fail(error)

    def _release(self, sequence: Sequence) -> None:
        self._runner.end(sequence)
        self._scheduler.release(sequence)

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
        for sequence in self._scheduler.sequences:
            sequence.stream.fail(error)
            try:
                self._release(sequence)
            except Exception:  # a backend that just failed may fail again; the waiters come first
                log.exception("a sequence could not be freed")


def _members(step: Step) -> tuple[Sequence, ...]:
    return step.sequences if isinstance(step, Decode) else (step.sequence,)


def _closing_tokens(backend: Backend, sequence: Sequence) -> list[int]:
    style = sequence.request.prompt.reasoning
    if style is None:
        return []
    layout = backend.layout([TextPart(style.closing)], add_bos=False)
    try:
        return [token for run in layout.runs for token in getattr(run, "tokens", ())]
    finally:
        layout.close()
