"""Who is told about each request: metrics for Prometheus, the access log, and OpenTelemetry traces.

None of them ever contains a prompt, an answer, a key, or the address of an image. Labels of metrics have few values:
no name, path or text that a client chose becomes one.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from opsin import __version__
from opsin.core.answer import Answer, Stage
from opsin.core.errors import BadParameter
from opsin.engine.clock import stage_row
from opsin.server.handler import ModelManager, RequestStats
from opsin.server.images import FairQueue

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.util.types import AttributeValue


# The boundaries in seconds that OpenTelemetry's conventions advise for gen_ai.server.time_to_first_token,
# .time_per_output_token and .request.duration:
# https://github.com/open-telemetry/semantic-conventions-genai/blob/main/docs/gen-ai/gen-ai-metrics.md
FIRST_TOKEN: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
PER_TOKEN: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
DURATION: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
# They give none for the parts of a request, which are as short as a first token and as long as a whole answer.
PART: Final = (*FIRST_TOKEN, 20.48, 40.96, 81.92)

NAME = "opsin.access"


class Metrics(Collector):
    """Metrics of one server, in a `registry` of their own. What waits in `queue` is not in the engine yet."""

    def __init__(self, manager: ModelManager, queue: FairQueue) -> None:
        self._manager, self._before = manager, queue
        self.registry = CollectorRegistry()
        self.registry.register(self)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"opsin:{name}", text, labels, buckets=buckets, registry=self.registry)

        self._first_token = histogram("time_to_first_token_seconds", "From arrival to the first text.", FIRST_TOKEN)
        self._per_token = histogram("time_per_output_token_seconds", "Time by token after the first.", PER_TOKEN)
        self._duration = histogram("e2e_request_latency_seconds", "From arrival to the last byte.", DURATION)
        self._queue = histogram("request_queue_time_seconds", "Time of an answer spent on others.", PART)
        self._pause = histogram("longest_pause_seconds", "The longest time between two pieces of a stream.", PART)
        self._stages = histogram("stage_seconds", "Time of an answer in a stage it went through.", PART, "stage")
        counter = functools.partial(Counter, registry=self.registry)
        self._success = counter("opsin:request_success", "Answers, by why they ended.", ["finished_reason"])
        self._guard_stops = counter("opsin:guard_stops", "Answers that the guard ended, by why.", ["reason"])
        self._refused = counter("opsin:requests_refused", "Requests without a whole answer, by error code.", ["reason"])

    def finished(self, stats: RequestStats) -> None:
        """Count a request (a Watcher)."""
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
            if ms := getattr(answer.stages, f"{stage.value}_ms"):
                self._stages.labels(stage.value).observe(ms / 1e3)

    def collect(self) -> Iterator[Metric]:
        """What the engine says about itself when it is asked; zeros before a model is loaded."""
        engine = self._manager.engine
        now, loaded = engine.stats, engine.loaded
        used = 0.0 if loaded is None else now.cells_used / loaded.limits.n_ctx
        for name, text, value in (
            ("num_requests_running", "Answers that are computed.", now.running),
            ("num_requests_waiting", "Answers that wait for their turn.", now.waiting + self._before.waiting),
            ("kv_cache_usage_perc", "Share of the KV cache in use, 1 when full; prefixes count.", used),
            ("num_idle_prefixes", "Prompts kept of ended answers, swapped out or not.", now.idle_prefixes),
            ("ready", "1 when requests are answered.", float(self._manager.ready)),
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


class AccessLog:
    """One line per request in the logger `opsin.access`, on standard error if that has no handler yet.

    A plain line shows the main stages of the choice that took longest; JSON has all stages of all choices.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._log = logging.getLogger(NAME)
        if not self._log.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(message)s"))
            self._log.addHandler(handler)
            self._log.propagate = False
        self._log.setLevel(logging.INFO)

    def finished(self, stats: RequestStats) -> None:
        """Write the line of a request (a Watcher)."""
        fields = _fields(stats)
        self._log.info("%s", json.dumps(fields) if self._as_json else _plain(fields))


def _fields(stats: RequestStats) -> dict[str, Any]:
    """What the log and the traces say of a request."""
    usages = [answer.usage for answer in stats.answers]
    return {
        "time": datetime.fromtimestamp(stats.began_at, UTC).isoformat(timespec="milliseconds"),
        "id": stats.id,
        "route": stats.route,
        "status": stats.status,
        "refused": stats.refused,
        # The name of a file can neither start a new line nor look like another field.
        "model": re.sub(r"[^\x21-\x7e]", "?", stats.model)[:100],
        "streamed": stats.streamed,
        "images": stats.images,
        "prompt_tokens": max((usage.prompt_tokens for usage in usages), default=0),
        "cached_tokens": max((usage.cached_tokens for usage in usages), default=0),
        "completion_tokens": sum(usage.completion_tokens for usage in usages),
        "first_token_s": None if stats.first_token_s is None else round(stats.first_token_s, 4),
        "longest_pause_s": round(stats.longest_pause_s, 4),
        "total_s": round(stats.ended - stats.began, 4),
        "answers": [
            {
                "finish_reason": answer.finish_reason,
                "limit": answer.limit,
                "guard": None if answer.guard is None else asdict(answer.guard),
                "stages": stage_row(answer.stages),
            }
            for answer in stats.answers
        ],
    }


