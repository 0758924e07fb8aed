"""Memories of their own: who is moved, what is copied, and what is carried on where it is."""

import dataclasses

from engine_driver import Backend, Driver, limits, prompt_of, reply
from hypothesis import given
from hypothesis import strategies as st

from opsin.engine import Policy
from opsin.engine.plan import Forget, Fork, Tokens
from opsin.engine.ranks import closing_move, spread
from opsin.testing import FakeClock


def driver(parallel: int = 4, n_seq_max: int = 5, answer=reply, **policy: object) -> Driver:  # type: ignore[no-untyped-def]
    size = dataclasses.replace(limits(n_ctx=200 * n_seq_max, n_seq_max=n_seq_max), shared=False)
    made = Driver(size, Policy(parallel=parallel, **policy), Backend(answer, limits=size, clock=FakeClock()))  # type: ignore[arg-type]
    made.backend.costs.preprocess = 0.0
    return made


def long(text: str) -> str:
    return (text[-2:] + ".") * 60


def operations(made: Driver) -> list[Fork | Forget]:
    return [operation for plan in made.plans for operation in plan.memory]


@given(st.sets(st.integers(0, 8), min_size=1))
def test_moves_come_to_an_end_and_then_all_are_neighbours(running: set[int]) -> None:
    for _ in range(9):
        move = closing_move(running, 9)
        if move is None:
            break
        source, target = move
        assert source in running
        assert target not in running
        running = running - {source} | {target}
    assert spread(running) == len(running)


def test_answers_are_brought_to_neighbouring_ids_when_some_have_ended() -> None:
    made = driver(parallel=4, answer=long)
    asked = [made.ask(f"{i}", max_tokens=tokens) for i, tokens in enumerate((60, 3, 60, 60))]
    made.run()
    steps = [[s.request.number for s in p.step.decode] for p in made.plans if isinstance(p.step, Tokens)]
    assert [0, 2, 3] in [sorted(step) for step in steps]
    moves = [op for op in operations(made) if isinstance(op, Fork) and op.end == -1]
    assert moves, "somebody moved into the gap"
    assert [asked[i].answer.text for i in (0, 2, 3)] == [long(f"{i}\x1e")[:60] for i in (0, 2, 3)]
    assert all(s.seq_id < 0 or spread([s.seq_id]) == 1 for s in made.scheduler.running)
    made.close()


def test_rows_of_a_step_come_in_the_order_of_ids_and_prompts_one_after_another() -> None:
    made = driver(parallel=4, answer=long)
    for i in range(4):
        made.ask(f"question {i}", max_tokens=20)
    made.run()
    for plan in made.plans:
        if isinstance(plan.step, Tokens):
            assert not (plan.step.decode and plan.step.prefill)
            assert len(plan.step.prefill) <= 1


def test_an_idle_prefix_is_carried_on_where_it_is() -> None:
    made = driver(wait_for=4)
    made.ask(prompt_of("about ", 1, "one?"), max_tokens=2)
    made.run()
    made.plans.clear()
    again = made.ask(prompt_of("about ", 1, "two?"), max_tokens=2)
    made.run()
    assert not [op for op in operations(made) if isinstance(op, Fork)]
    assert again.answer.usage.cached_tokens == 1 + len("about ") + 4
    assert len(made.backend.encoded) == 1
    made.close()


def test_a_long_prefix_is_copied_for_a_short_beginning_and_a_tiny_beginning_is_filled_again() -> None:
    made = driver(wait_for=8)
    made.ask("a long beginning" + "x" * 100, max_tokens=2)
    made.run()
    made.plans.clear()
    copied = made.ask("a long beginning, again", max_tokens=2)
    made.run()
    assert [op.end for op in operations(made) if isinstance(op, Fork)] == [1 + len("a long beginning")]
    tiny = made.ask("a lo", max_tokens=2)
    made.run()
    assert (copied.answer.usage.cached_tokens, tiny.answer.usage.cached_tokens) == (17, 0)
    made.close()


def test_an_answer_ends_where_its_own_memory_ends() -> None:
    made = driver(parallel=2, n_seq_max=3, answer=lambda text: "y" * 400)
    asked = [made.ask(c * 150, max_tokens=400) for c in "ab"]
    made.run()
    assert [a.answer.limit for a in asked] == ["context", "context"]
    assert [len(a.answer.tokens) for a in asked] == [200 - 152 + 1] * 2
    assert made.scheduler.preemptions == 0
    made.close()


def test_an_idle_prefix_that_is_moved_out_of_the_way_is_as_old_as_before() -> None:
    made = driver()
    for text in ("first", "second"):
        made.ask(text)
        made.run()
    scheduler = made.scheduler
    oldest = scheduler.prefixes.oldest_idle()
    assert oldest is not None
    assert len(scheduler.idle_ids) == 2
    scheduler._move(oldest, scheduler._free_ids.pop())
    assert scheduler.prefixes.oldest_idle() is oldest
