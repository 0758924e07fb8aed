"""From tokens to what a caller sees."""

from opsin.core.answer import ReasoningStyle, TextDelta, TokenLogprob
from opsin.engine.output import AnswerText, ReasoningSplitter

STYLE = ReasoningStyle("<think>", "</think>")


def read(output: AnswerText, pieces: list[tuple[int, bytes]]) -> list[TextDelta]:
    deltas = [delta for token, piece in pieces for delta in output.feed(token, piece, None)]
    return deltas + output.finish()


def test_tags_that_are_control_tokens_have_no_bytes_and_still_split() -> None:
    output = AnswerText((), ReasoningSplitter(STYLE, starts_inside=False), None, tags={1: b"<think>", 2: b"</think>"})
    deltas = read(output, [(1, b""), (7, b"hm"), (2, b""), (8, b" blue")])
    assert (output.reasoning, output.text) == ("hm", "blue")
    assert [(delta.text, delta.reasoning) for delta in deltas] == [("hm", True), ("blue", False)]
    assert output.reasoning_tokens == 2  # the thought and the tag that ends it


def test_stop_strings_end_the_answer_but_not_the_reasoning() -> None:
    output = AnswerText(("stop",), ReasoningSplitter(STYLE, starts_inside=True), None)
    read(output, [(1, b"don't stop "), (2, b"</think>"), (3, b"go st"), (4, b"op now")])
    assert (output.reasoning, output.text, output.stopped) == ("don't stop", "go ", "stop")


def test_stop_strings_end_own_words_before_a_label_and_what_was_held_back_comes_before_it() -> None:
    def own() -> AnswerText:
        splitter = ReasoningSplitter(ReasoningStyle("\0a", "\0b"), starts_inside=True)
        return AnswerText(("USER:",), splitter, None, stop_reasoning=True)

    output = own()
    read(output, [(1, b"a fish. US"), (2, b"ER: Is it"), (3, b" a ring?")])
    assert (output.reasoning, output.text, output.stopped) == ("a fish.", "", "USER:")
    output = own()
    deltas = output.feed(1, b"in the US", None) + output.write("a fish", [2, 3]) + output.finish()
    assert [(delta.text, delta.reasoning) for delta in deltas] == [("in the", True), (" US", True), ("a fish", False)]
    assert (output.tokens, output.stopped) == ([1, 2, 3], None)


def test_a_character_cut_over_tokens_comes_whole_with_both_logprobs() -> None:
    output = AnswerText((), None, None)
    smile = "\N{SLIGHTLY SMILING FACE}".encode()
    entries = [TokenLogprob(token, smile[token : token + 2], -0.1) for token in (0, 2)]
    first = output.feed(0, smile[:2], entries[0])
    second = output.feed(2, smile[2:], entries[1])
    assert first == []
    assert second == [TextDelta(smile.decode(), logprobs=tuple(entries))]


def test_white_space_before_the_answer_is_the_templates() -> None:
    output = AnswerText((), None, None)
    assert [delta.text for delta in read(output, [(1, b"  "), (2, b"\n a "), (3, b" b")])] == ["a ", " b"]
