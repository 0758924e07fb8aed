"""A rig in a process of its own, asked over its standard streams.

Two engines in one process disturb each other: each thread that computes has a team of OpenMP threads, and libgomp
stops spinning as soon as more threads than cores belong to its teams, which makes both half as fast. And a setting on
which llama.cpp ends the process should end that of the one candidate.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from opsin.core.errors import EngineError, OpsinError

if TYPE_CHECKING:
    from opsin.core.settings import EngineSettings
    from opsin.tune.rig import OpenRig

T = TypeVar("T")
_LAST_SECONDS = 20.0  # for a child to free its model


class Apart:
    """The parent's end. `command` starts a child that calls `serve`; opening raises what opening the rig raises."""

    def __init__(self, command: Sequence[str], settings: EngineSettings) -> None:
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 - our own
        try:
            self._ask(settings)
        except BaseException:
            self.close()
            raise

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(rig, *arguments)`, computed in the child; all of it must pickle.

        Raises OpsinError as the function does, and EngineError when the child ended.
        """
        found: T = self._ask((function, arguments))
        return found

    def close(self) -> None:
        """End the child; twice does no harm."""
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._child.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _ask(self, question: object) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            pickle.dump(question, self._child.stdin)
            self._child.stdin.flush()
            answer = pickle.load(self._child.stdout)  # noqa: S301 - written by our own child
        except (EOFError, OSError, pickle.UnpicklingError):
            code = self._child.wait()
            raise EngineError(f"The process that measured these settings ended (exit code {code}).") from None
        if isinstance(answer, OpsinError):
            raise answer
        return answer


def serve(open_rig: OpenRig) -> None:
    """The child's end: the settings come first, then calls, until the parent closes the line."""
    source = sys.stdin.buffer
    # Whatever else is printed here must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    rig = None
    try:
        while True:
            try:
                question = pickle.load(source)  # noqa: S301 - written by our own parent
            except EOFError:
                return
            answer: object = None
            try:
                if rig is None:
                    rig = open_rig(question)
                else:
                    function, arguments = question
                    answer = function(rig, *arguments)
            except OpsinError as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()
    finally:
        if rig is not None:
            rig.close()
