"""How this machine is measured: a stand-in engine, and times that drift."""

from contextlib import closing
from dataclasses import replace

import pytest

from opsin.models.shapes import SHAPES
from opsin.tune import predict_measure
from opsin.tune.predict import Request, Times
from opsin.tune.predict_measure import predict_here
from opsin.tune.predict_needs import shape_needs

TINY = shape_needs(SHAPES["tiny"], "q8_0", "f16")
ONE = Times(10.0, 20.0, 5.0, 1.0, 16, 70, 102)


class StandIn:
    """Notes what is opened and closed; each question takes a little longer than the one before."""

    def __init__(self):
        self.opened, self.open, self.asked = [], 0, []

    def __call__(self, llm, mmproj):
        assert self.open == 0  # never two at once
        self.opened.append(llm)
        self.open += 1
        return self, self

    def close(self):
        self.open -= 1

    def ask(self, engine, prompts, number, *, pictures):
        assert engine is prompts is self
        assert pictures
        self.asked.append((self.opened[-1], number))
        return replace(ONE, token_ms=1.0 + len(self.asked) / 100)


@pytest.fixture
def here(monkeypatch):
    def run(checked):
        engine = StandIn()
        monkeypatch.setattr(predict_measure, "_ask", engine.ask)
        said = []
        how = {"rounds": 2, "kv_type": "f16", "gpu": False}
        found = predict_here(TINY, Request(ctx=512), engine, said.append, checked=checked, **how)
        assert engine.open == 0
        return engine, found, said

    return run


def test_a_slice_is_measured_alike_with_a_check_and_without(here):
    alone, (times, notes, none), _ = here(None)
    beside, (_, _, checked), said = here(("tiny", None))
    slices = [[number for llm, number in engine.asked if "slice" in str(llm)] for engine in (alone, beside)]
    assert slices[0] == slices[1] == [0, 1, 2, 100, 101, 102, 200, 201, 202]
    assert (none, notes) == (None, ())
    assert times.token_ms > 0
    assert ["tiny" in str(llm) for llm in beside.opened] == [False, True] * 3
    assert "writing tiny" in said
    assert set(checked.errors) == {"encode", "prefill", "decode"}
    assert len(checked.about["measured_runs_ms"]) == len(checked.about["slice_runs_ms"]) == 6


def test_files_that_are_given_are_asked_as_they_are(here):
    engine, (_, _, checked), said = here(("model.gguf", "mmproj.gguf"))
    assert engine.opened[1::2] == ["model.gguf"] * 3
    assert "writing tiny" not in said
    assert checked.measured["encode"] == 10.0


def test_an_engine_is_closed_when_a_question_fails(monkeypatch):
    engine = StandIn()

    def broken(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(predict_measure, "_ask", broken)
    with pytest.raises(RuntimeError), closing(StandIn()):
        predict_here(TINY, Request(ctx=512), engine, print, rounds=1, kv_type="f16", gpu=False)
    assert engine.open == 0
