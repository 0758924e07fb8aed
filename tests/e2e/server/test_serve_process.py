"""`opsin serve` as a user runs it: ready, told to end, killed, and asked for what cannot be."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from serve_process import LIMIT, Served, Stream, environment, image_url, question, served

from opsin import Opsin

pytestmark = pytest.mark.slow

LONG = {"max_tokens": 600, "ignore_eos": True, "guard": False, "temperature": 0}


def ask(server: Served, url: str | None = None, **fields: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=question(url, **fields), timeout=LIMIT)


def refused(*arguments: str, cwd: Path | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "opsin", "serve", *arguments],
        env=environment(), cwd=cwd, capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def streams(server: Served, count: int, **fields: object) -> list[Stream]:
    running = [Stream(server.url, question(image_url(seed), **{**LONG, **fields})) for seed in range(count)]
    for stream in running:
        assert stream.begun.wait(LIMIT)
    assert all(stream.is_alive() for stream in running), "the answers are too short for this test"
    return running


def test_it_says_where_it_is_answers_and_ends_in_good_order() -> None:
    with served("--served-name", "eye", "--parallel", "2") as server:
        assert httpx.get(f"{server.url}/ready").status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert "text/html" in httpx.get(f"{server.url}/").headers["content-type"]
        answer = ask(server, image_url(0), max_tokens=8).json()
        assert answer["model"] == "eye"
        assert answer["usage"]["completion_tokens"] > 0
        parent = psutil.Process(server.process.pid)
        worker = server.worker
        assert "libllama" not in "".join(region.path for region in parent.memory_maps())
        assert server.end() == 0
        assert not worker.is_running()
        assert not [line for line in server.lines if "Traceback" in line or "error" in line.lower()]


def test_the_socket_is_there_before_the_model_and_says_not_yet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Served("--port", str(port), "--no-disk-cache")
    try:
        server.wait_line("loading the model")
        # Asked before the child has begun to listen: the parent's socket keeps the question until there is an answer.
        first = httpx.get(f"http://127.0.0.1:{port}/ready", timeout=LIMIT)
        assert first.status_code == 503
        assert first.json()["status"] in {"loading", "warming"}
        assert httpx.get(f"{server.wait_ready()}/ready").status_code == 200
    finally:
        assert server.end() == 0


def test_sigterm_amid_streams_loses_none_and_refuses_new_ones() -> None:
    with served() as server:
        running = streams(server, 4)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + LIMIT
        while (ready := httpx.get(f"{server.url}/ready")).status_code == 200:
            assert time.monotonic() < deadline
        new = ask(server)
        assert (ready.status_code, new.status_code) == (503, 503)
        assert int(new.headers["retry-after"]) > 0
        assert new.json()["error"]["code"] == "not_ready"
        for stream in running:
            stream.finish()
            assert (stream.broken, stream.done, stream.finish_reason) == (None, True, "length")
        assert server.exit_code() == 0


def test_what_outlasts_the_drain_is_told_so() -> None:
    with served("--drain-seconds", "0.1") as server:
        running = streams(server, 2, max_tokens=7000)
        assert server.end() == 0
        for stream in running:
            stream.finish()
            assert stream.broken is None
            assert stream.finish_reason is None
            assert stream.events[-1]["error"]["code"] == "engine_closed"


def test_an_idle_model_is_unloaded_and_loaded_by_the_next_request() -> None:
    with served("--idle-unload-seconds", "0.3") as server:
        server.wait_line("model unloaded")
        assert httpx.get(f"{server.url}/ready").status_code == 200
        answer = ask(server, max_tokens=2)
        assert answer.status_code == 200
        assert answer.json()["stages"]["load_ms"] > 0


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = refused("--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "in use by another program" in said
    assert said.count("\n") == 1


def test_a_model_that_does_not_exist_ends_at_once(tmp_path: Path) -> None:
    code, said = refused("--port", "0", "--model", str(tmp_path / "none.gguf"))
    assert code == 3
    assert "there is no file" in said
    assert "started again" not in said


def test_wrong_settings_are_one_sentence_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "opsin.toml").write_text("prallel = 2\n")
    code, said = refused("--port", "0", cwd=tmp_path)
    assert (code, said.count("\n")) == (2, 1)
    assert "nearest one is parallel" in said
    (tmp_path / "opsin.toml").write_text("")
    code, said = refused("--host", "0.0.0.0", "--port", "0", cwd=tmp_path)
    assert code == 2
    assert "key" in said
    code, said = refused("--allowed-hosts", "http://not a host/", "--port", "0", cwd=tmp_path)
    assert code == 2
    assert "started again" not in said


def test_a_module_in_the_working_folder_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the working folder was imported from')")
    # As the installed command starts it; `python -m` would import from the working folder by itself.
    start = "import sys; sys.path[:] = filter(None, sys.path); from opsin.__main__ import main; main()"
    with served(cwd=tmp_path, command=[sys.executable, "-c", start]) as server:
        assert httpx.get(f"{server.url}/ready").status_code == 200


def test_the_answers_are_those_of_the_library(tmp_path: Path) -> None:
    image = Path(__file__).parents[3] / "src" / "opsin" / "models" / "demo" / "shapes.png"
    with Opsin(disk_cache=False) as opsin:
        wanted = opsin.ask(image, "What is in this picture?", temperature=0).text
    with served("--media-path", str(image.parent)) as server:
        answer = ask(server, image.as_uri(), temperature=0)
        assert answer.json()["choices"][0]["message"]["content"] == wanted
