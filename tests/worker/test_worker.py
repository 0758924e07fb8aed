"""The worker as its front sees it: real processes that crash, hang and end, on a fake backend."""

from __future__ import annotations

import asyncio
import gc
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_worker import CRASHES_IN_ENCODE, CRASHES_IN_PREFILL, HANGS_IN_ENCODE, SLOW

from opsin.core.answer import Answer, TextDelta
from opsin.core.errors import Cancelled, EngineClosed, EngineDied, ModelNotFound, ModelUnreadable, QueueFull
from opsin.core.request import Image, ImagePart, Prompt, SamplingParams, TextPart
from opsin.core.settings import EngineSettings
from opsin.engine import AnswerStream
from opsin.testing import image
from opsin.testing.fake_backend import TURN_TEXT
from opsin.worker import ImageBlocked, NotReady, WorkerEngine, client, messages, share
from opsin.worker.messages import SHARED_BYTES, Pixels

pytestmark = [pytest.mark.slow, pytest.mark.native]

COMMAND = (sys.executable, "-c", "import fake_worker; fake_worker.main()")
LIMIT = 30.0
PARAMS = SamplingParams(guard=False)


@contextmanager
def worker(model: str | None = None, **options: Any) -> Iterator[WorkerEngine]:
    settings = EngineSettings(parallel=8)
    with closing(WorkerEngine(model, None, settings, **{"command": COMMAND, **options})) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{here.parents[1] / 'src'}")


def prompt(*images: Image, text: str = "what is this?") -> Prompt:
    return Prompt((*map(ImagePart, images), TextPart(text + TURN_TEXT)))


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def begun(stream: AnswerStream) -> AnswerStream:
    """A stream whose first text has come."""
    assert any(isinstance(event, TextDelta) for event in stream)
    return stream


def first_text(stream: AnswerStream) -> Iterator[object]:
    """An iterator over a stream, behind its first text."""
    events = iter(stream)
    while not isinstance(next(events), TextDelta):
        pass
    return events


def crash(engine: WorkerEngine, image: Image) -> None:
    """Ask about an image that ends the worker, and wait for the next worker."""
    before = engine.restarts
    with pytest.raises(EngineDied):
        engine.submit(prompt(image), PARAMS).result()
    wait_until(lambda: engine.restarts > before and engine.state == "ready")


def test_it_answers_as_an_engine_does() -> None:
    with worker() as engine:
        assert engine.info.name == "fake"
        assert engine.progress == 0.25
        assert engine.limits.n_ctx == 4096
        assert engine.placement().encoder
        answers = [engine.submit(prompt(image(i)), PARAMS.model_copy(update={"max_tokens": 5})) for i in range(3)]
        assert [stream.result().text for stream in answers] == ["ababa"] * 3
        assert engine.stats.encodes == 3
        stream = engine.submit(prompt(), PARAMS)
        stream.cancel()
        with pytest.raises(Cancelled):
            stream.result()
        wait_until(lambda: engine.submit(prompt(), SamplingParams(max_tokens=1)).result() and not engine.stats.running)

        async def several() -> list[Answer]:
            return await asyncio.gather(*(engine.submit(prompt(text=str(i)), PARAMS).answer() for i in range(8)))

        assert all(answer.text == "ab" * 100 for answer in asyncio.run(several()))
    with pytest.raises(EngineClosed):
        engine.submit(prompt())


HUGE = """
import ctypes
ctypes.memset(ctypes.create_string_buffer(64 * 2**20), 1, 64 * 2**20)
kept = ctypes.create_string_buffer(64 * 2**20)
ctypes.memset(kept, 1, len(kept))
print([line.split()[1] for line in open("/proc/self/smaps_rollup") if "AnonHuge" in line][0])
"""


def in_huge_pages(tunables: str) -> int:
    """MiB of 64 that glibc's malloc gives in them."""
    command, environ = [sys.executable, "-c", HUGE], {**os.environ, "GLIBC_TUNABLES": tunables}
    return int(subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout) >> 10


