"""The timeline shows each stage that took time, with what went through it."""

import dataclasses
import io

import pytest
from rich.console import Console

from opsin.cli.ask import BAR, timeline
from opsin.core.answer import Answer, ImageInfo, Stages, Timings, Usage
from opsin.core.model_info import BackendShare, Placement

STAGES = Stages(
    load_ms=70.0, preprocess_ms=5.0, encode_ms=400.0, image_prefill_ms=300.0, text_prefill_ms=20.0, decode_ms=200.0,
    sample_ms=2.0, other_ms=3.0, total_ms=1000.0,
)  # fmt: skip
NOWHERE = Placement({}, {}, 0, 0)
TIMINGS = Timings(0, 600, 720.0, 1.2, 833.3, 20, 202.0, 10.1, 99.0)


def shown(answer: Answer, placement: Placement, width: int = 100) -> list[str]:
    console = Console(width=width, force_terminal=False, record=True, file=io.StringIO())
    console.print(timeline(answer, placement))
    return [line.rstrip() for line in console.export_text().splitlines()]


def answer(images: int = 1) -> Answer:
    info = ImageInfo("0" * 64, 640, 480, 336, 336, 576)
    return Answer("a dog", None, "stop", Usage(600, 20, 576 * images), STAGES, TIMINGS, images=(info,) * images)


def test_every_stage_that_took_time_has_a_row_and_others_have_none() -> None:
    lines = shown(answer(), Placement({"CUDA0": BackendShare(90, 0.995), "CPU": BackendShare(3, 0.005)}, {}, 32, 32))
    text = "\n".join(lines)
    for words in (
        "load model",
        "640×480 → 336×336",
        "576 image tokens, ran on 100% CUDA0",
        "1,920 token/s",
        "99 token/s",
    ):
        assert words in text
    assert "queue" not in text
    assert "fetch" not in text


def test_drafts_are_counted_behind_decode_where_there_are_any() -> None:
    assert "drafted" not in "\n".join(shown(answer(), NOWHERE, 160))
    timings = dataclasses.replace(TIMINGS, draft_n=14, draft_n_accepted=9)
    (decode,) = (
        line
        for line in shown(dataclasses.replace(answer(), timings=timings), NOWHERE, 160)
        if line.startswith("decode")
    )
    assert "20 tokens, 99 token/s, 9 of 14 drafted tokens accepted" in decode


def test_bars_stand_one_after_another_and_inside_the_frame() -> None:
    bars = [line for line in shown(answer(), NOWHERE) if "█" in line]
    starts = [line.index("█") for line in bars]
    assert starts == sorted(starts)
    widths = [line.count("█") for line in bars]
    assert max(widths) == int(0.4 * BAR)
    assert max(line.rindex("█") for line in bars) - min(starts) < BAR


def test_a_question_without_an_image_has_no_vision_rows() -> None:
    asked = dataclasses.replace(answer(images=0), stages=Stages(text_prefill_ms=20.0, decode_ms=80.0, total_ms=100.0))
    text = "\n".join(shown(asked, NOWHERE))
    assert "text prefill" in text
    assert "encode" not in text
    assert "image" not in text


def test_a_remembered_image_says_that_the_encoder_did_not_run() -> None:
    known = dataclasses.replace(answer(), images=(dataclasses.replace(answer().images[0], cached=True),))
    assert "remembered: the encoder did not run" in "\n".join(shown(known, NOWHERE, width=120))


def test_the_start_of_python_comes_first_and_the_total_is_the_wall_time() -> None:
    console = Console(width=100, force_terminal=False, record=True, file=io.StringIO())
    console.print(timeline(answer(), NOWHERE, wall_ms=1250.0))
    lines = console.export_text().splitlines()
    assert "start Python" in lines[1]
    assert "250.0" in lines[1]
    assert "1,250.0" in lines[-1]


@pytest.mark.parametrize("width", [24, 40, 47, 60, 79, 80, 120])
def test_narrow_terminals_keep_the_numbers_and_whole_words(width: int) -> None:
    console = Console(width=width, force_terminal=False, record=True, file=io.StringIO())
    console.print(timeline(answer(), NOWHERE, width=width))
    text = console.export_text()
    for number in ("400.0", "300.0", "20.0", "200.0", "1,000.0"):
        assert number in text
    told = {word for line in shown(answer(), NOWHERE, width=200) for word in line.split()}
    assert {word for word in text.split() if "█" not in word} <= told | {"…"}
