"""`opsin ask IMAGE… QUESTION`: the answer as it comes, then where the time went."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.bar import Bar
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from opsin.api import Opsin, question_about
from opsin.cli import options as o
from opsin.cli.console import DEMO, printable, say, working
from opsin.core.answer import Answer, Finished, Progress, TextDelta
from opsin.core.errors import BadInput, BadParameter
from opsin.core.files import read_text
from opsin.core.model_info import BackendShare, Placement
from opsin.core.request import Image, SamplingParams
from opsin.core.settings import MAX_SCHEMA, EngineSettings, ImageSettings
from opsin.doctor.build import unused_gpu_hint
from opsin.doctor.placement import remembered_placement

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif", ".bmp", ".tif", ".tiff", ".gif"}
BAR = 32
_NOT_IN_JSON = {"tiles", "cached", "orientation"}
_OF_IMAGES = {"image_decode", "preprocess", "encode", "image_prefill"}
_LABELS = {"load": "load model", "encode": "vision encode"}
_CUTS = {
    "tokens": "(cut after {0.max_tokens} tokens; --max-tokens N lifts the limit)",
    "seconds": "(cut by --max-seconds)",
    "context": "(cut because the context is full; --ctx N makes it larger)",
    "guard": "(ended by the guard: {0.guard.reason} at token {0.guard.at_token}; --no-guard lets it go on)",
}


@o.flags_of(SamplingParams, *o.ANSWER)
@o.flags_of(EngineSettings, *o.ENGINE, "image_max_tokens", "image_min_tokens", "disk_cache")
def ask(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE… QUESTION", help="files, folders, addresses, or - for standard input"),
    ],
    *,
    together: Annotated[bool, typer.Option("--together", help="ask one question about all images together")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object for each image, one a line")] = False,
    json_schema: Annotated[Path | None, typer.Option(help="file with a JSON schema that the answer will fit")] = None,
    system: o.System = None,
    **flags: Any,
) -> None:
    """Ask one question about each image, or about all of them together.

    Options can also be set in opsin.toml or OPSIN_* environment variables.
    """
    params = o.given(SamplingParams, flags)
    if json_schema is not None:
        params["json_schema"] = read_text(json_schema, MAX_SCHEMA)
    *sources, question = arguments
    found = list(_expand(sources, question))
    groups = [found] if together else [[source] for source in found]
    failed = False
    with opened(flags) as opsin:
        for number, group in enumerate(groups):
            if len(groups) > 1 and not as_json:
                say(f"── {', '.join(group)}")
            try:
                load_ms = 0.0 if number else opsin.load_ms
                _ask_about(opsin, group, question, system, {**params, "load_ms": load_ms}, as_json=as_json)
            except BadInput as error:
                if as_json:
                    _print_row(group, {"error": {"code": error.code, "message": str(error)}, "text": None})
                if len(groups) == 1:
                    raise
                failed = True
                say(f"opsin: {', '.join(group)}: {error}")
    if failed:
        raise typer.Exit(1)


@contextmanager
def opened(flags: dict[str, Any]) -> Iterator[Opsin]:
    """The model that the flags name, loaded for one question at a time, after what the user should know about it."""
    with working("loading the model"):
        opsin = Opsin(**o.given(EngineSettings, flags), parallel=1)
    with opsin:
        if opsin.is_demo:
            say(DEMO)
        if hint := unused_gpu_hint():
            say(hint)
        yield opsin


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


def show_limits(answer: Answer) -> None:
    """Say what cut an answer, and how to lift it."""
    cut = "guard" if answer.guard is not None else answer.limit
    if cut is not None:
        say(_CUTS[cut].format(answer))


def _ask_about(
    opsin: Opsin, group: list[str], question: str, system: str | None, params: dict[str, Any], *, as_json: bool
) -> None:
    with working("reading the image") as line:
        images = [_read_image(opsin, source) for source in group]
        stream = opsin.submit(question_about(images, question, system), **params)
        answer = follow(stream, line, quiet=as_json)
    placement = remembered_placement(opsin.setup, opsin.placement)
    if as_json:
        about = {"placement": placement.as_dict(), "model": opsin.info.as_dict()}
        _print_row(group, {"error": None, **_as_json(answer, images), **about})
        return
    for image in images:
        for note in image.notes:
            say(f"({note})")
    show_limits(answer)
    Console(stderr=True).print("", timeline(answer, placement), sep="\n")


def _read_image(opsin: Opsin, source: str) -> Image:
    if not source:
        raise BadParameter("The image's name is empty: give a file, a folder, an address, or -.")
    # One byte more than an image may have is enough to refuse it.
    return opsin.image(sys.stdin.buffer.read(ImageSettings().max_bytes + 1) if source == "-" else source)


def _expand(sources: list[str], question: str) -> Iterator[str]:
    """The sources, with the images of a folder in its place. Raises BadParameter."""
    if not sources:
        if os.path.lexists(question):
            raise BadParameter(f'The question is missing: opsin ask {question} "What is this?"')
        raise BadParameter(f'The image is missing: opsin ask IMAGE "{question}"')
    for source in sources:
        # os.path.isdir, because it says False for a name that is too long; an empty name is no folder, either.
        if "://" in source or source.startswith("data:") or not os.path.isdir(source):  # noqa: PTH112
            yield source
            continue
        paths = [p for p in Path(source).iterdir() if p.suffix.lower() in IMAGE_ENDINGS and p.is_file()]
        if not paths:
            raise BadParameter(f"There is no image in the folder {source}: it holds no file named like one.")
        yield from sorted(map(str, paths))


def _print_row(group: list[str], row: dict[str, Any]) -> None:
    source = group[0] if len(group) == 1 else group
    typer.echo(json.dumps({"source": source, **row}, ensure_ascii=False))


def _as_json(answer: Answer, images: list[Image]) -> dict[str, Any]:
    row = asdict(answer)
    told = [
        {name: value for name, value in info.items() if name not in _NOT_IN_JSON} | {"notes": image.notes}
        for info, image in zip(row["images"], images, strict=True)
    ]
    times = {key: {name: round(value, 3) for name, value in row[key].items()} for key in ("stages", "timings")}
    same = {name: row[name] for name in ("text", "reasoning", "finish_reason", "usage", "guard")}
    return {**same, "images": told, **times}


def timeline(answer: Answer, placement: Placement) -> Table:
    """One row for each stage that took time; bars start where the stage began, if stages ran one after another."""
    stages = {name.removesuffix("_ms"): ms for name, ms in asdict(answer.stages).items()}
    total, before, notes = stages.pop("total"), 0.0, _notes(answer, placement)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("stage", style="bold", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("", width=BAR, no_wrap=True)
    table.add_column("", overflow="fold")
    for name, ms in stages.items():
        if ms >= 0.05 or name in {"text_prefill", "decode"} or (answer.images and name in _OF_IMAGES):
            bar = Bar(max(total, 1e-9), before, before + ms, width=BAR, color="cyan")
            label = _LABELS.get(name, name.replace("_", " "))
            table.add_row(label, f"{ms:,.1f}", bar, Text(notes.get(name, "")))
        before += ms
    counts = f"{answer.usage.prompt_tokens} prompt + {answer.usage.completion_tokens} answer tokens"
    table.add_row("total", f"{total:,.1f}", "", Text(counts))
    return table


def _notes(answer: Answer, placement: Placement) -> dict[str, str]:
    usage, stages = answer.usage, answer.stages
    known = answer.images and all(image.cached for image in answer.images)
    where = ", remembered: the encoder did not run" if known else _where(placement.encoder)
    sizes = {f"{i.width}×{i.height} → {i.resized_width}×{i.resized_height}" for i in answer.images}
    return {
        "preprocess": ", ".join(sorted(sizes)),
        "encode": f"{usage.image_tokens} image tokens{where}",
        "image_prefill": _rate(usage.image_tokens, stages.image_prefill_ms),
        "text_prefill": _rate(usage.prompt_tokens - usage.image_tokens, stages.text_prefill_ms),
        "decode": _rate(usage.completion_tokens, answer.timings.predicted_ms) + _where(placement.language_model),
    }


def _rate(tokens: int, ms: float) -> str:
    rate = f", {tokens / ms * 1e3:,.0f} token/s" if ms > 0 else ""
    return f"{tokens} tokens{rate}" if tokens else ""


def _where(shares: dict[str, BackendShare]) -> str:
    parts = [f"{share.share_of_ops:.0%} {name}" for name, share in shares.items() if share.share_of_ops >= 0.005]
    return f", ran on {', '.join(parts)}" if parts else ""
