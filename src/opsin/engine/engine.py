"""The façade: submit a prompt, read a stream of events; and what a prompt needs before the engine's thread sees it."""

import itertools
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Self, TypeVar

from opsin.boxes import check_boxes
from opsin.cache import EmbeddingCache, salted
from opsin.core.answer import Answer, Finished, ReasoningStyle, Stage, Usage
from opsin.core.backend import Backend, BackendLimits
from opsin.core.errors import BadParameter, ContextOverflow, EngineClosed, OpsinError, QueueFull, copy_of
from opsin.core.model_info import ModelInfo, Placement
from opsin.core.request import Embedding, ImageChunk, Prompt, SamplingParams, TextChunk, TextPart, TokenizedPrompt
from opsin.engine.clock import StageClock, timings
from opsin.engine.guard import Guard
from opsin.engine.labels import MAX_LABEL_TOKENS, LabelTree, spellings
from opsin.engine.loop import Loop
from opsin.engine.output import AnswerText, ReasoningSplitter
from opsin.engine.policy import Policy
from opsin.engine.request import Request, Sequence
from opsin.engine.runner import Watch, unwatched
from opsin.engine.stats import Snapshot
from opsin.engine.stream import AnswerStream, Wake, wake_readers

T = TypeVar("T")

PREPARE_WORKERS = 2
IMAGE_BYTES = 512 * 2**20
"""Embeddings kept in memory: about 200 images of a 7B LLaVA, in bytes."""
_OWN_WORDS = ReasoningStyle("\0own", "\0words")  # no text has them: all that is said before a label is its reasons
_CLOSED = "The engine was closed before the answer was complete."


