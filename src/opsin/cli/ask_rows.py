"""Answers of `opsin ask` on standard output: as text, or as JSON Lines, CSV or Markdown with a row for each image."""

import csv
import json
import sys
from pathlib import Path
from typing import Any, Literal

import typer

from opsin.cli.console import escaped, printable
from opsin.core.answer import Answer
from opsin.core.choice import Choice
from opsin.core.errors import BadParameter, OpsinError
from opsin.images.draw import check_drawing
from opsin.jobs.row import answer_row

_SURE = 0.5  # below, a free answer most often begins with something else
Format = Literal["text", "jsonl", "csv", "md"]


class Rows:
    """Prints one row for each image, or for each group of images; `alone` says that there is no more than one.

    Raises OSError when standard output cannot be written.
    """

    def __init__(self, form: Format, *, alone: bool) -> None:
        self._form, self._alone = form, alone
        self._csv = csv.writer(sys.stdout, lineterminator="\n")
        if form == "csv":
            self._csv.writerow(("source", "text", "error", "notes"))
        elif form == "md":
            typer.echo("| Image | Answer |\n| --- | --- |")

    def add(self, group: list[str], outcome: Answer | OpsinError, **about: Any) -> None:
        """The row of an answer, or of what went wrong, which text has none for; `about` goes into JSON."""
        name, answer = ", ".join(group), outcome if isinstance(outcome, Answer) else None
        text, error = (printable(answer.text), "") if answer else ("", str(outcome))
        if self._form == "jsonl":
            row = {"source": group[0] if len(group) == 1 else group, **answer_row(outcome), **about}
            typer.echo(json.dumps(row, ensure_ascii=False))
        elif self._form == "csv":
            notes = [note for image in answer.images for note in image.notes] if answer else []
            self._csv.writerow((name, text, error, "; ".join(filter(None, [*notes, about.get("cut", "")]))))
            sys.stdout.flush()
        elif self._form == "md":
            typer.echo(f"| {_cell(escaped(name))} | {_cell(text.strip() if answer else f'Error: {error}')} |")
        elif answer and self._alone:
            typer.echo(text, nl=not text.endswith("\n"))
        elif answer and sys.stdout.isatty():
            typer.echo(f"{typer.style(escaped(name), bold=True)}\n{text.strip()}\n")
        elif answer:
            typer.echo(f"{escaped(name)}\t{' '.join(text.split())}")


def check_boxes_out(form: Format, draw: Path | None, groups: list[list[str]]) -> None:
    """Raise BadParameter where boxes cannot be printed, or drawn."""
    if form in {"csv", "md"}:
        raise BadParameter(f"--format {form} has no place for boxes: use text or jsonl.")
    if draw is not None:
        if len(groups) != 1 or len(groups[0]) != 1 or groups[0] == ["-"]:
            raise BadParameter("--draw draws over one image, which is read twice: ask about one file or address.")
        check_drawing(draw)


def show_boxes(answer: Answer, group: list[str], form: Format, *, alone: bool) -> None:
    """A line of text for each box: left, top, right and lower edge, and its label."""
    for box in answer.boxes or () if form == "text" else ():
        edges = ",".join(f"{edge:.10g}" for edge in (box.x1, box.y1, box.x2, box.y2))
        words = [edges, escaped(box.label)] if alone else [escaped(", ".join(group)), edges, escaped(box.label)]
        typer.echo((" " if alone else "\t").join(words).rstrip())


def probable(choice: Choice) -> str:
    """How likely the likeliest labels are, and a word about labels that the model would not have said by itself."""
    best = sorted(choice.probabilities.items(), key=lambda one: -one[1])[:5]
    shown = ", ".join(f"{printable(label)} {share:.1%}" for label, share in best)
    mean = "" if choice.expected is None else f"; mean {choice.expected:.2f}"
    own = f"; a free answer begins so in {choice.coverage:.1%} of cases" if choice.coverage < _SURE else ""
    return f"({shown}{mean}{own})"


def _cell(text: str) -> str:
    return "<br>".join(text.replace("\\", "\\\\").replace("|", "\\|").splitlines())
