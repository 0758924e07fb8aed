"""`opsin ask IMAGE… QUESTION`: the answer as it comes, or one for each of many images; then where the time went."""

import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.bar import Bar
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

import opsin
from opsin.api import Opsin, question_about
from opsin.boxes import check_boxes
from opsin.cli import options as o
from opsin.cli.ask_files import check_question, expand_sources
from opsin.cli.ask_rows import Format, Rows, check_boxes_out, probable, show_boxes
from opsin.cli.console import DEMO, hush, printable, say, tell, working
from opsin.core.answer import CUTS, Answer, Finished, Progress, TextDelta, parsed
from opsin.core.config import checked
from opsin.core.errors import BadInput, BadParameter, OpsinError
from opsin.core.image_options import ImageOptions
from opsin.core.model_info import BackendShare, Placement
from opsin.core.request import Image, SamplingParams
from opsin.core.settings import EngineSettings, ImageSettings, VideoSettings
from opsin.doctor.build import unused_gpu_hint
from opsin.doctor.placement import remembered_placement
from opsin.engine import AnswerStream
from opsin.images import load_image
from opsin.images.draw import draw_boxes
from opsin.images.source import read_stream
from opsin.images.video import is_video
from opsin.worker.decoders import check_videos, join, load_source

BAR = 32
_MANY = 50
SLOTS = 4
_PROOF_MS = 500.0  # an image that takes longer than this is not computed once more only to see where it runs
_PARALLEL = f"{SLOTS} for several images, unless --ctx is given"
_TIMELINE = "show stage times (default: for one image, on a terminal)"
_QUIET = "print answers and errors only"
_Asked = tuple[list[str], AnswerStream | OpsinError]
_OF_IMAGES = {"image_decode", "preprocess", "encode", "image_prefill"}
_LABELS = {"start": "start Python", "load": "load model", "encode": "vision encode"}


@o.flags_of(SamplingParams, *o.LABELS, "system", *o.ANSWER, "boxes", "confidence")
@o.flags_of(EngineSettings, *o.ENGINE, "image_max_tokens", "image_min_tokens", "disk_cache", parallel=_PARALLEL)
@o.flags_of(ImageOptions, *o.IMAGES)
@o.flags_of(VideoSettings, "fps", "max_frames")
@o.flags_of(ImageSettings, *o.PAGES)
def ask(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE… QUESTION", help="images, PDFs, folders, addresses, or - for standard input"),
    ],
    *,
    together: Annotated[bool, typer.Option("--together", help="ask one question about all images together")] = False,
    frames: Annotated[bool, typer.Option("--frames", help="the images are frames of one video: ask together")] = False,
    recursive: Annotated[bool, typer.Option("-r", "--recursive", help="read the folders in folders, too")] = False,
    as_json: Annotated[bool, o.output("--json", help="the same as --format jsonl")] = False,
    form: Annotated[Format, o.output("--format", help="what is printed; jsonl: a JSON object a line")] = "text",
    timed: Annotated[bool | None, o.output("--timeline/--no-timeline", help=_TIMELINE)] = None,
    quiet: Annotated[bool, o.output("-q", "--quiet", help=_QUIET)] = False,
    draw: Annotated[Path | None, o.output("--draw", help="also write the image with the answer's boxes")] = None,
    json_schema: Annotated[Path | None, o.answer(help="file with a JSON schema that the answer will fit")] = None,
    **flags: Any,
) -> None:
    """Ask one question about each image or video, or about all of them together.

    Settings of model, hardware and images can also be given in opsin.toml or as OPSIN_* environment variables.
    """
    params = o.answer_fields(flags, json_schema)
    params |= {} if draw is None else {"boxes": True}
    whole = checked(SamplingParams, params).has_value  # before a model is loaded
    limits = checked(ImageSettings, {"fetch": True, **o.given(ImageSettings, flags)})
    *sources, question = arguments
    check_question(sources, question)
    hush(quiet=quiet)
    found = expand_sources(sources, recursive=recursive)
    groups = [found] if together or frames else [[source] for source in found]
    form = "jsonl" if as_json else form
    if params.get("boxes"):
        check_boxes_out(form, draw, groups)
        if draw is not None and (limits.pages or frames or is_video(found[0]) or found[0].lower().endswith(".pdf")):
            raise BadParameter(
                "--draw draws over an image file: save the page or the frame as one, and ask about that."
            )
    if params.get("confidence") and form != "jsonl":
        raise BadParameter("--confidence is shown in JSON alone: give --json, too.")
    if len(groups) > _MANY:
        tell(f"(for {len(groups):,} images see opsin batch: it goes on where it was stopped, and is faster)")
    settings = o.settings_of(flags, min(SLOTS, len(groups)))
    if timed is None:
        timed = form == "text" and len(groups) == 1 and not quiet and sys.stderr.isatty()
    video = o.given(VideoSettings, flags)
    checked(VideoSettings, video)
    reading = {"frames": frames, **video}
    check_videos(found, **reading)
    shown = checked(ImageOptions, {name: flags[name] for name in o.IMAGES})
    _Run(groups, form, timed, whole, settings, question, flags["system"], params, reading, draw, shown, limits).all()


