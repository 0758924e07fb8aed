"""The workloads run on the engine with the fake backend, and the figures made of their timings."""

import json
import time
from collections.abc import Generator, Iterator
from dataclasses import replace

import pytest

from opsin.bench import workloads as workloads_file
from opsin.bench.cost import Ceiling, ModelCost
from opsin.bench.drivers import engine_driver
from opsin.bench.report import Limits, Target, as_text, ratio, target_document
from opsin.bench.workloads import (
    Ask,
    Driver,
    Result,
    Stats,
    Timing,
    Workload,
    choose,
    image_file,
    images_of,
    invalid_reason,
    measure_in_turn,
    run_workload,
    stats_of,
    warm_up,
)
from opsin.core.answer import Usage
from opsin.core.backend import BackendLimits
from opsin.core.errors import BadParameter, DecodeFailed
from opsin.core.settings import ImageSettings
from opsin.engine import Engine, Policy
from opsin.images import load_image
from opsin.prompt import PromptBuilder, TemplateSource
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import TURN_TEXT

pytestmark = pytest.mark.slow  # together they take seconds, so `make check` leaves them out

LIMITS = BackendLimits(n_ctx=4096, n_ubatch=256, n_seq_max=24, n_vocab=259, n_embd=4, n_ctx_seq=4096)
WORKLOADS = choose()
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}" + TURN_TEXT
CEILING = Ceiling("CPU", read_bytes_s=1e10, matrix_ops_s=1e11)
COST = ModelCost(
    weight_bytes=1e8, weights=1e8, head=1e7, kv_values=1024, attention_width=1024, encode_ops=1e10, kv_value_bytes=2
)


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads_file, "IMAGE_SIZE", (32, 24))


class Running:
    def __init__(self, backend: FakeBackend | None = None) -> None:
        self.backend = backend or FakeBackend(lambda _: "x" * 200, limits=LIMITS)
        self.engine = Engine(lambda: self.backend, policy=Policy(parallel=8))
        self.prompts = PromptBuilder(TemplateSource(TEMPLATE, "fake", "fake", None, "", "", frozenset({TURN_TEXT})))
        self.driver = engine_driver(self.engine, self.prompts)


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.engine.close()


class Scripted:
    """A driver whose answers come at fixed times and have any length."""

    def __init__(self, tokens: int | None = None, gap: float = 0.0, pieces: int | None = None) -> None:
        self.tokens, self.gap, self.pieces = tokens, gap, pieces
        self.images: list[bytes] = []

    def __call__(self, image: bytes, question: str, max_tokens: int) -> Generator[float, None, Usage]:
        self.images.append(image)
        for _ in range(max_tokens if self.pieces is None else self.pieces):
            time.sleep(self.gap)
            yield time.perf_counter()
        return Usage(prompt_tokens=20, completion_tokens=self.tokens or max_tokens, image_tokens=10)


def measured(driver: Driver, workload: Workload, runs: int = 1) -> Result:
    return measure_in_turn({"one": driver}, workload, runs=runs)["one"]


@pytest.mark.parametrize("name", ["W1", "W2", "W3", "W4"])
def test_a_workload_runs_on_the_engine_and_every_answer_has_its_tokens(running: Running, name: str) -> None:
    (workload,) = choose([name])
    result = measured(running.driver, workload, runs=2)
    assert result.invalid is None
    assert [usage.completion_tokens for usage in result.usages] == [32] * len(workload.asks)
    assert len(result.runs) == 2
    middle = result.median
    assert middle is not None
    assert 0 < middle.first_token_ms <= middle.first_token_max_ms <= middle.total_s * 1e3
    assert 0 <= middle.longest_pause_ms < middle.total_s * 1e3
    # New images in each run, each encoded once however many ask about it.
    assert (
        len(running.backend.encoded)
        == len(set(running.backend.encoded))
        == 2 * len({ask.image for ask in workload.asks})
    )


