"""A hundred clients over HTTP for as long as SOAK_HTTP_MINUTES says: a third hang up, some send broken images.

Nothing is lost, no sequence stays taken, no error of the server's own, and the memory of the process that holds the
model stays where it was after the first fifth of the time.
"""

import asyncio
import base64
import contextlib
import json
import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
from serve_process import Served, image_url, question, served

from synth import write_pair

CLIENTS, SEQUENCES, IMAGES, CTX = 100, 8, 24, 2048
MINUTES = float(os.environ.get("SOAK_HTTP_MINUTES", "10"))
PATIENCE = 300.0
BROKEN_CODES = {"bad_image", "image_unsupported"}


def broken_urls() -> list[str]:
    whole = base64.b64decode(image_url(0).partition(",")[2])
    cut, mixed = whole[: len(whole) // 2], whole[:40] + bytes(200) + whole[240:]
    return [
        f"data:image/png;base64,{base64.b64encode(data).decode()}"
        for data in (cut, mixed, b"", b"%PDF-1.7", b"\x89PNG")
    ]


class Crowd:
    """The clients, and what became of their requests."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
        self._http = httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits)
        self._images = [image_url(seed, edge) for seed in range(IMAGES) for edge in (40, 64, 120)]
        self._broken = broken_urls()
        self.ends: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.until = time.monotonic() + MINUTES * 60

    async def client(self, seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < self.until:
            kind = rng.random()
            if kind < 0.1:
                await self._send_broken(rng)
            elif kind < 0.4:
                await self._hang_up(rng)
            elif kind < 0.7:
                await self._read_stream(rng)
            else:
                await self._ask(rng)

    def _body(self, rng: random.Random, **fields: object) -> dict[str, object]:
        url = rng.choice(self._images) if rng.random() < 0.8 else None
        text = "what is this? " * rng.choice((1, 1, 1, 8, 40))
        length = rng.choice((1, 8, 32, 64))
        return question(url, text, max_tokens=length, temperature=0.8, ignore_eos=True, **fields)

    async def _ask(self, rng: random.Random) -> None:
        body = self._body(rng)
        answer = await self._http.post("/v1/chat/completions", json=body)
        self.statuses[answer.status_code] += 1
        self.ends["told"] += answer.status_code == 500
        if answer.status_code == 200:
            choice = answer.json()["choices"][0]
            self.ends["whole" if choice["finish_reason"] in {"length", "stop"} else "lost"] += 1

    async def _read_stream(self, rng: random.Random) -> None:
        reasons: list[str] = []
        done = told = False
        async with self._http.stream("POST", "/v1/chat/completions", json=self._body(rng, stream=True)) as answer:
            self.statuses[answer.status_code] += 1
            async for line in answer.aiter_lines():
                done |= line == "data: [DONE]"
                told |= line.startswith('data: {"error"')
                reasons += re.findall(r'"finish_reason":\s*"(\w+)"', line)
        if answer.status_code == 200:
            self.ends["whole" if done and len(reasons) == 1 else "told" if told else "lost"] += 1

    async def _hang_up(self, rng: random.Random) -> None:
        """After some lines, or, with none to be waited for, after some time."""
        most = rng.randrange(12)
        body = self._body(rng, stream=True)

        async def read() -> None:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
                self.statuses[answer.status_code] += 1
                lines = 0
                async for _ in answer.aiter_lines():
                    lines += 1
                    if lines > most:
                        return

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), rng.random() * 2 if most < 3 else None)
        self.ends["hung up"] += 1

    async def _send_broken(self, rng: random.Random) -> None:
        answer = await self._http.post("/v1/chat/completions", json=question(rng.choice(self._broken)))
        self.statuses[answer.status_code] += 1
        refused = answer.status_code in {400, 415} and answer.json()["error"]["code"] in BROKEN_CODES
        self.ends["refused" if refused else "a broken image was taken"] += answer.status_code != 503

    async def run(self, server: Served) -> int:
        """Everybody until the end; the worker's resident memory after a fifth of the time."""

        async def watch() -> int:
            await asyncio.sleep(MINUTES * 12)
            return int(server.worker.memory_info().rss)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(self.client(seed) for seed in range(CLIENTS)))
        await self._http.aclose()
        return await watching


def gauge(server: Served, name: str) -> float:
    found = re.search(rf"^opsin:{name}(?:{{.*}})? (\S+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    assert found, f"/metrics has no {name}"
    return float(found[1])


def fill_the_context(server: Served) -> None:
    """Use all of llama.cpp's compute buffer once: its pages count from their first use."""
    body = question(None, "what is this? " * 220, max_tokens=1, ignore_eos=True)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE)
    assert answer.json()["usage"]["prompt_tokens"] > CTX - 32


