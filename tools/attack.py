"""Sends hostile requests and files to a real server and to the command, and prints what the next client noticed.

`python tools/attack.py` (`make attack`) takes a few minutes. While each group of attacks runs, another client asks a
plain question and for /health without pause; the table shows the slowest of both, the server's memory and its open
files. Exit code 1 if something failed that must not: a slow answer, a 500, a traceback, memory or files that stay.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "unit" / "images")]

from hostile import hostile_files  # noqa: E402
from hostile_constraints import HOSTILE  # noqa: E402
from serve_process import Served, environment, image_url, question, served  # noqa: E402

CHAT = "/v1/chat/completions"
ANSWER_SECONDS, HEALTH_SECONDS = 3.0, 1.0
MAY_BE = {200, 400, 404, 405, 408, 413, 415, 421, 422, 429, 431, 503, 505}
Send = Callable[["Served"], object]


class Neighbour(threading.Thread):
    """Another client: the slowest plain answer and the slowest /health while it runs."""

    def __init__(self, server: Served) -> None:
        super().__init__(daemon=True)
        self._server, self._over = server, threading.Event()
        self.answer = self.health = 0.0
        self.failures: list[str] = []

    def run(self) -> None:
        """Ask until told to stop, at least once."""
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            while True:
                try:
                    for path, body in ((CHAT, question(max_tokens=8)), ("/health", None)):
                        began = time.monotonic()
                        reply = client.post(path, json=body) if body else client.get(path)
                        took = time.monotonic() - began
                        if reply.status_code not in {200, 429, 503}:
                            self.failures.append(f"{path}: {reply.status_code}")
                        self.answer, self.health = (
                            (max(self.answer, took), self.health) if body else (self.answer, max(self.health, took))
                        )
                except httpx.HTTPError as error:
                    self.failures.append(type(error).__name__)
                if self._over.wait(0.02):
                    return

    def stop(self) -> None:
        """Let it finish its question."""
        self._over.set()
        self.join(120)


def post(server: Served, body: bytes, **headers: str) -> int | str:
    """The status of one request, or how the connection ended."""
    try:
        with httpx.Client(base_url=server.url, timeout=90) as client:
            head = {"content-type": "application/json", **headers}
            reply = client.post(CHAT, content=body, headers=head)
            return "traceback" if "Traceback" in reply.text else reply.status_code
    except httpx.HTTPError as error:
        return type(error).__name__


def all_at_once(server: Served, bodies: Iterable[bytes], workers: int = 8) -> collections.Counter[int | str]:
    """Send all, some at the same time; how often each status came."""
    with ThreadPoolExecutor(workers) as pool:
        return collections.Counter(pool.map(lambda body: post(server, body), bodies))


def constrained() -> Iterator[bytes]:
    """Every schema and grammar that once held an engine, alone and with eight choices."""
    for asked in HOSTILE.values():
        fields = dict(asked)
        if (schema := fields.pop("json_schema", None)) is not None:
            fields["response_format"] = {"type": "json_object", "schema": json.loads(schema)}
        for n in (1, 8):
            yield json.dumps(question(**fields, n=n, max_tokens=20, temperature=1.0)).encode()


def large() -> Iterator[bytes]:
    """Bodies of megabytes in every shape."""
    yield b'{"messages": [' + b"1," * 1_000_000 + b"1]}"
    yield b"{" + b",".join(b'"k%d": 1' % i for i in range(300_000)) + b"}"
    yield b'{"messages": [' + b",".join([b'{"role": "user", "content": ""}'] * 100_000) + b"]}"
    yield json.dumps(question(stop="a" * 10_000_000)).encode()
    yield json.dumps(question("file://" + "/." * 800_000)).encode()
    yield json.dumps(question("data:image/png;base64," + "A" * 30_000_000)).encode()
    yield b'{"messages": ' + b"[" * 200_000
    yield b'{"messages": ' + b'{"a":' * 100_000
    yield b"\xff\xfe" + "{}".encode("utf-16-le") * 1000
    yield json.dumps(
        question(text="\x00\u202e\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
    ).encode()


def images() -> Iterator[bytes]:
    """Every broken and hostile image file, as a data: address."""
    for _, data in hostile_files():
        if len(data) < 20_000_000:
            yield json.dumps(
                question("data:image/png;base64," + base64.b64encode(data).decode(), max_tokens=4)
            ).encode()


def addresses() -> Iterator[bytes]:
    """Addresses of images that lead inside, nowhere, or are none."""
    for url in (
        *("http://127.0.0.1:1/x.png", "http://0x7f000001/", "http://[::ffff:169.254.169.254]/", "http://xn--/x"),
        *("file:///etc/passwd", "file://" + "/.." * 2000 + "/etc/passwd", "ftp://a/b", "gopher://a", "javascript:1"),
        *("http://" + "a" * 9000, "data:,", "data:image/png;base64,%%%", "http://user:pw@example.org/x.png"),
        *("//example.org/x.png", "\x00", "http://example.org:22/"),
    ):
        yield json.dumps(question(url)).encode()


POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def raw(server: Served) -> collections.Counter[int | str]:
    """Requests that are not quite HTTP."""
    heads = [
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"GET " + b"/a" * 40_000 + b" HTTP/1.1\r\n\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
        POST + b"Content-Length: 10\r\n\r\n{}",
        b"\r\n" * 1000,
    ]
    found: collections.Counter[int | str] = collections.Counter()
    for head in heads:
        with connected(server, head) as one:
            one.settimeout(2)
            try:
                first = one.recv(200).split(b" ")
                found[int(first[1]) if len(first) > 1 else "closed"] += 1
            except OSError:
                found["waits"] += 1
    return found


def connected(server: Served, sent: bytes = b"") -> socket.socket:
    """A connection that said something."""
    one = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), 30)
    with contextlib.suppress(OSError):  # the server may have closed it
        one.sendall(sent)
    return one


def idle(server: Served) -> str:
    """More connections than are let in, and bodies that do not end, for five seconds."""
    head = POST + b"Content-Length: 60000000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for number in range(700):
            with contextlib.suppress(OSError):
                stack.enter_context(connected(server, head + b" " * 1000 if number % 10 == 0 else b""))
        time.sleep(5)
    return "700 connections"


def left(server: Served) -> str:
    """Long answers whose clients leave after 50 ms."""
    body = question(max_tokens=1000, ignore_eos=True, guard=False, n=8)
    for _ in range(40):
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{server.url}{CHAT}", json=body, timeout=0.05)
    return "40 requests of 8 choices"


def killed(server: Served) -> str:
    """The model's process is killed in the middle of streams; the neighbour may be told so."""
    with ThreadPoolExecutor(4) as pool:
        bodies = [json.dumps(question(max_tokens=400, ignore_eos=True, guard=False)).encode()] * 4
        sent = [pool.submit(post, server, body) for body in bodies]
        time.sleep(0.3)
        server.worker.kill()
        said = collections.Counter(one.result() for one in sent)
    server.wait_ready(2)
    return ", ".join(f"{status}: {count}" for status, count in said.items())