def test_the_five_workloads_are_those_of_the_design() -> None:
    assert [w.name for w in WORKLOADS] == ["W1", "W2", "W3", "W4", "W5"]
    assert [(len(w.asks), len({ask.image for ask in w.asks}), w.at_once) for w in WORKLOADS] == [
        (4, 4, False),
        (6, 1, False),
        (8, 1, True),
        (8, 8, True),
        (4, 4, True),
    ]
    assert all(len({ask.question for ask in w.asks}) == len(w.asks) for w in WORKLOADS if w.name in {"W2", "W3"})
    assert {ask.max_tokens for w in WORKLOADS[:4] for ask in w.asks} == {32}
    assert [(ask.max_tokens, ask.at) for ask in WORKLOADS[4].asks] == [(96, 0.0), (8, 0.5), (8, 0.8), (8, 1.1)]


def test_w5_sends_its_images_while_the_stream_runs() -> None:
    workload = WORKLOADS[4]
    timings = run_workload(Scripted(gap=0.015), workload, images_of(workload, 0))
    offsets = [timing.sent - timings[0].sent for timing in timings]
    assert all(offset >= ask.at - 0.05 for offset, ask in zip(offsets, workload.asks, strict=True))
    assert [len(timing.pieces) for timing in timings] == [96, 8, 8, 8]
    assert timings[0].ended > timings[3].sent


def test_a_stream_has_its_own_pause_and_first_token() -> None:
    asks = (Ask(0, max_tokens=3), Ask(1, max_tokens=3))
    timings = [
        Timing(0.0, (0.1, 0.2, 0.5), 0.5, Usage(completion_tokens=3)),
        Timing(0.0, (0.3, 0.4, 2.0), 2.0, Usage(completion_tokens=3)),
    ]
    stream = stats_of(Workload("X", "", asks, stream=0), timings)
    assert stream.longest_pause_ms == pytest.approx(300)
    assert stream.first_token_ms == pytest.approx(100)
    every = stats_of(Workload("X", "", asks), timings)
    assert every.longest_pause_ms == pytest.approx(1600)
    assert every.first_token_ms == pytest.approx(200)
    assert every.token_ms == pytest.approx((200 + 850) / 2)
    for stats in (stream, every):
        assert stats.total_s == pytest.approx(2.0)
        assert stats.first_token_max_ms == pytest.approx(300)


@pytest.mark.parametrize(
    ("driver", "reason"),
    [(Scripted(tokens=31), "an answer has 31 tokens instead of 32"), (Scripted(pieces=0), "an answer has no text")],
)
def test_a_run_of_another_length_is_invalid_and_has_no_figures(driver: Scripted, reason: str) -> None:
    result = measured(driver, WORKLOADS[0], runs=3)
    assert result.invalid == reason
    assert result.median is None
    assert len(driver.images) == 4, "an invalid run is not repeated"
    target = Target("opsin", {}, [result])
    row = target_document(target, Limits(CEILING, COST))["workloads"]["W1"]
    assert row == {"title": result.workload.title, "invalid": reason, "failed": 0}
    assert f"invalid: {reason}" in as_text([target])


def test_an_answer_that_ends_early_on_the_engine_makes_the_run_invalid() -> None:
    running = Running(FakeBackend(lambda _: "x" * 200, limits=replace(LIMITS, n_ctx=64, n_ctx_seq=64)))
    with running.engine:
        result = measured(running.driver, Workload("X", "", (Ask(0, max_tokens=60),)))
    assert "instead of 60" in (result.invalid or "")


def test_token_counts_are_compared_answer_by_answer() -> None:
    workload = Workload("X", "", (Ask(0, max_tokens=2), Ask(0, max_tokens=3)))
    good = [Timing(0, (1.0,), 1, Usage(completion_tokens=n)) for n in (2, 3)]
    assert invalid_reason(workload, good) is None
    assert invalid_reason(workload, good[::-1]) is not None
    assert Result(workload).median is None


def test_an_error_of_the_engine_reaches_the_caller(running: Running) -> None:
    running.backend.fail_decode = RuntimeError("broken")
    with pytest.raises(DecodeFailed):
        measured(running.driver, WORKLOADS[3])


