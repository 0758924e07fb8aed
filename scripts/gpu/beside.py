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
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "src"))

from opsin.bench.drivers import listening
from opsin.core.errors import BadParameter

PROGRAM = "llama-server"
SECONDS = (50, 2)  # to start and to end


def tell(sentence: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"beside: {sentence}\n")
    sys.stderr.flush()


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
    server = [program, "-m", given.model, "--mmproj", given.mmproj, "--host", "127.0.0.1", "-c", str(given.ctx)]
    server += ["-np", str(given.parallel), "-b", "2048", "-ub", "1024", "-ngl", "99"]
    began = time.monotonic()
    with given.log.open("w+b") as log, contextlib.ExitStack() as stack:
        try:
            _, url = stack.enter_context(listening(PROGRAM, server, "/health", log, SECONDS))
        except BadParameter as error:
            tell(f"{error} So nothing is measured beside.")
            return subprocess.call(given.command) or 1
        tell(f"{PROGRAM} was ready after {time.monotonic() - began:.1f} s: {' '.join(server[1:])}")
        return subprocess.call([*given.command, "--against", f"{PROGRAM}={url}"])


if __name__ == "__main__":
    sys.exit(main())