GROUPS: dict[str, Send] = {
    "schemas and grammars": lambda server: all_at_once(server, constrained()),
    "large and deep bodies": lambda server: all_at_once(server, large(), 4),
    "broken images": lambda server: all_at_once(server, images()),
    "addresses of images": lambda server: all_at_once(server, addresses()),
    "not quite HTTP": raw,
    "idle connections, endless bodies": idle,
    "clients that leave": left,
    "the worker is killed": killed,
}


def processes(server: Served) -> list[psutil.Process]:
    """The server and its children."""
    front = psutil.Process(server.process.pid)
    return [front, *front.children(recursive=True)]


def memory(server: Served) -> float:
    """Resident MiB of all of them."""
    return sum(one.memory_info().rss for one in processes(server) if one.is_running()) / 2**20


def attack_server() -> list[str]:
    """Every group in turn; what failed."""
    failed = []
    print(f"{'attack':<34} {'answer':>8} {'health':>8} {'memory':>10} {'files':>6}  what came")
    with served("--fetch-images") as server:
        # With images, so that the processes that decode them are there already.
        all_at_once(server, [json.dumps(question(image_url(seed), max_tokens=8)).encode() for seed in range(32)])
        before, files = memory(server), processes(server)[0].num_fds()
        print(f"{'before':<34} {'':>8} {'':>8} {before:>6.0f} MiB {files:>6}")
        for name, send in GROUPS.items():
            failed += attack(server, name, send)
        time.sleep(2)
        after, files_after = memory(server), processes(server)[0].num_fds()
        if after > 1.5 * before + 64:
            failed.append(f"memory stays: {before:.0f} MiB before, {after:.0f} MiB after")
        if files_after > files + 8:
            failed.append(f"files stay open: {files} before, {files_after} after")
        if any("Traceback" in line for line in server.lines):
            failed.append("a traceback in the log")
        if (code := server.end()) != 0:
            failed.append(f"the server ended with {code}")
    return failed


