"""The one thread that owns the backend: inbox, plan, run, process output; and what happens when it dies."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from opsin.boxes import with_boxes
from opsin.cache import EmbeddingCache
from opsin.core.answer import Finished, Stage
from opsin.core.backend import Backend, Stopped
from opsin.core.errors import DecodeFailed, EngineClosed, EngineDied, EngineError, OpsinError, copy_of
from opsin.engine.policy import Policy
from opsin.engine.request import Sequence, State
from opsin.engine.runner import Runner, Sampled, Watch, unwatched
from opsin.engine.scheduler import Scheduler
from opsin.engine.speculation import verify
from opsin.engine.stats import Snapshot
from opsin.engine.step import Encode, PrefillImage, Step, Tokens, members_of, priority_of
from opsin.engine.stream import AnswerStream, Wake, wake_readers

log = logging.getLogger(__name__)
T = TypeVar("T")
_EXPECT_SECONDS = 0.3
_IDLE_SECONDS = 0.01  # between two questions of one user there is more


class Loop:
    """Runs `open_backend` and all that follows in a thread of its own.

    Any thread may call the public methods. When the thread dies, everybody who waits is told, and every later call
    raises EngineDied: `error` says why. `wake` is called once a step with the streams that got events.
    """

    def __init__(
        self,
        open_backend: Callable[[], Backend],
        policy: Policy,
        images: EmbeddingCache,
        now: Callable[[], float] = time.perf_counter,
        *,
        wake: Wake = wake_readers,
        watch: Watch = unwatched,
    ) -> None:
        self._open_backend = open_backend
        self._policy = policy
        self._images = images
        self._now = now
        self._wake = wake
        self._watch = watch
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._opened: Future[Backend] = Future()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="opsin-engine", daemon=True)
        self._backend: Backend
        self._scheduler: Scheduler
        self._runner: Runner
        self._touched: list[AnswerStream] = []
        self._unread: list[tuple[Sequence, int]] = []  # tokens that are shown while the next ones are computed
        self._counts = Snapshot()
        # Whether work of low priority shall end, and until when it waits for a request that is on its way.
        self._hurried, self._expected = False, 0.0
        self._paused: Sequence | None = None  # whose encode stands still for others, so that its image must stay
        self._paused_seconds = 0.0  # of all encodes
        self.error: OpsinError | None = None

    def start(self) -> Backend:
        """Load the model and give the backend. Raises what the loading raised."""
        self._thread.start()
        return self._opened.result()

    def put(self, sequence: Sequence) -> None:
        """Hand a request over. Raises EngineClosed or EngineDied."""
        self._post(lambda: self._scheduler.add(sequence))
        if sequence.request.priority >= 0:
            self._hurry(0.0)

    def expect(self) -> None:
        """A request is being prepared: work of low priority ends now, and waits for it a moment."""
        self._hurry(self._now() + _EXPECT_SECONDS)
        self.wake()

    def _hurry(self, expected: float) -> None:
        self._hurried, self._expected = True, expected
        self._backend.stop(True)

    def wake(self) -> None:
        """Look at cancellations now."""
        self._inbox.put(None)

    def call(self, work: Callable[[Backend], T]) -> Future[T]:
        """Run `work` on the engine's thread between two steps. Raises EngineClosed or EngineDied."""
        future: Future[T] = Future()

        def run() -> None:
            if self.error is not None:  # the inbox is emptied after the end, too
                future.set_exception(copy_of(self.error))
                return
            if self._paused is not None:  # the backend is not free
                self._inbox.put(run)
                raise Stopped
            try:
                future.set_result(work(self._backend))
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

    def snapshot(self) -> Snapshot:
        """Now: each number is true, though a step may end between two of them."""
        return self._counts.seen(self._scheduler)

    def _post(self, item: Callable[[], None]) -> None:
        with self._lock:
            if self.error is not None:
                raise copy_of(self.error)
            if self._closing:
                raise EngineClosed("The engine is closed: open a new one.")
            self._inbox.put(item)

    def _main(self) -> None:
        backend: Backend | None = None
        try:
            backend = self._open_backend()
            self._attach(backend)
        except BaseException as error:  # noqa: BLE001 - whoever opened the engine gets it
            if backend is not None:
                backend.close()
            self._opened.set_exception(error)
            return
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
        self._backend, self._lags = backend, backend.limits.asynchronous
        self._piece, self._eog_tokens, self._n_ctx = backend.piece, backend.eog_tokens, backend.limits.n_ctx_seq
        self._runner = Runner(backend, self._images, self._now, self._watch)
        self._scheduler = Scheduler(backend.limits, self._policy)

    def _receive(self) -> bool:
        """Take the inbox in, waiting while there is nothing else to do; False when the loop shall end."""
        block, self._hurried = self._scheduler.idle, False
        self._backend.stop(False)
        if block:
            self._self_check()
        while not self._closing:
            wait = 0.0 if block or self._scheduler.serves_live else max(0.0, self._expected - self._now())
            try:
                item = self._inbox.get(block or wait > 0, wait or _IDLE_SECONDS)
            except queue.Empty:
                if not block:
                    break
                self._backend.pause_threads()  # an engine that waits for long lets its threads go
                item = self._inbox.get()
            if item is not None:
                item()
            block = False
        return not self._closing

    def _self_check(self) -> None:
        """With nobody waiting there is time to ask the backend whether it holds what was counted."""
        self._scheduler.check()
        self._runner.check(self._scheduler.kv.expected_positions())

    def _step(self) -> bool:
        """Plan a step, and compute it; while an encode stands still, not one of low priority: False if that is all.

        Raises Stopped if the step needs the encoder that stands still, or the row that it works for has ended.
        """
        self._sweep()
        paused = self._paused
        if paused is not None and paused.state is State.DONE:
            raise Stopped
        step = self._scheduler.plan(self._runner.now)
        self._apply()
        self._runner.set_idle_stages(self._scheduler.running)
        for sequence in [s for s in self._scheduler.running if s.sampler is None]:
            self._begin(sequence)
        if shown := bool(self._unread) and not isinstance(step, Tokens):
            self._show_unread()
        self._sweep_done()
        if shown:
            self._flush()  # an encode may take long
        if paused is not None and (step is None or priority_of(step) < 0):
            self._read_meanwhile()
            return False
        if paused is not None and isinstance(step, Encode) and not self._runner.knows(step):
            raise Stopped
        if step is not None and all(s.state is not State.DONE for s in members_of(step)):
            self._run(step)
        self._flush()
        return True

    def _flush(self) -> None:
        """Wake the readers of all streams that got something in this step."""
        if self._touched:
            touched, self._touched = self._touched, []
            self._wake(touched)

    def _apply(self) -> None:
        """Carry KV cache operations out; one that fails ends its own sequence."""
        operations = self._scheduler.kv.take_ops()
        if operations and (failed := self._runner.apply_kv_ops(operations)):
            for sequence in [s for s in self._scheduler.running if s.seq_id in failed]:
                self._fail(sequence, failed[sequence.seq_id])

    def _run(self, step: Step) -> None:
        started = self._runner.now = self._now()
        encodes, paused = self._runner.encodes, self._paused_seconds
        try:
            room = self._runner.run(step, self._between(step), may_stop=priority_of(step) < 0)
        except Stopped:  # it is done again later
            self._sweep_done()
            return
        except OpsinError as error:
            self._show_unread()  # whose answer is complete with that, did not fail
            for sequence in [s for s in members_of(step) if s.state is not State.DONE]:
                self._fail(sequence, error)
            self._sweep_done()
            return
        if not room:
            self._give_up_something(step)
            return
        seconds = self._runner.now - started
        if isinstance(step, Encode):
            self._scheduler.ran(step, self._runner.now, seconds)
            self._counts.count_encode(self._runner.encodes - encodes, seconds - (self._paused_seconds - paused))
            for owner in {id(s): s for s in (step.sequence, *(s for s, _ in step.beside))}.values():
                owner.drop_pixels()
        else:
            self._ran(step, seconds, alone=True)
        self._sweep_done()

    def _between(self, step: Step) -> Callable[[], None] | None:
        """What runs between two layers of an encode: everyone's next token; nothing while nobody answers.

        And beside the computing of tokens: showing the ones before.
        """
        if isinstance(step, Tokens):
            return self._read_meanwhile if self._unread else None
        if not isinstance(step, Encode) or not self._policy.decode_in_encode:
            return None
        encoding, priority = step.sequence, step.sequence.request.priority

        def look() -> None:
            if priority < 0 and self._hurried:
                self._pause(encoding)
            self._turn(encoding)

        return look if priority < 0 or self._scheduler.streams_beside(priority) else None

    def _pause(self, encoding: Sequence) -> None:
        """An encode of low priority stands still until whoever came meanwhile has a first token.

        Raises Stopped where they need the encoder, or what the row holds.
        """
        self._paused = encoding
        try:
            with self._standing_still(encoding):
                while self._receive() and self._step():
                    pass
        finally:
            self._paused = None
        if self._closing or encoding.state is not State.PREFILL:
            raise Stopped

    @contextmanager
    def _standing_still(self, encoding: Sequence) -> Iterator[None]:
        started = self._now()
        with encoding.clock.stage(Stage.QUEUE):
            yield
        self._paused_seconds += self._now() - started

    def _turn(self, encoding: Sequence) -> None:
        """A nested decode step: it only decodes and samples. Who ends in it is freed after the encode."""
        started = self._now()
        step = self._scheduler.plan_turn(started, encoding.request.priority)
        if step is None:
            return
        with self._standing_still(encoding):
            try:
                if self._runner.run(step):
                    self._ran(step, self._runner.now - started, alone=False)
            except EngineError as error:  # the image being encoded is not at fault: its encode goes on
                for sequence in step.decode:
                    sequence.end_with(error)
        self._flush()

    def _ran(self, step: Tokens | PrefillImage, seconds: float, *, alone: bool) -> None:
        """A step of the language model is done, `alone` or within an encode: count it, and sample what follows."""
        runner, counts = self._runner, self._counts
        self._scheduler.ran(step, runner.now, seconds)
        counts.count_step(step, seconds, alone=alone)
        drafts = step if isinstance(step, Tokens) and step.drafts else None
        self._touched += [sequence.stream for sequence in runner.score(step)]
        sampled = runner.sample(step)
        if not sampled and not drafts:
            return
        self._take(sampled, lags=self._lags and alone and isinstance(step, Tokens) and not drafts)
        if drafts:
            counts.count_drafts(drafts.drafted, verify(drafts, self._sample_behind, runner.forget_draft))
        runner.settled(step)

    def _take(self, sampled: list[Sampled], *, lags: bool) -> None:
        """Process tokens that were sampled; with `lags` they are shown later, where the sequence allows it."""
        thinking, piece, n_ctx = [s for s, _, _ in sampled if s.output.thinking], self._piece, self._n_ctx
        for sequence, token, logprob in sampled:
            if not sequence.take(token, logprob, ends_turn=token in self._eog_tokens):
                continue
            if lags and sequence.may_lag(n_ctx):
                self._unread.append((sequence, token))
            else:
                sequence.show(token, piece(token), n_ctx)
                self._touched.append(sequence.stream)
        self._counts.generated_tokens += len(sampled)
        for sequence in thinking:
            self._runner.leave_reasoning(sequence)

    def _sample_behind(self, sequence: Sequence, row: int) -> None:
        self._scheduler.decoded(sequence)
        self._take(self._runner.sample_behind(sequence, row), lags=False)

    def _show_unread(self) -> None:
        """Show the tokens of the step before that were not shown yet."""
        unread, self._unread = self._unread, []
        for sequence, token in unread:
            sequence.show(token, self._piece(token), self._n_ctx)
            self._touched.append(sequence.stream)

    def _read_meanwhile(self) -> None:
        """While the next tokens are computed. An answer that ends here has its last token in the KV cache, too."""
        self._show_unread()
        self._flush()

    def _give_up_something(self, step: Step) -> None:
        """The backend had no room although the counts said so: evict or preempt, or fail who cannot be helped."""
        if self._unread:  # maybe somebody ends, and there is room
            self._show_unread()
            self._sweep_done()
            return
        if self._scheduler.relieve():
            self._apply()
            return
        for sequence in {id(one): one for one in members_of(step)}.values():
            full = f"The KV cache is full at {sequence.n_cells} tokens"
            self._fail(sequence, DecodeFailed(f"{full}: ask for a larger context (--ctx), or for shorter answers."))

    def _sweep(self) -> None:
        """End who went away or is out of time, and free and answer all that ended."""
        now = self._runner.now = self._now()
        everybody = (*self._scheduler.running, *self._scheduler.waiting)
        if ended := [s for s in everybody if s.stream.done or s.is_late(now)]:
            self._show_unread()  # which may end an answer for another reason
            for sequence in ended:
                gone = sequence.stream.done
                sequence.end("cancelled" if gone else "length", None if gone else "seconds")
        self._sweep_done()

    def _sweep_done(self) -> None:
        """Free and answer all that ended."""
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            if sequence.state is State.DONE and sequence is not self._paused:
                self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        self._show_unread()
        if sequence.error is not None:
            self._fail(sequence, sequence.error)
        elif sequence.stream.done:
            self._release(sequence)
        elif sequence.later is not None and sequence.limit != "seconds":
            self._scheduler.next_phase(sequence)
        else:
            self._finish(sequence)

    def _begin(self, sequence: Sequence) -> None:
        self._counts.count_prompt(sequence)
        try:
            self._runner.begin(sequence)
        except OpsinError as error:
            self._fail(sequence, error)
            return
        sequence.limit_reasoning()
        sequence.drop_pixels()

    def _finish(self, sequence: Sequence) -> None:
        sequence.clock.leave()
        with sequence.clock.stage(Stage.DETOKENIZE):
            for delta in sequence.output.finish():
                sequence.stream.add(delta)
        answer = sequence.answer()
        if sequence.request.params.boxes:
            answer = with_boxes(answer, self._backend.info)
        self._release(sequence)
        self._counts.count_answer(answer)
        sequence.stream.add(Finished(answer))
        self._touched.append(sequence.stream)

    def _fail(self, sequence: Sequence, error: OpsinError) -> None:
        self._show_unread()
        if sequence is self._paused:  # told when its encode has stopped
            sequence.end_with(error)
            return
        sequence.state = State.DONE
        self._release(sequence, keep=False)
        self._counts.failed += 1
        sequence.stream.fail(error)

    def _release(self, sequence: Sequence, *, keep: bool = True) -> None:
        self._runner.end(sequence)
        self._scheduler.release(sequence, keep=keep)
        self._apply()

    def _fail_all(self, error: OpsinError) -> None:
        with self._lock:
            self.error = error
        while not self._inbox.empty():
            item = self._inbox.get()
            if item is not None:
                item()
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            sequence.stream.fail(copy_of(error))
            try:
                self._release(sequence, keep=False)
            except Exception:  # a backend that just failed may fail again; the waiters come first
                log.exception("a sequence could not be freed")
