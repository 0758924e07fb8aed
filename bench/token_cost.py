#!/usr/bin/env python3
"""What a token costs beside the model: CPU time of whole processes by tokens made, in process and over HTTP.

    python bench/token_cost.py --model tiny-q8_0.gguf --mmproj mmproj-tiny-f16.gguf --runs 4 --json-out overhead.json

Meant for a model that takes next to nothing itself; its share is measured by bare backend calls and shown beside. A
whole round goes before the one that is measured: a server's first answers fall into its start. Needs the package
`opsin`; this checkout's is used where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

from opsin import __version__
from opsin.bench.drivers import open_client, serving, streamed
from opsin.bench.report import columns
from opsin.bench.workloads import RequestFailed
from opsin.compose import open_backend, open_runtime
from opsin.core.backend import Backend
from opsin.core.config import checked
from opsin.core.errors import OpsinError
from opsin.core.request import Prompt, SamplingParams, TextPart, TokenBatch
from opsin.core.settings import EngineSettings
from opsin.engine import Engine
from opsin.models import resolve

STREAMS = (1, 8, 32)
TOKENS = 64
_WAITS = SamplingParams(json_schema="{}")  # to check it waits for the thread that reads the vocabulary after the load
_CLOCK_TICKS = 100  # per second: Linux's USER_HZ, the unit of /proc


@dataclass(frozen=True, slots=True)
class Overhead:
    """Greedy answers, all at once. `where` is "process", "http" or "native" (no engine); `steps` is 0 if unknown."""

    where: str
    streams: int
    guard: bool
    tokens: int
    steps: int
    wall_s: float
    cpu_s: float

    @property
    def us_per_token(self) -> float:
        """CPU time per token in microseconds."""
        return self.cpu_s / max(1, self.tokens) * 1e6

    def document(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **{name: getattr(self, name) for name in ("where", "streams", "guard", "tokens")},
            "tokens_s": round(self.tokens / self.wall_s, 1),
            "us_per_token": round(self.us_per_token, 2),
            "us_per_step": round(self.cpu_s / self.steps * 1e6, 2) if self.steps else None,
        }


def measure_overhead(
    open_engine: Callable[[], Engine],
    open_backend: Callable[[], Backend],
    settings: EngineSettings,
    *,
    runs: int,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Overhead]:
    """Measure each number of streams in process and natively, and the largest over HTTP: the medians of the runs.

    HTTP is left out where there is no /proc. Raises what the callables and `over_http` raise, and EngineError.
    """
    counts = [count for count in STREAMS if count <= settings.parallel]
    rows: list[Overhead] = []
    for run in range(runs):
        tell(f"run {run + 1} of {runs}")
        for streams in counts:
            with closing(open_backend()) as backend:
                rows.append(native(backend, streams))
            for guard in (True, False):
                with closing(open_engine()) as engine:
                    rows.append(in_process(engine, streams, guard=guard))
        if Path("/proc/self/stat").exists():
            rows += [over_http(settings, counts[-1], guard=guard) for guard in (True, False)]
    each = len(rows) // runs  # every run has the same rows in the same order
    return [sorted(rows[kind::each], key=lambda row: row.us_per_token)[(runs - 1) // 2] for kind in range(each)]


def in_process(engine: Engine, streams: int, *, guard: bool) -> Overhead:
    """The CPU time of this process, with one reader for all streams. Raises BadInput, EngineError."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, guard=guard)

    def answer(prompts: Sequence[str]) -> int:
        running = [engine.submit(Prompt((TextPart(prompt),)), params) for prompt in prompts]
        return sum(stream.result().usage.completion_tokens for stream in running)

    engine.call(lambda backend: backend.check(_WAITS))
    answer(_prompts(streams, "First "))
    steps, wall, cpu = engine.stats.decode_steps, time.perf_counter(), time.process_time()
    tokens = answer(_prompts(streams))
    spent = time.perf_counter() - wall, time.process_time() - cpu
    return Overhead("process", streams, guard, tokens, engine.stats.decode_steps - steps, *spent)


def native(backend: Backend, streams: int) -> Overhead:
    """The CPU time of the same number of steps by bare decode and sample calls. Raises EngineError."""
    backend.check(_WAITS)
    samplers = [backend.sampler(SamplingParams(temperature=0, ignore_eos=True), seed=0) for _ in range(streams)]
    tokens, rows = list(range(1, streams + 1)), list(range(streams))
    wall, cpu = time.perf_counter(), time.process_time()
    for pos in range(TOKENS):
        backend.decode(TokenBatch(tokens, [pos] * streams, rows, rows))
        backend.synchronize()
        sampled = backend.sample([(sampler, row, None) for row, sampler in enumerate(samplers)])
        tokens = [result[0] for result in sampled if isinstance(result, tuple)]
    spent = time.perf_counter() - wall, time.process_time() - cpu
    for sampler in samplers:
        sampler.close()
    return Overhead("native", streams, False, TOKENS * streams, TOKENS, *spent)


