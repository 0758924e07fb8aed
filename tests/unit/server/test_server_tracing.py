"""The trace of a request, read back from memory."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from opsin.core.answer import Answer, Stage
from opsin.core.errors import BadParameter
from opsin.core.request import ImagePart, Prompt, TextPart
from opsin.engine import Engine
from opsin.server import watchers as room
from opsin.server.handler import RequestStats
from opsin.server.watchers import Tracing
from opsin.testing import FakeBackend, image
from opsin.testing.fake_backend import TURN_TEXT


@pytest.fixture(scope="module")
def answer() -> Answer:
    backend = FakeBackend(lambda _: "a red circle.")
    backend.clock.spend(50_000.0)
    with Engine(lambda: backend, now=backend.clock) as engine:
        return engine.submit(Prompt((ImagePart(image(1)), TextPart("what?" + TURN_TEXT)))).result()


def record(*answers: Answer, **fields: object) -> RequestStats:
    """A request that began a second before its engine did."""
    made = RequestStats("/v1/chat/completions", **{"model": "demo", "streamed": True, **fields})  # type: ignore[arg-type]
    made.answers, made.began, made.began_at, made.ended = list(answers), 49.0, 1_700_000_000.0, 51.0
    made.deltas = [[50.5, 50.6, 51.0] for _ in answers]
    return made


def traced(*records: RequestStats) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter)
    for one in records:
        tracing.finished(one)
    tracing.close()
    return list(exporter.get_finished_spans())


def root(spans: Sequence[ReadableSpan]) -> ReadableSpan:
    (found,) = (span for span in spans if span.kind is SpanKind.SERVER)
    return found


def test_the_request_is_a_span_with_the_names_of_the_conventions(answer: Answer) -> None:
    span = root(traced(record(answer, id="abc", images=1)))
    attributes = span.attributes
    assert attributes is not None
    assert span.name == "chat demo"
    assert span.end_time - span.start_time == 2_000_000_000  # type: ignore[operator]
    assert span.start_time == 1_700_000_000_000_000_000
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.response.id"] == "abc"
    assert attributes["gen_ai.usage.input_tokens"] == answer.usage.prompt_tokens
    assert attributes["gen_ai.usage.output_tokens"] == len("a red circle.")
    assert attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(1.5)
    assert attributes["opsin.longest_pause_ms"] == pytest.approx(400.0)
    assert "red circle" not in str(attributes)
    assert span.resource.attributes["service.name"] == "opsin"


def test_stages_are_child_spans_at_their_time(answer: Answer) -> None:
    spans = traced(record(answer))
    parent = root(spans).context
    stages = [span for span in spans if span.kind is SpanKind.INTERNAL]
    assert all(span.parent is not None and span.parent.span_id == parent.span_id for span in stages)
    for stage in Stage:
        ms = sum(s.attributes["opsin.stage.ms"] for s in stages if s.name == stage.value)  # type: ignore[index, misc]
        assert ms == pytest.approx(getattr(answer.stages, f"{stage.value}_ms"), abs=1e-3)
    (encode,) = (span for span in stages if span.name == "encode")
    assert encode.end_time - encode.start_time == pytest.approx(40_000_000, abs=1000)  # type: ignore[operator]
    in_order = sorted(stages, key=lambda span: span.start_time or 0)
    # The engine's first interval begins a second behind the request.
    assert in_order[0].start_time == pytest.approx(1_700_000_001_000_000_000, abs=1000)


def test_choices_are_told_apart(answer: Answer) -> None:
    spans = traced(record(answer, answer))
    choices = {span.attributes["opsin.choice"] for span in spans if span.name == "encode"}  # type: ignore[index]
    assert choices == {0, 1}


def test_a_span_hangs_under_its_callers(answer: Answer) -> None:
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    span = root(traced(record(answer, traceparent=caller)))
    assert span.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert span.parent is not None
    assert span.parent.span_id == 0xB7AD6B7169203331


@pytest.mark.parametrize("wrong", ["", "00-xyz", "é" * 50])
def test_a_traceparent_that_is_none_begins_a_trace(answer: Answer, wrong: str) -> None:
    assert root(traced(record(answer, traceparent=wrong))).parent is None


def test_nothing_is_traced_for_a_caller_who_does_not_sample(answer: Answer) -> None:
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    assert traced(record(answer, traceparent=caller)) == []


def test_refusals_and_failures() -> None:
    refused = root(traced(record(status=400, refused="bad_image")))
    assert refused.attributes is not None
    assert refused.attributes["error.type"] == "bad_image"
    assert refused.status.status_code is StatusCode.UNSET  # the client's fault, no error of this server
    assert root(traced(record(status=503, refused="engine_died"))).status.status_code is StatusCode.ERROR


def test_completions_are_another_operation(answer: Answer) -> None:
    made = record(answer)
    made.route = "/v1/completions"
    assert root(traced(made)).name == "text_completion demo"


def test_addresses_that_are_none_leave_no_trace() -> None:
    made = record(status=404, refused="not_found")
    made.route = "/wp-login.php"
    assert traced(made) == []


def test_an_exporter_that_fails_disturbs_nobody(answer: Answer) -> None:
    class Broken(SpanExporter):
        asked = 0

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            self.asked += len(spans)
            return SpanExportResult.FAILURE

    exporter = Broken()
    tracing = Tracing(exporter)
    tracing.finished(record(answer))
    tracing.close()
    tracing.close()
    assert exporter.asked > 1


def test_spans_go_where_the_environment_says(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "images")
        tracing = Tracing()
        tracing.finished(record(answer))
        tracing.close()
        server.shutdown()
        serving.join()
    ((path, body),) = posted
    assert path == "/v1/traces"
    assert b"image_prefill" in body
    assert b"images" in body


def test_a_collector_that_never_answers_keeps_nobody_for_long(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Stuck(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            release.wait(30)
            return SpanExportResult.FAILURE

    monkeypatch.setattr(room, "LAST_SPANS_SECONDS", 0.05)
    tracing = Tracing(Stuck())
    tracing.finished(record(answer))
    began = time.perf_counter()
    tracing.close()
    assert time.perf_counter() - began < 5
    release.set()


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(BadParameter, match=r"pip install 'opsin\[otel\]'"):
        Tracing()


@pytest.mark.slow
def test_nothing_of_it_is_imported_when_it_is_off() -> None:
    code = (
        "import sys, opsin.server.watchers; sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
