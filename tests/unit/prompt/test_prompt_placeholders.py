import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_families import image

from opsin.core.errors import BadPrompt
from opsin.core.request import ImagePart, TextPart
from opsin.prompt.builder import ControlTokens, Placeholders

TOKENS = ["</s>", "<s>", "<<s>>", "<|a|>", "<|a|><|b|>", "[X]", "▁▁", "\n"]
SPLIT = ControlTokens(TOKENS)


@given(st.lists(st.sampled_from([*TOKENS, "<", ">", "|", "s>", "x", " "]), max_size=12).map("".join))
def test_splitting_loses_nothing_and_leaves_no_token_behind(text):
    pieces = SPLIT.split(text)
    assert "".join(pieces) == text
    assert set(pieces[1::2]) <= set(TOKENS)
    for plain in pieces[::2]:
        assert not any(token in plain for token in TOKENS if token.strip())


def test_without_tokens_a_text_is_whole():
    assert ControlTokens([]).split("a </s>") == ["a </s>"]
    assert ControlTokens([" ", "", "\n\n"]).split("a \n\n b") == ["a \n\n b"]


def test_characters_that_mean_something_in_patterns_do_not():
    tokens = ControlTokens(["^x", "]y", "\\z", "-w"])
    assert tokens.split("^x]y\\z-w_q") == ["", "^x", "", "]y", "", "\\z", "", "-w", "_q"]


def test_many_tokens_and_a_long_text_take_no_long_time():
    tokens = ControlTokens(f"<unused{n}>" for n in range(6000))
    start = time.thread_time()
    assert len(tokens.split("<unused" * 50_000)) == 1
    assert time.thread_time() - start < 1


def test_keys_and_nested_values_of_json_are_protected():
    placeholders = Placeholders(ControlTokens(["</s>"]))
    value = placeholders.protect({"a</s>": ["</s>", {"b": "x"}, 3, None, True, 1.5]})
    assert "</s>" not in str(value)
    assert next(iter(value.values()))[1:] == [{"b": "x"}, 3, None, True, 1.5]


def test_cutting_gives_back_what_was_put_in():
    placeholders = Placeholders(ControlTokens(["</s>"]))
    rendered = f"<s>{placeholders.protect('a</s>b')}{placeholders.place(image(1))}</s>"
    assert placeholders.cut(rendered) == (
        TextPart("<s>a"),
        TextPart("</s>", special=False),
        TextPart("b"),
        ImagePart(image(1)),
        TextPart("</s>"),
    )


def test_equal_images_have_placeholders_of_their_own():
    placeholders = Placeholders(ControlTokens([]))
    one, two = placeholders.place(image(1)), placeholders.place(image(1))
    assert one != two
    with pytest.raises(BadPrompt, match="once and in order"):
        placeholders.cut(one)
    with pytest.raises(BadPrompt, match="once and in order"):
        placeholders.cut(two + one)


def test_a_token_that_the_template_dropped_is_no_fault():
    placeholders = Placeholders(ControlTokens(["</s>"]))
    placeholders.protect("a</s>")
    assert placeholders.cut("left") == (TextPart("left"),)


@pytest.mark.parametrize(
    "spoil", [lambda m: m[:-1], lambda m: m[:20], lambda m: m[:-1] + "9", lambda m: m[:-6] + "x" * 6]
)
def test_a_spoilt_placeholder_is_noticed(spoil):
    placeholders = Placeholders(ControlTokens([]))
    with pytest.raises(BadPrompt, match="cuts texts apart"):
        placeholders.cut("a" + spoil(placeholders.place(image(1))) + "b")
