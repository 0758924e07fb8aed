"""From a request to a sequence, in a thread beside the engine's: constraint, remembered images, tokens, pixels."""

from __future__ import annotations

from opsin.cache import EmbeddingCache, salted
from opsin.core.answer import Stage, Started
from opsin.core.backend import Backend, BackendLimits
from opsin.core.errors import ContextOverflow
from opsin.core.reasoning import ReasoningStyle
from opsin.core.request import Embedding, ImageChunk, TextChunk, TextPart, TokenizedPrompt
from opsin.engine.clock import StageClock
from opsin.engine.guard import Guard
from opsin.engine.inflight import InFlightEncodes
from opsin.engine.native_calls import Watch, unwatched
from opsin.engine.output import AnswerText
from opsin.engine.request import AnswerStream, Request
from opsin.engine.sequence import Sequence


class Preparer:
    """Whatever a request needs before the engine's thread may see it. Any thread."""

    def __init__(self, backend: Backend, images: EmbeddingCache, watch: Watch = unwatched) -> None:
        self._backend = backend
        self._images = images
        self._watch = watch
        self._in_flight = InFlightEncodes()
        self._tags: dict[ReasoningStyle, dict[int, bytes]] = {}

    def sequence(self, request: Request, stream: AnswerStream, clock: StageClock) -> Sequence | None:
        """The sequence of a request; None when its reader went away. Raises BadInput."""
        with clock.stage(Stage.OTHER):
            # Here and not where the sampler is made: compiling a schema takes time, and others stream.
            self._backend.check(request.params)
        embeddings: dict[str, Embedding] = {}
        # Whoever waits here gets no pixels, and is served by the encode of the request that has them.
        with self._in_flight.alone(image.sha256 for image in request.prompt.images):
            if stream.done:
                return None
            with clock.stage(Stage.PREPROCESS):
                tokenized = self._tokenize(request, embeddings)
        try:
            _check_fit(tokenized, self._backend.limits)
            sequence = Sequence(request, stream, clock, self._text(request), tokenized, embeddings)
        except BaseException:
            tokenized.close()
            raise
        known = [chunk for chunk in tokenized.chunks if isinstance(chunk, ImageChunk) and chunk.identity in embeddings]
        sequence.cached_images |= {chunk.image for chunk in known}
        stream.deliver(Started(tokenized.images, tokenized.n_tokens))
        return sequence

    def pixels(self, sequence: Sequence) -> None:
        """Lay a waiting sequence's prompt out again, with pixels. Raises BadInput."""
        with sequence.clock.stage(Stage.PREPROCESS):
            sequence.adopt(self._tokenize(sequence.request, sequence.embeddings))

    def closing_tokens(self, sequence: Sequence) -> list[int]:
        """The tokens that close a reasoning block."""
        style = sequence.request.prompt.reasoning
        return [] if style is None else self._tokens(style.closing)

    def _tokenize(self, request: Request, embeddings: dict[str, Embedding]) -> TokenizedPrompt:
        def known(identity: str) -> bool:
            name = salted(identity, request.salt)
            embedding = self._images.get(name)
            if embedding is not None:
                embeddings[identity] = embedding
            return embedding is not None or identity in embeddings or name in self._in_flight

        prompt = request.prompt
        with self._watch(tuple(image.sha256 for image in prompt.images)):
            tokenized = self._backend.tokenize(prompt.parts, add_bos=prompt.add_bos, known=known)
        self._in_flight.add(tokenized, request.salt)
        return tokenized

    def _text(self, request: Request) -> AnswerText:
        prompt, params = request.prompt, request.params
        style = prompt.reasoning
        prompt_texts = [part.text for part in prompt.parts if isinstance(part, TextPart)]
        return AnswerText(
            stop=(*params.stop, *prompt.stop),
            splitter=None if style is None else style.splitter(starts_inside=prompt.thinking),
            guard=Guard("".join(prompt_texts)) if params.guard else None,
            tags={} if style is None else self._tag_tokens(style),
        )

    def _tag_tokens(self, style: ReasoningStyle) -> dict[int, bytes]:
        """The control tokens among a style's tags, with the text they stand for."""
        found = self._tags.get(style)
        if found is None:
            found = {}
            for tag in style.tags:
                tokens = self._tokens(tag)
                if len(tokens) == 1 and not self._backend.piece(tokens[0]):
                    found[tokens[0]] = tag.encode()
            self._tags[style] = found
        return found

    def _tokens(self, text: str) -> list[int]:
        tokenized = self._backend.tokenize([TextPart(text)], add_bos=False)
        tokenized.close()
        return [token for chunk in tokenized.chunks if isinstance(chunk, TextChunk) for token in chunk.tokens]


def _check_fit(tokenized: TokenizedPrompt, limits: BackendLimits) -> None:
    """A prompt needs its cells and one more for the first new token; what attends both ways goes in one ubatch."""
    if tokenized.n_tokens == 0:
        raise ContextOverflow("The prompt is empty: ask a question.")
    if tokenized.n_tokens >= limits.n_ctx_seq:
        trained = limits.n_ctx_seq < limits.n_ctx
        images = f", {tokenized.n_image_tokens} of them for images" if tokenized.n_image_tokens else ""
        raise ContextOverflow(
            f"The prompt takes {tokenized.n_tokens} tokens{images}, and "
            + (
                f"this model was trained for {limits.n_ctx_seq} at most: shorten it, or give fewer or smaller images."
                if trained
                else f"the context holds {limits.n_ctx}: ask for a larger one (--ctx), or for fewer or smaller images."
            )
        )
    for chunk in tokenized.chunks:
        if isinstance(chunk, ImageChunk) and not chunk.causal and chunk.n_tokens > limits.n_ubatch:
            raise ContextOverflow(
                f"An image takes {chunk.n_tokens} tokens that this model must read in one batch, and a batch holds "
                f"{limits.n_ubatch}: give --ubatch {chunk.n_tokens} or more, or a smaller --image-max-tokens."
            )
