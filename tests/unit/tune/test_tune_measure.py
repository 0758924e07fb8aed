"""How candidates are measured in turn with the baseline, and what it takes to win."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opsin.core.answer import TokenLogprob
from opsin.core.backend import BackendLimits
from opsin.core.errors import EngineError
from opsin.core.settings import EngineSettings
from opsin.engine import Engine, Policy
from opsin.prompt import PromptBuilder, TemplateSource
from opsin.testing.fake_backend import N_VOCAB, FakeBackend
from opsin.tune import measure
from opsin.tune.measure import Candidate, Report, Timing, Tuner, candidates, drift

Seconds = Callable[[EngineSettings, int], float]
SAME = ((TokenLogprob(1, b"", -0.5),),)
MOVED = ((TokenLogprob(1, b"", -0.7),),)


class World:
    """A machine on which an answer takes as long as a function says, by settings and number of the measurement."""

    def __init__(self, seconds: Seconds, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.clock, self.opened = seconds, 0.0, 0
        self.measured: list[dict[str, Any]] = []
        monkeypatch.setattr(measure, "measure", self.measure)

    def open(self, settings: EngineSettings) -> Any:
        assert self.opened == 0, "no two engines share the machine"
        self.opened += 1
        return SimpleNamespace(settings=settings, close=self.close)

    def close(self) -> None:
        self.opened -= 1

    def measure(self, runtime: Any, at_once: int) -> Timing:
        settings = runtime.settings
        self.measured.append(settings.model_dump(exclude_unset=True))
        seconds = self.seconds(settings, len(self.measured))
        self.clock += 2 * seconds * at_once
        return Timing(seconds, MOVED if settings.kv_type == "q4_0" else SAME)

    def tune(self, *changes: dict[str, Any], minutes: float = 1e6, target: Any = "interactive", **base: Any) -> Report:
        tuner = Tuner(self.open, EngineSettings(**base), target, minutes, now=lambda: self.clock)
        return tuner.run([Candidate(one) for one in changes])


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[[Seconds], World]:
    return lambda seconds: World(seconds, monkeypatch)


def verdicts(report: Report) -> list[str]:
    return [row.verdict for row in report.candidates]


def test_baseline_and_candidate_take_turns_and_the_hopeful_ones_are_repeated(world: Any) -> None:
    machine = world(lambda settings, _: {4: 0.8, 2: 1.2}.get(settings.threads, 1.0))
    report = machine.tune({"threads": 2}, {"threads": 4})
    assert [one.get("threads") for one in machine.measured] == [None, 2, None, 4, None, 4, None, 4, None]
    assert verdicts(report) == ["not faster", "faster"]
    assert report.best is report.candidates[1]
    assert report.best.ratio == pytest.approx(0.8)
    assert machine.opened == 0


def test_all_candidates_on_a_machine_of_two_cores_are_about_twenty_measurements(world: Any) -> None:
    machine = world(lambda *_: 1.0)
    rows = candidates(EngineSettings(), (), 2, [Path("a.gguf"), Path("b.gguf")])
    report = Tuner(machine.open, EngineSettings(), "interactive", 1e6).run(rows)
    assert len(machine.measured) == 1 + 2 * len(rows) == 19
    assert report.best is None


def test_a_machine_that_drifts_makes_no_winner_and_hides_none(world: Any) -> None:
    def slower_and_slower(settings: EngineSettings, number: int) -> float:
        return (1 + number / 10) * (0.85 if settings.threads == 3 else 1.0)

    report = world(slower_and_slower).tune({"threads": 1}, {"threads": 3}, {"threads": 2})
    assert verdicts(report) == ["not faster", "faster", "not faster"]


def test_noise_alone_hardly_ever_wins(world: Any) -> None:
    """The best of eight equal candidates looks 20 % faster on such a machine: that first look does not count."""
    won = 0
    for seed in range(100):
        draw = random.Random(seed)
        machine = world(lambda *_, draw=draw: draw.lognormvariate(0, 0.15))
        report = machine.tune(*({"threads": n} for n in range(1, 9)))
        assert report.noise > 0.05
        won += report.best is not None
    assert won <= 5


def test_two_winners_are_measured_together(world: Any) -> None:
    machine = world(lambda s, _: (0.8 if s.threads == 2 else 1) * (0.9 if s.ubatch == 512 else 1))
    report = machine.tune({"threads": 2}, {"ubatch": 512}, {"threads": 4})
    assert report.best is not None
    assert report.best.changes == {"threads": 2, "ubatch": 512}
    assert report.best.ratio == pytest.approx(0.72)
    # Two values of one setting cannot be.
    report = world(lambda s, _: {2: 0.8, 3: 0.9}.get(s.threads, 1)).tune({"threads": 2}, {"threads": 3})
    assert report.best is not None
    assert report.best.changes == {"threads": 2}


def test_what_changes_answers_cannot_win(world: Any) -> None:
    report = world(lambda s, _: 0.5 if s.kv_type == "q4_0" else 1.0).tune({"kv_type": "q4_0"})
    assert verdicts(report) == ["changes answers"]
    assert report.best is None


def test_candidates_that_fail_are_rows_of_the_table(world: Any) -> None:
    def seconds(settings: EngineSettings, _: int) -> float:
        if settings.ubatch == 2048:
            raise EngineError("no room.")
        return 0.5 if settings.threads == 2 else 1.0

    report = world(seconds).tune({"ubatch": 2048}, {"threads": 2})
    assert verdicts(report) == ["not possible: no room.", "faster"]
    assert "not possible: no room." in report.as_text()


def test_a_baseline_that_fails_for_a_moment_does_not_end_the_tuning(world: Any) -> None:
    def seconds(settings: EngineSettings, number: int) -> float:
        if number == 3:
            raise EngineError("another program took the memory.")
        return 0.5 if settings.threads == 2 else 1.0

    report = world(seconds).tune({"threads": 1}, {"threads": 2})
    assert verdicts(report) == ["not faster", "faster"]
    with pytest.raises(EngineError, match="never"):
        world(lambda *_: (_ for _ in ()).throw(EngineError("never."))).tune({"threads": 1})


@pytest.mark.parametrize("minutes", [0.001, 0.1, 0.2])
def test_no_measurement_begins_that_would_end_too_late(world: Any, minutes: float) -> None:
    machine = world(lambda *_: 1.0)
    report = machine.tune(*({"threads": n} for n in range(1, 9)), minutes=minutes)
    assert machine.clock <= max(2.0, 60 * minutes)
    assert verdicts(report)[-1] == "no time left"
    assert report.best is None
    assert report.as_document()["recommended"] is None
    assert "no time left" in report.as_text()


def test_many_at_once_are_as_many_as_the_engine_answers(world: Any) -> None:
    asked = [
        Tuner(world(lambda *_: 1.0).open, EngineSettings(parallel=parallel), target, 1).at_once
        for target, parallel in (("throughput", 4), ("throughput", 32), ("interactive", 4))
    ]
    assert asked == [4, measure.AT_ONCE, 1]


def test_what_the_user_chose_is_not_tried() -> None:
    found = [dict(row.changes) for row in candidates(EngineSettings(ubatch=512), {"threads"}, 8, [Path("m.gguf")])]
    assert found == [
        {"mmproj": Path("m.gguf")},
        {"flash_attention": False},
        {"vision_flash_attention": False},
        {"ubatch": 2048},
    ]
    threads = [row.changes for row in candidates(EngineSettings(), {"ubatch"}, 8) if "threads" in row.changes]
    assert threads == [
        {"threads": 4, "threads_batch": 4},
        {"threads": 4, "threads_batch": 8},
        {"threads": 8, "threads_batch": 8},
    ]


def test_the_document_holds_everything(world: Any) -> None:
    report = world(lambda s, _: 0.5 if s.mmproj else 1.0).tune({"mmproj": Path("/x/made.gguf")}, model=Path("m"))
    document = report.as_document()
    assert document["recommended"] == {"mmproj": "made.gguf"}
    assert document["candidates"][0] == {
        "settings": {"mmproj": "made.gguf"},
        "ratios": [0.5] * 3,
        "ratio": 0.5,
        "drift": 0.0,
        "verdict": "faster",
    }
    assert len(document["baseline_seconds"]) == 4
    assert "recommended for interactive: mmproj made.gguf takes 0.500 of the time" in report.as_text()


@pytest.mark.parametrize(("parallel", "at_once"), [(1, 4), (4, 4), (4, 1)])
def test_a_measurement_does_not_need_answers_that_overlap(parallel: int, at_once: int) -> None:
    """On a busy machine tuning gave up: "the sequences answered together for 2 steps only"."""
    limits = BackendLimits(n_ctx=1024, n_ubatch=64, n_seq_max=parallel, n_vocab=N_VOCAB, n_embd=4, n_ctx_seq=1024)
    source = TemplateSource(None, "llama", "llava", "mlp", "<s>", "</s>", frozenset())
    backends: list[FakeBackend] = []

    def opened() -> FakeBackend:
        backends.append(FakeBackend(limits=limits))
        return backends[0]

    engine = Engine(opened, policy=Policy(parallel=parallel))
    runtime = SimpleNamespace(engine=engine, prompts=PromptBuilder(source), close=engine.close)
    timing = measure.measure(runtime, at_once)
    assert timing.seconds > 0
    assert [len(answer) for answer in timing.answers] == [12, 12]
    # Each image is new, and encoded once: the check of the answers finds its own known.
    assert len(backends[0].encoded) == len(set(backends[0].encoded)) == 2 * at_once
    engine.close()


def row(token: int, logprob: float, *top: tuple[int, float]) -> TokenLogprob:
    return TokenLogprob(token, b"", logprob, tuple((t, b"", p) for t, p in top))


def test_drift_is_the_largest_change_of_an_answered_token() -> None:
    before = (row(1, -0.1, (1, -0.1), (2, -2.0)), row(3, -1.0, (3, -1.0)))
    after = (row(1, -0.12, (1, -0.12), (2, -2.2)), row(3, -1.2, (3, -1.2)))
    assert drift(before, after) == pytest.approx(0.2)
    assert drift(before, before) == 0.0


def test_where_answers_part_the_other_token_must_have_been_as_likely() -> None:
    before = (row(1, -0.50, (1, -0.50), (2, -0.53), (4, -3.0)), row(9, -5.0))
    # What comes behind the parting has another text before it, and says nothing.
    behind = row(7, -0.1)
    assert drift(before, (row(2, -0.51), behind)) == pytest.approx(0.03)
    assert drift(before, (row(4, -0.4), behind)) == pytest.approx(2.5)
    assert drift(before, (row(5, -0.4), behind)) == float("inf")
