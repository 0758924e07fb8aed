"""Who is served when, whose cells go, and what a step computes: the loop's thread is the test itself."""

import dataclasses
import hashlib
import itertools

import pytest
from engine_driver import Asked, Backend, Driver, expected, limits, prompt_of, reply

from opsin.cache import EmbeddingCache
from opsin.cache.kv_cache import Fork
from opsin.core.answer import Finished
from opsin.core.backend import BackendLimits
from opsin.core.errors import Cancelled, DecodeFailed, EncodeFailed
from opsin.core.request import TokenBatch
from opsin.engine import Policy
from opsin.engine.request import State
from opsin.engine.step import PrefillImage, Tokens, cells_needed
from opsin.testing import FakeClock


def long(text: str) -> str:
    """Answers that go on to the limit."""
    return (text[-2:] + ".") * 200


def driver(parallel: int = 4, size: BackendLimits | None = None, answer=reply, **policy: object) -> Driver:
    size = size or limits()
    made = Driver(size, Policy(parallel=parallel, **policy), Backend(answer, limits=size, clock=FakeClock()))  # type: ignore[arg-type]
    made.backend.preprocess_ms = 0.0
    return made


def forks(made: Driver) -> list[Fork]:
    return [op for plan in made.plans for op in plan.memory if isinstance(op, Fork)]


def in_order(asked: list[Asked], of: str = "ended_at") -> list[Asked]:
    return sorted(asked, key=lambda a: getattr(a, of))


# Order --------------------------------------------------------------------------------------------------------------


def test_first_come_is_first_served() -> None:
    made = driver(parallel=1)
    asked = [made.ask(f"question {i}") for i in range(5)]
    made.run()
    assert in_order(asked) == asked


def test_a_higher_priority_goes_first_and_within_one_who_came_first() -> None:
    made = driver(parallel=1)
    low, high, other = made.ask("x"), made.ask("y", priority=5), made.ask("z", priority=5)
    made.run()
    assert in_order([low, high, other], "started_at") == [high, other, low]


def test_one_that_needs_much_room_is_not_overtaken_for_ever() -> None:
    made = driver(parallel=4, size=limits(n_ctx=200), answer=long)
    running = made.ask("a", max_tokens=30)
    made.step()
    large = made.ask("b" * 180, max_tokens=2)
    small = [made.ask(f"{i}", max_tokens=30) for i in range(6)]
    made.run()
    assert large.started_at is not None
    assert running.ended_at is not None
    assert all(large.started_at <= s.started_at for s in small if s.started_at is not None)


@pytest.mark.parametrize("others", [0, 3, 9])
def test_a_small_prompt_never_waits_for_a_large_ones_whole_prefill(others: int) -> None:
    """With halves of halves the ninth in line got nothing until the first was done."""
    made = driver(parallel=12, size=limits(n_ctx=4000, n_ubatch=16, n_seq_max=12))
    large = [made.ask(f"{i}" * 300) for i in range(1 + others)]
    small = made.ask("?")
    made.run()
    assert small.first_token_at is not None
    assert small.first_token_at <= 3
    assert all(a.first_token_at is not None and a.first_token_at > 10 for a in large)


def test_the_first_in_line_still_gets_on_fastest() -> None:
    made = driver(parallel=3, size=limits(n_ctx=1000, n_ubatch=16))
    first, second, third = (made.ask(c * 100) for c in "abc")
    made.run()
    assert [a.answer.text for a in (first, second, third)] == [expected(prompt_of(c * 100), 20, 1000) for c in "abc"]
    assert in_order([third, second, first], "first_token_at")[0] is first


def test_a_step_is_full_while_there_is_enough_to_do() -> None:
    made = driver(parallel=3, size=limits(n_ctx=1000, n_ubatch=16))
    for text in ("a" * 60, "bb", "c" * 60):
        made.ask(text)
    made.step()
    made.step()
    for plan in made.plans:
        assert isinstance(plan.step, Tokens)
        assert cells_needed(plan.step) == 16


def test_a_small_request_with_an_image_waits_for_one_image_of_a_large_one_not_for_all() -> None:
    made = driver(parallel=4, size=limits(n_ctx=1000))
    many = made.ask(prompt_of(*range(8)))
    one = made.ask(prompt_of(20))
    made.run()
    assert made.backend.encoded[1] == one.sequence.tokenized.chunks[1].identity  # type: ignore[union-attr]
    assert in_order([many, one], "first_token_at") == [one, many]


def test_images_of_equal_requests_go_first_come_first_served() -> None:
    made = driver(parallel=4)
    asked = [made.ask(prompt_of(i)) for i in range(4)]
    made.run()
    assert in_order(asked, "first_token_at") == asked


