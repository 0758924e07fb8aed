"""`opsin serve --workers 2` as its clients see it."""

import signal
import time

import httpx
import psutil
import pytest
from serve_process import LIMIT, Served, Stream, image_url, question, served

pytestmark = [pytest.mark.slow, pytest.mark.native]

LONG = {"max_tokens": 400, "ignore_eos": True, "guard": False, "temperature": 0}


def get(server: Served, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}/{path}", timeout=LIMIT)


def ask(server: Served, seed: int) -> httpx.Response:
    body = question(image_url(seed), max_tokens=4)
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=LIMIT).raise_for_status()


def encodes(server: Served) -> float:
    return server.metric("image_cache_queries_total") - server.metric("image_cache_hits_total")


def test_two_workers_answer_as_one_and_the_death_of_one_stops_only_its_answers() -> None:
    with served("--workers", "2") as server:
        assert get(server, "props").json()["total_slots"] == 16
        workers = server.workers
        assert len(workers) == 2
        before = encodes(server)
        for _ in range(2):
            for seed in range(6):
                ask(server, seed)
        assert encodes(server) == before + 6, "an image is encoded by one worker"
        streams = [Stream(server.url, question(text=f"{number}?", **LONG)) for number in range(8)]
        assert all(stream.begun.wait(LIMIT) for stream in streams)
        workers[0].send_signal(signal.SIGKILL)
        for stream in streams:
            stream.finish()
        assert any(stream.done for stream in streams), "those of the other worker go on"
        assert {stream.events[-1]["error"]["code"] for stream in streams if not stream.done} <= {"engine_died"}
        sampled = server.metric("generation_tokens_total")
        assert get(server, "ready").status_code == 200
        for seed in range(6):
            ask(server, seed)
        assert server.metric("generation_tokens_total") >= sampled + 6
        end = time.monotonic() + LIMIT
        while len(server.workers) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        workers = server.workers
        assert server.end() == 0
        _, alive = psutil.wait_procs(workers, timeout=LIMIT)
        assert not alive
