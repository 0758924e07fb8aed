"""Drafts on real llama.cpp: the same answers, with rows verified in one batch and what was wrong cut off."""

import json
from pathlib import Path
from typing import Any

import pytest
from native_help import assert_undisturbed, draw

import opsin.models
from opsin import Opsin
from opsin.core.answer import Answer
from opsin.engine.speculation import Speculation

pytestmark = [pytest.mark.slow, pytest.mark.native]

DEMO = Path(opsin.models.__file__).parent / "demo"
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "color": {"enum": ["red", "green", "blue"]},
            "shape": {"enum": ["circle", "square", "star"]},
            "text": {"type": "string", "maxLength": 8},
        },
        "required": ["color", "shape", "text"],
    }
)


@pytest.fixture(autouse=True)
def _steps_take_10_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models are too small to gain anything, and by a busy machine's clock drafts are of other lengths."""
    learn = Speculation.learn
    monkeypatch.setattr(Speculation, "learn", lambda self, step, _: learn(self, step, 0.01))


def ask(pair: Any, on: bool, images: list[Any], question: str, **params: Any) -> list[Answer]:
    """One image after another, with an engine of its own."""
    most = {"image_max_tokens": 64} if pair and "qwen2vl" in str(pair.llm) else {}
    paths = (pair.llm, pair.mmproj) if pair else (None, None)
    with Opsin(*paths, config=False, ctx=1024, speculation=on, disk_cache=False, **most) as opsin:
        return [opsin.ask(image, question, **params) for image in images]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0, "json_schema": SCHEMA},
        {"temperature": 1.0, "seed": 3, "json_schema": SCHEMA},
        {"temperature": 0.8, "seed": 5, "repeat_penalty": 1.1, "top_k": 20},
        {"temperature": 0, "stop": (" and",), "logprobs": 3},
    ],
)
def test_the_demo_model_says_the_same(params: dict[str, Any]) -> None:
    images = [str(DEMO / f"{name}.png") for name in ("shapes", "sign", "number")] * 2
    plain, drafted = (ask(None, on, images, "What do you see?", max_tokens=80, **params) for on in (False, True))
    assert [(a.tokens, a.text, a.finish_reason) for a in plain] == [
        (a.tokens, a.text, a.finish_reason) for a in drafted
    ]
    assert sum(answer.timings.draft_n for answer in plain) == 0
    assert sum(answer.timings.draft_n_accepted for answer in drafted) > 0


@pytest.mark.parametrize("kind", ["tiny", "qwen2vl-tiny", "gemma3-tiny"])
def test_every_kind_of_memory_and_position_keeps_its_answers(kind: str, tmp_path: Path) -> None:
    from synth import write_pair

    pair = write_pair(kind, tmp_path, quantisation="f16")
    images = [draw(1, 90, 60), draw(1, 90, 60), draw(2, 60, 90)]
    params = {"temperature": 0, "ignore_eos": True, "max_tokens": 60, "guard": False, "logprobs": 20}
    plain, drafted = (ask(pair, on, images, "What is this? What is this? What is", **params) for on in (False, True))
    assert sum(answer.timings.draft_n for answer in drafted) > 0
    for ours, alone in zip(drafted, plain, strict=True):
        assert_undisturbed(ours, alone)


def test_a_model_whose_memory_cannot_be_cut_gets_no_drafts(tmp_path: Path) -> None:
    from synth import write_pair

    pair = write_pair("lfm2vl-tiny", tmp_path, quantisation="f16")
    params = {"temperature": 0, "ignore_eos": True, "max_tokens": 60, "guard": False}
    for answer in ask(pair, True, [draw(1, 90, 60)] * 2, "What is this?", **params):
        assert answer.timings.draft_n == 0
        assert len(answer.tokens) == 60
