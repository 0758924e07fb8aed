"""The report of a job: right numbers from the ledger, and a page that hostile names and answers cannot change."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.cells import cell_len

from opsin.jobs import ledger as ledger_module
from opsin.jobs.ledger import DONE, FAILED, Ended, Ledger
from opsin.jobs.output import OutputFailed
from opsin.jobs.report import report_text, write_report

SPEC = {
    "model": "small.gguf",
    "projector": None,
    "prompt": "What is it?",
    "temperature": 0.25,
    "json_schema": '{"a":1}',
}
HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</title></style></pre><b>&amp;",
    "line\nbreak\rreturn\x00nul\x1b[31mred\x9b\u202egnp.exe",
    "long" * 50_000,
    "漢字" * 200,
    "http://example.com/a.png",
    "{{ 7 * 7 }}{% raw %}",
)
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page as a parser reads it: its elements, texts and attributes. Wrong nesting is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def says(self, words: str) -> bool:
        return words in " ".join(" ".join(self.texts).split())


class Clock:
    """Stands in for the module `time` in the ledger."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ledger_module, "time", clock)
    return clock


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "out.jsonl.opsin", "out.jsonl")
    opened.begin("job", SPEC)
    yield opened
    opened.close()


def answered(name: str, total_ms: float = 100.0, text: str = "a cat") -> Ended:
    usage = {"prompt_tokens": 600, "image_tokens": 576, "cached_tokens": 10, "completion_tokens": 5}
    parts = {"encode_ms": 0.5, "image_prefill_ms": 0.1, "text_prefill_ms": 0.1, "decode_ms": 0.2, "total_ms": 1.0}
    stages = {stage: share * total_ms for stage, share in parts.items()} if total_ms else {}
    return Ended(name, DONE, 1, {"error": None, "text": text, "usage": usage, "stages": stages})


def failed(name: str, code: str = "bad_image") -> Ended:
    return Ended(name, FAILED, 1, {"error": {"code": code, "message": "x"}, "text": None})


def fill(ledger: Ledger, rows: Sequence[Ended], samples: dict[str, tuple[int, bytes]] | None = None) -> None:
    ledger.claim("job", [(row.id, place) for place, row in enumerate(rows)])
    ledger.end("job", rows, 1, samples or {})


def jpeg(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "JPEG")
    return file.getvalue()


def page(ledger: Ledger, tmp_path: Path, title: str = "out.jsonl") -> Page:
    path = tmp_path / "report.html"
    write_report(ledger, "job", path, title=title)
    read = Page(path)
    assert_safe(read)
    return read


