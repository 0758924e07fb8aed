"""The workloads, played on the engine with the fake backend, and the figures made of traces."""

import json
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import pytest

from opsin.bench import WORKLOADS, Ask, EngineDriver, Workload, as_document, as_text, choose, measure_workload, pictures
from opsin.bench.batched import Batched, measure_batched
from opsin.bench.ceiling import Machine, measure_machine
from opsin.bench.cost import ModelCost
from opsin.bench.measure import Measured, figures, longest_gap, warm_up, why_void
from opsin.bench.pictures import picture_file
from opsin.bench.play import Trace, draw_pictures, play
from opsin.bench.report import Results, ceiling_text, schema_cost
from opsin.core.answer import Usage
from opsin.core.backend import BackendLimits, EmbeddingRows, TokenRow
from opsin.core.errors import BadParameter, DecodeFailed
from opsin.core.settings import MediaSettings
from opsin.engine import Engine, Policy
from opsin.media import load_picture
from opsin.prompt import PromptBuilder, TemplateSource
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import TURN_TEXT

pytestmark = pytest.mark.slow  # together they take seconds, so `make check` leaves them out

LIMITS = BackendLimits(n_ctx=4096, n_batch=256, n_ubatch=256, n_seq_max=24, n_vocab=259, n_embd=4)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}" + TURN_TEXT
MACHINE = Machine(threads=2, read_bytes_s=1e10, copy_bytes_s=1e10, matrix_ops_s=1e11)
COST = ModelCost(
    weight_bytes=1e8, weights=1e8, head=1e7, kv_values=1024, attention_width=1024, encode_ops=1e10, kv_value_bytes=2
)


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "PNG_SIZE", (32, 24))
    monkeypatch.setattr(pictures, "JPEG_SIZE", (40, 30))


class SlowFake(FakeBackend):
    """Its decode takes real time, so that several answers are under way together."""

    def decode(self, rows: Sequence[TokenRow] | EmbeddingRows) -> bool:
        time.sleep(0.002)
        return super().decode(rows)


class Running:
    def __init__(self, backend: FakeBackend | None = None) -> None:
        self.backend = backend or FakeBackend(lambda _: "x" * 200, limits=LIMITS)
        self.engine = Engine(lambda: self.backend, policy=Policy(parallel=8))
        self.prompts = PromptBuilder(TemplateSource(TEMPLATE, "fake", "fake", None, "", "", frozenset({TURN_TEXT})))
        self.driver = EngineDriver(self.engine, self.prompts)


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.engine.close()


class Scripted:
    """A driver whose answers come at fixed times, and are as long as it likes."""

    def __init__(self, tokens: int | None = None, gap: float = 0.0, pieces: int | None = None) -> None:
        self.tokens, self.gap, self.pieces = tokens, gap, pieces
        self.pictures: list[bytes] = []
        self.sent: list[float] = []

    def ask(self, picture: bytes, question: str, max_tokens: int) -> Generator[float, None, Usage]:
        self.pictures.append(picture)
        self.sent.append(time.perf_counter())
        for _ in range(max_tokens if self.pieces is None else self.pieces):
            time.sleep(self.gap)
            yield time.perf_counter()
        return Usage(prompt_tokens=20, completion_tokens=self.tokens or max_tokens, image_tokens=10)


@pytest.mark.parametrize("name", ["W1", "W2", "W3", "W4"])
def test_a_workload_runs_on_the_engine_and_every_answer_has_its_tokens(running: Running, name: str) -> None:
    (workload,) = choose([name])
    measured = measure_workload(running.driver, workload, runs=2)
    assert measured.void is None
    assert [usage.completion_tokens for usage in measured.usages] == [32] * len(workload.asks)
    assert len(measured.runs) == 2
    middle = measured.median
    assert middle is not None
    assert 0 < middle.first_token_ms <= middle.first_token_max_ms <= middle.total_s * 1e3
    assert len(middle.first_tokens_ms) == len(workload.asks)
    assert max(middle.first_tokens_ms) <= middle.total_s * 1e3
    assert 0 <= middle.longest_pause_ms < middle.total_s * 1e3
    # New pictures in each run, each encoded once however many ask about it.
    assert len(running.backend.encoded) == len(set(running.backend.encoded)) == 2 * workload.pictures


def test_w5_sends_its_pictures_while_the_stream_runs() -> None:
    (workload,) = [w for w in WORKLOADS if w.name == "W5"]
    driver = Scripted(gap=0.015)
    traces = play(driver, workload, draw_pictures(workload, 0))
    offsets = [trace.sent - traces[0].sent for trace in traces]
    assert offsets[1:] == pytest.approx([0.5, 0.8, 1.1], abs=0.2)
    assert [len(trace.pieces) for trace in traces] == [96, 8, 8, 8]
    assert traces[0].ended > traces[3].sent


