"""Whatever the bytes are, explain gives an answer or its own error; prefixes, colours and ends of lines do no harm."""

import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.core.errors import BadInput
from opsin.doctor.explain import as_text, explain, rules
from opsin.doctor.explain.parse import go_duration

LOGS = Path(__file__).parents[2] / "logs"
FOUNDING = (LOGS / "lcp-0.2.56-founding.log").read_bytes()
CLEAN = explain(io.BytesIO(FOUNDING)).as_dict()
ALL = [path.read_text() for path in sorted(LOGS.glob("*.log"))]
LINES = sorted({line for text in ALL for line in text.splitlines() if line})
numbers = st.one_of(st.integers(-9, 10**12), st.floats(), st.just("9" * 400)).map(str)


def stamped(prefix: str) -> bytes:
    return "".join(f"{prefix}{line}\n" for line in FOUNDING.decode().splitlines()).encode()


@pytest.mark.parametrize(
    "data",
    [
        FOUNDING.replace(b"\n", b"\r\n"),
        FOUNDING.replace(b"llama_print", b"\x1b[32m\x1b[1mllama_print\x1b[0m"),
        FOUNDING.decode().encode("utf-16"),
        b"\xff\xfe\xff\x00\n"[2:] + FOUNDING + b"\x80\x81\xc3\n",
        stamped("Nov 22 10:00:01 host python[811]: "),
        stamped("2026-11-22T10:00:01.123456789Z "),
        stamped("app-1  | "),
        stamped("2026-11-22T10:00:01Z stderr F "),
        FOUNDING.replace(b"\n", b"\n" + b"x" * 3_000_000 + b"\n", 1),
        FOUNDING.removesuffix(b"\n"),
    ],
    ids=["crlf", "colours", "utf-16", "bytes", "journal", "docker", "compose", "kubernetes", "long line", "no end"],
)
def test_the_founding_log_reads_the_same_in_any_wrapping(data: bytes) -> None:
    found = explain(io.BytesIO(data)).as_dict()
    assert found["causes"] == CLEAN["causes"]
    assert found["stages"] == CLEAN["stages"]


def test_of_several_requests_the_slowest_is_explained() -> None:
    quick = FOUNDING.replace(b"3438", b"20").replace(b"64415.00", b"375.00").replace(b"90809.57", b"500.00")
    quick = quick.replace(b"2149.55", b"12.00").replace(b"91.75s", b"1.10s").replace(b"4096", b"678")
    found = explain(io.BytesIO(quick + FOUNDING + quick))
    assert found.as_dict()["request"] == {"line": 11, "position": 2, "count": 3, "total_s": 91.75}
    assert found.causes[0].name == "runaway"
    assert any("request 2 of 3, the slowest" in note for note in found.notes)


def test_answers_that_are_printed_with_indents_keep_their_counts() -> None:
    text = (LOGS / "llama-server-0c1e570-answers.log").read_text()
    objects = [json.loads(line) for line in text.splitlines()]
    for second in (objects[1], {**objects[1], "usage": objects[0]["usage"]}):
        told = "\n".join(json.dumps(x, indent=2) for x in (objects[0], second))
        requests = explain(io.BytesIO(told.encode())).facts.requests
        usage = second["usage"]
        assert [(r.prompt_tokens, r.completion_tokens, r.prompt_n, r.finish) for r in requests] == [
            (99, 20, 99, "stop"),
            (usage["prompt_tokens"], usage["completion_tokens"], 100, "length"),
        ]


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("cost: 91.75s", 91.75),
        ("request took 1,500.2 s", 1500.2),
        ("elapsed: 95 seconds.", 95.0),
        ("predict time is:92.5", 92.5),
        ("it took 5 minutes", 90.80957),
        ("it took 95 tries", 90.80957),
        ("it took 95", 90.80957),
        ("prompt cache update took 95000.00 ms", 90.80957),
        ("Model loading took 98.2 s", 90.80957),
    ],
)
def test_a_wall_time_has_a_unit_and_is_of_a_request(words: str, seconds: float) -> None:
    timers = FOUNDING[: FOUNDING.index(b"cost")].decode()
    assert explain(io.BytesIO(f"{timers}{words}\n".encode())).facts.worst.whole == pytest.approx(seconds * 1e3)


def test_a_time_told_before_the_timers_is_not_the_request_s() -> None:
    text = b"warm-up took 98.2 s\n" + FOUNDING
    assert explain(io.BytesIO(text)).facts.worst.wall_ms == 91_750


