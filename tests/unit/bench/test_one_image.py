"""bench/one_image.py and bench/device_sampling.py: what their figures mean."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

import device_sampling
from ceilings import Rates
from one_image import medians, shares
from opsin.bench.cost import Ceiling, ModelCost
from opsin.core.backend import BackendLimits
from opsin.engine import Engine, Policy
from opsin.prompt import PromptBuilder, TemplateSource
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import TURN_TEXT

COST = ModelCost(weight_bytes=1e6, weights=1e6, head=0, kv_values=0, attention_width=0, encode_ops=4e9)
WARM = {
    "prompt_tokens": 600,
    "cached_tokens": 100,
    "completion_tokens": 11,
    "encode_ms": 8.0,
    "image_prefill_ms": 1.5,
    "text_prefill_ms": 0.5,
    "decode_ms": 18.0,
    "sample_ms": 2.0,
}


def test_the_best_of_each_rate_is_the_ceiling() -> None:
    rates = Rates("GPU", 4.0e12, {"f16": 4.5e12, "q4_0": 3.0e12}, {"f16": 700e12, "q8_0": 800e12})
    assert rates.ceiling == Ceiling("GPU", 4.5e12, 800e12)
    assert rates.document()["read_gb_s"] == {"f16": 4500.0, "q4_0": 3000.0}


def test_shares_are_least_times_by_times() -> None:
    # 4 ms to encode; 1e9 operations of 500 tokens that were not cached: 1 ms; ten steps of 1 ms behind the first token.
    ceiling = Ceiling("x", read_bytes_s=1e9, matrix_ops_s=1e12)
    assert shares(COST, ceiling, WARM) == {"encode": 0.5, "prefill": 0.5, "decode": 0.5}
    unknown = ModelCost(1e6, 1e6, 0, 0, 0, encode_ops=None)
    assert shares(unknown, ceiling, WARM)["encode"] is None
    assert shares(COST, ceiling, {**WARM, "encode_ms": 0.0})["encode"] is None


def test_medians_are_of_each_figure() -> None:
    assert medians([{"a": 1, "b": 9.0}, {"a": 3, "b": 1.0}, {"a": 2, "b": 2.0}]) == {"a": 2, "b": 2.0}


class SlowFake(FakeBackend):
    """Its decode takes so long, so that several answers run together."""

    seconds = 0.002

    def decode(self, rows: Any, *, may_stop: bool = False) -> bool:
        time.sleep(self.seconds)
        return super().decode(rows, may_stop=may_stop)


def runtime(seconds: float) -> Any:
    limits = BackendLimits(n_ctx=8192, n_ubatch=256, n_seq_max=24, n_vocab=259, n_embd=4, n_ctx_seq=8192)
    backend = SlowFake(lambda _: "".join(map(chr, range(33, 126))) * 2, limits=limits)
    backend.seconds = seconds
    template = "{% for message in messages %}{{ message.content }}{% endfor %}" + TURN_TEXT
    prompts = PromptBuilder(TemplateSource(template, "fake", "fake", None, "", "", frozenset({TURN_TEXT})))
    return SimpleNamespace(engine=Engine(lambda: backend, policy=Policy(parallel=8)), prompts=prompts)


@pytest.mark.slow
def test_both_sides_of_device_sampling_are_measured_in_turn() -> None:
    cpu, device = runtime(0.006), runtime(0.002)
    with cpu.engine, device.engine:
        row = device_sampling.compare({"cpu": cpu, "device": device}, 4, "greedy", 2)
    assert (row["streams"], row["sampling"]) == (4, "greedy")
    assert row["ratio"] > 1.2
    assert row["device_tokens_s"] > row["cpu_tokens_s"] > 0