def test_streams_get_their_token_while_images_are_worked_on() -> None:
    made = driver(parallel=4, size=limits(n_ctx=2000), answer=long, shortest_wait=0.03, stream_share=1.0)
    made.backend.image_tokens = 64
    made.backend.layers = 10
    stream = made.ask("talk", max_tokens=200)
    made.step()
    for i in range(3):
        made.ask(prompt_of(i), max_tokens=1)
    longest, last, seen = 0.0, made.backend.clock(), 0
    while len(made.asked) > sum(a.stream.done for a in made.asked) + 1:
        made.step()
        longest = max(longest, made.backend.clock() - last) if len(stream.sequence.output.tokens) > seen else longest
        if len(stream.sequence.output.tokens) > seen:
            last, seen = made.backend.clock(), len(stream.sequence.output.tokens)
    assert made.turns, "somebody answered inside an encode"
    assert all(not step.prefill for step in made.turns)
    # An encode takes 40 ms and a slice of 16 rows 8: a turn comes due within 30 ms and one such piece of work.
    assert longest < 0.03 + 0.05 + 0.02


@pytest.mark.parametrize(("step", "wait"), [(0.001, 0.03), (0.01, 0.2), (0.5, 0.25)])
def test_the_wait_for_a_turn_follows_what_a_step_costs(step: float, wait: float) -> None:
    """A twentieth of the time is for the streams: dear steps come rarely, but no stream waits longer than 0.25 s."""
    made, decode = talking()
    made.scheduler.ran(decode, 100.0, step)
    assert first_turn(made, wait) == 1.0


def talking() -> tuple[Driver, Tokens]:
    """An engine in the midst of one answer, and its next step."""
    made = driver(parallel=2, answer=long)
    made.ask("talk", max_tokens=50)
    made.step()
    made.step()
    decode = made.scheduler.plan(made.backend.clock())
    assert isinstance(decode, Tokens)
    return made, decode


def first_turn(made: Driver, wait: float, often: int = 100) -> float:
    """When a turn is due behind a step at 100 s, in units of `wait`, asked so often in each."""
    return next(i for i in range(1, 5 * often) if made.scheduler.plan_turn(100.0 + wait * i / often)) / often


def test_a_turn_comes_early_when_the_next_question_would_come_late() -> None:
    made, decode = talking()
    for often in (1, 2, 3, 4, 5, 10):
        made.scheduler.ran(decode, 100.0, 0.5)
        assert 1 - 1 / often < first_turn(made, 0.25, often) <= 1
    made.scheduler.ran(decode, 100.0, 0.5)
    assert made.scheduler.plan_turn(100.0 + 0.25 * 0.5) is None
    assert made.scheduler.plan_turn(100.0 + 0.25 * 0.8) is not None, "the next one would be at 1.1"


@pytest.mark.parametrize(("waiting", "wait"), [(1, 0.25), (3, 0.25), (5, 0.4), (15, 0.4)])
def test_streams_wait_longer_while_many_wait_for_a_first_token(waiting: int, wait: float) -> None:
    made = driver(parallel=16, size=limits(n_ctx=8000, n_seq_max=20), answer=long)
    made.ask("talk", max_tokens=50)
    made.step()
    made.step()
    decode = made.scheduler.plan(made.backend.clock())
    assert isinstance(decode, Tokens)
    for i in range(waiting):
        made.ask(prompt_of(i), max_tokens=1)
    made.step()
    assert len(made.scheduler.running) == 1 + waiting
    made.scheduler.ran(decode, 100.0, 0.5)
    assert first_turn(made, wait) == 1.0


def test_slices_are_longer_while_many_wait_for_a_first_token() -> None:
    made = driver(
        parallel=8,
        size=limits(n_ctx=8000, n_seq_max=12, n_ubatch=256),
        answer=long,
        slice_seconds=0.02,
        stream_share=1.0,
    )
    made.backend.image_tokens = 240
    made.ask("talk", max_tokens=400)
    made.step()
    for i in range(6):
        made.ask(prompt_of(i), max_tokens=1)
    made.run()
    rows = [plan.step.stop - plan.step.start for plan in made.plans if isinstance(plan.step, PrefillImage)]
    # Six are served, then four and fewer: slices are as much shorter, and no stream waits for more.
    # A row takes half a millisecond: 40 rows while few are served, at most 90 while six are.
    assert max(rows[4:10]) == 80
    assert all(row <= 40 for row in rows[-3 * 6 :])


