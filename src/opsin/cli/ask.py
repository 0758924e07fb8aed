"""`opsin ask PICTURE… QUESTION`: the answer as it comes, then where the time went."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli import options as o
from opsin.cli.console import Printer, Working, say
from opsin.core.answer import Finished, Progress, TextDelta
from opsin.core.errors import BadInput, BadParameter, BadPicture, PictureTooLarge
from opsin.core.files import read_text
from opsin.core.sampling import MAX_SCHEMA, SamplingParams
from opsin.core.settings import EngineSettings, MediaSettings

if TYPE_CHECKING:
    from opsin.api import Opsin
    from opsin.core.answer import Answer
    from opsin.core.picture import Picture

PICTURE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif", ".bmp", ".tif", ".tiff", ".gif"}
_HIDDEN = {"tiles", "cached", "orientation"}  # of ImageInfo: no part of the contract


def ask(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="PICTURE… QUESTION", help="files, folders, addresses, or - for standard input"),
    ],
    *,
    together: Annotated[bool, typer.Option("--together", help="ask one question about all pictures together")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object for each picture, one a line")] = False,
    json_schema: Annotated[
        str | None, typer.Option("--json-schema", help="file with a JSON schema that the answer will fit")
    ] = None,
    model: o.Model = None,
    mmproj: o.Mmproj = None,
    ctx: o.Ctx = None,
    gpu_layers: o.GpuLayers = None,
    device: o.Device = None,
    mmproj_device: o.MmprojDevice = None,
    threads: o.Threads = None,
    threads_batch: o.ThreadsBatch = None,
    kv_type: o.KvType = None,
    image_max_tokens: o.ImageMax = None,
    image_min_tokens: o.ImageMin = None,
    profile: o.Profile = None,
    max_tokens: o.MaxTokens = None,
    max_seconds: o.MaxSeconds = None,
    temperature: o.Temperature = None,
    seed: o.Seed = None,
    guard: o.UseGuard = True,
    disk_cache: o.DiskCache = None,
    thinking: o.Thinking = None,
    max_thinking_tokens: o.MaxThinking = None,
    system: o.System = None,
    verbose: o.Verbose = None,
) -> None:
    """Ask one question about each picture, or about all of them together.

    Options can also be set in opsin.toml or OPSIN_* environment variables.
    """
    engine = {**o.fields_of(EngineSettings, locals()), **o.given(profile=profile), "parallel": 1}
    params = o.fields_of(SamplingParams, {**locals(), "json_schema": _read_schema(json_schema)})
    *sources, question = arguments
    found = _expand(sources, question)
    groups = [found] if together else [[source] for source in found]
    with Working("loading the model") as working:
        from opsin.api import Opsin

        with Opsin(**engine) as opsin:
            working.stop()
            notices(opsin)
            failed = _Asker(opsin, question, system, params, as_json).run(groups)
    if failed:
        raise typer.Exit(1)


@dataclass
class _Asker:
    """Asks about one group of pictures after another; one bad picture does not lose the others."""

    _opsin: Opsin
    _question: str
    _system: str | None
    _params: dict[str, Any]
    _json: bool

    def __post_init__(self) -> None:
        self._load_ms = self._opsin.load_ms

    def run(self, groups: list[list[str]]) -> int:
        """How many groups failed; a single one raises instead."""
        failed = 0
        for group in groups:
            if len(groups) > 1 and not self._json:
                say(f"── {', '.join(group)}")
            try:
                self._one(group)
            except BadInput as error:
                if self._json:
                    _print_row(
                        {"source": _source(group), "error": {"code": error.code, "message": str(error)}, "text": None}
                    )
                if len(groups) == 1:
                    raise
                failed += 1
                say(f"opsin: {', '.join(group)}: {error}")
        return failed

    def _one(self, group: list[str]) -> None:
        from opsin.api import question_about
        from opsin.doctor.placement import remembered_placement

        with Working("reading the picture") as working:
            pictures = [_load(self._opsin, source) for source in group]
            messages = question_about(pictures, self._question, self._system)
            stream = self._opsin.submit(messages, load_ms=self._load_ms, **self._params)
            self._load_ms = 0.0
            answer = follow(stream, working, quiet=self._json)
        placement = remembered_placement(self._opsin.setup, self._opsin.placement)
        if self._json:
            head = {"source": _source(group), "error": None}
            about = {"placement": placement.as_dict(), "model": self._opsin.info.as_dict()}
            _print_row({**head, **_as_json(answer, pictures), **about})
            return
        for note in (note for picture in pictures for note in picture.notes):
            say(f"({note})")
        show_limits(answer)
        from rich.console import Console

        from opsin.cli.timeline import timeline

        console = Console(stderr=True)
        console.print()
        console.print(timeline(answer, placement))


def _load(opsin: Opsin, source: str) -> Picture:
    if not source:
        raise BadParameter("The picture's name is empty: give a file, a folder, an address, or -.")
    return opsin.picture(_standard_input() if source == "-" else source)


def _standard_input() -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise BadPicture("Standard input is closed: give the picture as a file.")
    limit = MediaSettings().max_bytes
    data = sys.stdin.buffer.read(limit + 1)
    if len(data) > limit:
        raise PictureTooLarge(f"Standard input has more than {limit:,} bytes: give a smaller picture.")
    return data


def follow(stream: Iterable[object], working: Working, *, quiet: bool = False) -> Answer:
    """Print an answer as it comes (or nothing, when `quiet`), and give it back whole."""
    printer = Printer()
    for event in stream:
        if isinstance(event, Progress):
            working.update(event.text)
        elif isinstance(event, TextDelta) and not quiet:
            working.stop()
            printer.write(event.text, reasoning=event.reasoning)
        elif isinstance(event, Finished):
            if not quiet:
                printer.end()
            return event.answer
    raise AssertionError("a stream ends with Finished or an error")


def _expand(sources: list[str], question: str) -> list[str]:
    """Folders become the pictures in them. Raises BadParameter."""
    if not sources:
        if os.path.lexists(question):
            raise BadParameter(f'The question is missing: opsin ask {question} "What is this?"')
        raise BadParameter(f'The picture is missing: opsin ask PICTURE "{question}"')
    if sources.count("-") > 1:
        raise BadParameter("Standard input can be read once: give - one time.")
    return [path for source in sources for path in _pictures_in(source)]


def _pictures_in(source: str) -> Iterator[str]:
    if source in {"", "-"} or "://" in source or source.startswith("data:") or not os.path.isdir(source):  # noqa: PTH112 - says False for a name that is too long
        yield source
        return
    try:
        found = sorted(str(p) for p in Path(source).iterdir() if p.suffix.lower() in PICTURE_ENDINGS and p.is_file())
    except OSError as error:
        raise BadParameter(f"The folder {source} cannot be read: {error.strerror or error}.") from None
    if not found:
        raise BadParameter(f"There is no picture in the folder {source}: it holds no file named like one.")
    yield from found


def _read_schema(path: str | None) -> str | None:
    return None if path is None else read_text(Path(path), MAX_SCHEMA)


def notices(opsin: Opsin) -> None:
    """What the user should know before the first answer."""
    from opsin.doctor.build import unused_gpu_hint

    if opsin.is_demo:
        say("This is the demo model for drawn scenes; for photographs get a real one: opsin pull llava-1.5-7b")
    hint = unused_gpu_hint()
    if hint:
        say(hint)


def show_limits(answer: Answer) -> None:
    """Say what cut an answer, and how to lift it."""
    if answer.guard is not None:
        say(f"(ended by the guard: {answer.guard.reason} at token {answer.guard.at_token}; --no-guard lets it go on)")
    elif answer.limit == "tokens":
        say(f"(cut after {answer.max_tokens} tokens; --max-tokens N lifts the limit)")
    elif answer.limit == "seconds":
        say("(cut by --max-seconds)")
    elif answer.limit == "context":
        say("(cut because the context is full; --ctx N makes it larger)")


def _source(group: list[str]) -> str | list[str]:
    return group[0] if len(group) == 1 else group


def _print_row(row: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _as_json(answer: Answer, pictures: list[Picture]) -> dict[str, Any]:
    images = [
        {**{name: value for name, value in asdict(image).items() if name not in _HIDDEN}, "notes": list(picture.notes)}
        for image, picture in zip(answer.images, pictures, strict=True)
    ]
    return {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish_reason,
        "usage": asdict(answer.usage),
        "images": images,
        "stages": answer.stages.as_dict(),
        "timings": {name: round(value, 3) for name, value in asdict(answer.timings).items()},
        "guard": None if answer.guard is None else asdict(answer.guard),
    }