def test_a_draft_model_and_a_look_at_the_vocabulary_are_no_second_load() -> None:
    line = "llama_model_loader: loaded meta data with 2 key-value pairs and 3 tensors from {}.gguf (version GGUF V3)\n"
    look = "print_info: vocab_only       = 1\n"
    for text, loads in (
        (line.format("a") + line.format("draft"), 1),
        (line.format("a") + look + line.format("a"), 1),
        (line.format("a") + look.replace("1", "0") + line.format("a"), 2),
        ((line.format("a") + look + line.format("a")) * 2, 2),
    ):
        assert explain(io.BytesIO(text.encode())).facts.setup.loads == loads


def test_interleaved_slots_of_a_server_are_told_apart() -> None:
    line = "slot print_timing: id  {0} | task {0} | {1} time = {2:10.2f} ms / {3:5d} tokens\n"
    parts = [(slot, kind, ms, n) for kind, ms, n in (("prompt eval", 900, 600), ("eval", 700, 60)) for slot in (1, 2)]
    text = "".join(line.format(slot, kind, ms * slot, n) for slot, kind, ms, n in parts)
    found = explain(io.BytesIO(text.encode()))
    assert found.facts.count == 2
    assert found.facts.worst.prompt_ms == 1800
    assert found.facts.worst.eval_ms == 1400


def test_a_long_log_is_read_in_bounded_memory() -> None:
    class Endless(io.RawIOBase):
        """A thousand and fifty requests, never in memory at once."""

        def __init__(self) -> None:
            self.left = 1_050

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            if not self.left:
                return 0
            self.left -= 1
            buffer[: len(FOUNDING)] = FOUNDING
            return len(FOUNDING)

    found = explain(io.BufferedReader(Endless()))
    assert found.facts.count == 1_050
    assert len(found.facts.requests) <= 1_001


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "took 5 s\n",
        '{"total_ms": 5}\n',
        "CUDA out of memory\n",
        "Elapsed (wall clock) time (h:mm:ss or m:ss): 0:01.00\n",
        '{"usage": {"prompt_tokens": 5}}\n',
        "total duration: x1\n",
    ],
)
def test_what_any_program_may_say_is_no_log_of_ours(text: str) -> None:
    with pytest.raises(BadInput):
        explain(io.BytesIO(text.encode()))


@pytest.mark.parametrize(
    ("text", "ms"),
    [("1m2.5s", 62_500.0), ("78.93µs", 0.07893), ("2h", 7.2e6), ("15.5ms", 15.5), ("0s", 0.0), ("x", None)],
)
def test_durations_of_go(text: str, ms: float | None) -> None:
    assert go_duration(text) == (None if ms is None else pytest.approx(ms))


def whatever(data: bytes) -> None:
    try:
        found = explain(io.BytesIO(data))
    except BadInput:
        return
    json.dumps(found.as_dict(), allow_nan=False)
    assert as_text(found)


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_no_bytes_raise_anything_but_our_own_error(data: bytes) -> None:
    whatever(data)


def test_a_request_that_took_no_time_by_its_own_total() -> None:
    line = next(line for line in LINES if " total=" in line and "queue=" in line)
    told = re.sub(r"total=[\d.]+s", "total=0.000s", line, count=1)
    whatever(re.sub(r"queue=[\d.]+", "queue=99999", told, count=1).encode())


@given(st.lists(st.sampled_from(LINES), max_size=30), st.lists(numbers, min_size=1, max_size=9), st.randoms())
@settings(max_examples=40, deadline=None)
def test_no_mix_of_real_lines_and_wrong_numbers_raises(lines: list[str], wrong: list[str], dice) -> None:
    words = " ".join("\n".join(lines).split(" ")).split(" ")
    mixed = [dice.choice(wrong) if word[:1].isdigit() and dice.random() < 0.3 else word for word in words]
    whatever(" ".join(mixed).encode())


def test_each_table_of_a_cause_has_its_finder_and_no_misspelt_key() -> None:
    tables = rules.TABLE["causes"]
    assert tables.keys() == rules.FINDERS.keys()
    known = {"where", "message", "remedy", "name", "sums", "bound", "saves", "least_ms", "share", "symptom", "at_most"}
    known |= {"tools", "aside"}
    for table in tables.values():
        assert {"where", "message", "remedy"} <= table.keys() <= known
