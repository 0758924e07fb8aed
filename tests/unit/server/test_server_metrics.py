"""What Prometheus is told, and that dashboard and documentation speak of nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from opsin.core.answer import Answer, GuardVerdict
from opsin.core.request import ImagePart, Prompt, SamplingParams, TextPart
from opsin.engine import Engine, Snapshot
from opsin.engine.clock import stage_row
from opsin.server import app as room
from opsin.server.handler import RequestStats
from opsin.server.watchers import Metrics
from opsin.testing import FakeBackend, image
from opsin.testing.fake_backend import TURN_TEXT

ROOT = Path(__file__).parents[3]


def ask(engine: Engine, number: int = 0, text: str = "what is this?") -> Answer:
    prompt = Prompt((ImagePart(image(number)), TextPart(text + TURN_TEXT)))
    return engine.submit(prompt, SamplingParams(guard=False)).result()


@pytest.fixture
def engine() -> Iterator[Engine]:
    backend = FakeBackend(lambda _: "a red circle.")
    with Engine(lambda: backend, now=backend.clock) as made:
        yield made


def metrics_of(engine: Engine | None, waiting: int = 0) -> Metrics:
    watched: Any = engine or SimpleNamespace(stats=Snapshot())
    watched.loaded = engine
    manager = SimpleNamespace(engine=watched, ready=engine is not None)
    return Metrics(manager, SimpleNamespace(waiting=waiting))  # type: ignore[arg-type]


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Values by name and label values."""
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def record(*answers: Answer, **fields: object) -> RequestStats:
    made = RequestStats("/v1/chat/completions", answers=list(answers), **fields)  # type: ignore[arg-type]
    made.began, made.ended = 100.0, 103.0
    made.deltas = [[100.5, 100.6, 101.5] for _ in answers]
    return made


def test_the_engines_counts_are_read_when_asked_for(engine: Engine) -> None:
    metrics = metrics_of(engine)
    assert samples(metrics)["opsin:generation_tokens_total",] == 0
    first, again = ask(engine), ask(engine)
    ask(engine, text="another?")
    now = samples(metrics)
    assert now["opsin:num_requests_running",] == now["opsin:num_requests_waiting",] == 0
    assert now["opsin:ready",] == 1
    assert now["opsin:generation_tokens_total",] == 3 * (len("a red circle.") + 1)
    assert now["opsin:prefix_cache_queries_total",] == now["opsin:prompt_tokens_total",]
    assert now["opsin:prefix_cache_hits_total",] >= again.usage.cached_tokens > first.usage.cached_tokens == 0
    assert now["opsin:image_cache_queries_total",] - now["opsin:image_cache_hits_total",] == 1
    assert now["opsin:kv_cache_usage_perc",] == engine.stats.cells_used / 512 > 0


def test_without_a_model_there_are_zeros(engine: Engine) -> None:
    now = samples(metrics_of(None))
    assert now["opsin:ready",] == now["opsin:kv_cache_usage_perc",] == now["opsin:prompt_tokens_total",] == 0


def test_a_request_is_noted_in_every_histogram(engine: Engine) -> None:
    metrics = metrics_of(engine)
    answer = ask(engine)
    metrics.finished(record(answer))
    now = samples(metrics)
    assert now["opsin:time_to_first_token_seconds_sum",] == pytest.approx(0.5)
    assert now["opsin:e2e_request_latency_seconds_sum",] == pytest.approx(3.0)
    assert now["opsin:longest_pause_seconds_sum",] == pytest.approx(0.9)
    assert now["opsin:time_per_output_token_seconds_sum",] == pytest.approx(1.0 / 12)
    assert now["opsin:request_queue_time_seconds_sum",] == pytest.approx(answer.stages.queue_ms / 1e3)
    for name, ms in stage_row(answer.stages).items():
        stage = name.removesuffix("_ms")
        if stage != "total" and ms:
            assert now["opsin:stage_seconds_sum", stage] == pytest.approx(ms / 1e3, abs=1e-6)
            assert now["opsin:stage_seconds_count", stage] == 1
    assert ("opsin:stage_seconds_count", "fetch") not in now
    assert now["opsin:request_success_total", "stop"] == 1


def test_guard_stops_refusals_and_those_who_left_are_counted_apart(engine: Engine) -> None:
    metrics = metrics_of(engine)
    looping = dataclasses.replace(ask(engine), finish_reason="length", guard=GuardVerdict("cycle", 90))
    metrics.finished(record(looping, looping))
    metrics.finished(record(status=400, refused="bad_image"))
    metrics.finished(record(status=200, refused="cancelled"))
    now = samples(metrics)
    assert now["opsin:guard_stops_total", "cycle"] == now["opsin:request_success_total", "length"] == 2
    assert now["opsin:requests_refused_total", "bad_image"] == 1
    assert now["opsin:request_success_total", "cancelled"] == 1
    assert ("opsin:requests_refused_total", "cancelled") not in now
    assert now["opsin:e2e_request_latency_seconds_count",] == 1


def test_metrics_are_served_as_text(engine: Engine) -> None:
    app = FastAPI()
    app.include_router(room.router)
    app.state.metrics = metrics_of(engine, waiting=3)
    reply = TestClient(app).get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "opsin:num_requests_running 0.0" in reply.text
    assert "opsin:num_requests_waiting 3.0" in reply.text


@pytest.fixture
def everything(engine: Engine) -> Metrics:
    """Metrics in which every family has a value."""
    metrics = metrics_of(engine)
    metrics.finished(record(dataclasses.replace(ask(engine), guard=GuardVerdict("drift", 9))))
    metrics.finished(record(status=400, refused="bad_image"))
    return metrics


def test_the_dashboard_asks_for_what_there_is(everything: Metrics) -> None:
    dashboard = json.loads((ROOT / "src" / "opsin" / "server" / "page" / "grafana.json").read_text())
    asked = "\n".join(target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ()))
    names = set(re.findall(r"opsin:[a-zA-Z0-9_]+", asked))
    there = {key[0] for key in samples(everything)}
    assert len(names) > 15
    assert names <= there
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_the_documentation_names_every_metric_and_no_other(everything: Metrics) -> None:
    families = text_string_to_metric_families(generate_latest(everything.registry).decode())
    text = (ROOT / "docs" / "observability.md").read_text()
    named = set(re.findall(r"^\| `(opsin:[a-z0-9_]+)", text, re.MULTILINE))
    there = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    assert named == {name for name in there if not name.endswith("_created")}


def test_buckets_are_those_of_the_conventions(everything: Metrics) -> None:
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(everything.registry).decode())}

    def bounds(name: str) -> list[float]:
        found = [s.labels["le"] for s in families[name].samples if s.name.endswith("_bucket")]
        return [float(bound) for bound in found if bound != "+Inf"]

    assert bounds("opsin:e2e_request_latency_seconds") == [0.01 * 2**i for i in range(14)]
    assert bounds("opsin:time_to_first_token_seconds")[:4] == [0.001, 0.005, 0.01, 0.02]
    assert bounds("opsin:time_to_first_token_seconds")[-1] == 10
    assert bounds("opsin:time_per_output_token_seconds")[-1] == 2.5
