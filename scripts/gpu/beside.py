#!/usr/bin/env python3
"""Runs a bench with a llama-server of the same model beside it, which is started before and ended after.

    python scripts/gpu/beside.py --model M --mmproj P --ctx 32768 --parallel 8 --log LOG -- opsin bench engine ...

`--against llama-server=URL` is added to the command. Where PATH has no llama-server the command runs without it and
decides the exit code; a llama-server that does not start makes that at least 1.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PROGRAM = "llama-server"
START_S, STOP_S = 50.0, 2.0


def tell(sentence: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"beside: {sentence}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def llama_server(program: str, given: argparse.Namespace) -> Iterator[str | None]:
    """Its address once it is ready, None where it does not start. It ends with this block, however that ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, "-m", given.model, "--mmproj", given.mmproj, "--host", "127.0.0.1", "--port", str(port)]
    command += ["-c", str(given.ctx), "-np", str(given.parallel), "-b", "2048", "-ub", "1024", "-ngl", "99"]
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    with given.log.open("wb") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            ready = False
            while not ready and server.poll() is None and time.monotonic() < began + START_S:
                with contextlib.suppress(OSError):
                    ready = urllib.request.urlopen(f"{url}/health", timeout=2).status == 200
                time.sleep(0 if ready else 0.1)
            if ready:
                tell(f"{PROGRAM} was ready after {time.monotonic() - began:.1f} s: {' '.join(command[1:])}")
            else:
                tell(f"{PROGRAM} did not start, so nothing is measured beside: see {given.log}")
            yield url if ready else None
        finally:
            server.terminate()
            try:
                server.wait(STOP_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--mmproj"):
        parser.add_argument(name, required=True, help="GGUF file")
    parser.add_argument("--ctx", type=int, required=True, help="context in tokens of all slots")
    parser.add_argument("--parallel", type=int, required=True, help="slots")
    parser.add_argument("--log", type=Path, required=True, help="file for what the server prints")
    parser.add_argument("command", nargs="+", help="behind --")
    given = parser.parse_args()
    # `timeout` ends this process with SIGTERM: the server must not outlive it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    program = shutil.which(PROGRAM)
    if program is None:
        tell(f"there is no {PROGRAM} on PATH, so nothing is measured beside")
        return subprocess.call(given.command)
    with llama_server(program, given) as url:
        beside = [] if url is None else ["--against", f"{PROGRAM}={url}"]
        return subprocess.call([*given.command, *beside]) or int(url is None)


if __name__ == "__main__":
    sys.exit(main())
