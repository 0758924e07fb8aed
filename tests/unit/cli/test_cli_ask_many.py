"""What `ask` does with many images: slots, memory, order, failures; and which files of a folder it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from opsin.cli import ask as command
from opsin.cli.app import main
from opsin.cli.ask_files import check_question, expand_sources
from opsin.core.answer import Answer, Finished, ImageInfo, Stages, Timings, Usage
from opsin.core.errors import BadParameter, EncodeFailed
from opsin.core.model_info import Placement
from opsin.core.request import Image
from opsin.images import ENDINGS

ANSWER = Answer("a dog", None, "stop", Usage(), Stages(), Timings(0, 0, 0, 0, 0, 0, 0, 0, 0))


class Stream:
    """An answer that is there at once, or the error of its encode."""

    def __init__(self, opsin: Opsin, images: list[Image], *, fails: bool) -> None:
        self._opsin, self._fails = opsin, fails
        infos = [ImageInfo(one.sha256, one.width, one.height, 1, 1, 1, notes=one.notes) for one in images]
        self._answer = replace(ANSWER, images=tuple(infos))
        opsin.running += 1
        opsin.most = max(opsin.most, opsin.running)

    def result(self) -> Answer:
        self._opsin.running -= 1
        if self._fails:
            raise EncodeFailed("The vision encoder failed on this image.")
        return self._answer

    def __iter__(self) -> Iterator[Finished]:
        yield Finished(self.result())

    def cancel(self) -> None:
        pass


class Opsin:
    """Stands for a loaded model; counts what runs at the same time."""

    load_ms, is_demo, setup = 1.0, False, "x"
    info, placement = SimpleNamespace(as_dict=dict), None
    running = most = asked = 0

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def image(self, image: Image) -> Image:
        return image

    def submit(self, messages: Any, **_: Any) -> Stream:
        self.asked += 1
        images = [part for message in messages for part in message.parts if isinstance(part, Image)]
        return Stream(self, images, fails=self.asked == 5)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    made: dict[str, Any] = {}

    def opened(**options: Any) -> Opsin:
        made["opsin"] = Opsin(**options)
        return made["opsin"]

    monkeypatch.setattr(command, "Opsin", opened)
    monkeypatch.setattr(command, "AnswerStream", Stream)
    monkeypatch.setattr(
        command, "_read_images", lambda source, *_, **__: [Image(b"", 1, 1, "0", "PNG", notes=(source,))]
    )
    monkeypatch.setattr(command, "remembered_placement", lambda *_: Placement({}, {}, 0, 0))
    return made


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["opsin", "ask", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.mark.parametrize(
    ("flags", "slots"),
    [((), 4), (("--parallel", "2"), 2), (("--ctx", "4096"), 1), (("--ctx", "64", "--parallel", "3"), 3)],
)
def test_several_slots_are_used_and_few_images_are_held(
    model: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    slots: int,
) -> None:
    names = [f"x{number}.png" for number in range(40)]
    assert run(monkeypatch, *names, "what?", "--json", *flags) == 1
    opsin = model["opsin"]
    assert opsin.options["parallel"] == slots
    assert opsin.most == slots + 1
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [row["source"] for row in rows] == names
    assert [row["error"] and row["error"]["code"] for row in rows] == [None] * 4 + ["encode_failed"] + [None] * 35
    assert rows[3]["images"][0]["notes"] == ["x3.png"]
    assert "(39 of 40 done, 1 failed in" in shown.err


@pytest.mark.parametrize(
    ("variables", "slots"),
    [({"OPSIN_PARALLEL": "7"}, 7), ({"OPSIN_CTX": "2048"}, 1), ({"OPSIN_CTX": "2048", "OPSIN_PARALLEL": "2"}, 2)],
)
def test_the_environment_gives_slots_and_context_as_flags_do(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], slots: int
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run(monkeypatch, *[f"x{number}.png" for number in range(9)], "what?", "--json")
    assert (model["opsin"].options["parallel"], model["opsin"].most) == (slots, slots + 1)


def test_quiet_leaves_answers_and_errors(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, *[f"x{number}.png" for number in range(6)], "what?", "--quiet")
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 5
    assert shown.err == "opsin: x4.png: The vision encoder failed on this image.\n"


def test_one_image_is_asked_about_in_one_slot(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "x.png", "y.png", "what?", "--together", "--format", "csv") == 0
    assert capsys.readouterr().out == 'source,text,error,notes\n"x.png, y.png",a dog,,x.png; y.png\n'
    assert model["opsin"].options["parallel"] == 1


def test_names_in_text_and_markdown_stay_in_their_cell(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "a|b.png", "c\td.png", "what?", "--format", "md")
    assert "| a\\|b.png | a dog |" in capsys.readouterr().out
    run(monkeypatch, "a|b.png", "c\td.png", "what?")
    assert capsys.readouterr().out.splitlines() == ["a|b.png\ta dog", "c\\td.png\ta dog"]


def test_every_ending_is_taken_whatever_its_case(tmp_path: Path) -> None:
    names = [f"x{number}{ending}" for number, ending in enumerate(ENDINGS)]
    for name in names:
        (tmp_path / name.upper()).touch()
    assert [Path(path).name for path in expand_sources([str(tmp_path)], recursive=False)] == [n.upper() for n in names]
    assert {".jfif", ".jpe", ".heic", ".tif"} <= set(ENDINGS)


def test_folders_in_folders_are_read_if_asked_for_and_links_back_are_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    for name in ("b/1.png", ".git/2.png", "a.png", "c.png"):
        (tmp_path / name).touch()
    assert expand_sources([str(tmp_path)], recursive=True) == [str(tmp_path / n) for n in ("a.png", "b/1.png", "c.png")]
    assert capsys.readouterr().err == ""
    (tmp_path / "a.png").unlink()
    (tmp_path / "c.png").unlink()
    with pytest.raises(BadParameter, match="There is no image"):
        expand_sources([str(tmp_path)], recursive=False)
    assert capsys.readouterr().err == "(1 folder was left out, -r reads folders, too: b)\n"


def test_many_files_that_are_left_out_are_counted_and_few_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1200):
        (tmp_path / f"{number}.txt").touch()
    (tmp_path / "a.png").touch()
    expand_sources([str(tmp_path)], recursive=False)
    said = capsys.readouterr().err
    assert said == (
        "(1,200 files were left out, no image that can be read: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 1,195 more)\n"
    )


@pytest.mark.parametrize("question", ["What is in a.png?", "describe", "compare a.png with b.png", "Read a.pdf"])
def test_what_is_a_question(question: str) -> None:
    check_question(["a.png"], question)


@pytest.mark.parametrize("question", ["b.png", "/x/y/b.JPEG", "~/b.heic"])
def test_what_is_one_more_image(question: str) -> None:
    with pytest.raises(BadParameter, match="question is missing"):
        check_question(["a.png"], question)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.png", "what", "is", "this?"], 'opsin ask a.png "what is this?"'),
        (["what's", "to", "see"], 'opsin ask IMAGE "what\'s to see"'),
    ],
)
def test_a_question_without_quotes(arguments: list[str], said: str) -> None:
    *sources, question = arguments
    with pytest.raises(BadParameter) as caught:
        check_question(sources, question)
    assert said in str(caught.value)


@pytest.mark.parametrize("arguments", [["nowhere", "describe"], ["a.png", "b/c", "-", "describe"]])
def test_names_that_may_be_files(arguments: list[str]) -> None:
    *sources, question = arguments
    check_question(sources, question)
