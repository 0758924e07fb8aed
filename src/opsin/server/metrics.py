"""Prometheus metrics, under vLLM's names with `opsin:` in front.

What the engine counts is read when the metrics are requested; what belongs to one request is noted at its end. Labels
have few values: no name, path or text that a client chose becomes one.
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
from opsin.server.context import Context
from opsin.server.model import ModelManager
from opsin.server.request_stats import RequestStats

# The boundaries in seconds that OpenTelemetry's conventions advise for gen_ai.server.time_to_first_token,
# .time_per_output_token and .request.duration:
# https://github.com/open-telemetry/semantic-conventions-genai/blob/main/docs/gen-ai/gen-ai-metrics.md
FIRST_TOKEN: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
PER_TOKEN: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
DURATION: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
# They give none for the parts of a request, which are as short as a first token and as long as a whole answer.
PART: Final = (*FIRST_TOKEN, 20.48, 40.96, 81.92)

router = APIRouter()


@router.get("/metrics", include_in_schema=False)
def show_metrics(request: Request) -> Response:
    """All metrics as text, for Prometheus."""
    context: Context = request.app.state.context
    for watcher in context.watchers:
        if isinstance(watcher, Metrics):
            body, content_type = watcher.render(context.queue.waiting)
            return Response(body, headers={"content-type": content_type})
    return Response("This server keeps no metrics.\n", status_code=404, media_type="text/plain")


class Metrics:
    """A watcher with a registry of its own, so that several servers in one process do not mix."""

    def __init__(self, model: ModelManager) -> None:
        self.registry = CollectorRegistry()
        self._engine = _EngineNumbers(model)
        self.registry.register(self._engine)

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

    def render(self, waiting: int = 0) -> tuple[bytes, str]:
        """The metrics now in Prometheus' text format, and its content type; `waiting` answers are not in the engine."""
        self._engine.waiting = waiting
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def finished(self, stats: RequestStats) -> None:
        """See Watcher."""
        if stats.refused == "cancelled":
            self._success.labels("cancelled").inc()
        elif stats.refused is not None:
            self._refused.labels(stats.refused).inc()
        if not stats.answers:
            return
        self._duration.observe(stats.ended - stats.began)
        if stats.first_token_s is not None:
            self._first_token.observe(stats.first_token_s)
        if any(len(times) > 1 for times in stats.deltas):
            self._pause.observe(stats.longest_pause_s)
        more = sum(answer.usage.completion_tokens - 1 for answer in stats.answers)
        if more > 0:
            self._per_token.observe(sum(times[-1] - times[0] for times in stats.deltas if times) / more)
        for answer in stats.answers:
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


@dataclass(slots=True, eq=False)
class _EngineNumbers(Collector):
    """What the engine says about itself; zeros before a model is loaded. Counters go on when a worker is replaced."""

    manager: ModelManager
    waiting: int = 0
    """Answers that wait for their key's turn before the engine gets them."""

    def collect(self) -> Iterator[Metric]:
        model = self.manager.loaded
        now = Snapshot() if model is None else model.engine.stats
        used = 0.0 if model is None else now.cells_used / model.facts.limits.n_ctx
        for name, text, value in (
            ("num_requests_running", "Answers that are computed.", now.running),
            ("num_requests_waiting", "Answers that wait for their turn.", now.waiting + self.waiting),
            ("kv_cache_usage_perc", "Share of the KV cache in use, 1 when full; prefixes count.", used),
            ("num_idle_prefixes", "Prompts in the KV cache that no running answer uses.", now.idle_prefixes),
            ("ready", "1 when requests are answered.", float(self.manager.ready)),
        ):
            yield GaugeMetricFamily(f"opsin:{name}", text, value)
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts, cached ones included.", now.prompt_tokens),
            ("generation_tokens", "Tokens that were sampled.", now.generated_tokens),
            ("prefix_cache_queries", "Tokens looked up in the KV cache.", now.prompt_tokens),
            ("prefix_cache_hits", "Tokens found in the KV cache.", now.prefix_hits),
            ("image_cache_queries", "Pieces of images looked up.", now.image_hits + now.encodes),
            ("image_cache_hits", "Pieces of images that were not encoded again.", now.image_hits),
            ("picture_cache_queries", "Old name of image_cache_queries.", now.image_hits + now.encodes),
            ("picture_cache_hits", "Old name of image_cache_hits.", now.image_hits),
            ("num_preemptions", "Answers put back into the queue because the KV cache was full.", now.preemptions),
        ):
            yield CounterMetricFamily(f"opsin:{name}", text, value)
