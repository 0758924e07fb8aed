"""`opsin chat` on a terminal: lines that can be edited, images in a line, an answer that is stopped."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
IMAGE = Path(str(files("opsin.models"))) / "demo" / "shapes.png"
LIMIT = 30.0
PROMPT = ">"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path) -> None:
        self._own, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=env,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - so that Ctrl-C is a signal
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def wait_for(self, pattern: str) -> str:
        """What comes up to a pattern, and no longer counts then."""
        ends = time.monotonic() + LIMIT
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < ends, f"{pattern!r} did not come: {self.shown!r}"
            if select.select([self._own], [], [], 1)[0]:
                try:
                    data = os.read(self._own, 65536)
                except OSError:  # it has ended
                    pytest.fail(f"{pattern!r} did not come: {self.shown!r}")
                if b"\x1b[6n" in data:  # where is the cursor? A terminal answers
                    os.write(self._own, b"\x1b[1;1R")
                self.shown += _ESCAPES.sub("", data.decode("utf-8", "replace"))
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._own)


@pytest.fixture
def terminal(opsin_env: dict[str, str], tmp_path: Path) -> Iterator[Terminal]:
    env = {**opsin_env, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data"), "TERM": "xterm"}
    command = [sys.executable, "-m", "opsin", "chat", "--temperature", "9", "--no-guard"]  # long nonsense
    opened = Terminal([*command, "--max-tokens", "1000"], env, tmp_path)
    try:
        yield opened
    finally:
        opened.close()


def test_a_conversation_on_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    photo = tmp_path / "my photo.png"
    photo.write_bytes(IMAGE.read_bytes())
    terminal.wait_for(PROMPT)
    terminal.type("'~/my photo.png' What is thos\x7f\x7fis?\r")
    terminal.wait_for("thinking|reading image")
    terminal.type("\x03")  # the answer ends, not the conversation; a busy machine may have come to its end before
    terminal.wait_for(r"\(stopped\)|[a-z]\.\n")
    terminal.wait_for(PROMPT)
    terminal.type("half a line\x03")  # nor here
    terminal.wait_for(PROMPT)
    terminal.type("/new\r")
    terminal.wait_for("a new conversation")
    terminal.wait_for(PROMPT)
    terminal.type("\x1b[A\x1b[A\r")  # the question before that
    terminal.wait_for(r"[a-z]\.\n")
    terminal.wait_for(PROMPT)
    terminal.type(f"/save {tmp_path}/talk.md\r")
    terminal.wait_for("saved in")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.process.wait(LIMIT) == 0
    saved = (tmp_path / "talk.md").read_text()
    assert saved.startswith("**user:** (image of 448 x 448) What is this?")
    assert "What is this?" in (tmp_path / "data" / "opsin" / "chat-history").read_text()
