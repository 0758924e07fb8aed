"""OpenTelemetry traces: one span per request, and below it one span for each time a stage ran.

Needs `opsin[otel]`. The environment's OTEL_* variables say where traces go.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from opsin import __version__
from opsin.core.errors import BadParameter
from opsin.server.request_stats import RequestStats

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.util.types import AttributeValue

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/responses": "chat", "/v1/completions": "text_completion"}
LAST_SPANS_SECONDS = 2.0
"""How long a server that ends waits for the collector."""
_LONGEST = 100
"""Characters of a name that a client chose."""


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
        """See Watcher."""
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
            f"{operation} {stats.model[:_LONGEST]}".rstrip(),
            context=TraceContextTextMapPropagator().extract(caller),
            kind=SpanKind.SERVER,
            attributes=_attributes(stats, operation),
            start_time=unix_ns(stats.began),
        )
        if stats.status >= 500:
            span.set_status(StatusCode.ERROR)
        if span.is_recording():
            inside = set_span_in_context(span)
            for choice, answer in enumerate(stats.answers):
                for interval in answer.intervals:
                    stage = self._tracer.start_span(
                        interval.stage.value, context=inside, start_time=unix_ns(interval.start)
                    )
                    stage.set_attribute("opsin.choice", choice)
                    stage.set_attribute("opsin.stage", interval.stage.value)
                    stage.set_attribute("opsin.stage.ms", interval.seconds * 1e3)
                    stage.set_attribute("opsin.stage.times", interval.count)
                    stage.end(unix_ns(interval.end))
        span.end(unix_ns(stats.ended))

    def close(self) -> None:
        """Send what is left, within LAST_SPANS_SECONDS; a second call does nothing."""
        # The exporter itself tries for ten seconds, and no argument of the provider makes that shorter.
        sending = threading.Thread(target=self._provider.shutdown, name="opsin-traces", daemon=True)
        sending.start()
        sending.join(LAST_SPANS_SECONDS)


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
        "opsin.images": stats.images,
    }
    if stats.answers:
        usages = [answer.usage for answer in stats.answers]
        attributes |= {
            "gen_ai.response.finish_reasons": [answer.finish_reason for answer in stats.answers],
            # The prompt is read once, for all choices.
            "gen_ai.usage.input_tokens": usages[0].prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": usages[0].cached_tokens,
            "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in usages),
            "opsin.longest_pause_ms": stats.longest_pause_s * 1e3,
        }
        guards = [answer.guard.reason for answer in stats.answers if answer.guard is not None]
        if guards:
            attributes["opsin.guard"] = guards
    if stats.refused is not None:
        attributes["error.type"] = stats.refused
    if stats.first_token_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = stats.first_token_s
    return attributes
