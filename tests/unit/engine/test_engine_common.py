"""The common memory: who joins it, what is shared there, and who goes back."""

import dataclasses

import pytest
from engine_driver import Asked, Backend, Driver, limits, prompt_of, reply
from hypothesis import given
from hypothesis import strategies as st

from opsin.cache import CellBook
from opsin.core.backend import BackendLimits
from opsin.engine import Policy
from opsin.engine.books import Books
from opsin.engine.plan import Fork, Join, Leave, MemoryOp, Tokens
from opsin.testing import FakeClock

PICTURE = 40
N_CTX_SEQ = 120


def driver(common: int = 400, n_seq_max: int = 7, answer=reply, gather: int = 20) -> Driver:  # type: ignore[no-untyped-def]
    size = dataclasses.replace(limits(n_ctx=N_CTX_SEQ * n_seq_max, n_ubatch=64, n_seq_max=n_seq_max), shared=False)
    size = dataclasses.replace(size, common=common)
    backend = Backend(answer, limits=size, clock=FakeClock(), image_tokens=PICTURE)
    made = Driver(size, Policy(parallel=n_seq_max - 1, gather=gather, wait_for=8), backend)
    made.backend.costs.preprocess = 0.0
    return made


def letters(count: int):  # type: ignore[no-untyped-def]
    return lambda text: text[-2] * count


def ask(made: Driver, picture: int, questions: str, tokens: int = 20) -> list[Asked]:
    return [made.ask(prompt_of(picture, f" {question}"), max_tokens=tokens) for question in questions]


def operations(made: Driver, kind: type[MemoryOp]) -> list[MemoryOp]:
    return [operation for plan in made.plans for operation in plan.memory if isinstance(operation, kind)]


def test_questions_on_one_picture_share_its_cells_and_their_texts_are_filled_in_one_step() -> None:
    made = driver(answer=letters(20))
    asked = ask(made, 1, "abcd")
    most = 0
    while not all(a.stream.done for a in asked):
        made.step()
        most = max(most, made.backend.common_used)
    assert [a.answer.text for a in asked] == [question * 20 for question in "abcd"]
    assert len(operations(made, Join)) == 1
    assert len(made.backend.encoded) == 1
    assert max(len(p.step.prefill) for p in made.plans if isinstance(p.step, Tokens)) == 4
    # A begin token and the picture once; the question, its mark and nearly the whole answer for each.
    assert most == 1 + PICTURE + 4 * (3 + 19)
    made.run()
    made.close()


def test_a_second_family_stays_apart_while_the_first_is_answered() -> None:
    made = driver(answer=letters(30))
    first = ask(made, 1, "abc", tokens=30)
    while not all(a.sequence.output.tokens for a in first):
        made.step()
    second = ask(made, 2, "xyz", tokens=30)
    made.run()
    assert [a.answer.text for a in (*first, *second)] == [question * 30 for question in "abcxyz"]
    assert len(operations(made, Join)) == 1
    assert len(made.backend.encoded) == 2
    made.close()


def test_the_next_family_takes_the_place_of_one_that_has_ended_and_its_picture_is_still_known() -> None:
    made = driver(answer=letters(10))
    ask(made, 1, "abc")
    made.run()
    ask(made, 2, "xyz")
    made.run()
    assert [len(operations(made, kind)) for kind in (Join, Leave)] == [2, 1]
    assert len(made.scheduler.book.members) == 3
    (again,) = ask(made, 1, "d")
    made.run()
    assert again.answer.usage.cached_tokens >= 1 + PICTURE
    assert again.answer.text == "d" * 10
    made.close()


@pytest.mark.parametrize(
    ("room", "questions", "tokens"), [(70, "abcd", 40), (12, "abcde", 2)], ids=["while it answers", "at its fork"]
)
def test_who_finds_no_room_in_the_common_memory_is_at_its_own_place(room: int, questions: str, tokens: int) -> None:
    made = driver(common=1 + PICTURE + room, answer=letters(tokens))
    asked = ask(made, 1, questions, tokens=tokens)
    made.run()
    assert [a.answer.text for a in asked] == [question * tokens for question in questions]
    assert operations(made, Join)
    assert operations(made, Leave)
    assert made.scheduler.preemptions == 0
    made.close()


def test_little_in_common_is_copied_and_one_memory_for_all_knows_no_members() -> None:
    made = driver(gather=PICTURE + 10)
    ask(made, 1, "abc")
    made.run()
    assert operations(made, Fork)
    assert not operations(made, Join)
    shared = Driver(limits(n_ctx=400), Policy(parallel=4, gather=4, wait_for=4))
    ask(shared, 1, "abc")
    shared.run()
    assert not operations(shared, Join)
    for each in (made, shared):
        each.close()


def test_idle_members_go_when_they_slow_down_those_who_answer() -> None:
    made = driver(answer=letters(30))
    made.scheduler.idle_cost.expected = 0.01
    asked = ask(made, 1, "abcd", tokens=4)
    long = made.ask(prompt_of(1, " e"), max_tokens=30)
    made.run()
    assert [a.answer.text for a in (*asked, long)] == [q * 4 for q in "abcd"] + ["e" * 30]
    assert 1 <= len(made.scheduler.idle_ids) < 5, "without a cost all five are kept"
    made.close()


changes = st.lists(st.tuples(st.sampled_from("afjlcm"), st.integers(0, 3), st.integers(0, 3), st.integers(0, 5)))


@given(changes)
def test_the_books_agree_whatever_happens(history: list[tuple[str, int, int, int]]) -> None:
    made = Books(BackendLimits(400, 16, 16, 4, n_vocab=9, n_embd=4, shared=False, common=400))
    apart: CellBook = made._all
    for what, one, other, cells in history:
        inside = one in made.members
        if what == "a" and cells:
            made.append(one, cells)
        elif what == "f" and not made.held(other) and 0 < cells <= made.held(one):
            made.fork(one, other, cells)
            assert (other in made.members) is inside
        elif what == "j" and made.held(one) and not inside:
            made.join(one)
        elif what == "l" and inside:
            made.leave(one)
        elif what == "c":
            made.cut(one, cells)
        elif what == "m" and made.held(one) and not made.held(other) and one != other:
            made.move(one, other)
            assert (other in made.members) is inside
        made.check()
        assert made.used == apart.used == sum(made.held(seq_id) for seq_id in range(4))
