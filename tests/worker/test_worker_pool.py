"""Several workers on one machine: how many and where on plain values, and the pool on real processes."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_worker import CRASHES_IN_ENCODE
from test_worker import COMMAND, PARAMS, begun, first_text, prompt, wait_until

from opsin import compose
from opsin.core.errors import EngineClosed, EngineDied, ModelNotFound
from opsin.core.settings import EngineSettings
from opsin.models import resolve
from opsin.native.devices import Device
from opsin.testing import image
from opsin.worker import ImageBlocked, NotReady, WorkerEngine, WorkerPool, client, open_workers, pool
from opsin.worker.pool import Machine, spread

pytestmark = pytest.mark.native

GIB = 2**30
TWO = (("CUDA0", 24 * GIB), ("CUDA1", 24 * GIB))
SMALL, LARGE = Machine(TWO, 8 * GIB, 16), Machine(TWO, 21 * GIB, 16)
CPU = Machine((), 8 * GIB, 16)
SHORT = PARAMS.model_copy(update={"max_tokens": 5})


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{here.parents[1] / 'src'}")


@pytest.mark.parametrize(
    ("settings", "workers", "machine", "placed"),
    [
        ({}, None, SMALL, [("CUDA0", "CUDA0", None), ("CUDA1", "CUDA1", None)]),
        ({}, None, LARGE, [(None, None, None)]),
        ({}, None, Machine((TWO[0], ("CUDA1", 9 * GIB)), 8 * GIB, 16), [(None, None, None)]),
        ({}, None, Machine(TWO[:1], 8 * GIB, 16), [(None, None, None)]),
        ({}, None, CPU, [(None, None, None)]),
        ({}, None, Machine(), [(None, None, None)]),
        ({"device": "CUDA1"}, None, SMALL, [("CUDA1", None, None)]),
        ({"mmproj_device": "none"}, None, SMALL, [(None, "none", None)]),
        ({"gpu_layers": 0}, None, SMALL, [(None, None, None)]),
        ({}, 1, SMALL, [(None, None, None)]),
        ({}, 3, LARGE, [("CUDA0", "CUDA0", None), ("CUDA1", "CUDA1", None), ("CUDA0", "CUDA0", None)]),
        ({"mmproj_device": "none"}, 2, SMALL, [("CUDA0", "none", None), ("CUDA1", "none", None)]),
        ({"device": "none"}, 2, SMALL, [("none", "CUDA0", 8), ("none", "CUDA1", 8)]),
        ({}, 3, CPU, [(None, None, 5)] * 3),
        ({"threads": 12}, 2, CPU, [(None, None, 12)] * 2),
        ({}, 32, CPU, [(None, None, 1)] * 32),
        ({}, 2, Machine(), [(None, None, None)] * 2),
    ],
)
def test_workers_are_spread_over_gpus_and_share_the_threads_of_a_cpu(
    settings: dict[str, Any], workers: int | None, machine: Machine, placed: list[tuple[str | None, str | None, int]]
) -> None:
    found = spread(EngineSettings(**settings), workers, machine)
    assert [(one.device, one.mmproj_device, one.threads) for one in found] == placed


@pytest.mark.parametrize(
    ("devices", "gpus"),
    [
        (["CPU cpu"], []),
        (["CUDA0 gpu", "CUDA1 gpu", "CPU cpu"], ["CUDA0", "CUDA1"]),
        (["Vulkan0 gpu", "Vulkan1 igpu"], ["Vulkan0"]),
        (["Vulkan0 igpu", "CPU cpu"], ["Vulkan0"]),
        (["CUDA0 gpu", "CUDA1 gpu", "Vulkan0 gpu", "Vulkan1 gpu"], ["CUDA0", "CUDA1"]),
    ],
)
def test_cards_are_counted_once(monkeypatch: pytest.MonkeyPatch, devices: list[str], gpus: list[str]) -> None:
    present = [Device(name, "", kind, 7, 9, 0) for name, kind in map(str.split, devices)]
    monkeypatch.setattr(compose, "devices", lambda: tuple(present))
    told = Machine(**compose.machine_for("demo", ""))
    assert told.gpus == [(name, 7) for name in gpus]
    assert told.weights > 2**20
    assert told.threads == 1, "the demo model is small"


@pytest.mark.parametrize(
    ("files", "looks"),
    [
        (["libggml-base.so", "libggml-cpu.so.0", "libggml.so", "libllama.so"], False),
        (["libggml-base.so", "libggml-cpu-haswell.so", "libggml-cuda.so"], True),
        (["libggml-base.dylib", "libggml-blas.dylib", "libggml-metal.dylib"], True),
        (["libllama.so"], True),
    ],
)
def test_gpus_are_looked_for_where_the_library_can_have_some(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], looks: bool
) -> None:
    looked: list[int] = []
    monkeypatch.setattr(pool, "_look", lambda *_: looked.append(1) or SMALL)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    for name in files:
        (tmp_path / name).touch()
    for given in ({}, {"device": "CUDA0"}):
        with closing(open_workers("missing", None, EngineSettings(**given), command=COMMAND)) as engine:
            assert isinstance(engine, WorkerPool) == (looks and not given)
    assert len(looked) == looks


@pytest.mark.parametrize("library", ["", "import time; time.sleep(60)"], ids=["fails", "hangs"])
def test_a_look_at_the_machine_that_fails_or_hangs_leaves_one_worker(
    monkeypatch: pytest.MonkeyPatch, library: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool, "_LOOK", library)
    monkeypatch.setattr(pool, "_LOOK_SECONDS", 0.5)
    assert pool._look("demo", None) == Machine()
    assert caplog.records


def test_a_child_looks_at_this_machine() -> None:
    told = pool._look("demo", None)
    assert told.weights > 2**20
    assert told.threads == 1
    assert pool._look("no-such-model", None) == Machine()


@contextmanager
def workers(model: str | None = None, *, parallel: int = 8, **options: Any) -> Iterator[WorkerPool]:
    settings = [EngineSettings(parallel=parallel)] * 2
    with closing(WorkerPool(model, None, settings, command=COMMAND, **options)) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize(
    ("free", "cores", "most", "given", "workers"),
    [
        (64 * GIB, 4, 8, {}, 4),
        (64 * GIB, 64, 8, {}, 8),
        (64 * GIB, 64, 1, {}, 1),
        (64 * GIB, 64, 0, {}, 1),
        (8 * GIB, 2, 8, {}, 2),
        (2 * GIB, 2, 8, {}, 1),
        (0, 8, 8, {}, 1),
        (64 * GIB, 4, 8, {"ctx": 2048}, 4),
    ],
)
def test_on_a_cpu_workers_share_the_context_and_half_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, cores: int, most: int, given: dict[str, int], workers: int
) -> None:
    monkeypatch.setattr(compose, "free_memory", lambda _: {"CPU": free})
    monkeypatch.setattr(compose, "physical_cores", lambda: cores)
    pair, settings = resolve(None, None), EngineSettings(parallel=8, **given)
    count, each = compose.plan_workers(pair, settings, most)
    assert count == workers
    if count == 1:
        assert each == settings
        return
    facts = compose.read_facts(pair.llm, pair.mmproj, None)
    trained = facts.model.context
    assert trained
    assert each.ctx == given.get("ctx", max(trained, 8 * trained // count))
    needs = compose.MemoryPlanner(facts, (), each, {}).needed().by_device["CPU"].total
    assert count * needs <= free // 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("free", "cores", "given", "workers", "unified"),
    [
        (64 * GIB, 4, {}, 4, False),
        (64 * GIB, 1, {}, 1, False),
        (2 * GIB, 2, {}, 1, False),
        (0, 4, {}, 1, None),
        (64 * GIB, 4, {"ctx": 2048}, 4, None),
        (64 * GIB, 4, {"kv_unified": True}, 4, True),
        (64 * GIB, 4, {"kv_unified": False}, 4, False),
    ],
)
def test_rows_that_share_nothing_get_parts_as_long_as_one_alone_would(
    monkeypatch: pytest.MonkeyPatch, free: int, cores: int, given: dict[str, int], workers: int, unified: bool | None
) -> None:
    monkeypatch.setattr(compose, "free_memory", lambda _: {"CPU": free})
    monkeypatch.setattr(compose, "physical_cores", lambda: cores)
    pair, settings = resolve(None, None), EngineSettings(parallel=8, **given)
    count, each = compose.plan_workers(pair, settings, 8, apart=True)
    assert (count, each.kv_unified) == (workers, unified)
    if unified is False:
        assert each.ctx == 8 * (compose.read_facts(pair.llm, pair.mmproj, None).model.context or 0)


def test_it_offers_what_one_worker_offers() -> None:
    states: list[str] = []
    options: dict[str, Any] = {"command": COMMAND, "changed": states.append}
    with closing(open_workers(None, None, EngineSettings(parallel=8), workers=2, **options)) as two:
        assert isinstance(two, WorkerPool)
        assert two.state == "loading"
        with pytest.raises(NotReady):
            two.submit(prompt())
        loaded = two.wait_ready()
        assert (two.info.name, two.limits.n_ctx, two.limits.n_ctx_seq) == ("fake", 2 * 4096, 4096)
        assert two.load_ms == loaded.load_ms
        assert two.placement().encoder
        assert (two.progress, two.restarts, two.error, two.slots) == (0.25, 0, None, 16)
        wait_until(lambda: two.state == "ready")
        assert {"warming", "ready"} <= {*states}
        assert {name for name in dir(WorkerEngine) if not name.startswith("_")} <= {*dir(two), "in_flight"}
        processes = [psutil.Process(pid) for pid in two.pids]
        assert two.pid == processes[0].pid
        assert len(processes) == 2
        events = [first_text(two.submit(prompt(text=str(number)), PARAMS)) for number in range(2)]
        assert two.stats.running <= 2
    for one in events:
        with pytest.raises(EngineClosed):
            list(one)
    assert not any(process.is_running() for process in processes)
    assert two.state == "closed"
    with pytest.raises(EngineClosed):
        two.submit(prompt())


@pytest.mark.slow
def test_an_image_stays_with_the_worker_that_knows_it() -> None:
    with workers() as two:
        two.wait_ready()
        for text in "abc":
            streams = [two.submit(prompt(image(number), text=text), SHORT) for number in range(8)]
            answers = [stream.result() for stream in streams]
            assert {answer.images[0].cached for answer in answers} == {text != "a"}
        assert two.stats.encodes == 8
        assert all(engine.stats.encodes for engine in two.engines)


@pytest.mark.slow
def test_new_images_of_a_batch_are_dealt_out_evenly_and_those_known_stay() -> None:
    with workers(parallel=4) as two:
        two.wait_ready()
        first = [two.submit(prompt(image(number)), PARAMS, priority=-1) for number in range(4)]
        for stream in first[::2]:
            stream.cancel()
        wait_until(lambda: sorted(engine.in_flight for engine in two.engines) == [0, 2])
        more = [two.submit(prompt(image(number)), PARAMS, priority=-1) for number in range(4, 8)]
        assert sorted(engine.in_flight for engine in two.engines) == [2, 4], "not two for the one that is less busy"
        again = [two.submit(prompt(image(number), text="b"), PARAMS, priority=-1) for number in (4, 6)]
        assert sorted(engine.in_flight for engine in two.engines) in ([2, 6], [4, 4])
        live = two.submit(prompt(image(9)), PARAMS)
        assert min(engine.in_flight for engine in two.engines) > 2
        for stream in (*first[1::2], *more, *again, live):
            stream.cancel()


@pytest.mark.slow
def test_a_crowd_about_one_image_and_text_alone_are_for_both() -> None:
    with workers(parallel=2) as two:
        two.wait_ready()
        streams = [two.submit(prompt(image(1), text=str(number)), PARAMS) for number in range(6)]
        assert sorted(engine.in_flight for engine in two.engines) == [2, 4]
        assert all(stream.result().text for stream in streams)
        assert all(engine.stats.encodes == 1 for engine in two.engines)
        streams = [two.submit(prompt(text=str(number)), PARAMS) for number in range(4)]
        assert [engine.in_flight for engine in two.engines] == [2, 2]
        assert all(stream.result().text for stream in streams)


@pytest.mark.slow
def test_when_one_is_killed_its_answers_fail_the_other_goes_on_and_no_counter_falls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "FIRST_DELAY", 60.0)  # it does not come back
    with workers() as two:
        two.wait_ready()
        begun(lost := two.submit(prompt(text="lost"), PARAMS))
        begun(kept := two.submit(prompt(text="kept"), PARAMS))
        first, second = two.engines
        assert (first.in_flight, second.in_flight) == (1, 1)
        before = dataclasses.replace(two.stats, running=0, waiting=0, idle_prefixes=0, cells_used=0)
        os.kill(first.pid or 0, signal.SIGKILL)
        with pytest.raises(EngineDied):
            lost.result()
        wait_until(lambda: first.state == "restarting")
        assert (two.state, two.restarts, two.error) == ("ready", 1, None)
        answers = [two.submit(prompt(image(number)), SHORT).result() for number in range(4)]
        assert {answer.stages.load_ms for answer in answers} == {0.0}
        assert kept.result().text
        after = two.stats
        assert all(a <= b for a, b in zip(dataclasses.astuple(before), dataclasses.astuple(after), strict=True))
        assert second.stats.encodes == 4


@pytest.mark.slow
def test_an_image_that_crashed_two_workers_is_refused_by_all() -> None:
    with workers() as two:
        two.wait_ready()
        bad = image(1, width=CRASHES_IN_ENCODE)
        for _ in range(2):
            with pytest.raises(EngineDied):
                two.submit(prompt(bad), PARAMS).result()
        for one in (two, *two.engines):
            with pytest.raises(ImageBlocked):
                one.submit(prompt(bad), PARAMS)
        assert two.submit(prompt(image(2)), SHORT).result().text


@pytest.mark.slow
def test_it_has_failed_when_all_have(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(client, "MOST_STARTS", 2)
    states: list[str] = []
    with workers(changed=states.append) as two:
        two.wait_ready()
        for engine in two.engines:
            assert (two.error, two.state) == (None, "ready")
            assert two.submit(prompt(image(1)), SHORT).result().text
            engine._open = ("open", {**engine._open[1], "model": "aborts"})
            os.kill(engine.pid or 0, signal.SIGABRT)
            wait_until(lambda engine=engine: engine.state == "failed")  # type: ignore[misc]
        assert (two.state, two.pids) == ("failed", [])
        assert isinstance(two.error, EngineDied)
        with pytest.raises(EngineDied):
            two.submit(prompt())
        wait_until(lambda: states[-1] == "failed")
    assert sum("others go on" in record.message for record in caplog.records) == 1


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_raises_its_own_error() -> None:
    with workers("missing") as two:
        with pytest.raises(ModelNotFound):
            two.wait_ready()
        assert isinstance(two.error, ModelNotFound)
        wait_until(lambda: two.state == "failed")
        assert (two.loaded, two.progress) == (None, 0.0)


@pytest.mark.slow
def test_idle_workers_are_unloaded_and_woken_together() -> None:
    with workers(idle_seconds=0.5) as two:
        two.wait_ready()
        wait_until(lambda: two.state == "unloaded")
        before = two.stats
        two.wake()
        answers = [two.submit(prompt(image(number)), SHORT) for number in range(4)]
        assert all(stream.result().text for stream in answers)
        assert two.stats.finished >= before.finished + 4
        assert two.restarts == 0
