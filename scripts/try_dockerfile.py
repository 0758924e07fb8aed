#!/usr/bin/env python3
"""Runs the Dockerfile's steps for CPUs in a fresh Debian, where no Docker daemon is at hand.

    sudo python3 scripts/try_dockerfile.py FOLDER

Needs `debootstrap` and root. Each stage becomes a folder below FOLDER; a step runs by `chroot`. This machine's own apt
sources, pip settings and certificates are used, so that it also works behind a mirror. At the end it starts what was
built as the image would, and asks it for /health and for one answer.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUITES = {"debian:12-slim": "bookworm"}
PORT = 18010
_OURS = ("/etc/apt/sources.list", "/etc/apt/sources.list.d", "/etc/apt/apt.conf.d", "/etc/apt/auth.conf.d",
         "/etc/apt/preferences.d", "/etc/pip.conf", "/etc/xdg/pip", "/etc/resolv.conf", "/etc/hosts")  # fmt: skip


def steps(text: str, arguments: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The instructions of a Dockerfile in order, with build arguments put in."""
    for line in re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", text)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "ARG":
            name, _, default = rest.partition("=")
            arguments.setdefault(name, default)
        elif word:
            yield word, re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], rest)


class Stage:
    """The file system of one stage, and what its ENV, USER and WORKDIR said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.environ, self.user, self.workdir = folder, dict[str, str](), "root", "/"
        self.entry: list[str] = []

    def started(self, base: str, stages: dict[str, Stage]) -> Stage:
        """Begin with another stage's files, or with a fresh Debian."""
        if base in stages:
            subprocess.run(["cp", "-a", f"{stages[base].folder}/.", self.folder], check=True)
            self.environ = dict(stages[base].environ)
            return self
        subprocess.run(["debootstrap", "--variant=minbase", SUITES[base], self.folder], check=True)
        for path in map(Path, _OURS):
            inside = self.folder / path.relative_to("/")
            if path.is_dir():
                shutil.copytree(path, inside, dirs_exist_ok=True)
            elif path.is_file():
                inside.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, inside)
        certificates = Path("/etc/ssl/certs/ca-certificates.crt")
        (self.folder / "etc/ssl/certs").mkdir(parents=True, exist_ok=True)
        shutil.copy(certificates, self.folder / "etc/ssl/certs/host.crt")
        return self

    def command(self, words: list[str]) -> list[str]:
        """Words to run in this stage's files."""
        mirror = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        mirror |= {"PIP_CERT": "/etc/ssl/certs/host.crt", "DEBIAN_FRONTEND": "noninteractive"}
        environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **mirror, **self.environ}
        if self.user != "root":
            environ["HOME"] = f"/home/{self.user}"
        pairs = [f"{name}={value}" for name, value in environ.items()]
        inside = ["env", "-i", *pairs, "sh", "-c", f"cd {self.workdir} && exec {shlex.join(words)}"]
        return ["chroot", f"--userspec={self.user}", self.folder, *inside]

    def do(self, word: str, rest: str, stages: dict[str, Stage]) -> None:
        """Carry out one instruction."""
        if word == "RUN":
            subprocess.run(self.command(["sh", "-ec", rest]), check=True)
        elif word == "COPY":
            *sources, target = rest.split()
            origin = ROOT
            if sources[0].startswith("--from="):
                origin = stages[sources.pop(0).removeprefix("--from=")].folder
            inside = self.folder / self.workdir.lstrip("/") / target if target[0] != "/" else self.folder / target[1:]
            for name in sources:
                source = origin / name.lstrip("/")
                if source.is_dir():
                    shutil.copytree(source, inside, symlinks=True, dirs_exist_ok=True)
                else:
                    inside.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, inside)
        elif word == "ENV":
            self.environ |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "WORKDIR":
            self.workdir = rest
            (self.folder / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "USER":
            self.user = rest
        elif word in {"ENTRYPOINT", "CMD"}:
            self.entry += json.loads(rest)


def main() -> None:
    """Build, start, ask."""
    top = Path(sys.argv[1]).resolve()
    stages: dict[str, Stage] = {}
    wanted = {"build-cpu", "build", "run-cpu", "run"}
    stage: Stage | None = None
    for word, rest in steps((ROOT / "Dockerfile").read_text(encoding="utf-8"), {"BASE": "cpu"}):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = None
            if name in wanted:
                folder = top / name
                folder.mkdir(parents=True)
                stages[name] = stage = Stage(folder).started(base, stages)
        elif stage is not None:
            sys.stdout.write(f"--- {word} {rest}\n")
            sys.stdout.flush()
            stage.do(word, rest, stages)
    _ask(stages["run"])


def _ask(stage: Stage) -> None:
    key = secrets.token_hex(16)
    # The chroot shares this machine's network: it listens on loopback only.
    stage.environ |= {"OPSIN_API_KEY": key, "OPSIN_HOST": "127.0.0.1", "OPSIN_PORT": str(PORT)}
    subprocess.run(["mount", "-t", "proc", "proc", stage.folder / "proc"], check=True)
    subprocess.run(["mount", "--bind", "/dev", stage.folder / "dev"], check=True)
    server = subprocess.Popen(stage.command(stage.entry))
    try:
        for _ in range(120):
            time.sleep(1)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=4)
                break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit("the server ended") from None
        body = {"messages": [{"role": "user", "content": "What do you see?"}], "max_tokens": 20}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        address = f"http://127.0.0.1:{PORT}/v1/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        sys.stdout.write(f"answered: {answer['choices'][0]['message']['content']!r}\n")
    finally:
        server.send_signal(signal.SIGTERM)
        sys.stdout.write(f"ended with {server.wait(60)}\n")
        subprocess.run(["umount", stage.folder / "proc", stage.folder / "dev"], check=False)


if __name__ == "__main__":
    main()
