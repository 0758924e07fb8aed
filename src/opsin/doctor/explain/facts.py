"""What a log tells as plain values: its requests, and the setup that they ran on."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from opsin.core.answer import Stage

_FEW = 3  # stages that make an account of Opsin; any program may print one "total_ms"
_TITLES = {"load": "load model", "fetch": "fetch image", "encode": "vision encode"}
_LEAST_MS = 0.05
Timer = Literal["print_timings", "perf", "server", "ollama", "lmstudio", "opsin", ""]


class Batch(NamedTuple):
    """A part of an image's embeddings in the language model, one `of` several; tokens (None: not told) and time."""

    of: int
    tokens: int | None
    ms: float


@dataclass(frozen=True, slots=True)
class StageRow:
    """A stage and its milliseconds. `at_most`: the log only bounds it. `note` says what went through it."""

    name: str
    ms: float
    note: str = ""
    at_most: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """What one request says of itself; None where the log is silent. `line`: where it began.

    `wall_ms` is what the caller measured, other times are the tool's timers. `*_n` are what these counted, `*_tokens`
    what `usage` says. `kv_full`: how often a batch found no cells. `joined_ms`: a load that another line tells, and
    that it waited for. `unfinished`: the log ends first, and times are those of its last line of progress. `reusable`
    tokens of the prompt were cached. `thought` and `spoke`: the answer has thinking, and other words.
    """

    line: int = 0
    timer: Timer = ""
    load_ms: float | None = None
    prompt_ms: float | None = None
    eval_ms: float | None = None
    sample_ms: float | None = None
    total_ms: float | None = None
    wall_ms: float | None = None
    prompt_n: int | None = None
    eval_n: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    image_tokens: int | None = None
    processed_ms: float | None = None
    n_ctx: int | None = None
    end_tokens: int | None = None
    finish: str | None = None
    truncated: bool = False
    shifts: int = 0
    kv_full: int = 0
    reprocessed: bool = False
    reusable: int | None = None
    joined_ms: float | None = None
    unfinished: bool = False
    progress: float | None = None
    draft_n: int | None = None
    draft_ok: int = 0
    reasoning_n: int | None = None
    thought: bool = False
    spoke: bool = False
    encode_ms: tuple[float, ...] = ()
    batches: tuple[Batch, ...] = ()
    stages: Mapping[str, float] = field(default_factory=dict)

    @property
    def tells(self) -> bool:
        """It holds a time of a stage, or an event; a lone "took 5 s" may be anybody's."""
        timers = (self.prompt_ms, self.eval_ms, self.total_ms, self.processed_ms, self.wall_ms if self.timer else None)
        events = self.shifts or self.reprocessed or self.truncated or self.kv_full > 0 or self.progress
        return any(timers) or bool(self.image or events) or len(self.stages) >= _FEW

    @property
    def timed(self) -> bool:
        """A stage of the model has a time; an HTTP server tells only the whole, and a load."""
        parts = self.prompt_ms or self.eval_ms or self.image or self.before_timer or self.between
        return bool(parts or self.stages)

    @property
    def answer_n(self) -> int:
        """Tokens of the answer: usage's count, else the timer's, which may leave the first one out."""
        return (self.eval_n or 0) if self.completion_tokens is None else self.completion_tokens

    @property
    def encoded(self) -> float:
        """Milliseconds in the vision encoder, 0 where the log shows none."""
        if self.encode_ms or self.processed_ms is None:
            return sum(self.encode_ms)
        return max(0.0, self.processed_ms - self.decoded)

    @property
    def decoded(self) -> float:
        """Milliseconds of the image's prefill; batches that were cut out of the log at the mean of the others."""
        if not self.batches:
            return 0.0
        count = max(len(self.batches), self.batch_count)
        return sum(batch.ms for batch in self.batches) * count / len(self.batches)

    @property
    def batch_count(self) -> int:
        """Batches that an image's prefill was cut into, also those that were cut out of the log."""
        return max((batch.of for batch in self.batches), default=0)

    @property
    def image(self) -> float:
        """Milliseconds of the image that are known: encoder and prefill."""
        return self.encoded + self.decoded

    @property
    def counts_encoder(self) -> bool:
        """The prompt's timer holds an encoder time that the log does not tell."""
        return self.timer in {"server", "ollama"} and not self.image and not self.stages

    @property
    def hidden_prompt(self) -> bool:
        """The timers were reset after the prompt: they count at most its last token."""
        return (self.prompt_n or 0) <= 1 < (self.prompt_tokens or 0)

    @property
    def before_timer(self) -> float | None:
        """Milliseconds of wall time before the timers were set to zero: image and prompt, in some handlers."""
        wall, total = self.wall_ms, self.total_ms
        if wall is None or total is None or total > wall or self.timer in {"server", "ollama"}:
            return None
        return wall - total if self.hidden_prompt else None

    @property
    def between(self) -> float:
        """Milliseconds of the generation in no timer: the caller's work per token. Only if reset after the prompt."""
        if self.total_ms is None or not self.hidden_prompt or self.timer not in {"print_timings", "perf"}:
            return 0.0
        return max(0.0, self.total_ms - (self.prompt_ms or 0.0) - self.rest)

    @property
    def loading(self) -> float:
        """Milliseconds of loading that the request waited for: llama.cpp's own "load time" is none of it."""
        return self.joined_ms or (self.load_ms or 0.0) * (self.timer in {"ollama", "opsin", ""})

    @property
    def prompt_only(self) -> float:
        """The prompt's timer without the image: servers, and llama.cpp's newer timers, count the image in."""
        prompt = self.prompt_ms or 0.0
        holds_image = self.timer in {"server", "perf", "ollama"} and prompt >= self.image
        return prompt - self.image if holds_image else prompt

    @property
    def rest(self) -> float:
        """Milliseconds of the answer: decode and sampling."""
        return (self.eval_ms or 0.0) + (self.sample_ms or 0.0)

    @property
    def whole(self) -> float:
        """Milliseconds from first to last, by the best witness there is."""
        parts = self.loading + self.prompt_only + self.image + self.rest
        return self.wall_ms or max(self.total_ms or 0.0, parts)

    def table(self, vision: bool = True) -> tuple[StageRow, ...]:
        """The stages in their order; they add up, and the last is what none claims. `vision`: there is an encoder."""
        if self.stages:
            times = {stage.value: self.stages.get(stage.value, 0.0) for stage in Stage}
            rows = [StageRow(_TITLES.get(name, name.replace("_", " ")), ms) for name, ms in times.items()]
            return tuple(row for row in rows if row.ms >= _LEAST_MS)
        batches, images = self.batch_count, len(self.encode_ms)
        rate = _rate(self.prompt_n, self.prompt_only)
        told = f"{images} image(s) or slices" + (f", {self.image_tokens:,} tokens" if self.image_tokens else "")
        rows = [
            StageRow("load model", self.loading),
            StageRow("before the timer", self.before_timer or 0.0, "image and prompt, by the wall clock", at_most=True),
            StageRow("vision encode", self.encoded, told if images else ""),
            StageRow("image prefill", self.decoded, f"{batches} batches" if batches > 1 else ""),
            StageRow(f"prompt{' (and images)' * (vision and self.counts_encoder)}", self.prompt_only, rate),
            StageRow("decode", self.eval_ms or 0.0, _rate(self.eval_n, self.eval_ms or 0.0)),
            StageRow("sample", self.sample_ms or 0.0),
        ]
        rest = self.whole - sum(row.ms for row in rows)
        name = "other" if self.prompt_ms or self.eval_ms or not self.wall_ms else "not timed"
        rows.append(StageRow("between tokens" if self.between else name, rest, "in none of the timers"))
        return tuple(row for row in rows if row.ms >= _LEAST_MS)


