"""The report of a job, from its ledger: some lines for the terminal, and one HTML file that needs nothing else."""

import base64
import json
import math
import re
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

from opsin.core.files import write_whole
from opsin.jobs.ledger import Ledger
from opsin.jobs.output import writing
from opsin.jobs.row import COUNTS, TIMES

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_LONGEST_ID, _LONGEST_TEXT = 200, 20_000  # characters that are shown
_SLOWEST, _EXAMPLES, _IMAGES = 20, 5, 24
_BINS = 60
_UNITS = (("h", 3.6e6), ("min", 6e4), ("s", 1e3), ("ms", 1.0))
_PAUSE_MS = 60_000.0
"""After so long without a row, beyond what the next one took, the job is taken to have paused."""

# NOT INDEXED: one pass over the table is much faster than a look-up of each row by the index on its id.
_FROM = "FROM rows NOT INDEXED WHERE job = ?"
_ASKED = "state = 1 AND total_ms > 0"  # the others took another row's answer
_COUNTED = {"answered": "state = 1", "failed": "state = 2", "left": "state = 0", "asked": _ASKED}
_TOTALS = f"""SELECT {", ".join(f"total({what})" for what in _COUNTED.values())},
  {", ".join(f"total({name}) FILTER (WHERE {_ASKED})" for name in (*COUNTS, *TIMES))} {_FROM}"""
_THROUGHPUT = f"""
WITH gaps AS (
  SELECT ended, coalesce(total_ms, 0) AS own,
    1000 * (ended - lag(ended, 1, (SELECT begun FROM jobs WHERE job = ?)) OVER (ORDER BY ended)) AS gap
  {_FROM} AND state > 0
), clock AS MATERIALIZED (
  SELECT sum(CASE WHEN gap < own + {_PAUSE_MS} THEN max(gap, 0) ELSE own END)
    OVER (ORDER BY ended ROWS UNBOUNDED PRECEDING) AS at FROM gaps
)
SELECT min({_BINS - 1}, CAST(at * {_BINS} / wall AS INTEGER)), count(*), wall
FROM clock, (SELECT max(at) AS wall FROM clock) WHERE wall > 0 GROUP BY 1"""  # noqa: S608 - the names are our own
_AT_PLACES = f"""SELECT total_ms FROM (
  SELECT total_ms, row_number() OVER (ORDER BY total_ms) AS place {_FROM} AND {_ASKED}
) WHERE place IN (?, ?, ?, ?) ORDER BY place"""  # noqa: S608
_HISTOGRAM = f"""SELECT CAST((total_ms - ?) / ? AS INTEGER) AS bin, count(*) {_FROM} AND {_ASKED}
  AND total_ms BETWEEN ? AND ? GROUP BY bin"""
_SLOWEST_ROWS = f"SELECT id, {', '.join(TIMES)}, completion_tokens, attempt {_FROM} AND {_ASKED} ORDER BY total_ms DESC"
_ERRORS = f"""SELECT error_code, id, many FROM (
  SELECT error_code, id, seq, count(*) OVER (PARTITION BY error_code) AS many,
    row_number() OVER (PARTITION BY error_code ORDER BY seq) AS place {_FROM} AND state = 2
) WHERE place <= {_EXAMPLES} ORDER BY many DESC, error_code, seq"""  # noqa: S608
_SAMPLES = """SELECT id, jpeg, text, error_code, state FROM samples JOIN rows USING (job, id) WHERE job = ?
  ORDER BY rank LIMIT ?"""


