"""OpenTelemetry traces: a span a request, and under it a span for each time a stage ran.

Needs `opsin[otel]`; where traces go is said by the environment's OTEL_* variables.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from opsin import __version__
from opsin.core.errors import BadParameter
from opsin.core.stages import Interval
from opsin.server.request_stats import RequestStats

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/responses": "chat", "/v1/completions": "text_completion"}
LAST_SPANS_SECONDS = 2.0
"""How long an ending server waits for the collector."""
_LONGEST = 100
"""Characters of a name that a client chose."""


class Tracing:
    """A watcher with a tracer of its own. Spans leave in a thread of their own, the last ones with `close`.

    Names are those of OpenTelemetry's GenAI conventions; what they have no names for is under `opsin`. Prompts and
    answers are never part of a span. Raises BadParameter where OpenTelemetry is not installed.
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
        """See Watcher."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.status import StatusCode

        operation = _OPERATIONS.get(stats.route)
        if operation is None:
            return  # a stranger's knocking at doors that are none
        span = self._tracer.start_span(
            f"{operation} {stats.model[:_LONGEST]}".rstrip(),
            context=_caller(stats.traceparent),
            kind=SpanKind.SERVER,
            attributes=_attributes(stats, operation),
            start_time=_unix_ns(stats, stats.began),
        )
        if stats.refused is not None:
            span.set_attribute("error.type", stats.refused)
        if stats.status >= 500:
            span.set_status(StatusCode.ERROR)
        if span.is_recording():
            inside = set_span_in_context(span)
            for choice, answer in enumerate(stats.answers):
                for interval in answer.intervals:
                    self._stage(stats, choice, interval, inside).end(_unix_ns(stats, interval.end))
        span.end(_unix_ns(stats, stats.ended))

    def close(self) -> None:
        """Send what is left; twice does no harm. A collector that does not answer keeps nobody for long."""
        # The exporter's own attempts go on for ten seconds, and no argument of the provider's makes them shorter.
        sending = threading.Thread(target=self._provider.shutdown, name="opsin-traces", daemon=True)
        sending.start()
        sending.join(LAST_SPANS_SECONDS)

    def _stage(self, stats: RequestStats, choice: int, interval: Interval, inside: Context) -> Span:
        attributes: dict[str, AttributeValue] = {
            "opsin.choice": choice,
            "opsin.stage": interval.stage.value,
            "opsin.stage.ms": interval.seconds * 1e3,
            "opsin.stage.times": interval.count,
        }
        start = _unix_ns(stats, interval.start)
        return self._tracer.start_span(interval.stage.value, context=inside, attributes=attributes, start_time=start)


def _attributes(stats: RequestStats, operation: str) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "opsin",
        "gen_ai.request.model": stats.model[:_LONGEST],
        "gen_ai.request.stream": stats.streamed,
        "gen_ai.response.id": stats.id,
        "http.request.method": "POST",
        "url.path": stats.route[:_LONGEST],
        "http.response.status_code": stats.status,
        "opsin.pictures": stats.pictures,
    }
    if stats.answers:
        usages = [answer.usage for answer in stats.answers]
        attributes |= {
            "gen_ai.response.finish_reasons": [answer.finish_reason for answer in stats.answers],
            # A prompt is read once, and answered as often as there are choices.
            "gen_ai.usage.input_tokens": usages[0].prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": usages[0].cached_tokens,
            "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in usages),
            "opsin.longest_pause_ms": stats.longest_pause_s * 1e3,
        }
        guards = [answer.guard.reason for answer in stats.answers if answer.guard is not None]
        if guards:
            attributes["opsin.guard"] = guards
    if stats.first_token_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = stats.first_token_s
    return attributes


def _caller(traceparent: str | None) -> Context:
    """The span of whoever asked, so that this one is found under it."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({} if traceparent is None else {"traceparent": traceparent})


def _unix_ns(stats: RequestStats, at: float) -> int:
    """A time of the engine's clock as nanoseconds since 1970."""
    return int((stats.began_at + at - stats.began) * 1e9)
