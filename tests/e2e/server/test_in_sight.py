"""One slow request under load, found in the metrics, in the trace and in the log: the same pause, the same stages."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from opsin.core.answer import Stage
from opsin.core.settings import ServerSettings
from opsin.server.app import create_app
from opsin.server.handler import ModelManager
from opsin.server.images import ImageLoader
from opsin.server.watchers import NAME, AccessLog, Tracing
from opsin.worker import WorkerEngine

pytestmark = [pytest.mark.slow, pytest.mark.native]

CALLER = "0af7651916cd43dd8448eb211c80319c"
REQUESTS = 6
STAGES = [stage.value for stage in Stage]


@dataclass
class Seen:
    """What is left of a scene when the server is gone."""

    slow: dict[str, Any] = field(default_factory=dict)
    slow_id: str = ""
    metrics: dict[tuple[str, ...], float] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    spans: list[ReadableSpan] = field(default_factory=list)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def image(number: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (640, 480), (40 * number % 256, 90, 200 - 10 * number)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def question(number: int, tokens: int, **fields: Any) -> dict[str, Any]:
    """Made before the first is sent: client and server share an event loop."""
    content = [
        {"type": "image_url", "image_url": {"url": image(number)}},
        {"type": "text", "text": f"How many? {number}"},
    ]
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "guard": False, **fields}


LONG = question(0, 300, stream=True)
SHORT = [question(number, 30) for number in range(1, REQUESTS)]


async def stream(client: httpx.AsyncClient, seen: Seen, running: asyncio.Event) -> None:
    """The slow one: a long answer, of which every piece is read as it comes."""
    headers = {"traceparent": f"00-{CALLER}-b7ad6b7169203331-01"}
    async with client.stream("POST", "/v1/chat/completions", json=LONG, headers=headers) as reply:
        assert reply.status_code == 200, await reply.aread()
        seen.slow_id = reply.headers["x-request-id"]
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                running.set()
                if "stages" in chunk:
                    seen.slow = chunk
    assert seen.slow, "the last event has the stages"


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    reply = await client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 - neither uvicorn nor a log handler has an event for it
        await asyncio.sleep(0.01)


async def talk(port: int, seen: Seen, lines: list[str]) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        running = asyncio.Event()
        slow = asyncio.create_task(stream(client, seen, running))
        await running.wait()
        # More than may run at a time: the stream pauses for their images, and some of them queue.
        await asyncio.gather(slow, *(ask(client, body) for body in SHORT))
        await until(lambda: len(lines) == REQUESTS)  # a request is told of behind its last byte
        text = (await client.get("/metrics")).text
    for family in text_string_to_metric_families(text):
        seen.metrics |= {(sample.name, *sample.labels.values()): sample.value for sample in family.samples}


async def scene(seen: Seen, lines: list[str]) -> None:
    settings = ServerSettings(port=0, parallel=3, disk_cache=False)
    engine = WorkerEngine(None, None, settings)
    exporter, model, images = InMemorySpanExporter(), ModelManager(settings, engine), ImageLoader(settings)
    tracing = Tracing(exporter)
    watchers = (tracing.finished, AccessLog(as_json=True).finished)
    app = create_app(model, images, watchers=watchers)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off", ws="none"))

    await asyncio.to_thread(engine.wait_ready)
    serving = asyncio.create_task(server.serve())
    try:
        await asyncio.wait_for(until(lambda: server.started), 10)
        port = server.servers[0].sockets[0].getsockname()[1]
        await asyncio.wait_for(talk(port, seen, lines), 60)
    finally:
        server.should_exit = True
        await serving
        await asyncio.to_thread(engine.close)
        images.close()
        tracing.close()
    seen.spans = list(exporter.get_finished_spans())


@pytest.fixture(scope="module")
def seen() -> Seen:
    seen, handler = Seen(), Lines()
    logging.getLogger(NAME).addHandler(handler)
    try:
        asyncio.run(scene(seen, handler.lines))
    finally:
        logging.getLogger(NAME).removeHandler(handler)
    seen.lines = [json.loads(line) for line in handler.lines]
    return seen


def line_of(seen: Seen) -> dict[str, Any]:
    (line,) = (line for line in seen.lines if line["id"] == seen.slow_id)
    return line


def root_of(seen: Seen) -> ReadableSpan:
    (span,) = (span for span in seen.spans if (span.attributes or {}).get("gen_ai.response.id") == seen.slow_id)
    return span


def stages_of(seen: Seen) -> list[ReadableSpan]:
    root = root_of(seen).context.span_id
    return [span for span in seen.spans if span.parent is not None and span.parent.span_id == root]


def test_the_slow_request_paused_and_queued(seen: Seen) -> None:
    stages = seen.slow["stages"]
    assert stages["queue_ms"] > 10
    assert stages["encode_ms"] > 0
    assert stages["decode_ms"] > 10
    assert line_of(seen)["longest_pause_s"] > 0.005


def test_its_pause_is_in_all_three(seen: Seen) -> None:
    pause = line_of(seen)["longest_pause_s"]
    attributes = root_of(seen).attributes
    assert attributes is not None
    assert attributes["opsin.longest_pause_ms"] == pytest.approx(pause * 1e3, abs=0.1)
    # The histogram has it beside those of the others: its bucket is not empty, and the sum is that of all.
    bounds = sorted(float(key[1]) for key in seen.metrics if key[0] == "opsin:longest_pause_seconds_bucket")
    at, below = itertools.tee(bounds)
    upper = next(bound for bound in at if bound >= pause)
    lower = max((bound for bound in below if bound < pause), default=None)

    def count(bound: float | None) -> float:
        buckets = {float(k[1]): v for k, v in seen.metrics.items() if k[0] == "opsin:longest_pause_seconds_bucket"}
        return 0.0 if bound is None else buckets[bound]

    assert count(upper) - count(lower) >= 1
    pauses = sum(line["longest_pause_s"] for line in seen.lines)
    assert seen.metrics["opsin:longest_pause_seconds_sum",] == pytest.approx(pauses, abs=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_the_same_in_all_three(seen: Seen, stage: str) -> None:
    ms = seen.slow["stages"][f"{stage}_ms"]
    (answer,) = line_of(seen)["answers"]
    assert answer["stages"][f"{stage}_ms"] == ms
    told = [span.attributes["opsin.stage.ms"] for span in stages_of(seen) if span.name == stage]  # type: ignore[index]
    assert sum(told) == pytest.approx(ms, abs=0.01)  # type: ignore[arg-type]
    assert bool(told) == bool(ms)
    of_all = [a["stages"][f"{stage}_ms"] / 1e3 for line in seen.lines for a in line["answers"]]
    assert seen.metrics.get(("opsin:stage_seconds_sum", stage), 0.0) == pytest.approx(sum(of_all), abs=1e-4)
    assert seen.metrics.get(("opsin:stage_seconds_count", stage), 0.0) == sum(one > 0 for one in of_all)


def test_its_stages_are_disjoint_and_make_up_its_time(seen: Seen) -> None:
    stages = seen.slow["stages"]
    assert sum(stages[f"{stage}_ms"] for stage in STAGES) == pytest.approx(stages["total_ms"], abs=0.1)
    apart = sorted((s for s in stages_of(seen) if s.attributes["opsin.stage.times"] == 1), key=lambda s: s.start_time)  # type: ignore[index, arg-type, return-value]
    assert len(apart) > 4
    for before, after in itertools.pairwise(apart):
        assert before.end_time <= after.start_time + 1000  # type: ignore[operator]
    root = root_of(seen)
    assert stages["total_ms"] * 1e6 <= root.end_time - root.start_time  # type: ignore[operator]


def test_the_trace_hangs_under_the_callers_and_each_request_has_one(seen: Seen) -> None:
    assert f"{root_of(seen).context.trace_id:032x}" == CALLER
    assert sum(span.kind is SpanKind.SERVER for span in seen.spans) == len(seen.lines) == REQUESTS


def test_all_are_counted(seen: Seen) -> None:
    metrics = seen.metrics
    assert metrics["opsin:request_success_total", "length"] == REQUESTS
    assert metrics["opsin:e2e_request_latency_seconds_count",] == REQUESTS
    assert metrics["opsin:num_requests_running",] == metrics["opsin:num_requests_waiting",] == 0
    prompts = sum(line["prompt_tokens"] for line in seen.lines)
    drawn = sum(line["completion_tokens"] for line in seen.lines)
    # The warm-up counts, too.
    assert metrics["opsin:prompt_tokens_total",] >= prompts
    assert metrics["opsin:generation_tokens_total",] >= drawn == 300 + 5 * 30
    assert metrics["opsin:image_cache_queries_total",] >= REQUESTS
