"""What a tuning decides, with measurements that are made up: which settings are opened, kept, said, and refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opsin.core.backend import BackendLimits
from opsin.core.errors import BadParameter, EngineError, ModelError
from opsin.core.settings import EngineSettings
from opsin.tune import rig, session
from opsin.tune.finals import Final
from opsin.tune.rig import Pieces, Sized
from opsin.tune.search import Choice, Cost, Ratio
from opsin.tune.session import Tuning, tried_text
from opsin.tune.space import Wish, dimensions

LIMITS = BackendLimits(
    n_ctx=2048, n_batch=256, n_ubatch=256, n_seq_max=2, n_vocab=9, n_embd=4, shared=False, best_rows=192
)
PIECES = Pieces(1.0, 1.0, 0.01, 0.01)


class Rigs:
    """Opens stubs, counts those that are open, and lets a clock run meanwhile."""

    def __init__(self) -> None:
        self.opened: list[EngineSettings] = []
        self.open = self.most = 0
        self.clock = self.seconds = 0.0
        self.shared_small = False

    def __call__(self, settings: EngineSettings) -> Any:
        if settings.kv_type == "q8_0":
            raise ModelError("no such memory")
        self.clock += self.seconds
        self.opened.append(settings)
        self.open += 1
        self.most = max(self.most, self.open)
        limits = replace(LIMITS, shared=self.shared_small and settings.ctx is None)
        backend = SimpleNamespace(limits=limits)
        engine = SimpleNamespace(placement=lambda: SimpleNamespace(layers_offloaded=7))
        more = {"threads": (2, 2, 1), "close": self.close, "settings": settings, "driver": settings}
        return SimpleNamespace(backend=backend, engine=engine, **more)

    def close(self) -> None:
        self.open -= 1


class Trial:
    """Costs by the settings: flash attention is worth a fifth, threads of decode a tenth."""

    def __init__(self, rig: Any, part: str, _sequences: int, _known: Pieces) -> None:
        self.rig = rig
        settings = rig.settings
        if settings.longest_turn == 0.123:
            raise EngineError("no warming up")
        seconds = 1.0
        if part == "language":
            seconds *= (0.8 if settings.flash_attention else 1.0) * (0.9 if settings.threads == 1 else 1.0)
        self.cost = Cost(seconds, seconds)

    def run(self) -> Cost:
        return self.cost

    def close(self) -> None:
        self.rig.close()


def plays(*ratios: float, confirmed: float | None = None, calls: list[Any] | None = None) -> Any:
    """Finals with these ratios, one finalist after another, and rounds that confirm them."""
    left = list(ratios)

    def play(_untuned: Any, other: Any, *_: Any, first: int, **more: Any) -> Final:
        if calls is not None:
            calls.append((other, first, more))
        value = (confirmed or 0.7) if first else left.pop(0) if len(left) > 1 else left[0]
        if value == 0:
            raise EngineError("no answer")
        return Final(Ratio(value, 0.01), Ratio(value, 0.01), Cost(1, 1))

    return play


@pytest.fixture
def rigs(monkeypatch: pytest.MonkeyPatch) -> Rigs:
    @contextmanager
    def laid_out(_rig: Any, _number: int) -> Iterator[Any]:
        yield SimpleNamespace(n_tokens=600, n_image_tokens=576)

    monkeypatch.setattr(rig, "laid_out", laid_out)
    monkeypatch.setattr(session, "survey", lambda *_: (PIECES, 0.05))
    monkeypatch.setattr(session, "reference", lambda _: None)
    monkeypatch.setattr(session, "RigTrial", Trial)
    monkeypatch.setattr(session, "play_final", plays(0.7))
    monkeypatch.setattr(session, "judge", lambda _before, rig, encoder: (None, f"encoder {encoder}"))
    return Rigs()


def tuning(rigs: Rigs, wish: Wish, **settings: Any) -> Tuning:
    known = EngineSettings(**{"model": Path("m.gguf"), "mmproj": Path("p.gguf"), "parallel": 2, **settings})
    return Tuning(rigs, known, wish, lambda _source, _kind: None, now=lambda: rigs.clock)


def test_what_won_is_written_with_all_numbers_of_threads(rigs: Rigs) -> None:
    report = tuning(rigs, Wish("interactive", cores=2)).run()
    assert rigs.open == 0
    assert rigs.most == 2
    # Threads of prefill would follow those of decode if the file said those alone.
    assert report.settings == {"flash_attention": True, "threads": 1, "threads_batch": 2, "threads_encode": 1}
    assert report.checks == "encoder False"
    assert any("not possible: no such memory" in tried_text(tried) for tried in report.tried)
    document = report.as_document()
    assert document["picked"] == report.picked.name
    assert document["settings"] == dict(report.settings)
    # The micro-batch nobody chose stays unchosen: the context decides about it.
    assert "ubatch" not in rigs.opened[-1].model_fields_set
    assert rigs.opened[-1].ctx == 4096
    # As they are used, to see how the memory is laid out and what threads there are.
    assert rigs.opened[0].ctx is None
    assert rigs.opened[-1].disk_cache is False


def test_what_the_user_chose_is_left_alone(rigs: Rigs) -> None:
    report = tuning(rigs, Wish("interactive", fixed=frozenset({"flash_attention", "ctx"}), cores=2), ctx=8192).run()
    assert "flash_attention" not in report.settings
    assert {tried.dimension for tried in report.tried} & {"flash attention"} == set()
    assert rigs.opened[-1].ctx == 8192


def test_when_nothing_wins_there_are_no_finals(rigs: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "play_final", None)
    report = tuning(rigs, Wish("interactive", fixed=frozenset({"flash_attention", "threads"}), cores=1)).run()
    assert report.settings == {}
    assert report.picked.name == "untuned"
    assert "no finals" in report.notes[0]


def test_answers_beyond_tolerance_are_not_picked_unless_allowed(rigs: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "judge", lambda _before, rig, encoder: ("too far", "far"))
    # Threads need no check of their own; the whole is checked at the end, and falls.
    refused = tuning(rigs, Wish("interactive", cores=2)).run()
    assert refused.settings == {}
    assert any("refused: too far" in tried_text(tried) for tried in refused.tried)
    assert "too far" in refused.notes[-1]
    allowed = tuning(rigs, Wish("interactive", cores=2, allow_approximate=True)).run()
    assert allowed.settings["flash_attention"] is True
    assert allowed.checks == "far"


def test_when_the_best_is_refused_the_next_best_is_taken(rigs: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(_before: Any, rig: Any, encoder: bool) -> tuple[str | None, str]:
        return ("too far" if rig.settings.longest_turn > 0.7 else None), "told"

    monkeypatch.setattr(session, "play_final", plays(0.7, 0.6, 0.5))
    monkeypatch.setattr(session, "judge", judge)
    report = tuning(rigs, Wish("throughput", cores=1)).run()
    assert report.picked.name == "streams wait longer"
    assert report.settings["longest_turn"] == 0.6
    assert report.notes == ("longer slices, streams wait longer was best, but too far",)


def test_sharing_is_tried_where_throughput_counts_alone(rigs: Rigs) -> None:
    def finalists(profile: Any) -> list[str]:
        return [point.name for point in tuning(rigs, Wish(profile, cores=1)).run().points]

    assert finalists("interactive") == ["untuned", "balanced"]
    assert finalists("throughput")[2:] == ["streams wait longer", "longer slices, streams wait longer"]


def test_what_is_told_comes_from_rounds_that_did_not_choose(rigs: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(session, "play_final", plays(0.7, confirmed=0.9, calls=calls))
    report = tuning(rigs, Wish("interactive", cores=2)).run()
    assert report.picked.latency.value == 0.9
    assert report.picked in report.points
    _, first, more = calls[-1]
    assert (first, more["rounds"], more["noise"]) == (session.ROUNDS, session.CONFIRM, 0.05)
    monkeypatch.setattr(session, "play_final", plays(0.7, confirmed=1.0))
    lucky = tuning(rigs, Wish("interactive", cores=2)).run()
    assert lucky.settings == {}
    assert lucky.notes == ("balanced was best, but further rounds did not bear it out",)


def test_a_failure_at_the_end_loses_one_finalist(rigs: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "play_final", plays(0, 0.6))
    report = tuning(rigs, Wish("throughput", cores=1)).run()
    assert report.notes[0] == "balanced is left out of the finals: no answer"
    assert report.picked.name == "streams wait longer"

    def judge(*_: Any, **__: Any) -> Any:
        raise EngineError("no check")

    monkeypatch.setattr(session, "judge", judge)
    monkeypatch.setattr(session, "play_final", plays(0.7))
    refused = tuning(rigs, Wish("interactive", fixed=frozenset({"flash_attention"}), cores=1)).run()
    assert refused.settings == {}
    assert refused.notes == ("balanced was best, but no check",)
    assert rigs.open == 0


def test_an_engine_is_closed_when_warming_it_up_fails(rigs: Rigs) -> None:
    tuner = tuning(rigs, Wish("interactive", cores=2))
    tuner.run()
    with pytest.raises(EngineError, match="no warming up"):
        tuner._trial({"longest_turn": 0.123}, "encode")
    assert rigs.open == 0


@pytest.mark.parametrize("seconds", [4.0, 8.0, 20.0])
def test_the_time_is_kept_where_opening_takes_long(rigs: Rigs, seconds: float) -> None:
    rigs.seconds = seconds
    report = tuning(rigs, Wish("interactive", minutes=1.5, cores=2)).run()
    # Two are opened in any case: one as it is used, and one with less context, to measure.
    assert rigs.clock <= max(90, 2 * seconds)
    assert any("no time left" in tried_text(tried) for tried in report.tried)
    assert "the time was over before all was tried" in report.notes


def test_no_conversion_is_begun_late_and_each_is_told(rigs: Rigs) -> None:
    made: list[str] = []
    said: list[str] = []

    def convert(_source: Path, kind: Any) -> None:
        made.append(kind)
        rigs.clock += 1e6

    known = EngineSettings(model=Path("m.gguf"), mmproj=Path("p.gguf"), parallel=2)
    now = lambda: rigs.clock  # noqa: E731 - the clock of the stubs
    Tuning(rigs, known, Wish("interactive"), convert=convert, now=now, tell=lambda text, _: said.append(text)).run()
    assert made == ["bf16"]
    assert "writing p.gguf as bf16" in said


def test_a_small_context_that_changes_the_layout_is_refused(rigs: Rigs) -> None:
    rigs.shared_small = True
    with pytest.raises(BadParameter, match="give the --ctx that you will use"):
        tuning(rigs, Wish("interactive", cores=2)).run()
    assert rigs.open == 0


def test_layers_on_a_gpu_are_named_and_memory_is_asked_for_before_two_are_open(rigs: Rigs) -> None:
    def check_room(settings: EngineSettings) -> None:
        assert rigs.most == 1
        raise EngineError(f"no room for {settings.gpu_layers}")

    known = EngineSettings(model=Path("m.gguf"), mmproj=Path("p.gguf"), parallel=2)
    with pytest.raises(EngineError, match="no room for 8"):  # seven, and the output layer
        Tuning(rigs, known, Wish("interactive", gpus=("CUDA0",)), lambda *_: None, check_room).run()


def candidates(
    wish: Wish, limits: BackendLimits = LIMITS, mmproj: str | None = "p.gguf"
) -> dict[str, tuple[Choice, ...]]:
    facts = Sized(EngineSettings(mmproj=mmproj and Path(mmproj)), (2, 2, 1), limits, 576)
    return {
        one.name: one.candidates for one in dimensions(wish, facts, lambda source, kind: source.with_suffix(f".{kind}"))
    }


def test_candidates_follow_the_machine() -> None:
    plain = candidates(Wish("interactive", cores=2))
    assert plain["threads of encode"] == ({"threads_encode": 1}, {"threads_encode": 2})
    assert plain["rows of prefill"][-1] == {"prefill_rows": 576, "ubatch": 576}
    assert plain["type of the projector"] == ({"mmproj": Path("p.bf16")}, {"mmproj": Path("p.q8_0")})
    assert plain["flash attention"] == ({"flash_attention": True},)
    assert "layers on the GPU" not in plain
    shared = candidates(Wish("interactive", cores=2), replace(LIMITS, shared=True, best_rows=0), None)
    # Off for the text alone: the encoder, which follows, keeps it.
    assert shared["flash attention"] == ({"flash_attention": False, "vision_flash_attention": True},)
    assert shared["rows of prefill"] == ({"ubatch": 512}, {"ubatch": 2048})
    both = candidates(
        Wish("interactive", frozenset({"mmproj"}), allow_approximate=True, cores=2, gpus=("CUDA0", "CUDA1"))
    )
    # The first GPU is where it is untuned.
    assert both["device of the encoder"] == ({"mmproj_device": "CUDA1"}, {"mmproj_device": "none"})
    assert both["device"] == ({"device": "CUDA0"}, {"device": "CUDA1"})
    assert both["KV memory"][-1] == {"kv_type": "q4_0"}
    assert "type of the projector" not in both
    # Micro-batches and rows are tried together, so one that is chosen keeps both.
    assert "rows of prefill" not in candidates(Wish("interactive", frozenset({"ubatch"}), cores=2), mmproj=None)