@pytest.mark.slow
@pytest.mark.parametrize(("row_ms", "wanted"), [(8.0, 64), (13.0, 32)])
def test_slow_rows_come_in_whole_tiles_unless_that_takes_too_long(row_ms: float, wanted: int) -> None:
    """Slices of 32 rows cost a quarter more a row than those of 64, which a 1 B model does in half a second."""
    size = dataclasses.replace(limits(n_ctx=8000, n_seq_max=12, n_ubatch=256), tile=64)
    made = driver(parallel=8, size=size, answer=long)
    made.backend.image_tokens, made.backend.image_token_ms = 256, row_ms
    made.ask("talk", max_tokens=1000)
    made.step()
    for i in range(6):
        made.ask(prompt_of(i), max_tokens=1)
    made.run()
    rows = [plan.step.stop - plan.step.start for plan in made.plans if isinstance(plan.step, PrefillImage)]
    assert set(rows[4:]) == {wanted}


@pytest.mark.parametrize(
    ("tile", "rows"),
    [(1, [80, 80, 80]), (16, [80, 80, 80]), (32, [96, 96, 48]), (64, [64, 64, 64, 48]), (128, [64, 64, 64, 48])],
)
def test_slices_are_whole_tiles_or_halves_of_one(tile: int, rows: list[int]) -> None:
    size = dataclasses.replace(limits(n_ctx=8000, n_ubatch=100), tile=tile)
    made = driver(parallel=2, size=size, answer=long)
    made.backend.image_tokens = 240
    made.ask(prompt_of(1), max_tokens=1)
    made.run()
    steps = [plan.step for plan in made.plans]
    assert [step.stop - step.start for step in steps if isinstance(step, PrefillImage)] == rows


def test_a_stream_does_not_wait_for_a_slice_and_a_prompts_text_in_one_go() -> None:
    made = driver(parallel=4, size=limits(n_ctx=2000), answer=long, shortest_wait=0.0, longest_wait=0.0)
    made.backend.image_tokens = 64
    made.ask("talk", max_tokens=200)
    made.step()
    made.ask(prompt_of(1, "what is this?"), max_tokens=2)
    made.run()
    steps = [plan.step for plan in made.plans]
    after = [b for a, b in itertools.pairwise(steps) if isinstance(a, PrefillImage)]
    assert after
    assert all(isinstance(step, Tokens) and step.decode and not step.prefill for step in after)
    # And the text does get its step, with everyone's next token in it.
    assert any(isinstance(step, Tokens) and step.decode and step.prefill for step in steps)


def test_streams_get_their_tokens_in_the_slices_of_images_where_the_backend_can() -> None:
    """Each slice has everyone's next token in it, within the ubatch, and the answers are those of slices alone."""
    said = []
    for beside in (True, False):
        size = dataclasses.replace(limits(n_ctx=4000), mixed_rows=16 * beside)
        made = driver(parallel=4, size=size, answer=lambda text: hashlib.sha256(text.encode()).hexdigest())
        made.backend.image_tokens = 64
        talking = [made.ask(f"talk {i}", max_tokens=60) for i in range(2)]
        while any(a.sequence.state is not State.DECODE for a in talking):
            made.step()
        shown = [made.ask(prompt_of(i, "what is this?"), max_tokens=40) for i in range(2)]
        made.run()
        said.append([asked.answer.text for asked in (*talking, *shown)])
        slices = [plan.step for plan in made.plans if isinstance(plan.step, PrefillImage)]
        assert max(map(cells_needed, slices)) <= 16
        assert slices[0].decode == (tuple(a.sequence for a in talking) if beside else ())
        assert any(shown[0].sequence in step.decode for step in slices) == beside, "who has a first token joins in"
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("question", "mixed_rows", "steps"), [("what?", 64, 1), ("what?", 0, 2), ("what? " * 8, 64, 2)]
)
def test_a_short_question_goes_with_the_last_rows_of_its_image(question: str, mixed_rows: int, steps: int) -> None:
    """One step of the language model instead of two, where the backend can and the ubatch has room."""
    size = dataclasses.replace(limits(n_ctx=400, n_ubatch=64), mixed_rows=mixed_rows)
    made = driver(size=size, answer=lambda text: hashlib.sha256(text.encode()).hexdigest())
    made.backend.image_tokens = 20
    asked = made.ask(prompt_of(1, question), max_tokens=8)
    made.run()
    planned = [plan.step for plan in made.plans]
    filled = [step for step in planned if isinstance(step, PrefillImage) or (isinstance(step, Tokens) and step.prefill)]
    begin = [step for step in filled if isinstance(step, Tokens) and step.prefill[0].tokens == (256,)]
    assert len(filled) - len(begin) == steps
    images = [step for step in filled if isinstance(step, PrefillImage)]
    assert [bool(step.text) for step in images] == [steps == 1]
    alone = driver(size=limits(n_ctx=400, n_ubatch=64), answer=lambda text: hashlib.sha256(text.encode()).hexdigest())
    alone.backend.image_tokens = 20
    same = alone.ask(prompt_of(1, question), max_tokens=8)
    alone.run()
    assert asked.answer.text == same.answer.text
    assert asked.answer.stages.text_prefill_ms > 0