class Engine:
    """A running model. Opening it loads the model; it is closed once, or used in a `with` block.

    Tokenizing and preprocessing happen in `PREPARE_WORKERS` threads, for requests with a schema or grammar in one of
    its own, all else in one thread that owns the backend. `wake` is called on that thread with the streams that got
    events in a step; by default it wakes their readers. `watch` is told of native calls. Raises what `open_backend`
    raises.
    """

    def __init__(
        self,
        open_backend: Callable[[], Backend],
        *,
        policy: Policy | None = None,
        images: EmbeddingCache | None = None,
        max_tokens: int = 1024,
        now: Callable[[], float] = time.perf_counter,
        wake: Wake = wake_readers,
        watch: Watch = unwatched,
    ) -> None:
        started = now()
        policy = policy or Policy()
        self._now = now
        self._max_tokens = max_tokens
        self._numbers = itertools.count()
        self._most = policy.parallel + policy.max_queue
        self._room = threading.Semaphore(self._most)
        self._wake = wake
        self.images = images or EmbeddingCache(IMAGE_BYTES)
        self._loop = Loop(open_backend, policy, self.images, now, wake=wake, watch=watch)
        self._backend = self._loop.start()
        self._preparer = Preparer(self._backend, self.images, watch)
        self._workers = ThreadPoolExecutor(PREPARE_WORKERS, thread_name_prefix="opsin-prepare")
        # A schema may take long to compile: prompts without one do not wait for it.
        self._compilers = ThreadPoolExecutor(1, thread_name_prefix="opsin-compile")
        self.load_ms = (now() - started) * 1e3

    @property
    def info(self) -> ModelInfo:
        """Names of the loaded pair."""
        return self._backend.info

    @property
    def limits(self) -> BackendLimits:
        """Sizes of the loaded pair."""
        return self._backend.limits

    @property
    def error(self) -> OpsinError | None:
        """Why nothing can be asked any more; None while the engine lives."""
        return self._loop.error

    @property
    def stats(self) -> Snapshot:
        """Counters since the start, and what is so now."""
        return self._loop.snapshot()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        load_ms: float = 0.0,
        queue_ms: float = 0.0,
        waited_since: float | None = None,
        priority: int = 0,
        salt: str = "",
        count_only: bool = False,
    ) -> AnswerStream:
        """Ask. Never blocks; the stream raises what goes wrong from here on.

        `load_ms` is the loading time to be shown in this answer's stages, `queue_ms` how long it waited for its turn
        before. `waited_since` is when the caller began to load the images side by side, in seconds of the engine's
        clock: the stages go back to then. Higher `priority` goes first. Requests of different `salt` share nothing
        that is remembered. With `count_only` nothing is encoded or answered: the `usage` of an empty answer has the
        prompt's tokens. Raises EngineClosed, EngineDied, QueueFull, or BadParameter for boxes that it cannot read.
        """
        if self._loop.error is not None:
            raise copy_of(self._loop.error)
        params = params or SamplingParams()
        if params.boxes:
            check_boxes(self.info, len(prompt.images))
        request = Request(
            prompt=prompt,
            params=params,
            max_tokens=params.max_tokens or self._max_tokens,
            seed=secrets.randbits(31) if params.seed is None else params.seed,
            deadline=None if params.max_seconds is None else self._now() + params.max_seconds,
            priority=priority,
            salt=salt,
            number=next(self._numbers),
        )
        clock = StageClock(self._now)
        clock.add(Stage.LOAD, load_ms)
        for image in prompt.images:
            clock.add(Stage.FETCH, image.fetch_ms)
            clock.add(Stage.IMAGE_DECODE, image.decode_ms)
        clock.add(Stage.QUEUE, queue_ms)
        if waited_since is not None:
            clock.waited_since(waited_since)
        clock.start()
        clock.switch(Stage.QUEUE)
        if not self._room.acquire(blocking=False):
            raise QueueFull(f"{self._most} requests are running or waiting already: try again in a moment.")
        stream = AnswerStream(self._loop.wake, self._wake)
        stream.on_end = self._room.release
        constrained = params.json_schema is not None or params.grammar is not None
        workers = self._compilers if constrained else self._workers
        work = self._count if count_only else self._prepare
        self._work(workers, lambda: work(request, stream, clock), stream)
        return stream

    @staticmethod
    def _work(workers: ThreadPoolExecutor, work: Callable[[], None], stream: AnswerStream) -> None:
        """Do it in a worker; whatever goes wrong ends the stream. Raises EngineClosed."""

        def done(future: Future[None]) -> None:
            # `close` drops what no worker has begun with; whoever waits for it must hear of that.
            error = EngineClosed(_CLOSED) if future.cancelled() else future.exception()
            if error is not None:
                stream.fail(error)

        try:
            workers.submit(work).add_done_callback(done)
        except RuntimeError as error:
            stream.fail(EngineClosed(_CLOSED))
            raise EngineClosed("The engine is closed: open a new one.") from error

    def placement(self) -> Placement:
        """Prove where encoder and language model run, by running them once; not while answers are timed."""
        return self.call(lambda backend: backend.placement())

    def expect(self) -> None:
        """Let work of low priority wait a moment for a request that is being prepared."""
        self._loop.expect()

    def call(self, work: Callable[[Backend], T]) -> T:
        """Do `work` on the engine's thread between two steps. Raises EngineClosed, EngineDied and what `work` does."""
        return self._loop.call(work).result()

    def close(self) -> None:
        """End everything: running answers fail with EngineClosed. Twice does no harm."""
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._compilers.shutdown(wait=True, cancel_futures=True)
        self._loop.close()
        self.images.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count(self, request: Request, stream: AnswerStream, clock: StageClock) -> None:
        with clock.stage(Stage.PREPROCESS):
            tokenized = self._preparer.tokenize(request)
        tokenized.close()
        usage, stages = Usage(tokenized.n_tokens, image_tokens=tokenized.n_image_tokens), clock.freeze()
        rates = timings(stages, prompt_tokens=usage.prompt_tokens, cached_tokens=0, predicted_tokens=0)
        stream.deliver(Finished(Answer("", None, "stop", usage, stages, rates, tokenized.images)))

    def _prepare(self, request: Request, stream: AnswerStream, clock: StageClock) -> None:
        sequence = self._preparer.sequence(request, stream, clock)
        if sequence is None:
            return
        try:
            self._loop.put(sequence)
        except OpsinError:
            sequence.tokenized.close()
            raise


