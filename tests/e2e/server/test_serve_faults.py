"""`opsin serve` when its worker crashes, hangs or is gone: killed, stopped and hung up on for real."""

import base64
import contextlib
import io
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image
from serve_process import LIMIT, READY, Served, Stream, environment, image_url, question, served

pytestmark = [pytest.mark.slow, pytest.mark.native]

DEMO = Path(__file__).parents[3] / "src" / "opsin" / "models" / "demo"
LONG = {"max_tokens": 400, "ignore_eos": True, "guard": False, "temperature": 0}


def ask(server: Served, url: str | None = None, **fields: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=question(url, **fields), timeout=LIMIT)


def is_ready(server: Served) -> bool:
    return httpx.get(f"{server.url}/ready", timeout=LIMIT).status_code == 200


@contextlib.contextmanager
def health_asked_all_the_time(server: Served) -> Iterator[None]:
    """While the block runs /health is asked again and again; it must answer, and within a second."""
    stop, slowest, bad = threading.Event(), [0.0], []

    def asking() -> None:
        with httpx.Client(base_url=server.url, timeout=LIMIT) as client:
            while not stop.wait(0.02):
                begin = time.monotonic()
                if client.get("/health").status_code != 200:
                    bad.append(time.monotonic())
                slowest[0] = max(slowest[0], time.monotonic() - begin)

    thread = threading.Thread(target=asking)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(LIMIT)
    assert not bad
    assert slowest[0] < 1.0


def eight_streams(server: Served) -> list[Stream]:
    running = [Stream(server.url, question(image_url(seed), **LONG)) for seed in range(8)]
    for stream in running:
        assert stream.begun.wait(LIMIT)
    return running


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_amid_eight_streams_is_told_to_each_and_mended_within_ten_seconds(number: signal.Signals) -> None:
    with served() as server:
        drawn = server.metric("generation_tokens_total")
        with health_asked_all_the_time(server):
            running = eight_streams(server)
            before = server.metric("generation_tokens_total")
            worker = server.worker
            fell = time.monotonic()
            worker.send_signal(number)
            waiting = Stream(server.url, question(max_tokens=2))  # it waits for the next worker, or is told to
            for stream in running:
                events = stream.finish()
                if stream.done:
                    continue  # complete before the signal came
                assert stream.broken is None
                assert events[-1]["error"]["code"] == "engine_died"
                assert stream.ended_at - fell < 5
            assert not all(stream.done for stream in running), "the answers are too short for this test"
            while not is_ready(server):
                assert time.monotonic() - fell < 10
            assert server.worker.pid != worker.pid
            server.wait_line(number.name)
            waiting.finish()
            refused = isinstance(waiting.broken, httpx.HTTPStatusError) and waiting.broken.response.status_code == 503
            assert waiting.done or refused
            assert ask(server, max_tokens=2).status_code == 200
        assert server.metric("generation_tokens_total") >= before >= drawn


def test_32_requests_with_images_of_12_megapixels_run_at_once() -> None:
    flags = ["--parallel", "32", "--drain-seconds", "0", "--ctx", str(32 * 8192)]
    with served(*flags) as server:
        running = [Stream(server.url, question(large_url(seed), **{**LONG, "max_tokens": 7000})) for seed in range(32)]
        for stream in running:
            assert stream.begun.wait(4 * LIMIT)
            assert stream.events, stream.broken
        at_once = server.metric("num_requests_running")
        # The first may have had time for all their tokens while the last images were read, and end for the reader a
        # moment after they ended in the engine.
        assert at_once > 16
        until = time.monotonic() + LIMIT
        while sum(not stream.is_alive() for stream in running) < 32 - at_once:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert all(stream.is_alive() or stream.finish_reason == "length" for stream in running)


def large_url(seed: int) -> str:
    """A data: address of 4000 by 3000 pixels, in a small file; each seed has its own."""
    file = io.BytesIO()
    Image.new("RGB", (4000, 3000), (8 * seed % 256, 40, 200 - seed)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_an_image_is_not_blamed_for_crashes_while_it_was_answered() -> None:
    with served() as server:
        for crash in (1, 2):
            stream = Stream(server.url, question(image_url(0), **LONG))
            assert stream.begun.wait(LIMIT)
            server.worker.send_signal(signal.SIGABRT)
            stream.finish()
            server.wait_ready(crash + 1)
        assert ask(server, image_url(0), max_tokens=2).status_code == 200


def test_a_stopped_worker_is_noticed_within_thirty_seconds_replaced_and_its_requests_told() -> None:
    with served() as server, health_asked_all_the_time(server):
        worker = server.worker
        worker.suspend()
        stopped = time.monotonic()
        stream = Stream(server.url, question(image_url(0), **LONG))
        seen = set()
        while (answer := httpx.get(f"{server.url}/ready", timeout=LIMIT)).status_code == 200 or "stalled" not in seen:
            seen.add(answer.json()["status"])
            assert time.monotonic() - stopped < 30
            time.sleep(0.1)
        stream.finish()
        assert stream.ended_at - stopped < 30
        assert stream.events[-1]["error"]["code"] == "engine_died"  # behind a comment that kept the connection alive
        assert not worker.is_running()
        server.wait_ready(2)
        server.wait_line("did not answer for")
        assert ask(server, max_tokens=2).status_code == 200


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_ends_within_two_seconds_of_its_parent(stopped: bool) -> None:
    with served() as server:
        stream = Stream(server.url, question(image_url(0), **LONG))
        assert stream.begun.wait(LIMIT)
        worker, port = server.worker, int(server.url.rsplit(":", 1)[1])
        if stopped:
            worker.suspend()
        server.process.kill()
        _, alive = psutil.wait_procs([worker], timeout=2)
        assert not alive
    with served("--port", str(port)):
        pass  # the port is free again


def test_a_client_that_leaves_while_an_unloaded_model_loads_costs_one_loading() -> None:
    with served("--idle-unload-seconds", "0.5") as server:
        first = server.worker
        server.wait_line("model unloaded")
        psutil.wait_procs([first], timeout=LIMIT)
        assert not first.is_running()  # an unload is the end of the worker: all of its memory is back
        assert httpx.get(f"{server.url}/ready").status_code == 200
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=question(image_url(0)), timeout=0.05)
        started = server.worker.pid
        answer = ask(server, max_tokens=2)  # joins the loading that the other one began
        assert answer.status_code == 200
        assert answer.json()["stages"]["load_ms"] > 0
        assert server.worker.pid == started
        end = time.monotonic() + LIMIT
        while server.metric("num_requests_running"):  # counters come once a second
            assert time.monotonic() < end
        server.wait_line("model unloaded", 2)
        psutil.wait_procs(server.workers, timeout=LIMIT)
        assert server.workers == []