@pytest.mark.parametrize("leaver", ["talk", "image"])
def test_a_slice_whose_stream_or_image_goes_away_is_computed_for_the_others(leaver: str) -> None:
    size = dataclasses.replace(limits(n_ctx=60), mixed_rows=16)
    made = driver(parallel=2, size=size, answer=long)
    made.backend.image_tokens = 32
    talk = made.ask("talk", max_tokens=50, priority=leaver == "image")
    made.step()
    made.step()
    shot = made.ask(prompt_of(1), max_tokens=20, priority=leaver == "talk")
    made.run()
    assert made.scheduler.preemptions
    for asked in (talk, shot):
        assert asked.answer.finish_reason == "length"


def test_texts_and_images_take_turns_while_somebody_answers() -> None:
    made = driver(parallel=4, size=limits(n_ctx=4000), answer=long, shortest_wait=0.0, longest_wait=0.0)
    made.backend.image_tokens = 256
    made.ask("talk", max_tokens=400)
    made.step()
    shot = made.ask(prompt_of(1), max_tokens=1)
    text = made.ask("?" * 200, max_tokens=1)
    made.run()
    assert text.first_token_at is not None
    assert shot.first_token_at is not None
    assert text.first_token_at < shot.first_token_at


def test_images_get_on_also_when_streams_want_every_step() -> None:
    """A turn of 0 is due at once after every step: images were never looked at while anybody answered."""
    made = driver(parallel=2, size=limits(n_ctx=2000), answer=long, shortest_wait=0.0, longest_wait=0.0)
    made.ask("talk", max_tokens=400)
    made.step()
    shot = made.ask(prompt_of(1), max_tokens=1)
    made.run()
    assert shot.ended_at is not None
    assert shot.ended_at < 20


# Prefixes -----------------------------------------------------------------------------------------------------------


def test_the_longest_shared_prefix_is_forked() -> None:
    made = driver()
    for text in ("one two", "one two three", "one"):
        made.ask(prompt_of(text))
        made.run()
    made.plans.clear()
    again = made.ask(prompt_of("one two three four"))
    made.run()
    (fork,) = forks(made)
    assert fork.end == 1 + len("one two three")
    assert again.answer.usage.cached_tokens == 1 + len("one two three")
    assert again.answer.text == expected(prompt_of("one two three four"), 20, 256)


def test_the_next_turn_of_a_conversation_forks_the_last_answer_too() -> None:
    made = driver(answer=lambda _: "yes")
    first = made.ask(prompt_of("is it?"))
    made.run()
    assert first.answer.text == "yes"
    turn = dataclasses.replace(prompt_of("is it?"), parts=(*prompt_of("is it?").parts, *prompt_of("yes", "?").parts))
    second = made.ask(turn)
    made.run()
    # Its last token was drawn and never decoded.
    assert second.answer.usage.cached_tokens == 1 + len("is it?\x1eyes")


def test_the_last_token_of_a_known_prompt_is_decoded_again() -> None:
    made = driver()
    one = made.ask(prompt_of("same"))
    made.run()
    two = made.ask(prompt_of("same"))
    made.run()
    assert two.answer.text == one.answer.text
    assert two.answer.usage.cached_tokens == two.answer.usage.prompt_tokens - 1


def test_a_prefix_is_never_cut_inside_an_image() -> None:
    made = driver()
    backend = made.backend
    made.ask(prompt_of("see ", 1))
    made.run()
    other = made.ask(prompt_of("see ", 2))
    made.run()
    assert other.answer.usage.cached_tokens == 1 + len("see ")
    # A prompt that ends with an image: all of the image is decoded again, because its last row needs logits.
    bare = dataclasses.replace(prompt_of(), parts=prompt_of("see ", 1).parts[:-1])
    again = made.ask(bare)
    made.run()
    assert again.answer.usage.cached_tokens == 1 + len("see ")
    assert len(backend.encoded) == 2


def test_images_of_different_salt_are_encoded_apart() -> None:
    made = driver()
    for salt in ("mine", "yours", "mine", ""):
        made.ask(prompt_of(1, salt), salt=salt)
        made.run()
    assert len(made.backend.encoded) == 3