def test_the_warm_up_uses_no_image_that_is_measured() -> None:
    driver = Scripted()
    warm_up(driver, WORKLOADS[3])
    assert len(driver.images) == 1
    assert not set(driver.images) & {image for run in range(3) for image in images_of(WORKLOADS[3], run)}


def test_no_two_images_of_any_run_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [image for workload in WORKLOADS for run in range(2) for image in images_of(workload, run)]
    assert len(set(files)) == len(files)
    assert image_file(5) == image_file(5)
    monkeypatch.undo()
    image = load_image(image_file(5), ImageSettings())
    assert (image.format, image.width, image.height) == ("PNG", 640, 480)


def test_workloads_are_chosen_by_name() -> None:
    assert choose(None) == WORKLOADS
    (many,) = choose(["W3"], tokens=128, questions=32)
    assert {ask.max_tokens for ask in many.asks} == {128}
    assert len({ask.question for ask in many.asks}) == 32
    assert many.title == "32 questions about one new image, at once"
    assert [ask.max_tokens for ask in choose(["W5"], tokens=128)[0].asks] == [96, 8, 8, 8]
    assert [w.name for w in choose(["w5", " W1"])] == ["W1", "W5"]
    with pytest.raises(BadParameter, match="W7"):
        choose(["W1", "W7"])


def test_a_ratio_is_the_median_of_the_runs_own_ratios() -> None:
    def result(*totals: float) -> Result:
        return Result(WORKLOADS[0], tuple(Stats(total, 10, 10, 1, 0) for total in totals))

    assert ratio(result(1, 2, 9), result(2, 1, 10), "total_s") == pytest.approx(0.9)
    assert ratio(result(1), result(1), "longest_pause_ms") is None


def test_the_document_is_json_and_the_text_names_every_workload(running: Running) -> None:
    results = [measured(running.driver, workload) for workload in choose(["W1", "W3"])]
    limits = Limits(CEILING, COST)
    target = Target("opsin", {"url": "x"}, results)
    document = json.loads(json.dumps({**limits.document(), **target_document(target, limits)}))
    assert set(document) == {"machine", "least", "url", "workloads"}
    row = document["workloads"]["W1"]
    least = COST.workload_seconds(CEILING, results[0].workload, results[0].usages)
    assert row["share_of_ceiling"] == pytest.approx(least / row["total_s"], rel=0.01)
    assert row["completion_tokens"] == [32] * 4
    assert len(row["runs"]) == 1
    text = limits.text() + as_text([target], limits)
    for word in ("GB/s", "GFLOP/s", "W1", "W3", "of the ceiling"):
        assert word in text


def test_least_times_follow_memory_and_operations() -> None:
    # One row: reading the weights takes longest (10 ms); 100 rows: the operations do (220 ms and attention).
    assert COST.step_seconds(CEILING, [0]) == pytest.approx(0.010)
    assert COST.step_seconds(CEILING, [0] * 100) == pytest.approx(0.220)
    assert COST.prompt_seconds(CEILING, 100, images=1) == pytest.approx(0.1 + 0.2, rel=0.01)


def test_a_shared_image_is_counted_once_and_steps_are_shared() -> None:
    usage = Usage(prompt_tokens=120, completion_tokens=33, image_tokens=100)
    one_by_one, at_once, alone = WORKLOADS[1:4]
    w2 = COST.workload_seconds(CEILING, one_by_one, [usage] * 6)
    w3 = COST.workload_seconds(CEILING, at_once, [usage] * 8)
    w4 = COST.workload_seconds(CEILING, alone, [usage] * 8)
    text, image, encode = 20 * 0.002, 100 * 0.002, 0.1
    assert w2 == pytest.approx(encode + image + 6 * (text + 32 * 0.010), rel=0.05)
    assert w3 == pytest.approx(encode + image + 8 * text + 32 * 8 * 2.2e-3, rel=0.05)
    assert w4 - w3 == pytest.approx(7 * (encode + image), rel=0.05)