def over_http(settings: EngineSettings, streams: int, *, guard: bool) -> Overhead:
    """The CPU time of all processes of `opsin serve`. Needs /proc. Raises BadParameter, RequestFailed."""
    with serving(settings) as (pid, url):
        _complete(url, _prompts(streams, "First "), guard=guard)
        wall, cpu = time.perf_counter(), cpu_seconds(pid)
        tokens = _complete(url, _prompts(streams), guard=guard)
        return Overhead("http", streams, guard, tokens, 0, time.perf_counter() - wall, cpu_seconds(pid) - cpu)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all its descendants, from /proc in steps of 10 ms."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has just ended, and its parent has its time
        return 0.0
    own = sum(map(int, fields[11:15])) / _CLOCK_TICKS  # user and system, own and of ended children
    return own + sum(cpu_seconds(int(child)) for some in children for child in some)


def as_text(rows: Sequence[Overhead]) -> str:
    """A table, and what HTTP adds to a token."""
    cells = []
    for row in rows:
        step = f"{row.cpu_s / row.steps * 1e6:.1f}" if row.steps else ""
        switch = "" if row.where == "native" else "on" if row.guard else "off"
        rate = f"{row.tokens / row.wall_s:.0f}"
        cells.append([row.where, f"{row.streams}", switch, f"{row.us_per_token:.1f}", step, rate])
    lines = [columns(("CPU time", "streams", "guard", "µs per token", "µs per step", "token/s"), cells)]
    for (streams, guard), more in http_extra(rows).items():
        lines.append(f"over HTTP, {streams} streams, guard {'on' if guard else 'off'}: {more:.1f} µs more a token")
    return "\n".join(lines)


def http_extra(rows: Sequence[Overhead]) -> dict[tuple[int, bool], float]:
    """Microseconds per token over HTTP beyond those in process, by streams and guard."""
    alone = {(row.streams, row.guard): row.us_per_token for row in rows if row.where == "process"}
    served = [row for row in rows if row.where == "http"]
    return {(row.streams, row.guard): row.us_per_token - alone[row.streams, row.guard] for row in served}


def _prompts(streams: int, begin: str = "") -> list[str]:
    """Short; those that are measured differ from the first character on, so that no stream shares a prefix."""
    return [f"{begin}{number} and" for number in range(streams)]


def _complete(url: str, prompts: Sequence[str], *, guard: bool) -> int:
    """Stream completions of all prompts at once; tokens made. Raises RequestFailed."""

    def complete(prompt: str) -> int:
        body = {"prompt": prompt, "max_tokens": TOKENS, "guard": guard}
        counts = [event.get("usage") for _, event in streamed(client, "/v1/completions", body)]
        if not counts or counts[-1] is None:
            raise RequestFailed("opsin serve ended an answer without a token count.")
        return int(counts[-1]["completion_tokens"])

    with open_client(url) as client, ThreadPoolExecutor(len(prompts)) as pool:
        return sum(pool.map(complete, prompts))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and one JSON document, and write that to a file if asked to."""
    parser = argparse.ArgumentParser(description="CPU time of a token beside the model.")
    parser.add_argument("--model", help="GGUF file, folder or known name")
    parser.add_argument("--mmproj", help="projector")
    parser.add_argument("--threads", type=int, help="CPU threads for decoding")
    parser.add_argument("--ctx", type=int, default=16_384, help="context in tokens, shared by all slots (16384)")
    parser.add_argument("--parallel", type=int, default=32, help="slots, and most streams (32)")
    parser.add_argument("--runs", type=int, default=3, help="runs, of which medians are shown (3)")
    parser.add_argument("--json-out", type=Path, help="also write the JSON document to this file")
    asked = vars(parser.parse_args(arguments))
    runs, json_out = asked.pop("runs"), asked.pop("json_out")
    pair = resolve(asked.pop("model"), asked.pop("mmproj"))
    mmproj = pair.mmproj and pair.mmproj.resolve()
    given = {name: value for name, value in asked.items() if value is not None}
    settings = checked(EngineSettings, {**given, "model": pair.llm.resolve(), "mmproj": mmproj, "disk_cache": False})
    about: dict[str, Any] = {"opsin": __version__, "kind": "overhead", "llama_cpp_python": version("llama-cpp-python")}

    def open_engine() -> Engine:
        engine = open_runtime(settings.model, settings.mmproj, settings).engine
        about.update(model=engine.info.as_dict(), settings=given)
        return engine

    rows = measure_overhead(open_engine, lambda: open_backend(settings), settings, runs=runs, tell=_tell)
    extra = [
        {"streams": streams, "guard": guard, "more_us_per_token": round(more, 2)}
        for (streams, guard), more in http_extra(rows).items()
    ]
    about["platform"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    document = json.dumps({**about, "overhead": [row.document() for row in rows], "http": extra})
    print(as_text(rows), document, sep="\n")
    if json_out is not None:
        json_out.write_text(document + "\n", encoding="utf-8")


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except OpsinError as error:
        sys.exit(f"token_cost: {error}")