class Preparer:
    """Makes a sequence of a request: constraint, remembered images, tokens, pixels. Any thread."""

    def __init__(self, backend: Backend, images: EmbeddingCache, watch: Watch = unwatched) -> None:
        self._backend = backend
        self._images = images
        self._watch = watch
        self._styles: dict[ReasoningStyle, tuple[dict[int, bytes], tuple[int, ...]]] = {}

    def sequence(self, request: Request, stream: AnswerStream, clock: StageClock) -> Sequence | None:
        """The sequence of a request; None when its reader went away. Raises BadInput."""
        with clock.stage(Stage.OTHER):
            # Here and not where the sampler is made: compiling a schema takes time, and others stream.
            compiled = self._backend.check(request.params)
        embeddings: dict[str, Embedding] = {}
        if stream.done:
            return None
        with clock.stage(Stage.PREPROCESS):
            tokenized = self.tokenize(request, embeddings)
        try:
            labels = self._labels(request)
            _check_fit(tokenized, self._backend.limits, max(tree.longest if tree else 0 for tree in labels))
            text, closing = self._text(request)
            sequence = Sequence(request, stream, clock, text, tokenized, embeddings, closing, compiled)
            sequence.labels, sequence.later = labels
        except BaseException:
            tokenized.close()
            raise
        known = [chunk for chunk in tokenized.chunks if isinstance(chunk, ImageChunk) and chunk.identity in embeddings]
        sequence.cached_images |= {chunk.image for chunk in known}
        return sequence

    def _labels(self, request: Request) -> tuple[LabelTree | None, LabelTree | None]:
        """The labels to be scored behind the prompt, and those behind its own words. Raises BadParameter."""
        labels, reasons, limits = request.params.labels, request.params.reasons, self._backend.limits
        if not labels:
            return None, None
        paths = spellings(list(labels), partial(self._tokens, special=False), self._backend.piece)
        tree = LabelTree(paths)
        if tree.longest and limits.n_seq_max < 2:
            raise BadParameter("Choices of several tokens need a second sequence on this model: give --parallel 2.")
        if tree.longest and not limits.branches:
            why = "leave out --no-kv-unified and --no-swa-full"
            raise BadParameter(f"Choices of several tokens need a KV cache that is shared: {why}.")
        most = min(MAX_LABEL_TOKENS, limits.n_ubatch)
        if tree.longest > most:
            raise BadParameter(f"A choice takes {tree.longest} tokens, and {most} are the limit: give shorter ones.")
        return None if reasons else tree, None if reasons is False else LabelTree(paths)

    def tokenize(self, request: Request, embeddings: dict[str, Embedding] | None = None) -> TokenizedPrompt:
        """The tokens and pixels; `embeddings` gets those that are known, None asks for no pixels. Raises BadInput."""

        def known(identity: str) -> bool:
            if embeddings is None:
                return True
            embedding = self._images.get(salted(identity, request.salt))
            if embedding is not None:
                embeddings[identity] = embedding
            return embedding is not None

        prompt, parts = request.prompt, request.prompt.parts
        if request.params.labels and not request.params.reasons and prompt.thinking and prompt.reasoning:
            parts = (*parts, TextPart(f"\n{prompt.reasoning.closing}\n\n"))  # labels are no thoughts
        with self._watch(tuple(image.sha256 for image in prompt.images)):
            return self._backend.tokenize(parts, add_bos=prompt.add_bos, known=known)

    def _text(self, request: Request) -> tuple[AnswerText, tuple[int, ...]]:
        """Its answer's text, and the tokens that close a reasoning block."""
        prompt, params = request.prompt, request.params
        style = _OWN_WORDS if params.labels else prompt.reasoning
        if style is not None and style not in self._styles:
            tokens = {tag: self._tokens(tag) for tag in style.tags}
            # The control tokens among the tags, with the text they stand for.
            control = (tag for tag in style.tags if len(tokens[tag]) == 1 and not self._backend.piece(tokens[tag][0]))
            self._styles[style] = {tokens[tag][0]: tag.encode() for tag in control}, tokens[style.closing]
        tags, closing = ({}, ()) if style is None else self._styles[style]
        prompt_texts = [part.text for part in prompt.parts if isinstance(part, TextPart)]
        inside = prompt.thinking or bool(params.labels)
        text = AnswerText(
            stop=(*params.stop, *prompt.stop),
            splitter=None if style is None else ReasoningSplitter(style, starts_inside=inside),
            guard=Guard("".join(prompt_texts)) if params.guard else None,
            tags=tags,
            keep_space=prompt.continues or params.logprobs is not None,
            stop_reasoning=bool(params.labels),
        )
        return text, closing

    def _tokens(self, text: str, special: bool = True) -> tuple[int, ...]:
        tokenized = self._backend.tokenize([TextPart(text, special)], add_bos=False)
        tokenized.close()
        return tuple(token for chunk in tokenized.chunks if isinstance(chunk, TextChunk) for token in chunk.tokens)


def _check_fit(tokenized: TokenizedPrompt, limits: BackendLimits, labels: int = 0) -> None:
    """A prompt needs its cells and one more, or its longest label's; what attends both ways goes in one ubatch."""
    if tokenized.n_tokens == 0:
        raise ContextOverflow("The prompt is empty: ask a question.")
    if tokenized.n_tokens + max(0, labels - 1) >= limits.n_ctx_seq:
        images = f", {tokenized.n_image_tokens} of them for images" if tokenized.n_image_tokens else ""
        if limits.unified and limits.n_ctx_seq < limits.n_ctx:
            fix = f"this model was trained for {limits.n_ctx_seq} at most: shorten it, or give fewer or smaller images."
        else:
            fix = f"the context holds {limits.n_ctx_seq}: ask for a larger one (--ctx), or for fewer or smaller images."
        raise ContextOverflow(f"The prompt takes {tokenized.n_tokens} tokens{images}, and {fix}")
    for chunk in tokenized.chunks:
        if isinstance(chunk, ImageChunk) and not chunk.causal and chunk.n_tokens > limits.n_ubatch:
            raise ContextOverflow(
                f"An image takes {chunk.n_tokens} tokens that this model must read in one batch, and a batch holds "
                f"{limits.n_ubatch}: give --ubatch {chunk.n_tokens} or more, or a smaller --image-max-tokens."
            )