def assert_safe(read: Page) -> None:
    """Nothing runs, nothing is loaded, and who hears it knows what is where."""
    assert not read.all("script")
    assert "<script" not in read.html.lower()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", read.html)
    for tag, attrs in read.elements:
        assert not [name for name in attrs if name.startswith("on") or name in {"href", "srcset", "action"}]
        assert (attrs.get("src") or "data:").startswith("data:")
        assert "url(" not in (attrs.get("style") or "")
        if tag == "img":
            assert attrs["alt"]
        if tag == "th":
            assert attrs["scope"] in {"col", "row"}
        if tag == "svg":
            assert attrs["role"] == "img"
            assert attrs["aria-label"]
    (policy,) = (meta["content"] for meta in read.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert {"default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"} <= set(policy.split("; "))
    assert [tag for tag, _ in read.elements].count("h1") == 1


def test_numbers_are_those_of_the_ledger(ledger: Ledger, clock: Clock, tmp_path: Path) -> None:
    clock.now += 10
    same = answered("same", 0)
    fill(ledger, [answered("slow", 3000), answered("fast", 1000), same, failed("bad"), failed("gone", "fetch_failed")])
    ledger.claim("job", [("waits", 9)])
    text = report_text(ledger, "job")
    assert "3 answered (1 with the answer of an equal row), 2 failed, 1 begun" in text
    assert "10 s without pauses: 0.5 rows/s, 1 tokens/s" in text
    assert "encode 2 s (50%), prefill 800 ms (20%), decode 800 ms (20%), other" in text
    assert "1,200 in prompts (1,152 of images, 20 cached), 10 answered" in text
    assert "median 1 s, 99% within 3 s, longest 3 s" in text
    assert text.index("slow") < text.index("fast")
    assert "bad_image" in text
    assert "fetch_failed" in text
    read = page(ledger, tmp_path)
    for words in (
        "1,152",
        "2 s 50% 1 s",
        "0.5 rows/s",
        "slow 3 s 1.5 s 600 ms 600 ms 5 1",
        "What is it?",
        "small.gguf",
    ):
        assert read.says(words), words
    assert len(read.all("svg")) == 2
    assert read.says("rows per min")
    assert not read.says("projector")


def test_a_job_without_rows(ledger: Ledger, tmp_path: Path) -> None:
    assert "No row" in report_text(ledger, "job")
    assert not page(ledger, tmp_path).all("svg")
    ledger.claim("job", [("waits", 1)])
    assert "No row" in report_text(ledger, "job")
    assert page(ledger, tmp_path).says("Begun and not ended 1")


def test_only_failed_rows(ledger: Ledger, clock: Clock, tmp_path: Path) -> None:
    clock.now += 30
    fill(ledger, [failed(f"row {number:02}") for number in range(20)])
    text = report_text(ledger, "job")
    assert "0 answered, 20 failed" in text
    assert "Stages" not in text
    read = page(ledger, tmp_path)
    assert [row for row in read.texts if row.startswith("row ")] == [f"row {number:02}" for number in range(5)]
    assert len(read.all("svg")) == 1


def test_only_rows_that_took_anothers_answer(ledger: Ledger, tmp_path: Path) -> None:
    fill(ledger, [answered("a", 0)])
    assert "1 answered" in report_text(ledger, "job")
    assert "too short for a rate" in report_text(ledger, "job")
    assert not page(ledger, tmp_path).all("svg")


@pytest.mark.parametrize("times", [(50.0,), (50.0, 50.0), (50.0, 50.0000001), (0.001, 9e6), (1e-9, 1e-9)])
def test_a_plot_of_any_times(times: tuple[float, ...], ledger: Ledger, clock: Clock, tmp_path: Path) -> None:
    clock.now += 0.001
    fill(ledger, [answered(f"row {number}", ms) for number, ms in enumerate(times)])
    read = page(ledger, tmp_path)
    assert len(read.all("svg")) == 2
    for bar in read.all("rect"):
        left, top, width, height = (float(bar[name] or "nan") for name in ("x", "y", "width", "height"))
        assert left >= 64
        assert left + width <= 713
        assert top >= 7
        assert abs(top + height - 192) < 0.2


def test_pauses_between_runs_are_left_out(ledger: Ledger, clock: Clock, tmp_path: Path) -> None:
    for run in range(3):
        for number in range(20):
            clock.now += 5
            fill(ledger, [answered(f"{run} {number}", 4000)])
        clock.now += 24 * 3600
    # 20 rows 5 s apart, and then twice 19 more after one that took 4 s
    assert "4.97 min without pauses" in report_text(ledger, "job")
    bars = [float(bar["height"] or 0) for bar in page(ledger, tmp_path).all("rect")]
    assert len(bars) > 10
    assert min(bars[:10]) > 0.4 * max(bars[:10])


def test_slow_rows_are_no_pause(ledger: Ledger, clock: Clock) -> None:
    for number in range(4):
        clock.now += 300
        fill(ledger, [answered(str(number), 295_000)])
    assert "20 min without pauses" in report_text(ledger, "job")


def test_a_clock_that_was_set_back(ledger: Ledger, clock: Clock, tmp_path: Path) -> None:
    clock.now -= 1000
    fill(ledger, [answered("a"), answered("b")])
    clock.now += 10
    fill(ledger, [answered("c")])
    assert "10 s without pauses" in report_text(ledger, "job")
    page(ledger, tmp_path)


@pytest.mark.parametrize("words", HOSTILE, ids=lambda words: ascii(words[:12]))
def test_hostile_names_and_answers_stay_text(words: str, ledger: Ledger, clock: Clock, tmp_path: Path) -> None:
    clock.now += 5
    ledger.begin("job 2", {"prompt": words, "system": words, "json_schema": words, "stop": [words]})
    rows = [answered(words, text=words), failed(f"{words} failed", "bad_image")]
    ledger.claim("job 2", [(row.id, place) for place, row in enumerate(rows)])
    ledger.end("job 2", rows, 1, {rows[0].id: (1, jpeg()), rows[1].id: (2, jpeg())})
    text = report_text(ledger, "job 2")
    assert all(cell_len(line) <= 80 for line in text.splitlines())
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    path = tmp_path / "report.html"
    write_report(ledger, "job 2", path, title=words)
    read = Page(path)
    assert_safe(read)
    assert len(read.html) < 250_000
    assert {"script", "b"} & {tag for tag, _ in read.elements} == set()
    if words.isprintable() and len(words) < 100:
        assert read.texts.count(words) >= 5  # title, heading, prompt, slowest row, answer
        assert read.all("img")[0]["alt"] == f"Image of row {words}"


def test_samples_are_those_of_the_smallest_rank(ledger: Ledger, tmp_path: Path) -> None:
    names = [f"photo {number:02}" for number in range(40)]
    rows = [answered(name, text=f"the text of {name}") for name in names[:-1]] + [failed(names[-1])]
    fill(ledger, rows, {name: (100 - number, jpeg()) for number, name in enumerate(names)})
    ledger.end("job", [], 1, {"never asked": (0, jpeg())})
    read = page(ledger, tmp_path)
    assert [image["alt"] for image in read.all("img")] == [f"Image of row {name}" for name in names[:-25:-1]]
    assert read.says("the text of photo 38")
    assert not read.says("the text of photo 15 ")


def test_another_job_in_the_ledger_is_left_out(ledger: Ledger) -> None:
    fill(ledger, [answered("mine")])
    ledger.begin("other", {})
    ledger.claim("other", [("theirs", 1)])
    ledger.end("other", [answered("theirs", 9000)], 1, {})
    text = report_text(ledger, "job")
    assert "1 answered" in text
    assert "theirs" not in text


def test_a_report_that_cannot_be_written(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputFailed):
        write_report(ledger, "job", tmp_path / "folder", title="x")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".tmp") == []


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_less_than_five_seconds(ledger: Ledger, clock: Clock, tmp_path: Path) -> None:
    for group in range(0, 100_000, 250):
        clock.now += 1
        numbers = range(group, group + 250)
        fill(ledger, [failed(f"row {n}") if n % 50 == 0 else answered(f"row {n}", 1 + n * 7 % 997) for n in numbers])
    begun = time.process_time()
    text = report_text(ledger, "job")
    read = page(ledger, tmp_path)
    assert time.process_time() - begun < 5
    assert "98,000 answered, 2,000 failed" in text
    assert "250 rows/s" in text
    assert len(read.html) < 100_000


def test_a_name_that_is_no_unicode(ledger: Ledger, tmp_path: Path) -> None:
    ledger.begin("raw", {"prompt": "caf\udce9", "json_schema": '"\udce9'})
    write_report(ledger, "raw", tmp_path / "report.html", title="caf\udce9.jsonl")
    assert Page(tmp_path / "report.html").texts.count("caf\\udce9.jsonl") == 1
