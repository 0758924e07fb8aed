"""What a line of a conversation means: a question, images, or a command."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opsin.cli import chat
from opsin.cli.chat import find_images
from opsin.core.errors import BadInput
from opsin.core.request import Image
from opsin.prompt import Message
from opsin.testing import image


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "my photo.png"
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    "written",
    ["'{}'", '"{}"', "{escaped}", "file://{encoded}", "{escaped}?"],
)
@pytest.mark.parametrize(("before", "after"), [("", ""), ("", " What is this?"), ("What is in ", "")])
def test_a_path_is_found_however_it_was_pasted(photo: Path, written: str, before: str, after: str) -> None:
    pasted = written.format(photo, escaped=str(photo).replace(" ", "\\ "), encoded=str(photo).replace(" ", "%20"))
    image = f"this image{'?' if written.endswith('?') else ''}" if before else ""  # so that the sentence stays whole
    assert find_images(f"{before}{pasted}{after}") == ([str(photo)], f"{before}{image}{after}".strip())


def test_a_path_below_the_home_folder_is_found(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(photo.parent))
    assert find_images("~/my\\ photo.png What?") == ([str(photo)], "What?")
    assert find_images("'~/my photo.png'") == ([str(photo)], "")


@pytest.mark.parametrize(
    "line",
    ["What's that, and where's it?", "is /nowhere/x.png red?", "~nobody-here/x.png", "a  b \\", 'say "hi"', "x" * 5000],
)
def test_what_is_no_file_stays_as_it_is(line: str) -> None:
    assert find_images(line) == ([], line)


def test_a_word_that_is_a_files_name_stays_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert find_images("is the photo red?") == ([], "is the photo red?")
    assert find_images("is ./photo red?") == (["photo"], "is this image red?")


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[list[Message]]]:
    asked: list[list[Message]] = []

    def answer(_: Any, messages: list[Message], __: Any) -> Any:
        asked.append(messages)
        return SimpleNamespace(text=f"answer {len(asked)}")

    def load(source: str, **shown: object) -> list[Image]:
        assert shown["tiles"] is None
        if "missing" in source:
            raise BadInput(f"There is no {source}.")
        return [image(len(source))]

    monkeypatch.setattr(chat, "_answer", answer)
    opsin: Any = SimpleNamespace(images=load)
    return chat._Talk(opsin, {}, [Message("system", "Be brief.")], {"tiles": None}, ["x.png"]), asked


def parts(message: Message) -> list[str]:
    return ["image" if isinstance(part, Image) else part for part in message.parts]


def test_a_question_has_the_images_since_the_last_one(talk: Any, photo: Path) -> None:
    conversation, asked = talk
    conversation.take("what?")
    conversation.take(f"/image '{photo}'")
    conversation.take(f'"{photo}"')
    conversation.take(f"and this: '{photo}'")
    assert [parts(message) for message in asked[-1]] == [
        ["Be brief."],
        ["image", "what?"],
        ["answer 1"],
        ["image", "image", "image", "and this:"],
    ]
    conversation.take("/new")
    conversation.take("again?")
    assert [parts(message) for message in asked[-1]] == [["Be brief."], ["image", "again?"]]


def test_a_missing_image_is_a_sentence_and_commands_are_not_questions(talk: Any) -> None:
    conversation, asked = talk
    with pytest.raises(BadInput, match="missing"):
        conversation.take("/image '/a/missing one.png'")
    for line in ("/help", "/nothing", "/image", "/save", ""):
        conversation.take(line)
    assert asked == []


def test_what_was_said_is_saved(talk: Any, tmp_path: Path) -> None:
    conversation, _ = talk
    conversation.take("what?")
    conversation.take(f"/save '{tmp_path}/my talk.md'")
    text = (tmp_path / "my talk.md").read_text()
    assert text == "**system:** Be brief.\n\n**user:** (image of 8 x 6) what?\n\n**assistant:** answer 1\n"
    with pytest.raises(BadInput, match="cannot be written"):
        conversation.take(f"/save '{tmp_path}/my talk.md/x.md'")