@dataclass
class _Run:
    """Asks about groups of images, several at the same time, and prints the answers in their order.

    At most one group more than there are slots is held in memory. The model is loaded when the first image was read.
    """

    groups: list[list[str]]
    form: Format
    timed: bool
    whole: bool
    settings: EngineSettings
    question: str
    system: str | None
    params: dict[str, Any]
    reading: dict[str, Any]
    draw: Path | None
    shown: ImageOptions
    limits: ImageSettings

    def __post_init__(self) -> None:
        self._alone = len(self.groups) == 1
        self._rows, self._line = Rows(self.form, alone=self._alone), working("reading the image")
        self._done = self._failed = 0
        self._told_load = False

    @cached_property
    def _opsin(self) -> Opsin:
        self._line.stop()  # another line says that the model is loaded
        model = self._stack.enter_context(opened(self.settings))
        if self.params.get("boxes"):
            check_boxes(model.info)
        self._line.start()
        return model

    def all(self) -> None:
        """Ask about every group. Raises what is wrong with the only one, and Exit if one of several failed."""
        begin, pending = time.monotonic(), deque[_Asked]()
        try:
            with ExitStack() as self._stack:
                self._stack.callback(self._end_line)
                self._line.start()
                for group in self.groups:
                    pending.append(self._ask(group))
                    if len(pending) > self.settings.parallel:
                        self._finish(*pending.popleft())
                while pending:
                    self._finish(*pending.popleft())
        except KeyboardInterrupt:
            say(f"opsin: stopped: {self._progress()}")
            raise
        if not self._alone:
            tell(f"({self._progress()} in {time.monotonic() - begin:,.1f} s)")
        if self._failed:
            raise typer.Exit(1)

    def _end_line(self) -> None:
        with suppress(IndexError):  # Rich's, where Ctrl-C came while it began the line
            self._line.stop()

    def _progress(self) -> str:
        failed = f", {self._failed:,} failed" if self._failed else ""
        return f"{self._done - self._failed:,} of {len(self.groups):,} done{failed}"

    def _ask(self, group: list[str]) -> _Asked:
        try:
            how = (self.limits, self.shown, lambda: self._opsin.engine.limits.images)
            images = join([_read_images(source, *how, **self.reading) for source in group], **self.reading)
        except BadInput as error:  # what is wrong with the model, is for all
            return group, error
        load_ms = 0.0 if self._told_load else self._opsin.load_ms
        self._told_load = True
        try:
            images = [self._opsin.image(image) for image in images]  # in as many tokens as the settings say
            messages = question_about(images, self.question, self.system)
            return group, self._opsin.submit(messages, **self.params, load_ms=load_ms)
        except OpsinError as error:
            return group, error

    def _finish(self, group: list[str], outcome: AnswerStream | OpsinError) -> None:
        name = ", ".join(group)
        try:
            if isinstance(outcome, OpsinError):
                raise outcome
            self._answered(group, outcome)
        except OpsinError as error:
            self._failed += 1
            self._line.stop()
            self._rows.add(group, error)
            if self._alone:
                raise
            say(f"opsin: {error}" if name in str(error) else f"opsin: {name}: {error}")
        self._done += 1
        if not self._alone:
            self._line.update(self._progress())
            self._line.start()

    def _answered(self, group: list[str], stream: AnswerStream) -> None:
        streamed = self._alone and self.form == "text" and not self.whole  # half a JSON document is none
        answer = follow(stream, self._line, quiet=not streamed) if self._alone else stream.result()
        if self.whole:
            parsed(answer)
        self._line.stop()
        wall_ms = seconds_since_start() * 1e3
        if self.form == "jsonl" or self.timed:
            stages = answer.stages
            quick = stages.encode_ms + stages.image_prefill_ms + stages.text_prefill_ms < _PROOF_MS
            placement = remembered_placement(self._opsin.setup, self._opsin.placement if quick else None)
        if self.form == "jsonl":
            self._rows.add(group, answer, placement=placement.as_dict(), model=self._opsin.info.as_dict())
        elif not streamed:
            self._rows.add(group, answer, cut=CUTS[answer.limit].format(answer) if answer.limit else "")
        name = "" if self._alone else f"{', '.join(group)}: "
        show_boxes(answer, group, self.form, alone=self._alone)
        if self.draw:
            draw_boxes(load_image(group[0], ImageSettings(fetch=True)), answer.boxes or (), self.draw)
        if self.form != "jsonl":  # whose rows have both
            for note in dict.fromkeys(note for image in answer.images for note in image.notes):
                tell(f"({name}{note})")
            show_limits(answer, name)
        if self.timed:
            screen = Console(stderr=True)
            screen.print("", timeline(answer, placement, wall_ms, screen.width), sep="\n")
            if not placement.proven:
                tell("(`opsin doctor` proves which device computed it)")