def test_prompts_of_different_salt_share_no_prefix() -> None:
    made = driver()
    made.ask("same", salt="mine")
    made.run()
    other = made.ask("same", salt="yours")
    made.run()
    assert other.answer.usage.cached_tokens == 0
    assert not forks(made)


def test_one_image_asked_about_eight_times_at_once_is_encoded_and_prefilled_once() -> None:
    made = driver(parallel=8, size=limits(n_ctx=900, n_seq_max=9))
    made.backend.image_tokens = 60
    asked = [made.ask(prompt_of(1, f"q{i}")) for i in range(8)]
    made.run()
    assert len(made.backend.encoded) == 1
    rows = sum(p.step.stop - p.step.start for p in made.plans if isinstance(p.step, PrefillImage))
    assert rows == 60
    assert len(forks(made)) == 7
    assert [a.answer.text for a in asked] == [expected(prompt_of(1, f"q{i}"), 20, 900, 60) for i in range(8)]


def test_who_waits_for_a_prefix_does_not_hold_up_those_behind() -> None:
    made = driver(parallel=3, size=limits(n_ctx=900), wait_for=2)
    first = made.ask("a" * 200)
    waiting = made.ask("a" * 200 + "b")
    behind = made.ask("z")
    made.run()
    assert behind.started_at == first.started_at == 1
    assert waiting.started_at is not None
    assert waiting.started_at > 10
    assert waiting.answer.usage.cached_tokens == 1 + 200


def test_when_the_one_that_fills_goes_away_those_who_wait_go_on_from_what_is_there() -> None:
    made = driver(parallel=3, size=limits(n_ctx=900))
    first = made.ask("a" * 200)
    waiting = made.ask("a" * 200 + "b")
    for _ in range(5):
        made.step()
    assert waiting.sequence.state is State.WAITING
    first.stream.cancel()
    made.run()
    assert waiting.answer.usage.cached_tokens == 5 * 16
    assert waiting.answer.text == expected(prompt_of("a" * 200 + "b"), 20, 900)


def test_a_failed_filler_leaves_nothing_behind_and_the_waiter_starts_anew() -> None:
    made = driver(parallel=3, size=limits(n_ctx=900))
    first = made.ask("a" * 200)
    waiting = made.ask("a" * 200 + "b")
    made.step()
    made.backend.fail_decode = RuntimeError("boom")
    made.run()
    assert isinstance(first.ends[0], DecodeFailed)
    assert waiting.answer.usage.cached_tokens == 0


def test_memories_that_cannot_fork_keep_nothing() -> None:
    made = driver(size=dataclasses.replace(limits(), forks=False))
    for _ in range(2):
        made.ask("same")
        made.run()
    assert not forks(made)
    assert made.scheduler.kv.cells.used == 0


# Budgets ------------------------------------------------------------------------------------------------------------


def test_idle_prefixes_go_when_room_is_needed_least_recently_used_first() -> None:
    made = driver(parallel=1, size=limits(n_ctx=220), answer=lambda _: "")
    for name in "abc":
        made.ask(name * 50)
        made.run()
    made.ask("a" * 50 + "?")  # used again: now b is the oldest
    made.run()
    assert len(made.scheduler.kv.idle) == 4
    made.ask("d" * 60)
    made.run()
    cached = []
    for name in "acb":
        again = made.ask(name * 50 + "!")
        made.run()
        cached.append(again.answer.usage.cached_tokens >= 50)
    assert cached == [True, True, False]


def test_ids_are_a_budget_too() -> None:
    made = driver(parallel=3, size=limits(n_ctx=2000, n_seq_max=3))
    asked = [made.ask(f"{i}") for i in range(10)]
    made.run()
    assert [a.answer.text for a in asked] == [expected(prompt_of(f"{i}"), 20, 2000) for i in range(10)]
    assert len(made.scheduler.kv.idle) <= 3


def test_more_sequences_than_ids_wait_for_one() -> None:
    made = driver(parallel=4, size=limits(n_seq_max=2), answer=long)
    asked = [made.ask(f"{i}", max_tokens=5) for i in range(4)]
    made.step()
    assert len(made.scheduler.running) == 2
    made.run()
    assert in_order(asked, "started_at") == asked


def test_no_more_run_than_a_step_has_rows() -> None:
    """With more answers than rows the last ones got no token until others had ended."""
    made = driver(parallel=6, size=limits(n_ctx=1000, n_ubatch=3, n_seq_max=6), answer=long)
    asked = [made.ask(f"{i}", max_tokens=30) for i in range(6)]
    made.step()
    assert len(made.scheduler.running) == 3
    made.run()
    assert all(len(a.answer.tokens) == 30 for a in asked)


