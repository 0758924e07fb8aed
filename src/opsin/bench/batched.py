"""Many sequences in one decode call: what the calls take, and what stands around them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from statistics import median

from opsin.core.answer import Answer, Finished, TextDelta
from opsin.core.sampling import SamplingParams
from opsin.engine import AnswerStream, Engine, Snapshot
from opsin.prompt import Message, PromptBuilder

TOKENS = 128
FEWEST_STEPS = 16
_QUESTION = ": tell me all about it."
_FILLER = " and"
_TRIAL = 32
SCHEMA = '{"type": "object", "properties": {"description": {"type": "string"}}, "required": ["description"]}'


@dataclass(frozen=True, slots=True)
class Batched:
    """Tokens a second while all sequences answer, text, guard and events included, and of the decode calls alone.

    Shares are of a step's wall time: the decode calls, sampling, and the rest, which is Python's. `steps` is how long
    all answered together, `prompt_tokens` the length of one prompt. `void` says why the figures count for nothing.
    """

    sequences: int
    steps: int
    tokens_s: float = 0.0
    decode_tokens_s: float = 0.0
    decode_share: float = 0.0
    sample_share: float = 0.0
    python_share: float = 0.0
    prompt_tokens: int = 0
    void: str | None = None


@dataclass(slots=True)
class _Watch:
    """When the last answer began and when the first one ended: between the two the batch is full."""

    engine: Engine
    sequences: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    started: int = 0
    begin: tuple[float, Snapshot] | None = None
    end: tuple[float, Snapshot] | None = None
    answers: list[Answer] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def follow(self, stream: AnswerStream) -> None:
        """Read one answer; in a thread of its own."""
        begun = False
        try:
            for event in stream:
                if isinstance(event, TextDelta) and not begun:
                    begun = True
                    self._begun()
                elif isinstance(event, Finished):
                    self._ended(event.answer)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for all readers
            self.errors.append(error)

    def _begun(self) -> None:
        with self.lock:
            self.started += 1
            if self.started == self.sequences:
                self.begin = (time.perf_counter(), self.engine.stats)

    def _ended(self, answer: Answer) -> None:
        with self.lock:
            if self.end is None:
                self.end = (time.perf_counter(), self.engine.stats)
            self.answers.append(answer)


def measure_batched(
    engine: Engine,
    prompts: PromptBuilder,
    *,
    sequences: int = 8,
    tokens: int = TOKENS,
    schema: str | None = None,
    prompt_tokens: int = 0,
) -> Batched:
    """Let so many text answers run together, with sampling, guard and events as in use.

    Prompts have about `prompt_tokens`, at least those of the chat template and a short question.

    Raises BadInput, EngineError.
    """
    watch = _Watch(engine, sequences)
    filler = _FILLER * _fillers(engine, prompts, prompt_tokens)
    asked = [prompts.build([Message("user", f"{number}{_QUESTION}{filler}")]) for number in range(sequences)]
    readers = []
    for number, prompt in enumerate(asked):
        # A temperature at which a model of random weights does not go round in circles, which the guard would end.
        params = SamplingParams(
            temperature=1.0, seed=number, max_tokens=tokens, ignore_eos=schema is None, json_schema=schema
        )
        readers.append(threading.Thread(target=watch.follow, args=(engine.submit(prompt, params),), daemon=True))
        readers[-1].start()
    for reader in readers:
        reader.join()
    if watch.errors:
        raise watch.errors[0]
    return _account(watch)


def _fillers(engine: Engine, prompts: PromptBuilder, prompt_tokens: int) -> int:
    """How often the filler must stand in a prompt of about so many tokens, as this model counts them."""
    if not prompt_tokens:
        return 0

    def length(fillers: int) -> int:
        prompt = prompts.build([Message("user", f"0{_QUESTION}{_FILLER * fillers}")])
        stream = engine.submit(prompt, SamplingParams(max_tokens=1))
        return next(event.answer.usage.prompt_tokens for event in stream if isinstance(event, Finished))

    short, long = length(0), length(_TRIAL)
    return max(0, round((prompt_tokens - short) * _TRIAL / max(1, long - short)))


def _account(watch: _Watch) -> Batched:
    n = watch.sequences
    steps = 0
    if watch.begin is not None and watch.end is not None:
        (began, before), (ended, after) = watch.begin, watch.end
        steps = max(0, after.decode_steps - before.decode_steps)
    length = int(median(a.usage.prompt_tokens for a in watch.answers))
    if steps < FEWEST_STEPS:
        return Batched(n, steps, prompt_tokens=length, void=f"the sequences answered together for {steps} steps only")
    wall, decode = ended - began, after.decode_seconds - before.decode_seconds
    drawn = after.decode_tokens - before.decode_tokens
    sample = median(a.stages.sample_ms / max(1, a.usage.completion_tokens) for a in watch.answers) / 1e3 * drawn
    decode_share, sample_share = min(1.0, decode / wall), min(1.0, sample / wall)
    return Batched(
        sequences=n,
        steps=steps,
        tokens_s=drawn / wall,
        decode_tokens_s=drawn / decode if decode > 0 else 0.0,
        decode_share=decode_share,
        sample_share=sample_share,
        python_share=max(0.0, 1.0 - decode_share - sample_share),
        prompt_tokens=length,
    )
