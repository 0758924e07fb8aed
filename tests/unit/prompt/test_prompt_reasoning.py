import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prompt_families import source

from opsin.core.answer import ReasoningStyle
from opsin.engine.output import ReasoningSplitter
from opsin.prompt import TemplateSource
from opsin.prompt.builder import find_style

THINK = ReasoningStyle()
GLM = ReasoningStyle(dropped=("<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>"))


def run(splitter, *deltas):
    thoughts, texts = zip(*(*(splitter.feed(delta) for delta in deltas), splitter.finish()), strict=True)
    return "".join(thoughts), "".join(texts)


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\nwhy\n</think>\n\nso", False, ("why", "so")),
        ("\n <think>why</think>so", False, ("why", "so")),
        ("why\n</think>\n\nso", True, ("why", "so")),
        ("<think>\nwhy\n</think>so", True, ("why", "so")),
        ("just text", False, ("", "just text")),
        ("  text with space ", False, ("", "  text with space ")),
        ("text <think>later</think>", False, ("", "text <think>later</think>")),
        ("<think>a</think>b<think>c</think>d", False, ("a", "b<think>c</think>d")),
        ("<think></think>so", False, ("", "so")),
        ("</think>so", True, ("", "so")),
        ("<think>never closed </thi", False, ("never closed </thi", "")),
        ("never closed \n", True, ("never closed", "")),
        ("<think>a < b </ c </thin k</think> x ", False, ("a < b </ c </thin k", "x ")),
        ("<thin", False, ("", "<thin")),
        ("<thinking", False, ("", "<thinking")),
        ("", False, ("", "")),
        ("", True, ("", "")),
        ("<think>a\n\n b</think>\n", False, ("a\n\n b", "")),
    ],
)
def test_whole_and_letter_by_letter_agree(text, inside, expected):
    assert run(ReasoningSplitter(THINK, starts_inside=inside), text) == expected
    assert run(ReasoningSplitter(THINK, starts_inside=inside), *text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>why</think><answer>It is <|begin_of_box|>42<|end_of_box|>.</answer>", ("why", "It is 42.")),
        ("<think>why</think>\n<answer>\n42 \n</answer>\n", ("why", "42 \n\n")),
        ("<think>why</think>It is <|begin_of_box|>42<|end_of_box|>.", ("why", "It is 42.")),
        ("<answer>42</answer>", ("", "42")),
        ("no tags at all <an", ("", "no tags at all <an")),
    ],
)
def test_the_wrapping_of_glm_is_left_out(text, expected):
    assert run(ReasoningSplitter(GLM, starts_inside=False), text) == expected
    assert run(ReasoningSplitter(GLM, starts_inside=False), *text) == expected


pieces = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<thi",
            "nk>",
            "</",
            "think",
            "<answer>",
            "</answer>",
            "<|begin_of_box|>",
            "a",
            " ",
            "\n",
            "<",
        ]
    ),
    max_size=14,
)


@given(
    words=pieces,
    cuts=st.lists(st.integers(0, 60), max_size=8),
    inside=st.booleans(),
    style=st.sampled_from([THINK, GLM]),
)
@example(words=["<answer>", "</answer>", " ", "</answer>"], cuts=[17], inside=False, style=GLM)
def test_where_the_stream_is_cut_changes_nothing(words, cuts, inside, style):
    text = "".join(words)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    deltas = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert run(ReasoningSplitter(style, starts_inside=inside), *deltas) == run(
        ReasoningSplitter(style, starts_inside=inside), text
    )


@given(words=pieces)
def test_without_tags_nothing_is_lost(words):
    text = "".join(words).replace("<think>", "").replace("</think>", "")
    if not text.lstrip().startswith("<think>"):
        assert run(ReasoningSplitter(THINK, starts_inside=False), *text) == ("", text)


def test_text_is_given_out_as_soon_as_it_is_certain():
    splitter = ReasoningSplitter(THINK, starts_inside=False)
    assert splitter.feed("<think>") == ("", "")
    assert splitter.inside is True
    assert splitter.feed("first, ") == ("first,", "")
    assert splitter.feed("then </th") == (" then", "")
    assert splitter.feed("ink>\n") == ("", "")
    assert splitter.inside is False
    assert splitter.feed("so") == ("", "so")
    assert splitter.feed(" <think>") == ("", " <think>")


def test_a_whole_answer_is_split():
    assert ReasoningStyle().split("<think>a</think>b") == ("a", "b")
    assert ReasoningStyle().split("a</think>b") == ("a", "b")
    assert ReasoningStyle().split("b <think>") == (None, "b <think>")


@pytest.mark.parametrize(
    ("template", "tokens", "expected"),
    [
        ("… <think> …", (), ("<think>", "</think>")),
        ("…", ("<think>",), ("<think>", "</think>")),
        ("◁think▷", (), ("◁think▷", "◁/think▷")),
        ("<|channel>thought\n<channel|>", (), ("<|channel>thought", "<channel|>")),
        ("[THINK]", (), ("[THINK]", "[/THINK]")),
        ("nothing of the kind", ("<image>",), None),
    ],
)
def test_the_style_is_read_off_template_and_vocabulary(template, tokens, expected):
    of = TemplateSource(template, "x", "x", None, "", "", frozenset(tokens))
    style = find_style(of, template)
    assert (style and (style.opening, style.closing)) == expected


def test_glm_is_known_by_its_box():
    of = source("glm4v")
    style = find_style(of, of.template or "")
    assert style is not None
    assert "<answer>" in style.dropped