def _plain(fields: dict[str, Any]) -> str:
    words = [fields["time"], fields["id"], fields["route"], str(fields["status"])]
    words += [f"{name}={fields[name]}" for name in ("refused", "model") if fields[name]]
    total, answers = f"total={fields['total_s']:.3f}s", fields["answers"]
    if not answers:
        return " ".join((*words, total))
    words.append(f"tokens={fields['prompt_tokens']}+{fields['completion_tokens']}")
    if fields["first_token_s"] is not None:
        words += [f"ttft={fields['first_token_s']:.3f}s", f"pause={fields['longest_pause_s']:.3f}s"]
    stages = max((answer["stages"] for answer in answers), key=lambda stages: stages["total_ms"])
    least_ms = 0.01 * stages.pop("total_ms")
    words += [total, *(f"{name.removesuffix('_ms')}={ms / 1e3:.3f}s" for name, ms in stages.items() if ms > least_ms)]
    return " ".join((*words, *(f"end={answer['limit'] or answer['finish_reason']}" for answer in answers)))


_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/responses": "chat", "/v1/completions": "text_completion"}
LAST_SPANS_SECONDS = 2.0
"""How long a server that ends waits for the collector."""


class Tracing:
    """A watcher with a tracer of its own. Spans are sent by a thread, the last ones by `close`.

    Names are those of OpenTelemetry's GenAI conventions; others start with `opsin`. Prompts and answers are never part
    of a span. Raises BadParameter if OpenTelemetry is not installed.
    """

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        try:
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter()
        except ImportError as error:
            raise BadParameter("Traces need OpenTelemetry: pip install 'opsin[otel]', or leave out --otel.") from error
        name = OTELResourceDetector().detect().attributes.get("service.name", "opsin")
        resource = Resource.create({"service.name": name, "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("opsin", __version__)

    def finished(self, stats: RequestStats) -> None:
        """Make the spans of a request (a Watcher)."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        from opentelemetry.trace.status import StatusCode

        def unix_ns(at: float) -> int:
            return int((stats.began_at + at - stats.began) * 1e9)

        operation = _OPERATIONS.get(stats.route)
        if operation is None:
            return  # not one of our addresses
        caller = {} if stats.traceparent is None else {"traceparent": stats.traceparent}
        span = self._tracer.start_span(
            f"{operation} {stats.model[:100]}".rstrip(),
            context=TraceContextTextMapPropagator().extract(caller),
            kind=SpanKind.SERVER,
            attributes=_attributes(stats, operation),
            start_time=unix_ns(stats.began),
        )
        if stats.status >= 500:
            span.set_status(StatusCode.ERROR)
        inside = set_span_in_context(span)
        for choice, answer in enumerate(stats.answers):
            for interval in answer.intervals:
                attributes = {
                    "opsin.choice": choice,
                    "opsin.stage.ms": interval.seconds * 1e3,
                    "opsin.stage.times": interval.count,
                }
                start = unix_ns(interval.start)
                self._tracer.start_span(
                    interval.stage.value, context=inside, attributes=attributes, start_time=start
                ).end(unix_ns(interval.end))
        span.end(unix_ns(stats.ended))

    def close(self) -> None:
        """Send what is left, within LAST_SPANS_SECONDS; a second call does nothing."""
        # The exporter itself tries for ten seconds, and no argument of the provider makes that shorter.
        sending = threading.Thread(target=self._provider.shutdown, name="opsin-traces", daemon=True)
        sending.start()
        sending.join(LAST_SPANS_SECONDS)


def _attributes(stats: RequestStats, operation: str) -> dict[str, AttributeValue]:
    fields = _fields(stats)
    attributes: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "opsin",
        "gen_ai.request.model": fields["model"],
        "gen_ai.request.stream": stats.streamed,
        "gen_ai.response.id": stats.id,
        "gen_ai.response.time_to_first_chunk": stats.first_token_s,
        "gen_ai.response.finish_reasons": [answer.finish_reason for answer in stats.answers],
        "gen_ai.usage.input_tokens": fields["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": fields["cached_tokens"],
        "gen_ai.usage.output_tokens": fields["completion_tokens"],
        "http.request.method": "POST",
        "http.response.status_code": stats.status,
        "url.path": stats.route,
        "error.type": stats.refused,
        "opsin.images": stats.images,
        "opsin.longest_pause_ms": stats.longest_pause_s * 1e3,
        "opsin.guard": [answer.guard.reason for answer in stats.answers if answer.guard is not None],
    }
    return {name: value for name, value in attributes.items() if value is not None and value != []}
