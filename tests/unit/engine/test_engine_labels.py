"""Answers that are one of a list: what is scored, with what room, and beside whom."""

import dataclasses
import hashlib
import itertools
import math
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from opsin.core.answer import Answer, Finished, ReasoningStyle, TextDelta
from opsin.core.backend import BackendLimits
from opsin.core.choice import choose
from opsin.core.errors import BadParameter, Cancelled, ContextOverflow, DecodeFailed
from opsin.core.request import ImagePart, Prompt, SamplingParams, TextPart
from opsin.engine import Engine, Policy
from opsin.engine.labels import LabelTree, spellings
from opsin.testing import FakeBackend, image
from opsin.testing.fake_backend import TURN_TEXT

LIMITS = BackendLimits(n_ctx=512, n_ubatch=64, n_seq_max=8, n_vocab=259, n_embd=4, n_ctx_seq=512)
WORDS = ["red", "red square", "blue", "Blue", "a green ring", "black"]


class Chancy(FakeBackend):
    """Every token has a probability of its own behind every history; `batches` are the sizes of its ubatches."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.batches: list[int] = []
        self.scored = 0

    def decode(self, rows, **options: bool) -> bool:  # type: ignore[no-untyped-def]
        done = super().decode(rows, **options)
        self.batches.append(len(self._rows))
        assert len(getattr(rows, "outputs", ())) <= self.limits.n_outputs
        return done

    def score(self, row: int, tokens: Sequence[int]) -> list[float]:
        self.scored += 1
        seq_id, length = self._rows[row]
        return [chance([entry for [entry] in self._sequences[seq_id][:length]], token) for token in tokens]


def chance(history: Sequence[int | str], token: int) -> float:
    """A log probability from -3 to 0, the same whenever it is asked for."""
    digest = hashlib.sha256(repr(([*history], token)).encode()).digest()
    return -3 * int.from_bytes(digest[:4], "little") / 2**32 - 1e-3


def prompt(text: str = "what colour?", images: int = 1) -> Prompt:
    return Prompt((*(ImagePart(image(i)) for i in range(images)), TextPart(f"{text}{TURN_TEXT}")))


def by_hand(labels: Sequence[str], history: list[int | str]) -> dict[str, float]:
    """The formula of `opsin.engine.labels`, one label and one token at a time."""
    ways = spellings(labels, lambda text: tuple(text.encode()), lambda token: bytes([token]))

    def begins(way: tuple[int, ...]) -> float:
        return math.exp(sum(chance([*history, *way[:i]], token) for i, token in enumerate(way)))

    firsts = {way: math.exp(chance(history, way[0])) for way in ways}
    best = {label: max(firsts[way] for way in ways if ways[way] == label) for label in labels}
    ways = {way: label for way, label in ways.items() if firsts[way] >= 0.01 * best[label]}
    found = dict.fromkeys(labels, 0.0)
    for way, label in ways.items():
        longer = [one for one in ways if len(one) > len(way) and one[: len(way)] == way]
        nearest = [one for one in longer if not any(one != two and one[: len(two)] == two for two in longer)]
        found[label] += begins(way) - sum(map(begins, nearest))
    return found


def history_of(question: Prompt, answered: str = "") -> list[int | str]:
    backend = FakeBackend()
    cells: list[int | str] = []
    tokenized = backend.tokenize(question.parts, add_bos=True)
    for chunk in tokenized.chunks:
        rows = backend.encode(chunk) if hasattr(chunk, "image") else ()  # type: ignore[arg-type]
        cells += [f"<{int(row[0])}.{int(row[1])}>" for row in rows] or list(chunk.tokens)  # type: ignore[union-attr]
    tokenized.close()
    return [*cells, *answered.encode()]


def assert_right(answer: Answer, labels: Sequence[str], history: list[int | str]) -> None:
    found = by_hand(labels, history)
    assert answer.choice is not None
    assert answer.finish_reason == "stop"
    assert answer.text == answer.choice.label == max(found, key=lambda label: found[label])
    assert sum(answer.choice.probabilities.values()) == pytest.approx(1)
    total = sum(found.values())
    for label, value in found.items():
        assert answer.choice.probabilities[label] == pytest.approx(value / total, rel=1e-6), label
    first, second, *_ = sorted(answer.choice.probabilities.values(), reverse=True)
    assert answer.margin == pytest.approx(first - second)
    assert answer.choice.coverage == pytest.approx(min(1, total), rel=1e-6)


def ask(backend: FakeBackend, question: Prompt | None = None, **params: object) -> Answer:
    """An answer; a label without own words, unless `reasons` asks for them."""
    plain = {"reasons": False} if {"choices", "scale", "boolean"} & params.keys() else {}
    with Engine(lambda: backend, now=backend.clock) as engine:
        answer = engine.submit(question or prompt(), SamplingParams(**{**plain, **params})).result()  # type: ignore[arg-type]
        engine.call(lambda _: engine._loop._self_check())
    return answer


def test_every_label_has_its_probability_also_one_that_another_begins_with() -> None:
    backend = Chancy(limits=LIMITS)
    answer = ask(backend, choices=WORDS)
    assert_right(answer, WORDS, history_of(prompt()))
    assert backend.open_handles == 0


def test_labels_of_one_token_cost_no_step_behind_the_prompt() -> None:
    class Outright(Chancy):
        def score(self, row: int, tokens: Sequence[int]) -> list[float]:
            return [-20.0 if token == ord(" ") else -1.0 for token in tokens]

    backend, free = Outright(limits=LIMITS), Chancy(lambda _: "x", limits=LIMITS)
    answer = ask(backend, choices=["1", "2", "3"])
    ask(free, max_tokens=1)
    assert backend.batches == free.batches
    assert answer.choice is not None


def test_many_labels_go_in_several_steps_where_ids_rows_or_cells_are_few() -> None:
    many = [f"label {a}{b}" for a, b in itertools.product("abcdef", repeat=2)]
    for change in ({"n_seq_max": 2}, {"n_ubatch": 32}, {"n_outputs": 20}, {"n_ctx": 40, "n_ctx_seq": 40}, {}):
        backend = Chancy(limits=dataclasses.replace(LIMITS, **change))
        assert_right(ask(backend, choices=many), many, history_of(prompt()))
        assert max(backend.batches) <= backend.limits.n_ubatch


def test_several_at_once_and_streams_beside_them_disturb_nobody() -> None:
    backend = Chancy(lambda text: "abcdefgh" * 6, limits=LIMITS)
    questions = [prompt(f"which of them, {number}?", images=number % 2) for number in range(12)]
    with Engine(lambda: backend, policy=Policy(parallel=4), now=backend.clock) as engine:
        streams = []
        for number, question in enumerate(questions):
            kind = {"choices": WORDS, "reasons": False} if number % 3 else {"guard": False}
            streams.append(engine.submit(question, SamplingParams(**kind)))  # type: ignore[arg-type]
        answers = [stream.result() for stream in streams]
        engine.call(lambda _: engine._loop._self_check())
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            if number % 3:
                assert_right(answer, WORDS, history_of(question))
            else:
                assert answer.text == "abcdefgh" * 6
    assert backend.open_handles == 0


def test_as_many_run_as_there_are_sequences() -> None:
    limits = dataclasses.replace(LIMITS, n_seq_max=3)
    backend = Chancy(lambda text: "abcdefgh" * 9, limits=limits)
    with Engine(lambda: backend, policy=Policy(parallel=3), now=backend.clock) as engine:
        free = [engine.submit(prompt(f"say {n}", 0), SamplingParams(guard=False)) for n in range(2)]
        scored = [
            engine.submit(prompt(f"which {n}", 0), SamplingParams(choices=WORDS, reasons=False)) for n in range(4)
        ]
        for number, stream in enumerate(scored):
            assert_right(stream.result(), WORDS, history_of(prompt(f"which {number}", 0)))
        assert {stream.result().text for stream in free} == {"abcdefgh" * 9}


def test_the_label_comes_as_one_piece_of_text() -> None:
    backend = Chancy(limits=LIMITS)
    with Engine(lambda: backend, now=backend.clock) as engine:
        events = list(engine.submit(prompt(), SamplingParams(choices=WORDS, reasons=False)))
    assert isinstance(events[-1], Finished)
    assert [event.text for event in events if isinstance(event, TextDelta)] == [events[-1].answer.text]


def test_a_scale_is_numbers_and_a_boolean_is_true_or_false() -> None:
    rated = ask(Chancy(limits=LIMITS), scale="8-12").choice
    assert rated is not None
    assert list(rated.probabilities) == ["8", "9", "10", "11", "12"]
    assert rated.value == int(rated.label)
    assert rated.expected == pytest.approx(sum(int(n) * p for n, p in rated.probabilities.items()))
    judged = ask(Chancy(limits=LIMITS), boolean=True).choice
    assert judged is not None
    assert judged.value is {"yes": True, "no": False}[judged.label]
    assert judged.expected is None


def test_with_reasons_labels_are_scored_where_the_last_one_stands() -> None:
    words = "no circles, a square, so no."
    backend = Chancy(lambda _: words, limits=LIMITS)
    answer = ask(backend, choices=["yes", "no"], reasons=True)
    assert answer.reasoning == words
    assert_right(answer, ["yes", "no"], history_of(prompt(), words[: words.rindex(" no")]))
    assert answer.usage.completion_tokens == len(words) + len(answer.tokens[len(words) :])
    cut = ask(Chancy(lambda _: words, limits=LIMITS), choices=["yes", "no"], reasons=True, max_tokens=5)
    assert cut.reasoning == words[:5]
    assert cut.finish_reason == "stop"
    assert cut.limit is None


def test_with_reasons_that_name_no_label_the_prompts_end_counts() -> None:
    answer = ask(Chancy(lambda _: "a fish.", limits=LIMITS), choices=["yes", "no"], reasons=True)
    assert_right(answer, ["yes", "no"], history_of(prompt()))


SHAPES = ["a star", "a ring", "a cube"]  # of many tokens, so that the model hardly ever begins with one of them
SEEN = "I see a ring at the left."


@pytest.mark.parametrize("kind", [Chancy, FakeBackend])
def test_unset_its_own_words_come_where_it_hardly_begins_with_a_label(kind: type[FakeBackend]) -> None:
    answers = {reasons: ask(kind(lambda _: SEEN), choices=SHAPES, reasons=reasons) for reasons in (None, True, False)}
    found, wanted = answers[None], answers[True]
    assert found.reasoning == wanted.reasoning == SEEN
    assert found.choice == wanted.choice
    assert (found.text, found.tokens, found.usage) == (wanted.text, wanted.tokens, wanted.usage)
    assert (found.finish_reason, found.limit) == ("stop", None)
    assert answers[False].reasoning is None
    assert answers[False].choice is not None
    assert answers[False].choice.coverage < 0.1


def test_labels_are_scored_anew_behind_own_words_that_unset_reasons_led_to() -> None:
    answer = ask(Chancy(lambda _: SEEN), choices=SHAPES, reasons=None)
    assert_right(answer, SHAPES, history_of(prompt(), SEEN[: SEEN.index(" a ring")]))
    silent = ask(Chancy(lambda _: ""), choices=SHAPES, reasons=None)
    assert_right(silent, SHAPES, history_of(prompt()))
    assert silent.reasoning is None
    one = ask(Chancy(lambda _: SEEN), choices=SHAPES, reasons=None, max_tokens=1)
    assert one.reasoning == "I"
    assert_right(one, SHAPES, history_of(prompt()))


def test_unset_nothing_is_said_nor_computed_where_it_begins_with_a_label() -> None:
    backends = [FakeBackend(lambda _: "a ring, as it is round") for _ in range(2)]
    work: list[list[int]] = [[], []]
    for backend, rows in zip(backends, work, strict=True):
        backend.on_decode = lambda backend=backend, rows=rows: rows.append(backend.cells_used)  # type: ignore[misc]
    found, wanted = (ask(backends[at], choices=SHAPES, reasons=(None, False)[at]) for at in range(2))
    assert (found.text, found.reasoning, found.choice) == ("a ring", None, wanted.choice)
    assert found.choice is not None
    assert found.choice.coverage > 0.9
    assert work[0] == work[1]
    assert backends[0].clock.seconds == backends[1].clock.seconds


def test_own_words_end_at_a_stop_string_and_no_label_behind_it_counts() -> None:
    said = "It swims. USER: Is it a ring?"
    answer = ask(Chancy(lambda _: said), choices=SHAPES, reasons=None, stop=("USER:",))
    assert (answer.reasoning, answer.stop) == ("It swims.", None)
    assert_right(answer, SHAPES, history_of(prompt()))


def test_own_words_find_the_prompt_and_its_image_in_the_kv_cache() -> None:
    long = prompt("what is it? " * 20)
    found, wanted = Chancy(lambda _: SEEN), Chancy(lambda _: SEEN)
    ask(found, long, choices=SHAPES, reasons=None)
    scored = Chancy(limits=LIMITS)
    ask(scored, long, choices=SHAPES)
    ask(wanted, long, choices=SHAPES, reasons=True)
    assert len(found.encoded) == 1
    # The first scoring is what `wanted` does not do, and the prompt's last token is computed again.
    labels_alone = sum(scored.batches) - len(history_of(long))
    assert sum(found.batches) == sum(wanted.batches) + labels_alone + 1


def test_own_words_that_unset_reasons_led_to_are_streamed_then_the_label() -> None:
    backend = FakeBackend(lambda _: SEEN)
    with Engine(lambda: backend, now=backend.clock) as engine:
        events = list(engine.submit(prompt(), SamplingParams(choices=SHAPES)))
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert len(deltas) > 10
    assert "".join(one.text for one in deltas if one.reasoning) == SEEN
    assert [one.text for one in deltas if not one.reasoning] == ["a ring"]
    assert not deltas[-1].reasoning


def test_unset_many_at_once_with_little_room_are_as_each_alone() -> None:
    def reply(text: str) -> str:
        return f"{text[-5:-1]} means that there is {SHAPES[len(text) % 3]}, or so I say."

    limits = dataclasses.replace(LIMITS, n_ctx=160, n_ctx_seq=160)
    questions = [prompt(f"which{'!' * number}", images=number % 2) for number in range(9)]
    params = SamplingParams(choices=SHAPES, guard=False)
    backend, all_there = Chancy(reply, limits=limits), threading.Event()
    backend.on_decode = lambda: all_there.wait(20) or None
    policy = Policy(parallel=4, swap_cells=64, park_beside=8)
    with Engine(lambda: backend, policy=policy, now=backend.clock) as engine:
        streams = [engine.submit(one, params, priority=-(at % 3)) for at, one in enumerate(questions)]
        scheduler, inbox = engine._loop._scheduler, engine._loop._inbox
        while len(scheduler.running) + len(scheduler.waiting) + inbox.qsize() < len(questions):
            time.sleep(0.001)
        all_there.set()
        answers = [stream.result() for stream in streams]
        engine.call(lambda _: engine._loop._self_check())
        assert engine.stats.preemptions > 0
    for question, answer in zip(questions, answers, strict=True):
        alone = ask(Chancy(reply, limits=limits), question, choices=SHAPES, guard=False, reasons=True)
        assert (answer.text, answer.reasoning, answer.choice) == (alone.text, alone.reasoning, alone.choice)
    assert backend.open_handles == 0


def test_unset_a_prompt_that_leaves_no_room_for_words_has_the_label_that_it_had_at_first() -> None:
    full = prompt("x" * (512 - 4 - 2 - 1 - len(SHAPES[0])), 1)
    for n in range(3):  # more room by a token each
        part = full.parts[1]
        assert isinstance(part, TextPart)
        question = Prompt((full.parts[0], TextPart(part.text[n:])))
        answer = ask(Chancy(lambda _: "So I said.", limits=LIMITS), question, choices=SHAPES, reasons=None)
        assert_right(answer, SHAPES, history_of(question))
        assert answer.limit is None


def test_unset_the_clock_and_a_caller_that_leaves_end_own_words() -> None:
    long = "and so on, " * 20
    whole = ask(Chancy(lambda _: long), choices=SHAPES, reasons=None, guard=False)
    assert whole.reasoning == long.strip()
    for seconds in (0.03, 0.08, 0.2, 0.5, 1.0):
        late = ask(Chancy(lambda _: long), choices=SHAPES, reasons=None, guard=False, max_seconds=seconds)
        assert (late.text, late.choice, late.finish_reason, late.limit) == ("", None, "length", "seconds")
        assert long.startswith(late.reasoning or "")
    backend = Chancy(lambda _: long)
    with Engine(lambda: backend, now=backend.clock) as engine:
        stream = engine.submit(prompt(), SamplingParams(choices=SHAPES, guard=False))
        for event in stream:
            if isinstance(event, TextDelta):
                break
        stream.cancel()
        with pytest.raises(Cancelled):
            stream.result()
        again = engine.submit(prompt(), SamplingParams(choices=SHAPES, guard=False)).result()
        assert (again.choice, again.reasoning) == (whole.choice, whole.reasoning)
        engine.call(lambda _: engine._loop._self_check())
    assert backend.open_handles == 0


def test_unset_a_model_that_thinks_says_its_words_without_thoughts() -> None:
    style = ReasoningStyle("<think>", "</think>")
    thinks = dataclasses.replace(prompt(), thinking=True, reasoning=style)
    closed = Prompt((*thinks.parts, TextPart("\n</think>\n\n")))
    skip = "." * len("\n</think>\n\n")  # the fake takes what stands behind its mark for said
    answer = ask(Chancy(lambda _: skip + SEEN), thinks, choices=SHAPES, reasons=None)
    assert answer.reasoning == SEEN
    assert_right(answer, SHAPES, history_of(closed, SEEN[: SEEN.index(" a ring")]))


def test_no_byte_of_its_own_words_ends_them() -> None:
    words = "a \0 or two, so no."
    answer = ask(FakeBackend(lambda _: words), boolean=True, reasons=True)
    assert (answer.text, answer.reasoning) == ("no", words)


def test_the_clock_and_a_caller_that_leaves_end_it() -> None:
    late = ask(Chancy(limits=LIMITS), choices=WORDS, max_seconds=0.01)
    assert (late.text, late.choice, late.finish_reason, late.limit) == ("", None, "length", "seconds")
    left = threading.Event()

    class Waiting(Chancy):
        def score(self, row: int, tokens: Sequence[int]) -> list[float]:
            assert left.wait(20)
            return super().score(row, tokens)

    backend = Waiting(limits=LIMITS)
    with Engine(lambda: backend, now=backend.clock) as engine:
        stream = engine.submit(prompt(), SamplingParams(choices=WORDS, reasons=False))
        stream.cancel()
        left.set()
        with pytest.raises(Cancelled):
            stream.result()
        assert_right(
            engine.submit(prompt(), SamplingParams(choices=WORDS, reasons=False)).result(), WORDS, history_of(prompt())
        )


def test_a_batch_that_fails_fails_its_own_and_leaves_nothing_behind() -> None:
    class Failing(Chancy):
        def score(self, row: int, tokens: Sequence[int]) -> list[float]:
            if self.scored == 3:
                self.scored += 1
                raise DecodeFailed("A value is not a number.")
            return super().score(row, tokens)

    backend = Failing(limits=LIMITS)
    with Engine(lambda: backend, now=backend.clock) as engine:
        with pytest.raises(DecodeFailed):
            engine.submit(prompt(), SamplingParams(choices=WORDS, reasons=False)).result()
        assert_right(
            engine.submit(prompt(), SamplingParams(choices=WORDS, reasons=False)).result(), WORDS, history_of(prompt())
        )
        engine.call(lambda _: engine._loop._self_check())


def test_labels_that_cannot_be_scored_are_refused_in_a_sentence() -> None:
    with pytest.raises(BadParameter, match="takes 39 tokens, and 32 are the limit"):
        ask(Chancy(limits=LIMITS), choices=["x" * 39, "y"])
    with pytest.raises(BadParameter, match="--parallel 2"):
        ask(Chancy(limits=dataclasses.replace(LIMITS, n_seq_max=1)), choices=["red", "blue"])
    with pytest.raises(BadParameter, match="leave out --no-kv-unified"):
        ask(Chancy(limits=dataclasses.replace(LIMITS, branches=False)), choices=["red", "blue"])
    with pytest.raises(ContextOverflow):
        ask(Chancy(limits=LIMITS), prompt("x" * 496), choices=["a long label", "b"])


@pytest.mark.parametrize(
    "params",
    [
        {"choices": ["yes"]},
        {"choices": ["yes", "yes"]},
        {"choices": ["yes", ""]},
        {"choices": ["yes", " no"]},
        {"choices": ["yes", "no"], "boolean": True},
        {"scale": "5-1"},
        {"scale": "1-999"},
        {"scale": "good"},
        {"boolean": True, "json_schema": "{}"},
        {"boolean": True, "grammar": "root ::= x"},
        {"boolean": True, "logprobs": 0},
        {"boolean": True, "logit_bias": {1: 2.0}},
        {"boolean": True, "thinking": True},
        {"reasons": True},
        {"reasons": False},
    ],
)
def test_what_cannot_be_honoured_is_refused(params: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        SamplingParams(**params)  # type: ignore[arg-type]


def tokenizer(*vocabulary: str, space: str) -> tuple:  # type: ignore[type-arg]
    """Longest match first; `space` is put before every text, as sentencepiece does."""
    names = sorted(vocabulary, key=len, reverse=True)

    def tokens(text: str) -> tuple[int, ...]:
        text, found = space + text, list[int]()
        while text:
            name = next(name for name in names if text.startswith(name))
            found.append(names.index(name))
            text = text[len(name) :]
        return tuple(found)

    return tokens, lambda token: names[token].encode(), names


def texts(found: dict[tuple[int, ...], str], names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(names[token] for token in way) for way in found)


def test_labels_are_spelled_as_the_tokenizer_would_write_them_at_an_answers_start() -> None:
    tokens, piece, names = tokenizer("yes", " yes", "Yes", " Yes", " ", "\n", space="")
    assert set(texts(spellings(["yes"], tokens, piece), names)) == {("yes",), (" yes",), ("Yes",), (" Yes",)}
    tokens, piece, names = tokenizer("yes", " yes", "Yes", " Yes", " ", "\n", space=" ")
    assert {("yes",), (" yes",), ("Yes",), (" Yes",)} <= set(texts(spellings(["yes"], tokens, piece), names))


def test_a_spelling_belongs_to_the_label_that_it_is() -> None:
    tokens, piece, names = tokenizer("a", "A", " a", " A", "\n", " ", space="")
    found = spellings(["a", "A"], tokens, piece)
    assert {names[way[0]].strip(): label for way, label in found.items()} == {"a": "a", "A": "A"}


def test_unlikely_spellings_are_left_out_and_labels_never() -> None:
    tree = LabelTree({(1, 2): "yes", (3, 4): "yes", (5, 6): "no"})
    tree.take((), [math.log(0.9), math.log(1e-5), -40.0])
    assert tree.pending == [(1,), (5,)]


def test_equal_labels_and_hopeless_ones_are_a_distribution_too() -> None:
    found = choose({"a": -1e4, "b": -1e4}, {"a": "a", "b": "b"})
    assert found.probabilities == {"a": 0.5, "b": 0.5}
    assert (found.label, found.margin, found.coverage) == ("a", 0, 0)
