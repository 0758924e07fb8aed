"""What a tuning decides, with measurements that are made up: which settings are opened, kept, said, and refused."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opsin.core.backend import BackendLimits
from opsin.core.errors import ModelError
from opsin.core.settings import EngineSettings
from opsin.tune import session
from opsin.tune.pareto import Point
from opsin.tune.rig import Pieces
from opsin.tune.search import Choice, Cost, Ratio
from opsin.tune.session import Tuning, Wish, tried_text
from opsin.tune.space import Ground, dimensions

LIMITS = BackendLimits(
    n_ctx=2048, n_batch=256, n_ubatch=256, n_seq_max=2, n_vocab=9, n_embd=4, shared=False, best_rows=192
)
PIECES = Pieces(1.0, 1.0, 0.01, 0.01)


class Rigs:
    """Opens stubs, and counts those that are open."""

    def __init__(self) -> None:
        self.opened: list[EngineSettings] = []
        self.open = 0

    def __call__(self, settings: EngineSettings) -> Any:
        if settings.kv_type == "q8_0":
            raise ModelError("no such memory")
        self.opened.append(settings)
        self.open += 1
        return SimpleNamespace(
            engine=SimpleNamespace(limits=LIMITS), threads=(2, 2, 1), close=self.close, settings=settings
        )

    def close(self) -> None:
        self.open -= 1


class Trial:
    """Costs by the settings: flash attention is worth a fifth, threads of decode a tenth."""

    def __init__(self, rig: Any, part: str, _sequences: int, _known: Pieces) -> None:
        self.rig = rig
        settings = rig.settings
        seconds = 1.0
        if part == "language":
            seconds *= (0.8 if settings.flash_attention else 1.0) * (0.9 if settings.threads == 1 else 1.0)
        self.cost = Cost(seconds, seconds)

    def run(self) -> Cost:
        return self.cost

    def close(self) -> None:
        self.rig.close()


@pytest.fixture
def rigs(monkeypatch: pytest.MonkeyPatch) -> Rigs:
    @contextmanager
    def laid_out(_rig: Any, _number: int) -> Iterator[Any]:
        yield SimpleNamespace(n_tokens=600, n_image_tokens=576)

    def finals(drivers: Any, choices: Any, *_: Any, **__: Any) -> Sequence[Point]:
        ratio = {"untuned": 1.0}
        return tuple(
            Point(n, ratio.get(n, 0.7), 1, Ratio(ratio.get(n, 0.7), 0.01), Ratio(ratio.get(n, 0.7), 0.01), choices[n])
            for n in drivers
        )

    monkeypatch.setattr(session, "laid_out", laid_out)
    monkeypatch.setattr(session, "survey", lambda *_: (PIECES, 0.05))
    monkeypatch.setattr(session, "reference", lambda _: None)
    monkeypatch.setattr(session, "RigTrial", Trial)
    monkeypatch.setattr(session, "measure_finals", finals)
    monkeypatch.setattr(session, "driver_of", lambda rig: rig)
    monkeypatch.setattr(session, "judge", lambda _before, rig, encoder: (None, f"encoder {encoder}"))
    return Rigs()


def tuning(rigs: Rigs, wish: Wish, **settings: Any) -> Tuning:
    known = EngineSettings(**{"model": Path("m.gguf"), "mmproj": Path("p.gguf"), "parallel": 2, **settings})
    return Tuning(rigs, known, wish, convert=lambda _source, _kind: None, now=lambda: 0.0)


def test_what_won_is_written_with_all_numbers_of_threads(rigs: Rigs) -> None:
    report = tuning(rigs, Wish("interactive", cores=2)).run()
    assert rigs.open == 0
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
    assert rigs.opened[-1].disk_cache is False


def test_what_the_user_chose_is_left_alone(rigs: Rigs) -> None:
    report = tuning(rigs, Wish("interactive", fixed=frozenset({"flash_attention", "ctx"}), cores=2), ctx=8192).run()
    assert "flash_attention" not in report.settings
    assert {tried.dimension for tried in report.tried} & {"flash attention"} == set()
    assert rigs.opened[-1].ctx == 8192


def test_when_nothing_wins_there_are_no_finals(rigs: Rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "measure_finals", None)
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
    def finals(drivers: Any, choices: Any, *_: Any, **__: Any) -> Sequence[Point]:
        ratios = dict(zip(drivers, (1.0, 0.7, 0.6, 0.5), strict=True))
        return tuple(Point(n, r, 1 / r, Ratio(r, 0.01), Ratio(r, 0.01), choices[n]) for n, r in ratios.items())

    def judge(_before: Any, rig: Any, encoder: bool) -> tuple[str | None, str]:
        return ("too far" if rig.settings.longest_turn > 0.7 else None), "told"

    monkeypatch.setattr(session, "measure_finals", finals)
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


def candidates(ground: Ground, fixed: Sequence[str] = (), **more: Any) -> dict[str, tuple[Choice, ...]]:
    made = dimensions(ground, fixed, lambda source, kind: source.with_suffix(f".{kind}"), **more)
    return {one.name: one.candidates for one in made}


def test_candidates_follow_the_machine() -> None:
    plain = candidates(Ground(2, (), LIMITS, 576, Path("p.gguf")))
    assert plain["threads of encode"] == ({"threads_encode": 1}, {"threads_encode": 2})
    assert plain["rows of prefill"][-1] == {"prefill_rows": 576, "ubatch": 576}
    assert plain["type of the projector"] == ({"mmproj": Path("p.bf16")}, {"mmproj": Path("p.q8_0")})
    assert plain["flash attention"] == ({"flash_attention": True},)
    assert "layers on the GPU" not in plain
    shared = candidates(Ground(2, (), replace(LIMITS, shared=True, best_rows=0), 576, None))
    # Off for the text alone: the encoder, which follows, keeps it.
    assert shared["flash attention"] == ({"flash_attention": False, "vision_flash_attention": True},)
    assert shared["rows of prefill"] == ({"ubatch": 512}, {"ubatch": 2048})
    both = candidates(Ground(2, ("CUDA0", "CUDA1"), LIMITS, 576, Path("p.gguf")), ["mmproj"], allow_approximate=True)
    assert both["device of the encoder"][-1] == {"mmproj_device": "none"}
    assert both["device"] == ({"device": "CUDA0"}, {"device": "CUDA1"})
    assert both["KV memory"][-1] == {"kv_type": "q4_0"}
    assert "type of the projector" not in both
    # Micro-batches and rows are tried together, so one that is chosen keeps both.
    assert "rows of prefill" not in candidates(Ground(2, (), LIMITS, 576, None), ["ubatch"])