def attack(server: Served, name: str, send: Send) -> Iterator[str]:
    """One group: a row of the table, and what failed."""
    neighbour = Neighbour(server)
    neighbour.start()
    said = send(server)
    neighbour.stop()
    now, open_files = memory(server), processes(server)[0].num_fds()
    told = ", ".join(f"{key}: {value}" for key, value in said.items()) if isinstance(said, dict) else said
    waited = f"{neighbour.answer:>6.2f} s {neighbour.health:>6.2f} s"
    print(f"{name:<34} {waited} {now:>6.0f} MiB {open_files:>6}  {told}", flush=True)
    spared = name == "the worker is killed"
    if not spared and neighbour.answer > ANSWER_SECONDS:
        yield f"{name}: a plain question took {neighbour.answer:.1f} s"
    if neighbour.health > HEALTH_SECONDS:
        yield f"{name}: /health took {neighbour.health:.1f} s"
    if neighbour.failures and not spared:
        yield f"{name}: the neighbour got {set(neighbour.failures)}"
    if isinstance(said, dict) and (bad := {key for key in said if isinstance(key, int) and key not in MAY_BE}):
        yield f"{name}: {bad}"
    if isinstance(said, dict) and "traceback" in said:
        yield f"{name}: a traceback"


def attack_command() -> list[str]:
    """Hostile files, names and settings through `opsin ask`: an answer or one sentence, below 20 s and 1 GiB."""
    failed = []
    demo = ROOT / "src" / "opsin" / "models" / "demo"
    model = (demo / "opsin-demo.gguf").read_bytes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases: dict[str, list[str]] = {}
        for number, (file, data) in enumerate(hostile_files()):
            path = folder / f"{number}-{file}".replace("/", "_")
            path.write_bytes(data)
            cases[file] = [str(path), "What is this?"]
        for key, change in {
            "cut": lambda data: data[: len(data) // 3],
            "no-magic": lambda data: b"XXXX" + data[4:],
            "many-keys": lambda data: data[:16] + b"\xff\xff\xff\x00\x00\x00\x00\x00" + data[24:],
            "no-blocks": lambda data: data.replace(
                b"llama.block_count\x04\0\0\0\x04", b"llama.block_count\x04\0\0\0\0"
            ),
            "renamed": lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"),
        }.items():
            path = folder / f"model-{key}.gguf"
            path.write_bytes(change(model))
            pair = ["--model", str(path), "--mmproj", str(demo / "mmproj-opsin-demo.gguf")]
            cases[path.name] = [str(demo / "shapes.png"), "What is this?", *pair]
        for number, strange in enumerate(
            ("a" * 300, "~nosuchuser/x", "\x1b]0;x", "/dev/zero", "/proc/self/mem", ".", "")
        ):
            cases[f"name {number}"] = [strange, "What is this?"]
        shown = str(demo / "shapes.png")
        for flag in (
            "--ctx=1000000000",
            "--threads=0",
            "--max-tokens=99999999999999",
            "--seed=x",
            "--json-schema=/dev/zero",
        ):
            cases[flag] = [shown, "What is this?", flag]
        slowest, largest, codes = 0.0, 0.0, collections.Counter[int]()
        env = {**environment(), "XDG_CACHE_HOME": name, "XDG_CONFIG_HOME": name, "XDG_DATA_HOME": name}
        for case, arguments in cases.items():
            began = time.monotonic()
            command = [sys.executable, "-m", "opsin", "ask", *arguments, "--max-tokens", "4"]
            if any(one.startswith("--max-tokens=") for one in arguments):
                command = command[:-2]
            with subprocess.Popen(
                command, env=env, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
            ) as run:
                assert run.stderr is not None
                said = run.stderr.read().decode(errors="replace")
                _, status, usage = os.wait4(run.pid, 0)
                run.returncode = code = os.waitstatus_to_exitcode(status)
            slowest, largest = max(slowest, time.monotonic() - began), max(largest, usage.ru_maxrss / 2**20)
            codes[code] += 1
            if code not in {0, 1, 2, 3} or "Traceback" in said:
                failed.append(f"{case!r}: exit code {code}: {said[-200:]!r}")
    told = ", ".join(f"{code}: {count}" for code, count in sorted(codes.items()))
    print(f"{len(cases)} commands: exit codes {told}; the slowest {slowest:.1f} s, the largest {largest:.2f} GiB")
    if slowest > 20 or largest > 1:
        failed.append(f"a command took {slowest:.1f} s or {largest:.2f} GiB")
    return failed


if __name__ == "__main__":
    FAILED = attack_server() + attack_command()
    print("\n".join(FAILED) or "nothing failed")
    sys.exit(bool(FAILED))