def test_it_survives_its_terminal_under_nohup() -> None:
    command = ["sh", "-c", 'trap "" HUP INT; exec "$@"', "sh", sys.executable, "-m", "opsin"]
    with served(command=command) as server:
        for number in (signal.SIGHUP, signal.SIGINT):
            server.process.send_signal(number)
        assert ask(server, max_tokens=2).status_code == 200
        assert server.end() == 0


@pytest.fixture
def hang_ups_end_it() -> Iterator[None]:
    """As in a terminal, also where the tests themselves run with SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid of util-linux")
@pytest.mark.usefixtures("hang_ups_end_it")
def test_it_survives_a_terminal_that_closes_for_real(tmp_path: Path) -> None:
    """The kernel sends SIGHUP to the server and to all else that runs in the terminal."""
    ours, theirs = pty.openpty()
    serve = [sys.executable, "-m", "opsin", "serve", "--port", "0", "--no-disk-cache"]
    shell = subprocess.Popen(
        ["setsid", "--ctty", "sh", "-c", 'nohup "$@" & wait', "sh", *serve],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    os.close(theirs)
    said = tmp_path / "nohup.out"
    until = time.monotonic() + LIMIT
    while not (said.exists() and (ready := READY.search(said.read_text()))):
        assert time.monotonic() < until
        time.sleep(0.05)
    server, *_ = psutil.Process(shell.pid).children()
    worker, *_ = [child for child in server.children() if "opsin.worker.process" in " ".join(child.cmdline())]
    try:
        os.close(ours)
        assert shell.wait(LIMIT) == -signal.SIGHUP
        body = question(max_tokens=2)
        assert httpx.post(f"{ready[1]}/v1/chat/completions", json=body, timeout=LIMIT).status_code == 200
        assert worker.is_running()
    finally:
        server.terminate()
        _, alive = psutil.wait_procs([server], timeout=LIMIT)
        assert not alive


@pytest.mark.usefixtures("hang_ups_end_it")
def test_a_hang_up_ends_it_where_nobody_asked_for_the_contrary() -> None:
    with served() as server:
        assert server.end(signal.SIGHUP) == 0
    with served() as server:
        assert server.end(signal.SIGINT) == 130


def test_sigterm_to_all_of_its_processes_lets_answers_end() -> None:
    # systemd and container runtimes send it to the whole group.
    with served() as server:
        stream = Stream(server.url, question(image_url(0), **LONG))
        assert stream.begun.wait(LIMIT)
        server.worker.terminate()
        server.process.terminate()
        stream.finish()
        assert (stream.broken, stream.done, stream.finish_reason) == (None, True, "length")
        assert server.exit_code() == 0


def damaged_model(folder: Path) -> Path:
    """The demo model with a number of layers that llama.cpp aborts on."""
    source = next(path for path in DEMO.glob("*.gguf") if "mmproj" not in path.name)
    data = bytearray(source.read_bytes())
    key = b"llama.block_count"
    at = data.index(key) + len(key) + 4  # behind the name and its type
    data[at : at + 4] = (0x7FFFFFFF).to_bytes(4, "little")
    path = folder / "damaged.gguf"
    path.write_bytes(data)
    return path


def test_a_model_that_crashes_llama_cpp_is_one_sentence_after_one_start(tmp_path: Path) -> None:
    path = damaged_model(tmp_path)
    projector = next(path for path in DEMO.glob("*.gguf") if "mmproj" in path.name)
    done = subprocess.run(
        [sys.executable, "-m", "opsin", "serve", "--port", "0", "--model", str(path), "--mmproj", str(projector)],
        env=environment(), capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    told = [line for line in done.stderr.splitlines() if line.startswith("opsin: ")]
    assert done.returncode == 3, done.stderr
    assert len(told) == 1
    assert str(path) in told[0]
    assert "started again" not in done.stderr
    assert done.stdout == ""
    assert READY.search(done.stderr) is None
    assert "gdb" not in done.stderr.lower() + os.linesep
