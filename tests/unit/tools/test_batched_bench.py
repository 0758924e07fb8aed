"""bench/batched_bench.py: full batches on the fake backend, and llama-batched-bench as another program plays it."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batched_bench import Batch, document, measure_batch, program_rate
from opsin.core.backend import BackendLimits
from opsin.core.errors import BadInput, BadParameter, DecodeFailed
from opsin.engine import Engine, Policy
from opsin.prompt import PromptBuilder, TemplateSource
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import TURN_TEXT

pytestmark = pytest.mark.slow

LIMITS = BackendLimits(n_ctx=8192, n_ubatch=256, n_seq_max=24, n_vocab=259, n_embd=4, n_ctx_seq=8192)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}" + TURN_TEXT


class SlowFake(FakeBackend):
    """Its decode takes time, so that several answers run together."""

    def decode(self, rows: Any, *, may_stop: bool = False) -> bool:
        time.sleep(0.002)
        return super().decode(rows, may_stop=may_stop)


def runtime(answer: str = "".join(map(chr, range(33, 126))) * 2) -> Any:
    backend = SlowFake(lambda _: answer, limits=LIMITS)
    prompts = PromptBuilder(TemplateSource(TEMPLATE, "fake", "fake", None, "", "", frozenset({TURN_TEXT})))
    return SimpleNamespace(backend=backend, engine=Engine(lambda: backend, policy=Policy(parallel=8)), prompts=prompts)


def test_a_batch_is_measured_while_all_answer() -> None:
    running = runtime()
    with running.engine:
        batch = measure_batch(running, 8)
    assert batch.sequences == 8
    assert 16 <= batch.steps <= 128
    assert 0 < batch.tokens_s <= batch.decode_tokens_s
    assert batch.tokens_s / batch.decode_tokens_s == pytest.approx(batch.decode_share, rel=1e-6)


def test_prompts_are_as_long_as_asked() -> None:
    running = runtime()
    with running.engine:
        assert measure_batch(running, 2).prompt_tokens < 100
        assert measure_batch(running, 2, prompt_tokens=400).prompt_tokens == pytest.approx(400, abs=4)


def test_errors_and_batches_that_were_never_full_are_refused() -> None:
    running = runtime()
    with running.engine:
        running.backend.fail_decode = RuntimeError("broken")
        with pytest.raises(DecodeFailed):
            measure_batch(running, 4)
    running = runtime('"x"')
    with running.engine, pytest.raises(BadInput, match="answered together"):
        measure_batch(running, 8, schema="{}")


def test_schemas_cost_what_is_beside_the_decode_calls() -> None:
    plain = Batch(8, 100, 80, 200.0, 220.0, 0.9, 0.05)
    schema = replace(plain, tokens_s=190.0, decode_share=0.855)
    # A busy machine makes the decode calls longer, which is not the schemas' doing.
    starved = replace(schema, tokens_s=50.0, decode_share=1 - (1 - schema.decode_share) * 50.0 / schema.tokens_s)
    found = document([plain, plain, plain], [schema, schema, starved], [220.0, 100.0, 210.0])
    assert found["json_schema_cost"] == pytest.approx(0.05)
    # The median of the runs' own ratios: a slow moment is slow for both.
    assert found["of_llama_batched_bench"] == pytest.approx(200 / 210)


def program(folder: Path, body: str) -> Path:
    path = folder / "batched"
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(0o755)
    return path


def rate(path: Path, flash: bool | None = None) -> float:
    return program_rate(path, Path("m.gguf"), sequences=8, prompt_tokens=77, n_ctx=8192, threads=2, flash=flash)


@pytest.mark.parametrize(("flash", "words"), [(None, []), (False, ["-fa", "off"]), (True, ["-fa", "on"])])
def test_the_program_is_asked_for_the_engines_sizes(tmp_path: Path, flash: bool | None, words: list[str]) -> None:
    body = f"""
expected = "-m m.gguf -c 8192 -npp 77 -ntg 128 -npl 8 --output-format jsonl -t 2 -tb 2".split()
assert sys.argv[1:] == expected + {words!r} + ["--kv-unified"], sys.argv
print("noise")
print('{{"pl": 8, "speed_tg": 181.5}}')
"""
    assert rate(program(tmp_path, body), flash) == 181.5


@pytest.mark.parametrize(
    ("body", "told"), [("sys.exit(3)", "failed"), ("print('hello')", "printed no result: is it llama-batched-bench?")]
)
def test_another_program_is_refused(tmp_path: Path, body: str, told: str) -> None:
    with pytest.raises(BadParameter, match=told):
        rate(program(tmp_path, body))
    with pytest.raises(BadParameter, match="cannot be run"):
        rate(tmp_path / "none")
