"""The one thread that owns the backend: inbox, plan, run, process output; and what happens when it dies."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from opsin.cache import EmbeddingCache
from opsin.core.answer import Finished, Stage
from opsin.core.backend import Backend
from opsin.core.errors import DecodeFailed, EngineClosed, EngineDied, EngineError, OpsinError, copy_of
from opsin.core.request import ImageChunk
from opsin.engine.native_calls import Watch, unwatched
from opsin.engine.output import OutputProcessor, check_deadline
from opsin.engine.plan import Encode, KVOp, Plan, Step, Tokens, members_of
from opsin.engine.policy import Policy
from opsin.engine.prepare import Preparer
from opsin.engine.request import AnswerStream, Wake, wake_readers
from opsin.engine.runner import PixelsNeeded, Runner
from opsin.engine.scheduler import Scheduler
from opsin.engine.sequence import Sequence, State
from opsin.engine.stats import Stats

log = logging.getLogger(__name__)
T = TypeVar("T")
_IDLE_SECONDS = 0.01  # between two questions of one user there is more


class Loop:
    """Runs `open_backend` and all that follows in a thread of its own.

    Any thread may call the public methods. When the thread dies, everybody who waits is told, and every later call
    raises EngineDied. `wake` is called once a step with the streams that got events.
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
        self._error: OpsinError | None = None
        self._thread = threading.Thread(target=self._main, name="opsin-engine", daemon=True)
        self._scheduler: Scheduler
        self._runner: Runner
        self._outputs: OutputProcessor
        self._touched: list[AnswerStream] = []
        self.prepare: Preparer
        self.on_pixels_needed: Callable[[Sequence], None] = self._prepare_pixels_here
        self.stats: Stats

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
                future.set_exception(copy_of(self._error))
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
                raise copy_of(self._error)
            if self._closing:
                raise EngineClosed("The engine is closed: open a new one.")
            self._inbox.put(item)

    def _main(self) -> None:
        try:
            backend = self._open_backend()
        except BaseException as error:  # noqa: BLE001 - whoever opened the engine gets it
            self._opened.set_exception(error)
            return
        try:
            self._attach(backend)
        except BaseException as error:  # noqa: BLE001 - as above
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
        self.prepare = Preparer(backend, self._images, self._watch)
        self._runner = Runner(backend, self._images, self._now, self._watch)
        self._scheduler = Scheduler(backend.limits, self._policy)
        self.stats = Stats(self._scheduler)
        self._outputs = OutputProcessor(
            backend.piece, backend.eog_tokens, backend.limits.n_ctx_seq, self.prepare.closing_tokens
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
            self._opened.result().pause_threads()
            return self._inbox.get()

    def _self_check(self) -> None:
        """With nobody waiting there is time to ask the backend whether it holds what was counted."""
        self._scheduler.check()
        for seq_id, expected in self._scheduler.kv.expected_positions().items():
            last = self._runner.last_position(seq_id)
            assert last == expected, f"sequence {seq_id} ends at {last}, the count says {expected}"

    def _step(self) -> None:
        self._sweep()
        plan = self._scheduler.plan(self._runner.now)
        self._apply(plan.memory)
        self._set_idle_stages()
        for sequence in self._scheduler.running:
            if sequence.sampler is None:
                self._begin(sequence)
        self._sweep_done()
        if plan.step is not None and all(s.state is not State.DONE for s in members_of(plan.step)):
            self._run(plan)
        self._flush()

    def _flush(self) -> None:
        """Wake the readers of all streams that got something in this step."""
        if self._touched:
            touched, self._touched = self._touched, []
            self._wake(touched)

    def _apply(self, operations: tuple[KVOp, ...]) -> None:
        """Carry KV cache operations out; one that fails ends its own sequence."""
        failed = self._runner.apply_kv_ops(operations) if operations else {}
        for sequence in self._scheduler.running if failed else ():
            if sequence.seq_id in failed:
                self._fail(sequence, failed[sequence.seq_id])

    def _set_idle_stages(self) -> None:
        """What the time between steps is: waiting for others, or the engine's own work on the next token."""
        running, runner = self._scheduler.running, self._runner
        filling = [s for s in running if s.state is State.PREFILL]
        rest = Stage.QUEUE if len(running) > 1 else Stage.OTHER
        if rest is not runner.idle_stage:
            runner.idle_stage = rest
            for sequence in filling:
                sequence.clock.switch(rest)
        runner.group_idle = Stage.QUEUE if filling else Stage.DECODE
        runner.group.switch(runner.group_idle, runner.now)

    def _run(self, plan: Plan) -> None:
        step = plan.step
        assert step is not None
        started = self._runner.now = self._now()
        encodes = self._runner.encodes
        try:
            room = self._runner.run(step, self._between(step))
        except PixelsNeeded:
            self._put_back(members_of(step)[0])
            return
        except OpsinError as error:
            for sequence in members_of(step):
                self._fail(sequence, error)
            return
        if not room:
            self._give_up_something(step)
            return
        now = self._runner.now
        self._scheduler.ran(step, now, now - started)
        if isinstance(step, Encode):
            encoded = self._runner.encodes - encodes
            self.stats.encoded(now - started, encoded)
            for owner in {id(s): s for s in (step.sequence, *(s for s, _ in step.beside))}.values():
                self._drop_pixels(owner)
        else:
            self.stats.ran(step, now - started)
            self._process(step)
        self._sweep_done()

    def _between(self, step: Step) -> Callable[[], None] | None:
        """What runs between two layers of an encode: everyone's next token; nothing while nobody answers."""
        if not isinstance(step, Encode) or not self._policy.decode_in_encode:
            return None
        if not any(s.state is State.DECODE for s in self._scheduler.running):
            return None
        return lambda: self._turn(step.sequence)

    def _turn(self, encoding: Sequence) -> None:
        """A nested decode step: it only decodes and samples. Who ends in it is freed after the encode."""
        started = self._now()
        step = self._scheduler.plan_turn(started)
        if step is not None:
            with encoding.clock.stage(Stage.QUEUE):  # its encode stands still for the others
                self._nested(step, started)
            self._flush()

    def _nested(self, step: Tokens, started: float) -> None:
        try:
            room = self._runner.run(step)
        except EngineError as error:
            # The image being encoded is not at fault: its encode goes on.
            for sequence in step.decode:
                sequence.error = error
                sequence.end("cancelled")
            return
        if room:
            now = self._runner.now
            self._scheduler.ran(step, now, now - started)
            self.stats.ran(step, 0.0)
            self._process(step)

    def _process(self, step: Step) -> None:
        runner = self._runner
        sampled = runner.sample(step)
        if not sampled:
            return
        thinking = [s for s, _, _ in sampled if s.output.thinking]
        self._outputs.process_output(sampled)
        self.stats.counts.generated_tokens += len(sampled)
        for sequence in thinking:
            if not sequence.output.thinking and sequence.state is not State.DONE:
                try:
                    runner.leave_reasoning(sequence)
                except OpsinError as error:
                    sequence.error = error
                    sequence.end("cancelled")
        runner.settled(step)
        self._touched += [sequence.stream for sequence, _, _ in sampled]

    def _give_up_something(self, step: Step) -> None:
        """The backend had no room although the counts said so: evict or preempt, or fail who cannot be helped."""
        operations = self._scheduler.relieve()
        if operations:
            self._apply(operations)
            return
        for sequence in members_of(step):
            self._fail(
                sequence,
                DecodeFailed(
                    f"The KV cache is full at {sequence.n_cells} tokens: ask for a larger context (--ctx), "
                    "or for shorter answers."
                ),
            )

    def _put_back(self, sequence: Sequence) -> None:
        """It needs its pixels again, which are prepared beside the engine; then it comes again."""
        self._apply(self._scheduler.put_back(sequence))
        sequence.clock.switch(Stage.QUEUE)
        self.on_pixels_needed(sequence)

    def _prepare_pixels_here(self, sequence: Sequence) -> None:
        self.prepare.pixels(sequence)
        self._scheduler.add(sequence)

    @staticmethod
    def _drop_pixels(sequence: Sequence) -> None:
        """When all images are encoded nobody needs their pixels: with 12 megapixels each they fill the memory."""
        pixels = any(isinstance(chunk, ImageChunk) and not chunk.placeholder for chunk in sequence.tokenized.chunks)
        if pixels and not sequence.to_encode:
            sequence.drop_pixels()

    def _sweep(self) -> None:
        """Drop who went away, and end who is out of time."""
        now = self._runner.now = self._now()
        ended = False
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            if sequence.stream.done:
                sequence.end("cancelled")
                self._release(sequence, keep=sequence.error is None)
            elif sequence.request.deadline is not None:
                check_deadline(sequence, now)
                ended |= sequence.state is State.DONE
        if ended:
            self._sweep_done()

    def _sweep_done(self) -> None:
        """Free and answer all that ended."""
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            if sequence.state is State.DONE:
                if sequence.error is not None:
                    self._fail(sequence, sequence.error)
                elif sequence.stream.done:
                    self._release(sequence)
                else:
                    self._finish(sequence)

    def _begin(self, sequence: Sequence) -> None:
        sequence.clock.switch(self._runner.idle_stage)
        coming = sequence.chunks[sequence.chunk_index :]
        known = sum(isinstance(chunk, ImageChunk) and chunk.identity in sequence.embeddings for chunk in coming)
        counts = self.stats.counts
        counts.prompt_tokens += sequence.tokenized.n_tokens
        counts.prefix_hits += sequence.cached
        counts.image_hits += known
        try:
            self._runner.begin(sequence)
        except OpsinError as error:
            self._fail(sequence, error)
            return
        self._outputs.limit_reasoning(sequence)
        self._drop_pixels(sequence)

    def _finish(self, sequence: Sequence) -> None:
        sequence.clock.leave()
        with sequence.clock.stage(Stage.DETOKENIZE):
            for delta in sequence.output.finish():
                sequence.stream.add(delta)
        answer = sequence.answer()
        self._release(sequence)
        self.stats.counts.finished += 1
        self.stats.counts.guard_stops += answer.guard is not None
        sequence.stream.add(Finished(answer))
        self._touched.append(sequence.stream)

    def _fail(self, sequence: Sequence, error: OpsinError) -> None:
        sequence.state = State.DONE
        self._release(sequence, keep=False)
        self.stats.counts.failed += 1
        sequence.stream.fail(error)

    def _release(self, sequence: Sequence, *, keep: bool = True) -> None:
        self._runner.end(sequence)
        self._apply(self._scheduler.release(sequence, keep=keep))

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
            sequence.stream.fail(copy_of(error))
            try:
                self._release(sequence, keep=False)
            except Exception:  # a backend that just failed may fail again; the waiters come first
                log.exception("a sequence could not be freed")
