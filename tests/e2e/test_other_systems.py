"""What Windows and macOS do not have is not needed to import the package, nor by `opsin ask`.

Neither system is at hand: a child process on this one goes without the modules and names that they lack.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import opsin

pytestmark = [pytest.mark.slow, pytest.mark.native]
IMAGE = Path(opsin.__file__).parent / "models" / "demo" / "shapes.png"

_WITHOUT = """
import os, select, signal, subprocess, sys, time
for name in {modules!r}:
    sys.modules[name] = None
for module, names in ((os, {names!r}), (signal, {signals!r}), (select, {polls!r}), (time, {clocks!r})):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
"""
WINDOWS = _WITHOUT.format(
    modules=["resource", "fcntl", "pwd", "grp", "termios", "tty", "pty"],
    names=["sched_getaffinity", "sysconf", "O_NONBLOCK", "O_NOFOLLOW", "memfd_create", "fork"],
    signals=["SIGHUP", "SIGKILL", "SIGPROF", "setitimer"],
    polls=["poll", "epoll"],
    clocks=["CLOCK_BOOTTIME", "clock_gettime"],
)
MACOS = _WITHOUT.format(
    modules=[], names=["sched_getaffinity", "memfd_create"], signals=[], polls=["epoll"], clocks=["CLOCK_BOOTTIME"]
)
ALL = """
import importlib, pkgutil, opsin
for found in pkgutil.walk_packages(opsin.__path__, "opsin."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
print("imported")
"""
ASK = f"""
import sys
sys.argv = ["opsin", "ask", {str(IMAGE)!r}, "What is in this picture?", "--timeline"]
from opsin.cli.app import main
main()
"""


@pytest.mark.parametrize("system", [pytest.param(WINDOWS, id="windows"), pytest.param(MACOS, id="macos")])
@pytest.mark.parametrize(("code", "says"), [(ALL, "imported"), (ASK, "circle")], ids=["import", "ask"])
def test_it_goes_without_what_the_system_lacks(opsin_env: dict[str, str], system: str, code: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", system + code], env=opsin_env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-800:]
    assert says in done.stdout
