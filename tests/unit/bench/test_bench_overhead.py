"""CPU time per token: what is counted, and how it is told."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import token_cost as overhead
from opsin.core.backend import BackendLimits
from opsin.core.settings import EngineSettings
from opsin.engine import Engine, Policy
from opsin.testing import FakeBackend
from token_cost import Overhead, as_text, cpu_seconds, http_extra, in_process, measure_overhead, native

pytestmark = pytest.mark.slow

LIMITS = BackendLimits(n_ctx=8192, n_ubatch=256, n_seq_max=24, n_vocab=259, n_embd=4, n_ctx_seq=8192)
SPENT_S = 0.003


def spend(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


class BusyFake(FakeBackend):
    """A model whose every decode call takes CPU time."""

    def decode(self, rows: Any, *, may_stop: bool = False) -> bool:
        spend(SPENT_S)
        return super().decode(rows, may_stop=may_stop)


def backend() -> BusyFake:
    return BusyFake(lambda prompt: "abcdefghij" * 20, limits=LIMITS)


def engine() -> Engine:
    return Engine(backend, policy=Policy(parallel=8))


def test_all_cpu_time_of_the_process_is_counted() -> None:
    with engine() as running:
        row = in_process(running, 8, guard=True)
    assert (row.where, row.streams, row.guard) == ("process", 8, True)
    assert row.tokens == 8 * overhead.TOKENS
    assert overhead.TOKENS - 1 <= row.steps < 2 * overhead.TOKENS
    assert row.cpu_s > SPENT_S * row.steps
    assert row.us_per_token == pytest.approx(row.cpu_s / row.tokens * 1e6)


def test_bare_backend_calls_take_as_many_steps() -> None:
    row = native(backend(), 8)
    assert (row.tokens, row.steps) == (8 * overhead.TOKENS, overhead.TOKENS)
    assert row.cpu_s > SPENT_S * row.steps


def test_streams_that_do_not_fit_are_left_out_and_the_middle_of_the_runs_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    costs = iter([5.0, 1.0, 3.0])

    def measured(_: object, streams: int, *, guard: bool = False) -> Overhead:
        cost = next(costs) if (streams, guard) == (8, True) else 2.0
        return Overhead("process", streams, guard, 1, 1, 1.0, cost)

    monkeypatch.setattr(overhead, "in_process", measured)
    monkeypatch.setattr(
        overhead, "over_http", lambda _, streams, guard: Overhead("http", streams, guard, 1, 0, 1.0, 4.0)
    )
    rows = measure_overhead(engine, backend, EngineSettings(parallel=8), runs=3)
    kinds = [(row.where, row.streams) for row in rows if row.where != "http"]
    assert kinds == [(where, streams) for streams in (1, 8) for where in ("native", "process", "process")]
    assert {row.streams for row in rows if row.where == "http"} <= {8}
    assert next(row.cpu_s for row in rows if (row.streams, row.guard) == (8, True)) == 3.0


def test_what_http_adds_is_told_for_equal_streams_and_guard() -> None:
    rows = [
        Overhead("native", 32, False, 1000, 100, 1.0, 0.02),
        Overhead("process", 32, True, 1000, 100, 1.0, 0.10),
        Overhead("process", 32, False, 1000, 100, 1.0, 0.08),
        Overhead("http", 32, True, 1000, 0, 1.0, 0.16),
    ]
    assert http_extra(rows) == {(32, True): pytest.approx(60.0)}
    assert rows[1].document()["us_per_step"] == 1000.0
    assert rows[3].document()["us_per_step"] is None
    text = as_text(rows)
    assert "60.0 µs more a token" in text
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["native", "process", "process", "http"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_the_time_of_a_process_includes_its_children_and_those_that_ended() -> None:
    work = "import time\nwhile time.process_time() < 0.3: pass\n"
    code = f"import subprocess, sys\nfor _ in range(2): subprocess.run([sys.executable, '-c', {work!r}])\n"
    code += "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
    code += f"{work}print('done', flush=True)\ninput()\nchild.communicate(b'\\n')\n"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        assert 0.85 <= cpu_seconds(process.pid) < 2.5
    finally:
        process.communicate("\n")
    assert process.returncode == 0