@pytest.mark.skipif("glibc" not in platform.libc_ver()[0], reason="a setting of glibc's malloc")
@pytest.mark.parametrize(("users", "huge"), [("", True), ("glibc.malloc.hugetlb=0", False)])
def test_its_memory_is_in_huge_pages_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, users: str, huge: bool
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", users)
    given: dict[str, str] = {}
    start = messages.start_process
    monkeypatch.setattr(messages, "start_process", lambda command, **v: (given.update(v), start(command, **v))[1])
    with worker() as engine:
        engine.wait_ready()
    if in_huge_pages("glibc.malloc.hugetlb=1") < 32 or in_huge_pages("glibc.malloc.hugetlb=0") >= 32:
        pytest.skip("this system gives huge pages always, or never")
    assert (in_huge_pages(given["GLIBC_TUNABLES"]) >= 32) == huge


def test_errors_cross_the_border_as_themselves() -> None:
    from opsin.core.errors import BadGrammar, ContextOverflow

    with worker() as engine:
        engine.wait_ready()
        with pytest.raises(BadGrammar):
            engine.submit(prompt(), SamplingParams(grammar="bad")).result()
        with pytest.raises(ContextOverflow):
            engine.submit(prompt(text="x" * 5000)).result()


@pytest.mark.parametrize("where", [CRASHES_IN_ENCODE, CRASHES_IN_PREFILL])
def test_an_image_that_crashes_two_workers_is_refused_for_an_hour_and_others_are_not(
    where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker() as engine:
        engine.wait_ready()
        bad, waiting, answered = image(1, width=where), image(2), image(3)
        for _ in range(2):
            before = engine.restarts
            streaming = first_text(engine.submit(prompt(answered), PARAMS))
            failing = engine.submit(prompt(bad), PARAMS)
            behind = engine.submit(prompt(waiting), PARAMS)
            for stream in (failing, behind):
                with pytest.raises(EngineDied):
                    stream.result()
            with pytest.raises(EngineDied):
                list(streaming)
            wait_until(lambda before=before: engine.restarts > before and engine.state == "ready")  # type: ignore[misc]
        with pytest.raises(ImageBlocked) as refused:
            engine.submit(prompt(waiting, bad), PARAMS)
        assert refused.value.http_status == 422
        for other in (waiting, answered):
            assert engine.submit(prompt(other), PARAMS).result().text
        clock = time.monotonic
        monkeypatch.setattr(client.time, "monotonic", lambda: clock() + 3500)
        with pytest.raises(ImageBlocked):
            engine.submit(prompt(bad), PARAMS)
        monkeypatch.setattr(client.time, "monotonic", lambda: clock() + 3700)
        crash(engine, bad)


def test_an_image_is_blamed_although_its_client_had_left() -> None:
    with worker() as engine:
        engine.wait_ready()
        bad = image(1, width=CRASHES_IN_ENCODE)
        for crashes in (1, 2):
            stream = engine.submit(prompt(bad), PARAMS)
            threading.Timer(0.2, stream.cancel).start()  # its encode runs by then, and goes on
            with pytest.raises(Cancelled):
                stream.result()
            wait_until(lambda crashes=crashes: engine.restarts == crashes and engine.state == "ready")  # type: ignore[misc]
        with pytest.raises(ImageBlocked):
            engine.submit(prompt(bad), PARAMS)


def test_a_finished_encode_is_kept_although_its_client_had_left() -> None:
    with worker() as engine:
        engine.wait_ready()
        slow = image(1, width=SLOW)
        stream = engine.submit(prompt(slow), PARAMS)
        threading.Timer(0.2, stream.cancel).start()
        with pytest.raises(Cancelled):
            stream.result()
        assert engine.submit(prompt(slow), PARAMS).result().images[0].cached
        assert engine.stats.encodes == 1


def test_an_endless_native_call_is_shown_ended_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LEAST_CALL_SECONDS", 3.0)
    monkeypatch.setattr(client, "PING_SECONDS", 0.2)
    with worker() as engine:
        engine.wait_ready()
        pid = engine.pid
        stream = engine.submit(prompt(image(1, width=HANGS_IN_ENCODE)), PARAMS)
        wait_until(lambda: engine.state == "stalled")
        assert not stream.done
        with pytest.raises(EngineDied):
            stream.result()
        wait_until(lambda: engine.state == "ready")
        assert engine.pid != pid
        assert engine.submit(prompt(), PARAMS).result().text


def test_a_long_honest_call_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LEAST_CALL_SECONDS", 3.0)
    monkeypatch.setattr(client, "PING_SECONDS", 0.05)
    with worker() as engine:
        engine.wait_ready()
        assert engine.submit(prompt(image(1, width=SLOW)), PARAMS).result().text
        assert engine.restarts == 0


def test_a_worker_that_is_stopped_while_nobody_waits_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PING_SECONDS", 0.01)
    monkeypatch.setattr(client, "SILENT_SECONDS", 1.0)
    with worker() as engine:
        engine.wait_ready()
        process = psutil.Process(engine.pid)
        process.suspend()
        time.sleep(1.5)
        assert engine.state == "ready"
        process.resume()
        assert engine.submit(prompt(), PARAMS).result().text
        assert engine.restarts == 0


def test_requests_after_a_crash_wait_for_the_next_worker_and_counters_never_fall() -> None:
    with worker() as engine:
        engine.wait_ready()
        assert engine.submit(prompt(), PARAMS).result().text
        before = engine.stats
        os.kill(engine.pid or 0, signal.SIGSEGV)
        wait_until(lambda: engine.state == "restarting")
        answer = engine.submit(prompt(), PARAMS).result()
        assert answer.stages.load_ms > 0
        after = engine.stats
        assert after.generated_tokens == 2 * before.generated_tokens
        assert after.finished == 2 * before.finished


def test_a_worker_that_does_not_come_back_fails_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MOST_STARTS", 2)
    with worker() as engine:
        engine.wait_ready()
        engine._open = ("open", {**engine._open[1], "model": "aborts"})  # as a file that was overwritten
        os.kill(engine.pid or 0, signal.SIGABRT)
        wait_until(lambda: engine.state == "failed")
        with pytest.raises(EngineDied):
            engine.submit(prompt(), PARAMS)


@pytest.mark.parametrize(("model", "kind"), [("missing", ModelNotFound), ("aborts", ModelUnreadable)])
def test_a_model_that_cannot_be_loaded_raises_its_own_error_after_one_start(model: str, kind: type[Exception]) -> None:
    with worker(model) as engine:
        with pytest.raises(kind, match=model):
            engine.wait_ready()
        with pytest.raises(kind):
            engine.submit(prompt())
        assert (engine.state, engine.restarts, engine.pid) == ("failed", 0, None)


def test_before_it_is_loaded_requests_are_told_to_come_back() -> None:
    with worker() as engine:
        assert engine.state == "loading"
        with pytest.raises(NotReady):
            engine.submit(prompt())


def test_a_full_queue_is_refused_at_once() -> None:
    with worker(max_queue=1) as engine:
        engine.wait_ready()
        streams = [engine.submit(prompt(text=str(number)), PARAMS) for number in range(9)]
        with pytest.raises(QueueFull):
            engine.submit(prompt(), PARAMS).result()
        assert all(stream.result().text for stream in streams)


def test_an_idle_worker_is_ended_and_one_loading_serves_all_who_come() -> None:
    states: list[str] = []
    with worker(idle_seconds=0.3, changed=states.append) as engine:
        engine.wait_ready()
        process = psutil.Process(engine.pid)
        wait_until(lambda: engine.state == "unloaded")
        process.wait(LIMIT)
        engine.wake()  # a client that leaves before its request is read
        left = engine.submit(prompt(), PARAMS)
        left.cancel()  # a client that hangs up while the model loads
        streams = [engine.submit(prompt(text=str(number)), PARAMS) for number in range(3)]
        assert all(stream.result().stages.load_ms > 0 for stream in streams)
        assert states.count("reloading") == 1
        assert engine.restarts == 0
        assert engine.stats.finished == 3 + 2  # and a warm-up for each worker


def test_closing_ends_answers_and_the_process() -> None:
    with worker() as engine:
        engine.wait_ready()
        process = psutil.Process(engine.pid)
        events = first_text(engine.submit(prompt(), PARAMS))
        engine.close()
        with pytest.raises(EngineClosed):
            list(events)
        assert not process.is_running()
        assert engine.state == "closed"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_pixels_are_freed_in_both_processes_when_the_answer_begins() -> None:
    def mapped(pid: int) -> int:
        return Path(f"/proc/{pid}/maps").read_text().count("opsin-pixels")

    with worker() as engine:
        engine.wait_ready()
        asked = prompt(image(1, 2000, 1000), image(2, width=SLOW))
        stream = engine.submit(asked, PARAMS)
        wait_until(lambda: mapped(engine.pid or 0) == 1)
        events = first_text(stream)
        gc.collect()
        wait_until(lambda: mapped(engine.pid or 0) == mapped(os.getpid()) == 0)
        assert not stream.done
        assert list(events)


def test_pixels_are_what_was_put_in_and_travel_without_a_name() -> None:
    assert share(b"few") == b"few"
    size = SHARED_BYTES // 3 * 3 + 3
    pixels = share(b"rgb" * (size // 3))
    assert isinstance(pixels, Pixels)
    assert pixels[:6] == b"rgbrgb"
    assert share(pixels) is pixels
    again = Pixels(os.dup(pixels.fd), size)
    again[0:1] = b"R"
    assert pixels[0:1] == b"R"


def test_a_step_is_one_message_however_many_stream() -> None:
    class Counted(WorkerEngine):
        messages = 0

        def _on_events(self, *said: Any) -> None:
            self.messages += 1
            super()._on_events(*said)

    with closing(Counted(None, None, EngineSettings(parallel=8), command=COMMAND)) as engine:
        engine.wait_ready()
        before, steps = engine.messages, engine.stats.decode_steps
        streams = [engine.submit(prompt(text=str(number)), PARAMS) for number in range(8)]
        tokens = sum(stream.result().usage.completion_tokens for stream in streams)
        assert tokens == 8 * 200
        # A first text and an end go out at once, and are not the same step's for all.
        assert 0 < engine.messages - before <= engine.stats.decode_steps - steps + 2 * 8


def test_who_left_does_not_count_as_running() -> None:
    """The last counters to come were those from before their end, and nobody asked for others."""
    with worker() as engine:
        engine.wait_ready()
        begun(stream := engine.submit(prompt(), PARAMS))
        wait_until(lambda: engine.stats.running == 1)
        stream.cancel()
        wait_until(lambda: engine.stats.running == 0)


PARENT = """
import sys, time
from fake_worker import HANGS_IN_ENCODE
from test_worker import EngineSettings, WorkerEngine, COMMAND, image, prompt
engine = WorkerEngine(sys.argv[1] or None, None, EngineSettings(parallel=8), command=COMMAND)
if not sys.argv[1]:
    engine.wait_ready()
    engine.submit(prompt(image(1, width=HANGS_IN_ENCODE)))
while engine.pid is None:
    time.sleep(0.01)
print(engine.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a process in native code cannot be ended by its parent's"
)
@pytest.mark.parametrize("model", ["", "hangs"], ids=["in an encode", "while it loads, with the interpreter lock"])
def test_a_worker_in_an_endless_native_call_ends_with_its_parent(model: str) -> None:
    command = [sys.executable, "-c", PARENT, model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert "the worker hangs\n" in iter(parent.stderr.readline, "")
        parent.kill()
        _, alive = psutil.wait_procs([child], timeout=2)
        assert not alive