def test_only_the_streams_pause_counts_where_there_is_one() -> None:
    asks = (Ask(0, max_tokens=3), Ask(1, max_tokens=3))
    traces = [
        Trace(0.0, (0.1, 0.2, 0.5), 0.5, Usage(completion_tokens=3)),
        Trace(0.0, (0.1, 0.2, 2.0), 2.0, Usage(completion_tokens=3)),
    ]
    assert figures(Workload("X", "", asks, stream=0), traces).longest_pause_ms == pytest.approx(300)
    found = figures(Workload("X", "", asks), traces)
    assert found.longest_pause_ms == pytest.approx(1800)
    assert found.total_s == pytest.approx(2.0)
    assert found.first_token_ms == pytest.approx(100)
    assert found.token_ms == pytest.approx((200 + 950) / 2)


def test_gaps() -> None:
    assert longest_gap([]) == longest_gap([3.0]) == 0.0
    assert longest_gap([1.0, 1.5, 4.0, 4.5]) == 2.5


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Scripted(tokens=31), "31 tokens were answered where 32 were asked for"),
        (Scripted(pieces=0), "an answer had no text"),
    ],
)
def test_a_run_of_another_length_is_void_and_has_no_figures(driver: Scripted, reason: str) -> None:
    measured = measure_workload(driver, choose(["W1"])[0], runs=3)
    assert measured.void == reason
    assert measured.median is None
    assert len(driver.pictures) == 4, "a void run is not repeated"
    results = Results({}, MACHINE, COST, workloads=[measured])
    assert as_document(results)["workloads"]["W1"] == {
        "title": measured.workload.title,
        "void": reason,
        "failed": 0,
    }
    assert f"void: {reason}" in as_text(results)


def test_an_answer_that_ends_early_on_the_engine_voids_the_run() -> None:
    running = Running(FakeBackend(lambda _: "x" * 200, limits=replace(LIMITS, n_ctx=64)))
    with running.engine:
        measured = measure_workload(running.driver, Workload("X", "", (Ask(0, max_tokens=60),)), runs=1)
    assert measured.void is not None
    assert "where 60 were asked for" in measured.void


def test_an_error_of_the_engine_reaches_the_caller(running: Running) -> None:
    running.backend.fail_decode = RuntimeError("broken")
    with pytest.raises(DecodeFailed):
        measure_workload(running.driver, choose(["W4"])[0], runs=1)


def test_the_warm_up_uses_no_picture_that_is_measured() -> None:
    driver = Scripted()
    workload = choose(["W4"])[0]
    warm_up(driver, workload)
    assert len(driver.pictures) == 1
    assert not set(driver.pictures) & {p for run in range(3) for p in draw_pictures(workload, run)}


def test_no_two_pictures_of_any_run_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [w for w in WORKLOADS if not w.large]
    files = [p for w in small[:3] for run in range(2) for p in draw_pictures(w, run)]
    assert len(set(files)) == len(files)
    assert picture_file(5) == picture_file(5)
    monkeypatch.undo()
    picture = load_picture(picture_file(5), MediaSettings())
    assert (picture.format, picture.width, picture.height) == ("PNG", 640, 480)


def test_large_pictures_are_jpegs_of_12_megapixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    picture = load_picture(picture_file(5, large=True), MediaSettings())
    assert (picture.format, picture.width * picture.height) == ("JPEG", 12_000_000)


def test_workloads_are_chosen_by_name() -> None:
    assert [w.name for w in choose(None)] == ["W1", "W2", "W3", "W4", "W5", "W5-12MP"]
    assert [w.name for w in choose(["w5", "W1"])] == ["W1", "W5", "W5-12MP"]
    assert [w.name for w in choose(["W5-12MP"])] == ["W5-12MP"]
    with pytest.raises(BadParameter, match="W7"):
        choose(["W1", "W7"])


def test_a_batch_is_measured_while_all_answer() -> None:
    running = Running(SlowFake(lambda _: "".join(map(chr, range(33, 113))), limits=LIMITS))
    with running.engine:
        batched = measure_batched(running.engine, running.prompts, sequences=8, tokens=64)
    assert batched.void is None
    assert batched.sequences == 8
    assert 16 <= batched.steps <= 64
    assert 0 < batched.tokens_s <= batched.decode_tokens_s
    assert batched.decode_share + batched.sample_share + batched.python_share == pytest.approx(1.0, abs=1e-6)
    assert batched.tokens_s / batched.decode_tokens_s == pytest.approx(batched.decode_share, rel=1e-6)


def test_prompts_of_a_batch_are_as_long_as_asked() -> None:
    running = Running(SlowFake(lambda _: "".join(map(chr, range(33, 113))), limits=replace(LIMITS, n_ctx=8192)))
    with running.engine:
        short = measure_batched(running.engine, running.prompts, sequences=2, tokens=32)
        long = measure_batched(running.engine, running.prompts, sequences=2, tokens=32, prompt_tokens=400)
    assert short.prompt_tokens < 100
    assert long.prompt_tokens == pytest.approx(400, abs=4)


