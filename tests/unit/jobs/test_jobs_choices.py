"""Rows of answers that are one of a list: JSON, and the columns of tables."""

import dataclasses

import pytest

from opsin.core.answer import Answer, Stages, Timings, Usage, parsed
from opsin.core.choice import choose
from opsin.core.errors import ConstraintFailed
from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings
from opsin.jobs.asker import Question
from opsin.jobs.row import answer_row, columns, flat, output_fields, output_of
from opsin.jobs.spec import job_spec
from opsin.jobs.template import PromptTemplate
from opsin.models import resolve

TIMINGS = Timings(0, 0, 0, 0, 0, 0, 0, 0, 0)


def answer(**params: object) -> Answer:
    values = SamplingParams(**params).labels  # type: ignore[arg-type]
    choice = choose({label: -float(place) for place, label in enumerate(values)}, values)
    return Answer(choice.label, None, "stop", Usage(), Stages(), TIMINGS, choice=choice)


@pytest.mark.parametrize(
    ("params", "value", "kind"),
    [
        ({"choices": ["red", "blue"]}, "red", "string"),
        ({"scale": "3-5"}, 3, "integer"),
        ({"boolean": True}, True, "boolean"),
    ],
)
def test_the_value_is_what_the_label_stands_for(params: dict[str, object], value: object, kind: str) -> None:
    given = answer(**params)
    assert parsed(given) == value
    row = answer_row(given)
    assert row["value"] == value
    assert row["margin"] == given.margin
    assert row["probabilities"] == given.probabilities
    assert ("expected" in row) == ("scale" in params)
    fields = output_fields(SamplingParams(**params).model_dump())  # type: ignore[arg-type]
    assert fields == {"choice": kind, "probability": "number", "margin": "number"}
    whole = {**row, "id": "1", "source": "a", "output": output_of(given), "attempt": 1, "job": "x"}
    cells = dict(zip(columns(fields), flat(whole, fields), strict=True))
    assert cells["choice"] == value
    assert cells["probability"] == pytest.approx(max(row["probabilities"].values()))


def test_a_job_of_an_earlier_version_goes_on_where_reasons_are_unset() -> None:
    def fields(**params: object) -> dict[str, object]:
        asked = Question(PromptTemplate("What?"), SamplingParams(**params))  # type: ignore[arg-type]
        return job_spec(resolve(None, None), EngineSettings(), asked)

    assert not {"choices", "scale", "boolean", "reasons", "boxes", "confidence"} & fields().keys()
    assert "reasons" not in fields(boolean=True)
    assert [fields(boolean=True, reasons=one)["reasons"] for one in (True, False)] == [True, False]


def test_an_answer_that_was_cut_has_no_value() -> None:
    cut = dataclasses.replace(answer(boolean=True), choice=None, limit="seconds", finish_reason="length", text="")
    with pytest.raises(ConstraintFailed, match="--max-seconds"):
        output_of(cut)


def test_a_free_answer_shows_nothing_of_it() -> None:
    free = dataclasses.replace(answer(boolean=True), choice=None)
    assert not {"value", "probabilities", "margin", "coverage"} & answer_row(free).keys()
    assert output_fields(SamplingParams().model_dump()) == {}