def test_prompts_that_were_admitted_fit_together() -> None:
    """Admission looked at cells in use and not at those it had promised: both were admitted, and one put back."""
    made = driver(parallel=4, size=limits(n_ctx=256), answer=lambda _: "ok")
    one, two = made.ask("a" * 150), made.ask("b" * 150)
    made.run()
    assert made.scheduler.preemptions == 0
    assert two.started_at is not None
    assert one.ended_at is not None
    assert two.started_at >= one.ended_at
    assert [a.answer.text for a in (one, two)] == ["ok", "ok"]


def test_too_little_room_puts_the_youngest_back_instead_of_failing_anybody() -> None:
    made = driver(parallel=3, size=limits(n_ctx=100), answer=long)
    asked = [made.ask(c * 10, max_tokens=50) for c in "abc"]
    made.run()
    assert made.scheduler.preemptions >= 1
    assert asked[0].sequence.preemptions == 0
    assert asked[2].sequence.preemptions >= 1
    texts = [a.answer.text for a in asked]
    assert texts == [long(f"{c}\x1e")[:50] for c in "abc"]
    assert in_order(asked) == asked


def test_the_lowest_priority_is_put_back_even_when_it_ran_first() -> None:
    """The oldest member of a step was spared whatever its priority, and a more urgent one lost its cells."""
    made = driver(parallel=2, size=limits(n_ctx=100), answer=long)
    low = made.ask("a" * 30, max_tokens=60)
    made.step()
    high = made.ask("b" * 20, priority=1, max_tokens=60)
    made.run()
    assert high.sequence.preemptions == 0
    assert low.sequence.preemptions >= 1
    assert len(low.answer.tokens) == len(high.answer.tokens) == 60


def test_room_that_is_enough_without_the_youngest_ends_nobody() -> None:
    """Room was asked for on behalf of a step whose other members had just been put back: the oldest was cut short."""
    made = driver(parallel=2, size=limits(n_ctx=64, n_ubatch=16), answer=long, shortest_wait=0.001)
    made.backend.image_tokens = 1
    made.backend.layers = 14  # the first one's answer grows by as many tokens during the second one's encode
    first = made.ask("a" * 20, max_tokens=40)
    while first.sequence.n_cells < 37:
        made.step()
    second = made.ask(prompt_of(1, "b" * 20), max_tokens=4)
    made.run()
    assert second.sequence.preemptions == 1
    assert first.answer.limit == "tokens"
    assert len(first.answer.tokens) == 40


def test_alone_a_full_context_ends_the_answer_and_says_so() -> None:
    made = driver(parallel=2, size=limits(n_ctx=64), answer=long)
    asked = [made.ask(c * 10, max_tokens=500) for c in "ab"]
    made.run()
    for a in asked:
        assert a.answer.limit == "context"
        assert a.answer.usage.prompt_tokens + len(a.answer.tokens) == 65


def test_no_room_although_the_books_say_so_costs_idle_prefixes_then_the_youngest_then_fails() -> None:
    made = driver(parallel=2, size=limits(n_ctx=400), answer=long)
    made.ask("old", max_tokens=2)
    made.run()
    one, two = made.ask("a", max_tokens=9), made.ask("b", max_tokens=9)
    made.step()
    made.backend.out_of_room = 1
    made.step()
    assert not made.scheduler.kv.idle
    made.backend.out_of_room = 1
    made.step()
    assert (one.sequence.preemptions, two.sequence.preemptions) == (0, 1)
    made.run()
    assert [len(a.answer.tokens) for a in (one, two)] == [9, 9]
    made.ask("c", max_tokens=9)
    made.backend.out_of_room = 1000
    made.run()
    assert isinstance(made.asked[-1].ends[0], DecodeFailed)


def test_idle_prefixes_wait_in_main_memory_where_they_are_in_nobodys_way() -> None:
    """On a CPU attention looks at idle cells, too."""
    made = driver(parallel=1, size=limits(n_ctx=2000), swap_cells=450)
    for name in "abc":
        asked = made.ask(name * 200, max_tokens=2)
        made.step()
        assert made.scheduler.kv.cells.used <= asked.sequence.n_cells
        made.run()
    assert made.loop.snapshot().idle_prefixes == 3
    again = [made.ask(name * 200 + "!") for name in "cab"]
    made.run()
    assert [asked.answer.usage.cached_tokens > 200 for asked in again] == [True, True, False]
    assert [asked.answer.text for asked in again] == [expected(prompt_of(n * 200 + "!"), 20, 2000) for n in "cab"]


