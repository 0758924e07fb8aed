"""Prometheus metrics, under the names that vLLM's users know, with `opsin:` in front.

What the engine counts is read from it when somebody asks for the metrics; what belongs to one request is noted at its
end. Labels have few values: no name, path or text that a client chose becomes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from opsin.core.answer import Answer
from opsin.core.stages import Stage
from opsin.engine import Snapshot
from opsin.server.model import ModelManager
from opsin.server.record import Record

# The boundaries in seconds that OpenTelemetry's conventions advise for gen_ai.server.time_to_first_token,
# .time_per_output_token and .request.duration:
# https://github.com/open-telemetry/semantic-conventions-genai/blob/main/docs/gen-ai/gen-ai-metrics.md
FIRST_TOKEN: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
PER_TOKEN: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
DURATION: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
# They name none for the parts of a request, which are as short as a first token and as long as a whole answer.
PART: Final = (*FIRST_TOKEN, 20.48, 40.96, 81.92)

MAX_REASONS: Final = 64
"""Values of the label `reason` of refusals; there are fewer error codes than that."""

router = APIRouter()


@router.get("/metrics", include_in_schema=False)
def show_metrics(request: Request) -> Response:
    """All metrics as text, for Prometheus."""
    for watcher in request.app.state.context.watchers:
        if isinstance(watcher, Metrics):
            body, content_type = watcher.render()
            return Response(body, headers={"content-type": content_type})
    return Response("This server keeps no metrics.\n", status_code=404, media_type="text/plain")


class Metrics:
    """A watcher with a registry of its own, so that several servers in one process do not mix."""

    def __init__(self, model: ModelManager) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineNumbers(model))
        self._refusals: set[str] = set()

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"opsin:{name}", text, labels, buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"opsin:{name}", text, labels, registry=self.registry)

        self._first_token = histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first piece of text.", FIRST_TOKEN
        )
        self._per_token = histogram(
            "time_per_output_token_seconds", "Time of an answer behind its first token, by token.", PER_TOKEN
        )
        self._duration = histogram(
            "e2e_request_latency_seconds", "From the request's arrival to its last byte.", DURATION
        )
        self._queue = histogram(
            "request_queue_time_seconds", "Time of an answer that the engine spent on others.", PART
        )
        self._pause = histogram("longest_pause_seconds", "The longest time between two pieces of a stream.", PART)
        self._stages = histogram("stage_seconds", "Time of an answer in a stage it went through.", PART, "stage")
        self._success = counter("request_success", "Answers, by why they ended.", "finished_reason")
        self._guard_stops = counter("guard_stops", "Answers that the guard ended, by why.", "reason")
        self._refused = counter("requests_refused", "Requests without a whole answer, by error code.", "reason")

    def render(self) -> tuple[bytes, str]:
        """The metrics now in Prometheus' text format, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def finished(self, record: Record) -> None:
        """See Watcher."""
        if record.refused == "cancelled":
            self._success.labels("cancelled").inc()
        elif record.refused is not None:
            self._refused.labels(self._bounded(record.refused)).inc()
        if not record.answers:
            return
        self._duration.observe(record.ended - record.began)
        if record.first_token_s is not None:
            self._first_token.observe(record.first_token_s)
        if any(len(times) > 1 for times in record.deltas):
            self._pause.observe(record.longest_pause_s)
        more = sum(answer.usage.completion_tokens - 1 for answer in record.answers)
        if more > 0:
            self._per_token.observe(sum(times[-1] - times[0] for times in record.deltas if times) / more)
        for answer in record.answers:
            self._note(answer)

    def _note(self, answer: Answer) -> None:
        self._success.labels(answer.finish_reason).inc()
        if answer.guard is not None:
            self._guard_stops.labels(answer.guard.reason).inc()
        self._queue.observe(answer.stages.queue_ms / 1e3)
        for stage in Stage:
            ms = getattr(answer.stages, f"{stage.value}_ms")
            if ms > 0:
                self._stages.labels(stage.value).observe(ms / 1e3)

    def _bounded(self, reason: str) -> str:
        if reason not in self._refusals and len(self._refusals) >= MAX_REASONS:
            return "other"
        self._refusals.add(reason)
        return reason


@dataclass(frozen=True, slots=True, eq=False)
class _EngineNumbers(Collector):
    """What the engine says of itself; zeros before the model was loaded. Counters go on when a worker is replaced."""

    manager: ModelManager

    def collect(self) -> Iterator[Metric]:
        model = self.manager.loaded
        now = Snapshot() if model is None else model.engine.stats
        used = 0.0 if model is None else now.cells_used / model.facts.limits.n_ctx
        yield _gauge("num_requests_running", "Answers that are computed.", now.running)
        yield _gauge("num_requests_waiting", "Answers that wait for their turn.", now.waiting)
        yield _gauge("kv_cache_usage_perc", "Share of the KV memory in use, 1 when full; prefixes count.", used)
        yield _gauge("num_idle_prefixes", "Prompts in the KV memory that nobody answers on now.", now.idle_prefixes)
        yield _gauge("ready", "1 when requests are answered.", float(self.manager.ready))
        yield _counter("prompt_tokens", "Tokens of prompts, remembered ones too.", now.prompt_tokens)
        yield _counter("generation_tokens", "Tokens that were drawn.", now.generated_tokens)
        yield _counter("prefix_cache_queries", "Tokens looked up in the KV memory.", now.prompt_tokens)
        yield _counter("prefix_cache_hits", "Tokens found in the KV memory.", now.prefix_hits)
        yield _counter("picture_cache_queries", "Pieces of pictures looked up.", now.picture_hits + now.encodes)
        yield _counter("picture_cache_hits", "Pieces of pictures that were not encoded again.", now.picture_hits)
        yield _counter("num_preemptions", "Answers put back into the queue for want of KV memory.", now.preemptions)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"opsin:{name}", text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"opsin:{name}", text, value)