@contextmanager
def opened(settings: EngineSettings) -> Iterator[Opsin]:
    """The model of these settings, after what the user should know about it."""
    with working("loading the model"):
        model = Opsin(config=False, **settings.model_dump(exclude_unset=True))
    with model:
        if model.is_demo:
            tell(DEMO)
        if hint := unused_gpu_hint():
            tell(hint)
        yield model


def seconds_since_start() -> float:
    """How long this process has run: on Linux with the start of Python, elsewhere from Opsin's first import on."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.perf_counter() - opsin.BEGAN


def follow(stream: Iterable[object], line: Status, *, quiet: bool = False) -> Answer:
    """Print an answer as it comes (nothing when `quiet`), its reasoning dimmed; give it back whole."""
    thinking, last = False, "\n"
    for event in stream:
        if isinstance(event, Progress):
            line.update(event.text)
        elif isinstance(event, TextDelta) and not quiet:
            line.stop()
            text = printable(event.text)
            if thinking and not event.reasoning:
                text = f"\n\n{text}"
            typer.echo(typer.style(text, dim=True) if event.reasoning else text, nl=False)
            thinking, last = event.reasoning, text[-1:] or last
        elif isinstance(event, Finished):
            typer.echo(nl=not quiet and last != "\n")
            return event.answer
    raise AssertionError("a stream ends with Finished or an error")


def show_limits(answer: Answer, name: str = "") -> None:
    """Say what cut an answer, and how to lift it, or how likely its choice is; `name` says which one."""
    if answer.limit is not None:
        tell(name + CUTS[answer.limit].format(answer))
    if answer.choice is not None:
        tell(name + probable(answer.choice))


def _read_images(source: str, limits: ImageSettings, *how: Any, frames: bool = False, **video: Any) -> list[Image]:
    if not source:
        raise BadParameter("The image's name is empty: give a file, a folder, an address, or -.")
    settings = VideoSettings(**video)
    # One byte more than a file may have is enough to refuse it.
    data: str | bytes = source
    if source == "-":
        data = read_stream(sys.stdin.buffer, limits.max_bytes + 1)
        if is_video(data):
            data += read_stream(sys.stdin.buffer, settings.max_bytes + 1 - len(data))
    return load_source(data, limits, settings, *how, frames=frames)


def timeline(answer: Answer, placement: Placement, wall_ms: float = 0.0, width: int = 100) -> Table:
    """One row for each stage that took time; bars start where the stage began, if stages ran one after another.

    `wall_ms` is how long the command has run: what no stage has of it is the start of Python and Opsin. In few columns
    the bars go first, then the notes; the numbers stay.
    """
    stages = {name.removesuffix("_ms"): ms for name, ms in asdict(answer.stages).items()}
    total = stages.pop("total")
    stages = {"start": max(0.0, wall_ms - total), **stages}
    total, before, notes = max(total, wall_ms), 0.0, _notes(answer, placement)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("stage", style="bold", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    if bars := width >= 2.5 * BAR:
        table.add_column("", width=BAR, no_wrap=True)
    if noted := width >= 1.5 * BAR:
        table.add_column("")
    for name, ms in stages.items():
        if ms >= 0.05 or name in {"text_prefill", "decode"} or (answer.images and name in _OF_IMAGES):
            bar = Bar(max(total, 1e-9), before, before + ms, width=BAR, color="cyan")
            label = _LABELS.get(name, name.replace("_", " "))
            table.add_row(label, f"{ms:,.1f}", *[bar] * bars, *[Text(notes.get(name, ""))] * noted)
        before += ms
    counts = f"{answer.usage.prompt_tokens} prompt + {answer.usage.completion_tokens} answer tokens"
    table.add_row("total", f"{total:,.1f}", *[""] * bars, *[Text(counts)] * noted)
    return table


def _notes(answer: Answer, placement: Placement) -> dict[str, str]:
    usage, stages = answer.usage, answer.stages
    known = answer.images and all(image.cached for image in answer.images)
    where = ", remembered: the encoder did not run" if known else _where(placement.encoder)
    timings = answer.timings
    drafts = f", {timings.draft_n_accepted} of {timings.draft_n} drafted tokens accepted" if timings.draft_n else ""
    sizes = {f"{i.width}×{i.height} → {i.resized_width}×{i.resized_height}" for i in answer.images}
    return {
        "preprocess": ", ".join(sorted(sizes)),
        "encode": f"{usage.image_tokens} image tokens{where}",
        "image_prefill": _rate(usage.image_tokens, stages.image_prefill_ms),
        "text_prefill": _rate(usage.prompt_tokens - usage.image_tokens, stages.text_prefill_ms),
        "decode": _rate(usage.completion_tokens, timings.predicted_ms) + drafts + _where(placement.language_model),
    }


def _rate(tokens: int, ms: float) -> str:
    rate = f", {tokens / ms * 1e3:,.0f} token/s" if ms > 0 else ""
    return f"{tokens} tokens{rate}" if tokens else ""


def _where(shares: dict[str, BackendShare]) -> str:
    parts = [f"{share.share_of_ops:.0%} {name}" for name, share in shares.items() if share.share_of_ops >= 0.005]
    return f", ran on {', '.join(parts)}" if parts else ""