def test_a_conversation_stays_in_the_cache_and_its_questions_are_swapped_out_once() -> None:
    made = driver(parallel=1, size=limits(n_ctx=2000), answer=lambda _: "", swap_cells=1000)
    for question in "xyz":
        asked = made.ask("a" * 200 + question * 10, max_tokens=2)
        made.run()
    assert asked.answer.usage.cached_tokens > 200
    assert not made.scheduler.kv.swapped
    made.ask("b" * 200, max_tokens=2)
    made.run()
    assert len(made.scheduler.kv.swapped) == 1


def test_who_has_answered_is_not_in_the_way_of_those_that_came_with_it() -> None:
    """Eight images at once: the last ones were filled beside the cells of all that had answered long ago."""
    made = driver(parallel=4, size=limits(n_ctx=2000, n_ubatch=16), swap_cells=1000)
    asked = [made.ask(name * 200, max_tokens=2) for name in "abcd"]
    made.step()
    while not made.scheduler.idle:
        assert not made.scheduler.kv.idle
        made.step()
    assert made.loop.snapshot().idle_prefixes == 4
    assert [a.answer.text for a in asked] == [expected(prompt_of(c * 200), 2, 2000) for c in "abcd"]


def test_what_main_memory_has_no_room_for_stays_in_the_cache() -> None:
    made = driver(parallel=1, size=limits(n_ctx=600), answer=lambda _: "", swap_cells=100)
    for name in "ab":
        made.ask(name * 200, max_tokens=2)
        made.run()
    assert len(made.scheduler.kv.idle) == 2
    again = made.ask("a" * 200 + "!")
    made.run()
    assert again.answer.usage.cached_tokens > 200


def test_no_more_idle_cells_stay_in_the_cache_than_the_policy_says() -> None:
    made = driver(parallel=1, size=limits(n_ctx=2000), answer=lambda _: "", idle_cells=450)
    for name in "abc":
        made.ask(name * 200, max_tokens=2)
        made.run()
        assert made.scheduler.kv.cells.held_by(made.scheduler.kv.idle) <= 450
    cached = [made.ask(name * 200 + "!", max_tokens=1) for name in "cb"]
    made.run()
    assert [asked.answer.usage.cached_tokens > 200 for asked in cached] == [True, False]


@pytest.mark.parametrize("unified", [True, False])
def test_with_parts_of_the_cells_sequences_decode_in_the_order_of_their_ids(unified: bool) -> None:
    """llama.cpp decodes neighbours together, and cuts a batch wherever an id does not follow on the one before."""
    made = driver(size=dataclasses.replace(limits(n_ctx=2000), unified=unified), answer=long)
    decode, orders = made.backend.decode, []

    def noted(rows, **options: bool) -> bool:  # type: ignore[no-untyped-def]
        if isinstance(rows, TokenBatch) and len(rows.tokens) == len(rows.outputs):
            orders.append(list(rows.seq_ids))
        return decode(rows, **options)

    made.backend.decode = noted  # type: ignore[method-assign]
    for number in range(12):
        made.ask(f"{number} talk", max_tokens=3 + 7 * number % 11)
    made.run()
    assert 4 in {len(order) for order in orders}
    assert all(order == sorted(order) for order in orders) is not unified
    made.close()


def test_who_needs_what_the_only_id_holds_gets_it_from_main_memory() -> None:
    made = driver(1, dataclasses.replace(limits(n_ctx=2000, n_seq_max=1), unified=False), answer=long, swap_cells=1000)
    made.ask("a beginning" * 9, max_tokens=2)
    made.run()
    again = made.ask("a beginning" * 9 + "!", max_tokens=2)
    made.run()
    assert again.answer.usage.cached_tokens > 90
    made.close()


def test_a_kv_operation_that_fails_ends_its_own_sequence_alone() -> None:
    """It was outside of the error scope, and every request died with the engine."""
    made = driver(answer=long)
    made.ask("a beginning", max_tokens=2)
    made.run()
    stream = made.ask("talk", max_tokens=30)
    made.step()
    copy = made.backend.kv_copy

    def fails(*_: object) -> None:
        made.backend.kv_copy = copy  # type: ignore[method-assign]
        raise DecodeFailed("no")

    made.backend.kv_copy = fails  # type: ignore[method-assign]
    forked = made.ask("a beginning and more", max_tokens=2)
    while not forked.stream.done:
        assert made.loop._receive()
        made.loop._step()
    assert isinstance(forked.ends[0], DecodeFailed)
    again = made.ask("a beginning again", max_tokens=2)
    made.run()
    assert isinstance(stream.ends[0], Finished)
    assert isinstance(again.ends[0], Finished)


