"""One line a request, with everything that is needed and nothing that is not."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator

import pytest

from opsin.core.answer import Answer, GuardVerdict, Stages, Timings, Usage
from opsin.engine.clock import stage_row
from opsin.server.handler import RequestStats
from opsin.server.watchers import NAME, AccessLog

ANSWER = Answer(
    text="a secret answer",
    reasoning=None,
    finish_reason="stop",
    usage=Usage(600, 32, 576, 64),
    stages=Stages(queue_ms=500, encode_ms=400.25, decode_ms=99, sample_ms=0.75, total_ms=1000),
    timings=Timings(64, 536, 0, 0, 0, 32, 0, 0, 0),
)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[list[str]]:
    handler = Lines()
    logging.getLogger(NAME).addHandler(handler)
    yield handler.lines
    logging.getLogger(NAME).removeHandler(handler)


def record(*answers: Answer, **fields: object) -> RequestStats:
    made = RequestStats("/v1/chat/completions", **{"model": "demo", **fields})  # type: ignore[arg-type]
    made.answers, made.began_at, made.began, made.ended = list(answers), 0.0, 100.0, 101.25
    made.deltas = [[100.5, 100.6, 101.1] for _ in answers]
    return made


def test_a_plain_line_tells_where_the_time_went(lines: list[str]) -> None:
    AccessLog(as_json=False).finished(record(ANSWER, id="abc"))
    (line,) = lines
    assert line == (
        "1970-01-01T00:00:00.000+00:00 abc /v1/chat/completions 200 model=demo tokens=600+32 ttft=0.500s pause=0.500s "
        "total=1.250s queue=0.500s encode=0.400s decode=0.099s end=stop"
    )


def test_json_has_all_of_it(lines: list[str]) -> None:
    looping = dataclasses.replace(ANSWER, finish_reason="length", limit="guard", guard=GuardVerdict("cycle", 20))
    AccessLog(as_json=True).finished(record(ANSWER, looping, id="abc", streamed=True, images=2))
    (line,) = lines
    account = json.loads(line)
    assert (account["id"], account["status"], account["streamed"], account["images"]) == ("abc", 200, True, 2)
    assert (account["prompt_tokens"], account["cached_tokens"], account["completion_tokens"]) == (600, 64, 64)
    assert (account["first_token_s"], account["longest_pause_s"], account["total_s"]) == (0.5, 0.5, 1.25)
    assert [answer["stages"] for answer in account["answers"]] == [stage_row(ANSWER.stages)] * 2
    assert account["answers"][1]["guard"] == {"reason": "cycle", "at_token": 20}


def test_a_refused_request_has_a_line_too(lines: list[str]) -> None:
    AccessLog(as_json=False).finished(record(status=413, refused="image_too_large"))
    assert "413 refused=image_too_large model=demo total=1.250s" in lines[0]


@pytest.mark.parametrize("as_json", [False, True])
def test_one_line_whatever_the_client_chose_and_no_secrets(lines: list[str], as_json: bool) -> None:
    forged = "x\n1970-01-01 fake 200 model=other\x1b[31m" + "y" * 500
    made = record(ANSWER, model=forged)
    AccessLog(as_json=as_json).finished(made)
    (line,) = lines
    assert len(line.splitlines()) == 1
    assert len(line) < 1000
    assert "\x1b" not in line
    assert "model=other" not in line.split()
    assert "secret" not in line


def test_it_writes_to_standard_error_where_nobody_chose_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(NAME), "handlers", [])
    monkeypatch.setattr(logging.getLogger(NAME), "propagate", True)
    AccessLog(as_json=False).finished(record(id="seen"))
    AccessLog(as_json=False).finished(record(id="twice"))
    printed = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in printed] == ["seen", "twice"]
