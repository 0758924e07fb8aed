"""Who is told about each request: metrics for Prometheus, the access log, and OpenTelemetry traces.

None of them ever contains a prompt, an answer, a key, or the address of an image. Labels of metrics have few values:
no name, path or text that a client chose becomes one.
"""

import json
import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from opsin import __version__
from opsin.core.answer import Answer, Stage
from opsin.core.errors import BadParameter
from opsin.core.files import read_table
from opsin.engine.clock import stage_row
from opsin.server.handler import ModelManager, RequestStats
from opsin.server.images import FairQueue

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.util.types import AttributeValue


_TABLE = read_table(__file__, "metrics.toml")
NAME = "opsin.access"


class Metrics(Collector):
    """Metrics of one server, in a `registry` of their own. What waits in `queue` is not in the engine yet."""

    def __init__(self, manager: ModelManager, queue: FairQueue) -> None:
        self._manager, self._before = manager, queue
        self.registry = CollectorRegistry()
        self.registry.register(self)

        self._histograms = {
            name: Histogram(f"opsin:{name}", text, labels, buckets=_TABLE["buckets"][buckets], registry=self.registry)
            for name, (text, buckets, *labels) in _TABLE["histograms"].items()
        }
        self._counters = {
            name: Counter(f"opsin:{name}", text, labels, registry=self.registry)
            for name, (text, *labels) in _TABLE["labelled_counters"].items()
        }

    def finished(self, stats: RequestStats) -> None:
        """Count a request (a Watcher)."""
        if stats.refused == "cancelled":
            self._counters["request_success"].labels("cancelled").inc()
        elif stats.refused is not None:
            self._counters["requests_refused"].labels(stats.refused).inc()
        if not stats.answers:
            return
        observed = {"e2e_request_latency_seconds": stats.ended - stats.began}
        if stats.first_token_s is not None:
            observed["time_to_first_token_seconds"] = stats.first_token_s
        if any(len(times) > 1 for times in stats.deltas):
            observed["longest_pause_seconds"] = stats.longest_pause_s
        if (more := sum(answer.usage.completion_tokens - 1 for answer in stats.answers)) > 0:
            after_first = sum(times[-1] - times[0] for times in stats.deltas if times)
            observed["time_per_output_token_seconds"] = after_first / more
        for name, seconds in observed.items():
            self._histograms[name].observe(seconds)
        for answer in stats.answers:
            self._note(answer)

    def _note(self, answer: Answer) -> None:
        self._counters["request_success"].labels(answer.finish_reason).inc()
        if answer.guard is not None:
            self._counters["guard_stops"].labels(answer.guard.reason).inc()
        self._histograms["request_queue_time_seconds"].observe(answer.stages.queue_ms / 1e3)
        for stage in Stage:
            if ms := getattr(answer.stages, f"{stage.value}_ms"):
                self._histograms["stage_seconds"].labels(stage.value).observe(ms / 1e3)

    def collect(self) -> Iterator[Metric]:
        """What the engine says about itself when it is asked; zeros before a model is loaded."""
        engine = self._manager.engine
        now, loaded = engine.stats, engine.loaded
        used = 0.0 if loaded is None else now.cells_used / loaded.limits.n_ctx
        values: dict[str, float] = {**asdict(now), "used": used, "ready": float(self._manager.ready)}
        values |= {"waiting": now.waiting + self._before.waiting, "images": now.image_hits + now.encodes}
        for kind, family in (("gauges", GaugeMetricFamily), ("counters", CounterMetricFamily)):
            for name, text, value in _TABLE[kind]:
                yield family(f"opsin:{name}", text, values[value])


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


_OPERATIONS = dict.fromkeys(("/v1/chat/completions", "/v1/responses", "/v1/messages"), "chat")
_OPERATIONS["/v1/completions"] = "text_completion"
LAST_SPANS_SECONDS = 2.0
"""How long a server that ends waits for the collector."""


class Tracing:
    """A watcher with a tracer of its own. Spans are sent by a thread, the last ones by `close`.

    Names are those of OpenTelemetry's GenAI conventions; others start with `opsin`. Prompts and answers are never part
    of a span. Raises BadParameter if OpenTelemetry is not installed.
    """

    def __init__(self, exporter: "SpanExporter | None" = None) -> None:
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


def _attributes(stats: RequestStats, operation: str) -> "dict[str, AttributeValue]":
    fields = _fields(stats)
    attributes: dict[str, AttributeValue | None] = {
        **{name: fields[field] for name, field in _TABLE["span"].items()},
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "opsin",
        "gen_ai.response.time_to_first_chunk": stats.first_token_s,
        "gen_ai.response.finish_reasons": [answer.finish_reason for answer in stats.answers],
        "http.request.method": "POST",
        "opsin.longest_pause_ms": stats.longest_pause_s * 1e3,
        "opsin.guard": [answer.guard.reason for answer in stats.answers if answer.guard is not None],
    }
    return {name: value for name, value in attributes.items() if value is not None and value != []}
