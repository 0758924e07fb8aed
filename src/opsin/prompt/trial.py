"""The child process in which a stranger's chat template is tried, on long conversations of awkward texts.

Any template can loop for ever or repeat a string until memory is full, and no thread can be stopped.
"""

import contextlib
import itertools
import json
import signal
import sys
from pathlib import Path

from opsin.core.errors import BadPrompt
from opsin.prompt.builder import ChatTemplate, Json, Shape, message_of
from opsin.prompt.template import TooCostly

_CPU_SECONDS = 1.0
_MEMORY_BYTES = 128 * 2**20
_TURNS = 50
_TEXTS = (
    "What do you see?", "", " " * 4000, "\n" * 2000, "a b " * 1000, "<" * 2000, "</think>" * 300, "7" * 5000,
    "{{ messages }}{% if %}", "äß😀" * 500, "word\n" * 2000,
)  # fmt: skip
_CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "</s>" * 100}}}
_TOOLS = [{"type": "function", "function": {"name": f"look{n}", "parameters": {"type": "object"}}} for n in range(20)]


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
    _ = template.system_shape  # asked as the builder asks
    for shape, full, thinking in itertools.product(template.user_shapes, (False, True), (None, True, False)):
        messages = _conversation(shape, full=full)
        switches = {} if thinking is None else {"enable_thinking": thinking}
        for some in (messages[-1:], messages):
            try:
                template.render(some, tools=_TOOLS if full else None, options=switches)
            except TooCostly:
                raise
            except BadPrompt:
                continue


def _conversation(shape: Shape, *, full: bool) -> list[Json]:
    """Turns in order, with every text; with `full` also a system message, thoughts and tool calls."""
    messages = [message_of("system", _TEXTS[0], shape)] if full else []
    for turn in range(_TURNS):
        answer = _TEXTS[(turn + 1) % (len(_TEXTS) - 1)]
        thought = {"reasoning_content": answer, "tool_calls": [_CALL]} if full else {}
        messages.append(message_of("user", _TEXTS[turn % len(_TEXTS)], shape))
        messages.append({**message_of("assistant", answer, shape), **thought})
        if full:
            messages.append({**message_of("tool", answer, shape), "tool_call_id": "1", "name": "look"})
    return [*messages, message_of("user", _TEXTS[0], shape)]