def test_a_batch_that_was_full_for_a_moment_only_is_void(running: Running) -> None:
    batched = measure_batched(running.engine, running.prompts, sequences=8, tokens=4)
    assert batched.void is not None
    assert schema_cost(Results({}, MACHINE, COST, plain=(batched,), schema=(batched,))) is None


def test_an_error_in_a_batch_reaches_the_caller(running: Running) -> None:
    running.backend.fail_decode = RuntimeError("broken")
    with pytest.raises(DecodeFailed):
        measure_batched(running.engine, running.prompts, sequences=4)


def test_the_machine_is_measured() -> None:
    machine = measure_machine(2, array_bytes=2**20, side=64, repeats=2)
    assert 1e8 < machine.read_bytes_s < 1e13
    assert 1e8 < machine.copy_bytes_s < 1e13
    assert 1e6 < machine.matrix_ops_s < 1e15


def test_least_times_follow_memory_and_operations() -> None:
    # One row: the weights' bytes bound it (10 ms); 100 rows: the operations do (220 ms and attention).
    assert COST.step_seconds(MACHINE, [0]) == pytest.approx(0.010)
    assert COST.step_seconds(MACHINE, [0] * 100) == pytest.approx(0.220)
    assert COST.prompt_seconds(MACHINE, 100, pictures=1) == pytest.approx(0.1 + 0.2, rel=0.01)


def test_a_shared_picture_is_counted_once_and_steps_are_shared() -> None:
    usage = Usage(prompt_tokens=120, completion_tokens=33, image_tokens=100)
    (one_by_one,) = choose(["W2"])
    (at_once,) = choose(["W3"])
    (alone,) = choose(["W4"])
    w2 = COST.workload_seconds(MACHINE, one_by_one, [usage] * 6)
    w3 = COST.workload_seconds(MACHINE, at_once, [usage] * 8)
    w4 = COST.workload_seconds(MACHINE, alone, [usage] * 8)
    text, image, encode = 20 * 0.002, 100 * 0.002, 0.1
    assert w2 == pytest.approx(encode + image + 6 * (text + 32 * 0.010), rel=0.05)
    assert w3 == pytest.approx(encode + image + 8 * text + 32 * 8 * 2.2e-3, rel=0.05)
    assert w4 - w3 == pytest.approx(7 * (encode + image), rel=0.05)


def test_the_document_is_one_json_line_and_the_text_names_every_workload(running: Running) -> None:
    measured = [measure_workload(running.driver, w, runs=1) for w in choose(["W1", "W3"])]
    plain = Batched(8, 100, 200.0, 220.0, 0.9, 0.05, 0.05)
    schema = Batched(8, 100, 190.0, 220.0, 0.855, 0.095, 0.05)
    slower = replace(plain, tokens_s=100.0, decode_tokens_s=110.0)
    # A machine that is busy meanwhile makes the decode calls longer, and that is not the schemas' doing.
    starved = replace(schema, tokens_s=50.0, decode_share=1 - (1 - schema.decode_share) * 50.0 / schema.tokens_s)
    results = Results(
        {"opsin": "0"},
        MACHINE,
        COST,
        measured,
        (plain, slower, plain),
        (schema, slower, starved),
        (220.0, 100.0, 210.0),
    )
    document = json.loads(json.dumps(as_document(results)))
    assert set(document) == {"opsin", "machine", "ceiling", "workloads", "batched"}
    row = document["workloads"]["W1"]
    assert row["void"] is None
    assert row["share_of_ceiling"] == pytest.approx(row["least_s"] / row["total_s"], rel=0.01)
    assert row["completion_tokens"] == [32] * 4
    assert {"token_share", "first_token_share"} <= set(row)
    assert "first_token_share" not in document["workloads"]["W3"]
    assert document["batched"]["json_schema_cost"] == pytest.approx(0.05)
    # The medians of the runs' own ratios: a slow moment is slow for both.
    assert document["batched"]["of_llama_batched_bench"] == {"decode_calls": 1.0476, "all": 0.9524}
    assert document["batched"]["llama_batched_bench_tokens_s"] == 210.0
    text = ceiling_text(results) + as_text(results)
    for word in ("GB/s", "GFLOP/s", "W1", "W3", "5.0% Python", "schemas cost 5.0%"):
        assert word in text


def test_counts_are_compared_answer_by_answer() -> None:
    workload = Workload("X", "", (Ask(0, max_tokens=2), Ask(0, max_tokens=3)))
    good = [Trace(0, (1.0,), 1, Usage(completion_tokens=n)) for n in (2, 3)]
    assert why_void(workload, good) is None
    assert why_void(workload, good[::-1]) is not None
    assert Measured(workload, (), ()).median is None