def _rate(count: int | None, ms: float) -> str:
    if (count or 0) < 8:  # what a few tokens take is the start of a batch, not a speed
        return f"{count} token(s)" if count else ""
    return f"{count:,} tokens, {count / ms * 1e3:,.2f} token/s" if count and ms > 0 else ""


@dataclass(frozen=True, slots=True)
class Setup:
    """Placement, build and memory; None and empty where the log is silent. `faults` are major page faults.

    `layers_on` of `layers` are on a GPU, `asked_layers` are what a command line asked for. `loads` counts loads of one
    model, `load_s` are the seconds that are known. `short_of` is whose memory llama.cpp or its front end found short.
    `unlisted`: the encoder has operations that fall back, and the log does not name them.
    """

    clip: str | None = None
    layers_on: int | None = None
    layers: int = 0
    asked_layers: int = -1
    vision: bool = False
    thinking: bool = False
    swa: int = 0
    gpu: bool = False
    no_gpu_build: bool = False
    parked: str | None = None
    unsupported: tuple[str, ...] = ()
    unlisted: bool = False
    device: str | None = None
    splits: int = 0
    nodes: int = 0
    flash: bool | None = None
    flash_failed: bool = False
    flash_where: str = ""
    threads: int = 0
    processors: int = 0
    debug: bool = False
    loads: int = 0
    load_s: tuple[float, ...] = ()
    no_memory: bool = False
    short_of: str | None = None
    no_vram: bool = False
    no_device: bool = False
    cpu_share: int = 0
    vram_free: str | None = None
    vram_need: str | None = None
    vram_total: str | None = None
    vram_start: str | None = None
    load_failed: bool = False
    client_gone: bool = False
    too_long: int = 0
    too_long_for: int = 0
    warning_line: int = 0
    prompt_limit: int = 0
    prompt_length: int = 0
    faults: int = 0
    cpu_percent: int | None = None
    elapsed_s: float | None = None

    @property
    def known(self) -> bool:
        """Something that only llama.cpp and its front ends say; any program runs out of memory, or is timed."""
        machine = replace(self, debug=False, faults=0, cpu_percent=None, elapsed_s=None, processors=0)
        return replace(machine, no_memory=False, warning_line=0, client_gone=False, vision=False) != Setup()

    @property
    def on_gpu(self) -> bool:
        """The language model has a GPU."""
        return self.gpu or bool(self.layers_on)


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a log holds: the first thousand of `count` requests, and the slowest (`worst`), which is explained."""

    tool: str
    setup: Setup
    requests: tuple[Request, ...]
    count: int
    worst: Request
    refused: Mapping[int, int] = field(default_factory=dict)  # how often, by the HTTP error
    refusal: str = ""  # what the server said to the first

    @property
    def position(self) -> int:
        """Which request is explained, from 1; 0 beyond those that are kept."""
        return self.requests.index(self.worst) + 1 if self.worst in self.requests else 0