# Ends ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 3, 8])
def test_a_cancelled_request_is_gone_within_one_step(after: int) -> None:
    made = driver(parallel=1, answer=long)
    asked = made.ask(prompt_of("hello", 1, "x" * 30), max_tokens=200)
    behind = made.ask("next", max_tokens=2)
    for _ in range(after):
        made.step()
    asked.stream.cancel()
    made.step()
    assert asked.sequence.state is State.DONE
    assert asked.sequence not in (*made.scheduler.running, *made.scheduler.waiting, *made.last_step())
    assert asked.sequence.tokenized.owned is None
    assert isinstance(asked.ends[0], Cancelled)
    made.run()
    assert isinstance(behind.ends[0], Finished)
    made.close()


def test_a_cancel_after_the_end_changes_nothing() -> None:
    made = driver()
    asked = made.ask("hello")
    made.run()
    asked.stream.cancel()
    made.step()
    assert isinstance(asked.ends[0], Finished)
    made.close()


def test_an_image_whose_asker_went_away_in_its_encode_is_remembered() -> None:
    made = driver()
    asked = made.ask(prompt_of(1))
    stream = made.ask("talk", max_tokens=20)
    encode = made.backend.encode

    def cancelled_inside(run, between=None):  # type: ignore[no-untyped-def]
        asked.stream.cancel()
        return encode(run, between)

    made.backend.encode = cancelled_inside  # type: ignore[method-assign]
    made.run()
    made.backend.encode = encode  # type: ignore[method-assign]
    assert isinstance(stream.ends[0], Finished)
    made.ask(prompt_of(1))
    made.run()
    assert len(made.backend.encoded) == 1


def test_a_failed_encode_is_not_remembered_and_streams_go_on() -> None:
    made = driver(answer=long)
    stream = made.ask("talk", max_tokens=30)
    made.step()
    made.backend.fail_encode = RuntimeError("boom")
    asked = made.ask(prompt_of(1))
    made.run()
    assert isinstance(asked.ends[0], EncodeFailed)
    assert stream.answer.text == long("k\x1e")[:30]
    made.ask(prompt_of(1), max_tokens=1)
    made.run()
    assert len(made.backend.encoded) == 1


def test_a_failed_nested_step_fails_the_streams_and_not_the_image() -> None:
    made = driver(answer=long, shortest_wait=0.0, longest_wait=0.0)
    stream = made.ask("talk", max_tokens=30)
    encode = made.backend.encode

    def failing_inside(run, between=None):  # type: ignore[no-untyped-def]
        made.backend.fail_decode = RuntimeError("boom")
        return encode(run, between)

    made.backend.encode = failing_inside  # type: ignore[method-assign]
    asked = made.ask(prompt_of(1), max_tokens=2)
    made.run()
    assert made.turns
    assert isinstance(stream.ends[0], DecodeFailed)
    assert isinstance(asked.ends[0], Finished)


def test_a_deadline_ends_an_answer_with_what_it_has_and_a_waiting_one_with_nothing() -> None:
    made = driver(parallel=1, answer=long)
    running, waiting = made.ask("a", seconds=0.2, max_tokens=200), made.ask("b", seconds=0.1)
    made.run()
    assert running.answer.limit == waiting.answer.limit == "seconds"
    assert 0 < len(running.answer.text) < 200
    assert waiting.answer.text == ""
    assert made.backend.clock() < 0.25


def test_counts_tell_encodes_from_remembered_images() -> None:
    made = driver()
    for text in ("a", "b"):
        made.ask(prompt_of(text, 1))
        made.run()
    assert made.loop.snapshot().encodes == 1
    assert [a.answer.images[0].cached for a in made.asked] == [False, True]


def test_nothing_is_kept_when_the_image_cache_is_too_small_and_answers_are_the_same() -> None:
    size = limits()
    made = Driver(size, Policy(parallel=2, keep_prefixes=False), images=EmbeddingCache(0))
    asked = [made.ask(prompt_of(1, text)) for text in "aab"]
    made.run()
    assert len(made.backend.encoded) == 3
    assert [a.answer.text for a in asked] == [expected(prompt_of(1, text), 20, 256) for text in "aab"]


def test_the_same_history_gives_the_same_plans() -> None:
    def plans() -> list[str]:
        made = driver(parallel=3, size=limits(n_ctx=120))
        for text in ("abc", "abd" * 9, "abc" * 7):
            made.ask(prompt_of(text, 1))
            made.step()
        made.run()
        return [repr([type(p.step).__name__, p.memory]) for p in made.plans]

    assert plans() == plans()