class _Stats:
    """What the ledger says of a job. Times are in milliseconds, summed over rows but for `wall`, without pauses."""

    def __init__(self, ledger: Ledger, job: str) -> None:
        self._ledger, self._job = ledger, job
        (found,) = ledger.query(_TOTALS, job)
        self.sums: dict[str, float] = dict(zip((*_COUNTED, *COUNTS, *TIMES), found, strict=True))
        self.ended = int(self.sums["answered"] + self.sums["failed"])
        self.asked = int(self.sums["asked"])
        self.same = int(self.sums["answered"]) - self.asked
        parts = {name: self.sums[f"{name}_ms"] for name in ("encode", "prefill", "decode")}
        self.stages = {**parts, "other": max(0.0, self.sums["total_ms"] - sum(parts.values()))}
        self.ended_by_time = ledger.query(_THROUGHPUT, job, job)
        self.wall: float = self.ended_by_time[0][2] if self.ended_by_time else 0.0
        places = [max(1, math.ceil(self.asked * share)) for share in (0.01, 0.5, 0.99, 1)]
        at = dict(zip(sorted(set(places)), ledger.query(_AT_PLACES, job, *places), strict=False))
        self.low, self.median, self.high, self.longest = (float(at[place][0]) if at else 0.0 for place in places)
        self.slowest = ledger.query(f"{_SLOWEST_ROWS} LIMIT {_SLOWEST}", job)
        self.errors = dict[str, tuple[int, list[str]]]()
        for code, name, many in ledger.query(_ERRORS, job):
            self.errors.setdefault(code or "unknown", (many, []))[1].append(name)

    @property
    def rates(self) -> str:
        """Rows and tokens a second."""
        seconds = self.wall / 1000
        if not seconds:
            return "too short for a rate"
        return f"{_number(self.ended / seconds)} rows/s, {_number(self.sums['completion_tokens'] / seconds)} tokens/s"

    def share(self, ms: float) -> str:
        """Of all rows' time, in percent."""
        return f"{100 * ms / (self.sums['total_ms'] or 1):.0f}%"

    def throughput(self) -> dict[str, Any] | None:
        """Rows per second or minute over the time of the job."""
        if not self.wall:
            return None
        # Rows are noted in groups, a second apart or more: shorter bars would show those, not the rate.
        most = min(self.wall / 3000, self.ended / 5)
        bins = next((count for count in (60, 30, 20, 15, 12, 10, 6, 5, 4, 3, 2) if count <= most), 1)
        values = [0.0] * bins
        for place, count, _ in self.ended_by_time:
            values[place * bins // _BINS] += count * bins / (self.wall / 1000)
        unit = "s" if max(values) >= 1 else "min"
        values = values if unit == "s" else [60 * value for value in values]
        name, size = _unit(self.wall)
        titles = {"x_title": f"time, without pauses ({name})", "y_title": f"rows per {unit}"}
        return {"start": 0, "width": self.wall / size / bins, "values": values, **titles}

    def times(self) -> dict[str, Any] | None:
        """How many rows took how long; the 1 % at each end are left out where they lie far away."""
        if not self.asked:
            return None
        width = _nice(max(self.high - self.low, self.high / 20) / 30)
        start = math.floor(self.low / width) * width
        values = [0.0] * (math.floor((self.high - start) / width) + 1)
        stop = start + width * len(values)
        for place, count in self._ledger.query(_HISTOGRAM, start, width, self._job, start, stop):
            if place < len(values):
                values[place] = count
        name, size = _unit(stop)
        titles = {"x_title": f"time of one row ({name})", "y_title": "rows"}
        return {"start": start / size, "width": width / size, "values": values, **titles}


def report_text(ledger: Ledger, job: str) -> str:
    """How a job went, in lines of at most 80 columns without a line break at the end."""
    lines = _render("report.txt.j2", stats=_Stats(ledger, job)).splitlines()
    return "\n".join(textwrap.fill(line, 80, subsequent_indent=" " * 10) for line in lines)


def write_report(ledger: Ledger, job: str, path: Path, *, title: str) -> None:
    """Write the report as one HTML file without scripts or links. Raises OutputFailed and LedgerBroken."""
    spec = dict(ledger.jobs().get(job, {}))
    with suppress(ValueError, TypeError):  # what is not JSON is shown as it is
        spec["json_schema"] = json.dumps(json.loads(spec.get("json_schema") or ""), indent=2, ensure_ascii=False)
    found = ledger.query(_SAMPLES, job, _IMAGES)
    samples = [(name, base64.b64encode(jpeg).decode(), *answer) for name, jpeg, *answer in found]
    html = _render("report.html.j2", title=title, job=job, stats=_Stats(ledger, job), spec=spec, samples=samples)
    with writing(f"The report {path}", "free some space or check the folder; the rows are not touched"):
        write_whole(path, html, 0o644)


def _render(name: str, **values: Any) -> str:
    """A template beside this file, filled in."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters.update(time=_time, number=_number, id=_shown, text=_lines, cut=_cut, ticks=_ticks)
    return page.get_template(name).render(values)


def _shown(text: str, longest: int = _LONGEST_ID) -> str:
    """A text as one line: control characters become escapes, and what is too long is cut."""
    short = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), short)


def _lines(value: Any) -> str:
    """The same with its line breaks; what is no text is shown as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "\n".join(_shown(line, _LONGEST_TEXT) for line in text[:_LONGEST_TEXT].splitlines())


def _cut(text: str, columns: int) -> str:
    """One line of a terminal, at most so wide: some characters take two columns."""
    from rich.cells import cell_len, set_cell_size

    shown = _shown(text)
    return shown if cell_len(shown) <= columns else set_cell_size(shown, columns - 1).rstrip() + "…"


def _unit(ms: float) -> tuple[str, float]:
    """The unit that shows a time well, and its milliseconds."""
    return next((unit for unit in _UNITS if ms >= unit[1]), _UNITS[-1])


def _time(ms: float) -> str:
    name, size = _unit(ms)
    return f"{_number(ms / size)} {name}"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _ticks(end: float, start: float, count: int) -> list[float]:
    """About so many round numbers, the first at most `start` and the last at least `end`."""
    step = _nice((end - start) / count)
    return [step * place for place in range(math.floor(start / step), math.ceil(end / step) + 1)]


def _nice(value: float) -> float:
    """The next larger one of 1, 2, 5, 10 and so on."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 5, 10, 20) if power * step >= value)
