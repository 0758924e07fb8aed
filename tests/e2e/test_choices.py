"""Choices as a user types them, and from Python, on the shipped demo model."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from opsin import Opsin
from opsin.core.errors import BadParameter

pytestmark = [pytest.mark.slow, pytest.mark.native]
DEMO = Path(__file__).parents[2] / "src" / "opsin" / "models" / "demo"
IMAGE = str(DEMO / "shapes.png")
COLOUR = "What color is the circle?"


def opsin(env: dict[str, str], *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opsin", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_label_is_printed_with_its_probability_beside_it(opsin_env: dict[str, str]) -> None:
    done = opsin(opsin_env, "ask", IMAGE, COLOUR, "--choices", "red, blue,green")
    assert done.stdout == "blue\n"
    assert "(blue 9" in done.stderr or "(blue 100.0%" in done.stderr
    row = json.loads(opsin(opsin_env, "ask", IMAGE, COLOUR, "--choices", '["red","blue"]', "--json").stdout)
    assert (row["text"], row["value"], list(row["probabilities"])) == ("blue", "blue", ["red", "blue"])


def test_a_model_that_hardly_begins_with_a_label_speaks_first_unless_told_not_to(opsin_env: dict[str, str]) -> None:
    asked = ("ask", IMAGE, "Is there a star?", "--bool", "--temperature", "0")
    for flags in ((), ("--reasons",)):
        row = json.loads(opsin(opsin_env, *asked, *flags, "--json").stdout)
        assert (row["value"], row["text"]) == (True, "yes")
        assert row["reasoning"].endswith("so yes.")
        assert row["coverage"] > 0.9
    assert opsin(opsin_env, *asked).stdout == "yes\n"
    said = opsin(opsin_env, *asked, "--no-reasons")
    assert said.stdout in {"yes\n", "no\n"}
    assert "a free answer begins so in 0." in said.stderr
    outright = json.loads(opsin(opsin_env, "ask", IMAGE, COLOUR, "--choices", "red,blue", "--json").stdout)
    assert outright["reasoning"] is None
    assert outright["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--choices", "red"), "two or more"),
        (("--choices", "[red"), "JSON list"),
        (("--choices", "red,blue", "--bool"), "cannot be used together"),
        (("--scale", "5-1"), "1-5"),
        (("--bool", "--thinking"), "thinking cannot be used with boolean"),
        (("--reasons",), "choices, scale or boolean"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    opsin_env: dict[str, str], flags: tuple[str, ...], word: str
) -> None:
    assert word in opsin(opsin_env, "ask", IMAGE, COLOUR, *flags, code=2).stderr


def test_a_batch_has_columns_for_the_choice_and_its_probability(opsin_env: dict[str, str], tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"p{number}.png").write_bytes(Path(IMAGE).read_bytes())
    arguments = (
        "batch",
        f"{tmp_path}/*.png",
        "Is there a star?",
        "-o",
        str(tmp_path / "out.csv"),
        "--bool",
        "--reasons",
    )
    opsin(opsin_env, *arguments)
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [(row["text"], row["choice"]) for row in rows] == [("yes", "true")] * 3
    assert all(float(row["probability"]) > 0.9 and float(row["margin"]) > 0.8 for row in rows)
    for others in (arguments[:-1], (*arguments[:-1], "--no-reasons")):
        assert "another job" in opsin(opsin_env, *others, code=2).stderr, "another question is another job"
    opsin(opsin_env, "batch", f"{tmp_path}/*.png", COLOUR, "-o", str(tmp_path / "o.jsonl"), "--choices", "red,blue")
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert {line["output"]["choice"] for line in lines} == {"blue"}
    assert all(sum(line["probabilities"].values()) == pytest.approx(1) for line in lines)


def test_from_python_in_this_process_and_in_one_of_its_own() -> None:
    for isolated in (False, True):
        with Opsin(config=False, isolated=isolated) as model:
            answer = model.ask(IMAGE, COLOUR, choices=["red", "blue"])
            assert answer.text == "blue"
            assert answer.probabilities is not None
            assert sum(answer.probabilities.values()) == pytest.approx(1)
            assert answer.margin is not None
            (mapped,) = model.map([IMAGE], "Is there a star?", boolean=True, temperature=0)
            assert mapped.output is True
            several = [f"a {size} {colour} circle" for size in ("small", "large") for colour in ("red", "blue")]
            placed = model.ask(IMAGE, "What is on the left?", choices=[*several, "nothing"]).choice
            assert placed is not None
            assert placed.label.endswith("blue circle")
            with pytest.raises(BadParameter, match="choices"):
                model.ask(IMAGE, COLOUR, choices=["red"])


def test_json_says_how_sure_the_model_is_of_each_value(opsin_env: dict[str, str], tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "n": {"type": "integer", "maximum": 9}},
    }
    (tmp_path / "s.json").write_text(json.dumps({**schema, "required": ["color", "n"]}))
    asked = ("ask", IMAGE, COLOUR, "--json-schema", str(tmp_path / "s.json"), "--temperature", "0", "--json")
    row = json.loads(opsin(opsin_env, *asked, "--confidence").stdout)
    assert row["confidence"].keys() == {"/color", "/n"}
    assert all(0 < one["probability"] <= 1 for one in row["confidence"].values())
    plain = json.loads(opsin(opsin_env, *asked).stdout)
    assert "confidence" not in plain
    assert plain["text"] == row["text"], "it changes nothing"
    with Opsin(config=False) as model:
        free = model.ask(IMAGE, COLOUR, json_schema='{"const": "zebra"}', confidence=True).confidence
        assert free is not None
        assert 0 < free[""].probability < 1
        assert free[""].changed, "the model would have written something else"
        assert opsin(opsin_env, "ask", IMAGE, COLOUR, "--confidence", code=2).stderr.count("schema")
