"""The progress line of `opsin batch`, and its summary."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opsin.cli import console
from opsin.jobs.runner import Figures

_LINE_SECONDS = 60.0


class ProgressLine:
    """A bar on a terminal, shown while `bar` is entered; elsewhere a line now and then."""

    def __init__(self, total: int | None) -> None:
        parts = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"), TimeRemainingColumn())
        screen = Console(stderr=True)
        self.bar = Progress(*parts, console=screen, disable=console.is_quiet() or not screen.is_terminal)
        self._task = self.bar.add_task("", total=total, rates="")
        self._said = time.monotonic()

    def show(self, figures: Figures) -> None:
        """How it stands now."""
        self.bar.update(self._task, completed=figures.before + figures.done, rates=rates(figures))
        if not sys.stderr.isatty() and time.monotonic() - self._said > _LINE_SECONDS:
            self._said = time.monotonic()
            of = f" of {figures.total:,}" if figures.total else ""
            console.tell(f"({figures.before + figures.done:,}{of} rows, {rates(figures)})")


def rates(figures: Figures) -> str:
    """Rows, images and tokens a second, what was remembered, and errors by kind."""
    seconds = max(1e-9, time.monotonic() - figures.began)
    parts = [f"{figures.done / seconds:,.1f} rows/s", f"{figures.images / seconds:,.1f} images/s"]
    parts += [f"{figures.tokens / seconds:,.0f} tokens/s"]
    parts += [f"{figures.cached:,} with a remembered image"] if figures.cached else []
    parts += [f"{figures.same:,} the same as another row"] if figures.same else []
    return ", ".join([*parts, *(f"{count:,} {code}" for code, count in figures.errors.most_common())])


def summary(figures: Figures) -> str:
    """One sentence without its stop about a run."""
    before = f", {figures.before:,} were there before" if figures.before else ""
    seconds = time.monotonic() - figures.began
    return f"{figures.done:,} rows in {seconds:,.1f} s{before}: {rates(figures)}"
