"""A trial of a stranger's chat template in a child process with limits, before this process renders it.

Jinja's sandbox keeps a template away from Python, but any template can loop for ever or repeat a string until memory
is full, and no thread can be stopped. So it is compiled and rendered once, on a long conversation of awkward texts,
where the operating system can end it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from opsin.core.errors import BadPrompt, ModelUnreadable
from opsin.prompt.template import ChatTemplate, TooCostly

_CPU_SECONDS = 1.0
_MEMORY_BYTES = 128 * 2**20
# For a machine so busy that a second of CPU time takes long; the only limit on Windows.
_WALL_SECONDS = 60
_TURNS = 50
_TEXTS = (
    "What do you see?", "", " " * 4000, "\n" * 2000, "a b " * 1000, "<" * 2000, "</think>" * 300, "7" * 5000,
    "{{ messages }}{% if %}", "äß😀" * 500, "word\n" * 2000,
)  # fmt: skip
_CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "</s>" * 100}}}
_TOOLS = [{"type": "function", "function": {"name": f"look{n}", "parameters": {"type": "object"}}} for n in range(20)]


@cache
def check_template(text: str, *, bos_token: str, eos_token: str) -> None:
    """Raise ModelUnreadable unless the template compiles and renders a long conversation within the limits."""
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-c", "from opsin.prompt.trial import main; main()"],
            input=json.dumps([text, bos_token, eos_token]).encode(),
            capture_output=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
            timeout=_WALL_SECONDS,
            check=False,
        )
        late = sys.platform != "win32" and child.returncode == -signal.SIGPROF
    except subprocess.TimeoutExpired:
        late = True
    except OSError as error:
        why = error.strerror or error
        raise ModelUnreadable(f"The model's chat template cannot be tried in a process of its own: {why}.") from None
    if late or child.returncode != 0:
        raise ModelUnreadable(str(TooCostly("runs too long" if late else "ends the process that renders it")))
    if child.stdout:
        raise ModelUnreadable(child.stdout.decode())


def main() -> None:
    """Try the template on standard input, and say on standard output what is wrong with it."""
    text, bos_token, eos_token = json.load(sys.stdin)
    _limit()
    try:
        _render_all(ChatTemplate(text, bos_token=bos_token, eos_token=eos_token))
    except BadPrompt as error:
        sys.stdout.buffer.write(str(error).encode("utf-8", "replace"))


def _limit() -> None:
    """From here on this process ends after _CPU_SECONDS, and gets _MEMORY_BYTES more at most."""
    if sys.platform == "win32":
        return
    import resource

    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
    with contextlib.suppress(OSError, ValueError):  # macOS has no such file and does not keep the limit either
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + _MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _render_all(template: ChatTemplate) -> None:
    """Render conversations as the builder would; the template may refuse them, but it may not cost too much."""
    abilities = template.abilities
    shapes = [lists for lists, able in ((False, abilities.strings), (True, abilities.lists)) if able]
    for lists, full, thinking in itertools.product(shapes, (False, True), (None, True, False)):
        messages = _conversation(lists=lists, full=full)
        switches = {} if thinking is None else {"enable_thinking": thinking}
        for some in (messages[-1:], messages):
            try:
                template.render(some, tools=_TOOLS if full else None, switches=switches)
            except TooCostly:
                raise
            except BadPrompt:
                continue


def _conversation(*, lists: bool, full: bool) -> list[dict[str, Any]]:
    """Turns in order, with every text; with `full` also a system message, thoughts and tool calls."""

    def said(role: str, text: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if lists else text, **more}

    messages = [said("system", _TEXTS[0])] if full else []
    for turn in range(_TURNS):
        question, answer = _TEXTS[turn % len(_TEXTS)], _TEXTS[(turn + 1) % (len(_TEXTS) - 1)]
        messages.append(said("user", question))
        if full:
            messages.append(said("assistant", answer, reasoning_content=answer, tool_calls=[_CALL]))
            messages.append(said("tool", answer, tool_call_id="1", name="look"))
        else:
            messages.append(said("assistant", answer))
    return [*messages, said("user", _TEXTS[0])]
