#!/usr/bin/env python3
"""What a token costs before and after: CPU time of whole processes by tokens made, two commits in turn.

    python bench/between_commits.py d642eeb HEAD --model tiny.gguf --runs 6 --json-out before_after.json

Every run has 32 greedy answers of 64 tokens in process and over HTTP, with and without guard, of each commit, every
second run backwards; the medians are shown. Each commit's own package runs, with the libraries of this interpreter.
Meant for a model that takes next to nothing itself. Linux; needs psutil and httpx.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

STREAMS, TOKENS, CTX = 32, 64, 32 * 256
START_SECONDS = 120.0
KINDS = [(where, guard) for where in ("process", "http") for guard in (True, False)]


def in_process(model: str, guard: bool) -> float:
    """Microseconds of CPU a token, of this process."""
    from opsin import Opsin
    from opsin.api import question_about

    with Opsin(model, config=False, parallel=STREAMS, ctx=CTX, disk_cache=False) as engine:

        def answer(questions: list[str]) -> int:
            options = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "guard": guard}
            streams = [engine.submit(question_about([], question), **options) for question in questions]
            return sum(stream.result().usage.completion_tokens for stream in streams)

        answer(["warm up"])
        before = time.process_time()
        tokens = answer(prompts())
        return (time.process_time() - before) / tokens * 1e6


def over_http(model: str, guard: bool) -> float:
    """Microseconds of CPU a token, of all processes of a server."""
    import httpx
    import psutil

    with serving(model) as (pid, url), httpx.Client(trust_env=False, timeout=300) as client:

        def ask(question: str) -> int:
            body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": TOKENS}
            body |= {"ignore_eos": True, "guard": guard, "stream": True, "stream_options": {"include_usage": True}}
            lines = client.stream("POST", f"{url}/v1/chat/completions", json=body)
            with lines as answer:
                frames = [line for line in answer.iter_lines() if line.startswith("data: {")]
            return int(json.loads(frames[-1][6:])["usage"]["completion_tokens"])

        def spent() -> float:
            server = psutil.Process(pid)
            times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
            return sum(one.user + one.system for one in times)

        ask("warm up")
        with ThreadPoolExecutor(STREAMS) as pool:
            before = spent()
            tokens = sum(pool.map(ask, prompts()))
            return (spent() - before) / tokens * 1e6


@contextmanager
def serving(model: str) -> Iterator[tuple[int, str]]:
    """The process id and the address of an `opsin serve` of the package that is imported here."""
    import httpx

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = [f"--model={model}", f"--port={port}", f"--parallel={STREAMS}", f"--ctx={CTX}", "--no-disk-cache"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-m", "opsin", "serve", *flags], **quiet) as process:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        try:
            while True:
                try:
                    if httpx.get(f"{url}/ready", trust_env=False).is_success:
                        break
                except httpx.HTTPError:
                    pass
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("opsin serve did not start")
                time.sleep(0.05)
            yield process.pid, url
        finally:
            process.terminate()


def prompts() -> list[str]:
    """Questions that share no beginning."""
    return [f"{number} things: what is this?" for number in range(STREAMS)]


def measure(tree: Path, model: str, kind: tuple[str, bool]) -> float:
    """One figure of the package in a working tree, taken in a process of its own."""
    where, guard = kind
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OPSIN_")}
    environ |= {"PYTHONPATH": str(tree / "src"), "XDG_CONFIG_HOME": os.devnull}
    command = [sys.executable, __file__, "--probe", where, "--guard" if guard else "--no-guard", "--model", model]
    found = subprocess.run(command, env=environ, cwd=tree, check=True, stdout=subprocess.PIPE, text=True)
    return float(found.stdout.split()[-1])


def main() -> None:
    """The table, and the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", help="the commit before and the one after")
    parser.add_argument("--model", required=True, type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--json-out", type=Path)
    parser.add_argument("--probe", choices=("process", "http"), help=argparse.SUPPRESS)
    parser.add_argument("--guard", action=argparse.BooleanOptionalAction, default=True, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        print((in_process if options.probe == "process" else over_http)(options.model, options.guard))
        return
    if len(options.commits) != 2:
        parser.error("give two commits")
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="opsin-bench-") as folder:
        trees = [Path(folder) / name for name in ("before", "after")]
        figures: dict[tuple[str, tuple[str, bool]], list[float]] = {}
        try:
            for tree, commit in zip(trees, options.commits, strict=True):
                subprocess.run(["git", "-C", root, "worktree", "add", "--quiet", "--detach", tree, commit], check=True)
            for run in range(options.runs):
                for tree in trees if run % 2 == 0 else trees[::-1]:
                    for kind in KINDS:
                        print(f"run {run + 1} of {options.runs}: {tree.name}, {kind[0]}", file=sys.stderr)
                        figures.setdefault((tree.name, kind), []).append(measure(tree, options.model, kind))
        finally:
            for tree in trees:
                subprocess.run(["git", "-C", root, "worktree", "remove", "--force", tree], check=False)
    rows = []
    for kind in KINDS:
        before, after = (figures[tree.name, kind] for tree in trees)
        ratio = median(b / a for a, b in zip(before, after, strict=True))
        rows.append({"where": kind[0], "guard": kind[1], "before_us": before, "after_us": after, "ratio": ratio})
        guard = "on" if kind[1] else "off"
        print(f"{kind[0]:8} guard {guard:4} {median(before):7.1f} -> {median(after):7.1f} µs a token, {ratio:.2f} x")
    if options.json_out:
        document = {"streams": STREAMS, "tokens": TOKENS, "commits": options.commits, "rows": rows}
        options.json_out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