def test_a_hundred_clients_lose_nothing(tmp_path: Path) -> None:
    pair = write_pair("tiny", tmp_path)
    arguments = ["--model", str(pair.llm), "--mmproj", str(pair.mmproj), "--ctx", str(CTX)]
    with served(*arguments, "--parallel", str(SEQUENCES)) as server:
        fill_the_context(server)
        crowd, worker = Crowd(server.url), server.worker
        early = asyncio.run(crowd.run(server))
        deadline = time.monotonic() + 30
        while gauge(server, "num_requests_running") or gauge(server, "num_requests_waiting"):
            assert time.monotonic() < deadline, "a sequence is stuck"
        last = httpx.post(f"{server.url}/v1/chat/completions", json=question(max_tokens=1), timeout=PATIENCE)
        late = worker.memory_info().rss
        assert server.worker == worker, "the worker was replaced"
        growth = late / early - 1
        print(
            f"{dict(crowd.ends)}, statuses {dict(crowd.statuses)}, "
            f"resident memory {early / 2**20:.1f} to {late / 2**20:.1f} MiB ({growth:+.2%})"
        )
        assert last.status_code == 200
        assert server.end() == 0
    assert crowd.ends["whole"] > CLIENTS
    assert crowd.ends["hung up"] > 0
    assert crowd.ends["refused"] > 0
    assert set(+crowd.ends) == {"whole", "hung up", "refused"}
    assert set(crowd.statuses) <= {200, 400, 415, 503}
    assert growth <= 0.02


def test_a_worker_that_crashes_every_minute_loses_only_what_it_had_begun(tmp_path: Path) -> None:
    pair = write_pair("tiny", tmp_path)
    arguments = ["--model", str(pair.llm), "--mmproj", str(pair.mmproj), "--ctx", str(CTX)]
    crashes = 0

    async def crash(crowd: Crowd, server: Served) -> None:
        nonlocal crashes
        every = min(60.0, MINUTES * 15)
        while time.monotonic() + every < crowd.until:
            await asyncio.sleep(every)
            server.worker.send_signal(signal.SIGSEGV)
            crashes += 1
            await asyncio.sleep(2)
            assert (await asyncio.to_thread(httpx.get, f"{server.url}/health")).status_code == 200

    async def everybody(crowd: Crowd, server: Served) -> None:
        crashing = asyncio.create_task(crash(crowd, server))
        await crowd.run(server)
        await crashing

    with served(*arguments, "--parallel", str(SEQUENCES)) as server:
        crowd, front = Crowd(server.url), psutil.Process(server.process.pid)
        asyncio.run(everybody(crowd, server))
        deadline = time.monotonic() + 30
        while gauge(server, "num_requests_running") or gauge(server, "num_requests_waiting"):
            assert time.monotonic() < deadline, "a sequence is stuck"
        last = httpx.post(f"{server.url}/v1/chat/completions", json=question(max_tokens=1), timeout=PATIENCE)
        print(f"{crashes} crashes: {dict(crowd.ends)}, statuses {dict(crowd.statuses)}")
        assert last.status_code == 200
        assert front.is_running()
        assert server.end() == 0
    assert crashes > 0
    assert set(crowd.ends) <= {"whole", "hung up", "refused", "told"}
    assert set(crowd.statuses) <= {200, 400, 415, 500, 503}
    # A crash takes those that ran, and no more.
    assert crowd.ends["told"] <= crashes * SEQUENCES
    assert crowd.ends["whole"] > CLIENTS


def test_sigterm_amid_a_hundred_clients_loses_no_running_answer(tmp_path: Path) -> None:
    """Whatever the server had begun with is answered whole; what comes later is refused or finds nobody there."""
    pair = write_pair("tiny", tmp_path)
    outcomes: Counter[str] = Counter()
    enough = asyncio.Event()

    async def client(http: httpx.AsyncClient, seed: int) -> None:
        done = True
        while done:
            status, done = 0, False
            body = question(image_url(seed % IMAGES, 40), max_tokens=32, ignore_eos=True, stream=True)
            try:
                async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                    status = answer.status_code
                    async for line in answer.aiter_lines():
                        done |= line == "data: [DONE]"
            except httpx.TransportError:
                outcomes["cut off" if status else "nobody there"] += 1
                return
            outcomes["200" if done else f"{status} without an end" if status == 200 else f"{status}"] += 1
            if outcomes["200"] >= CLIENTS:
                enough.set()

    async def everybody(server: Served) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, limits=httpx.Limits()) as http:
            clients = [asyncio.create_task(client(http, seed)) for seed in range(CLIENTS)]
            await enough.wait()
            server.process.terminate()
            await asyncio.gather(*clients)

    with served("--model", str(pair.llm), "--mmproj", str(pair.mmproj), "--ctx", str(CTX), "--log-json") as server:
        asyncio.run(everybody(server))
        assert server.exit_code() == 0
        logged = Counter(str(json.loads(line)["status"]) for line in server.lines if line.startswith("{"))
        assert not [line for line in server.lines if "cut off" in line]
    print(dict(outcomes), dict(logged))
    assert set(outcomes) <= {"200", "503", "nobody there"}
    # By its own account the server ended no other request, and every answer it counts as whole came in whole.
    assert set(logged) <= {"200", "503"}
    assert outcomes["200"] == logged["200"] > CLIENTS
