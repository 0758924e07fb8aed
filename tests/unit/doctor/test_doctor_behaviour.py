"""Each finding about an engine's behaviour, on an engine that behaves so, and on one that does not."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from opsin.cache import PictureCache
from opsin.core.answer import Answer, ImageInfo, Timings, Usage
from opsin.core.backend import BackendLimits
from opsin.core.layout import ImageRun
from opsin.core.stages import Stages
from opsin.doctor.behaviour import behaviour_checks, stages_check
from opsin.doctor.check import Check
from opsin.engine import Engine
from opsin.prompt import PromptBuilder, TemplateSource
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import N_VOCAB, TURN_TEXT, Costs

TEMPLATE = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}" + TURN_TEXT
LIMITS = BackendLimits(n_ctx=2048, n_batch=64, n_ubatch=64, n_seq_max=8, n_vocab=N_VOCAB, n_embd=4)


def found(backend: FakeBackend, pictures: PictureCache | None = None) -> dict[str, Check]:
    prompts = PromptBuilder(TemplateSource(TEMPLATE, "llama", "fake", None, "", "", frozenset({TURN_TEXT})))
    with Engine(lambda: backend, pictures=pictures or PictureCache(2**20), now=backend.clock) as engine:
        checks = behaviour_checks(engine, prompts)
    by_name = {check.name: check for check in checks}
    assert len(by_name) == len(checks) == 5
    assert all(check.message.endswith(".") and "\n" not in check.message for check in checks)
    return by_name


def fake(reply: Callable[[str], str] = lambda _: "a red square.", **options: object) -> FakeBackend:
    return FakeBackend(reply, **{"limits": LIMITS, **options})  # type: ignore[arg-type]


def test_all_is_well_with_an_engine_that_behaves() -> None:
    checks = found(fake())
    assert {check.status for check in checks.values()} == {"ok"}
    assert checks["behaviour.ends"].evidence["completion_tokens"] == len("a red square.")
    assert checks["behaviour.picture_cache"].evidence["cached"] is True
    assert checks["behaviour.picture_cache"].evidence["encode_ms"] == 0
    assert checks["behaviour.picture_cache"].evidence["cached_tokens"] >= 4
    assert checks["behaviour.warm_up"].evidence == {"first_encode_ms": 40.0, "next_encode_ms": 40.0}
    assert checks["behaviour.stages"].evidence["largest"] == "decode_ms"
    assert "the largest is decode" in checks["behaviour.stages"].message


def test_an_answer_that_is_long_is_told() -> None:
    words = " ".join(f"{word}{word * 7 % 91}" for word in range(400))
    check = found(fake(lambda _: words))["behaviour.ends"]
    assert check.status == "warn"
    assert check.evidence["limit"] == "tokens"
    assert "--max-tokens" in check.message
    assert check.evidence["text"] in words


def test_a_template_whose_end_is_no_end_token_is_found() -> None:
    check = found(fake(lambda _: "a square.</s>USER: and then? ASSISTANT: more. " + "and on " * 40))["behaviour.ends"]
    assert check.status == "fail"
    assert "another turn" in check.message
    assert "template" in check.message


def test_an_answer_that_goes_round_in_circles_is_found() -> None:
    check = found(fake(lambda _: "it is " + "no " * 2000))["behaviour.ends"]
    assert check.status == "fail"
    assert check.evidence["limit"] == "tokens"
    assert "in circles" in check.message


def test_a_picture_that_is_encoded_again_is_found() -> None:
    backend = fake(limits=replace(LIMITS, forks=False))
    check = found(backend, PictureCache(0))["behaviour.picture_cache"]
    assert check.status == "fail"
    assert check.evidence["encode_ms"] == 40.0
    assert "--picture-cache-bytes" in check.message


def test_a_prefix_that_is_gone_is_told_where_one_could_be_kept() -> None:
    # Room for one conversation: the next picture's prompt takes the place of the first one's.
    backend = fake(limits=replace(LIMITS, n_ctx=100))
    check = found(backend)["behaviour.picture_cache"]
    assert check.status == "warn"
    assert check.evidence["cached_tokens"] < check.evidence["image_tokens"]
    assert "--ctx" in check.message
    assert found(fake(limits=replace(LIMITS, forks=False)))["behaviour.picture_cache"].status == "ok"


class Cold(FakeBackend):
    """Its first encode takes longer, as one that compiles kernels does."""

    def encode(self, run: ImageRun, between: Callable[[], None] | None = None) -> object:  # type: ignore[override]
        self.costs = Costs(encode=40.0 if self.encoded else self.first)
        return super().encode(run, between)

    first = 400.0


def test_a_first_picture_that_costs_more_is_told() -> None:
    check = found(Cold(lambda _: "a square.", limits=LIMITS))["behaviour.warm_up"]
    assert check.status == "warn"
    assert check.evidence == {"first_encode_ms": 400.0, "next_encode_ms": 40.0}
    assert "400 ms" in check.message


def test_a_small_difference_is_no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cold, "first", 58.0)
    assert found(Cold(lambda _: "a square.", limits=LIMITS))["behaviour.warm_up"].status == "ok"


def test_other_tokens_for_the_same_question_are_told() -> None:
    seen: dict[str, int] = {}

    class Fickle(FakeBackend):
        """The second time a question is asked it answers otherwise."""

        def sampler(self, params: object, seed: int) -> object:  # type: ignore[override]
            seen["asked"] = seen.get("asked", 0) + 1
            return super().sampler(params, seed)  # type: ignore[arg-type]

    check = found(Fickle(lambda _: "a red one." if seen["asked"] < 3 else "a rose.", limits=LIMITS))["behaviour.repeat"]
    assert check.status == "warn"
    assert check.evidence["first_difference"] == len("a r")


def answer(stages: Stages) -> Answer:
    timings = Timings(0, 0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0)
    return Answer("a", None, "stop", Usage(), stages, timings, images=(ImageInfo("", 1, 1, 1, 1, 1),))


def test_stages_that_do_not_add_up_are_found() -> None:
    check = stages_check(answer(Stages(encode_ms=100.0, decode_ms=50.0, total_ms=180.0)))
    assert check.status == "fail"
    assert "150.0 ms of 180.0" in check.message


def test_time_that_no_stage_claims_is_told() -> None:
    check = stages_check(answer(Stages(encode_ms=100.0, other_ms=50.0, total_ms=150.0)))
    assert check.status == "warn"
    assert "33%" in check.message


def test_the_largest_stage_is_named_with_its_share() -> None:
    check = stages_check(answer(Stages(encode_ms=150.0, decode_ms=40.0, other_ms=10.0, total_ms=200.0)))
    assert check.status == "ok"
    assert check.evidence["largest"] == "encode_ms"
    assert check.evidence["largest_share"] == 0.75
