"""One worker process as its front sees it, and which images were being worked on when workers crashed."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from opsin.core.errors import BadInput, ModelError, ModelUnreadable, OpsinError
from opsin.core.request import Prompt, SamplingParams
from opsin.worker.messages import Channel, Pixels

# No -m: that would put the working folder before the standard library.
_START = "import sys; sys.path[:] = filter(None, sys.path); from opsin.worker.process import main; main()"
COMMAND = (sys.executable, "-c", _START)
GRACE_SECONDS = 15.0
"""What a worker may take to end before it is killed."""
CRASHES_TO_BLOCK, BLOCKED_SECONDS = 2, 3600.0


class ImageBlocked(BadInput):
    """The model's process crashed twice while it worked on this image."""

    code = "image_blocked"
    http_status = 422


class CrashTracker:
    """Counts the crashes at which an image was in native code itself. Images that merely waited are not blamed."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._crashes: dict[str, tuple[int, float]] = {}  # how many, and until when they count

    def crashed(self, images: Iterable[str]) -> None:
        """A worker crashed while it encoded, prefilled or preprocessed these."""
        now = self._now()
        self._crashes = {image: found for image, found in self._crashes.items() if found[1] > now}
        for image in images:
            count, _ = self._crashes.get(image, (0, 0.0))
            self._crashes[image] = count + 1, now + BLOCKED_SECONDS

    def check(self, images: Iterable[str]) -> None:
        """Raises ImageBlocked for an image that crashed two workers within the last hour."""
        for image in images:
            count, until = self._crashes.get(image, (0, 0.0))
            if count >= CRASHES_TO_BLOCK and until > self._now():
                raise ImageBlocked(
                    "The model's process crashed twice while it worked on an image of this request, so the image is "
                    "refused for an hour: send another one, or the same one in another size."
                )


def start_process(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], Channel]:
    """Start a child with a connection to it: it gets the descriptor of its end, and the id of this process."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
            [*command, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # A session of its own: what the terminal sends reaches the front alone.
            start_new_session=True,
            # ggml would start a debugger to print where it aborts.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
    return process, Channel(ours)


class Child:
    """A worker process, the connection to it, and a thread that sends so that nobody else waits for a full socket.

    `ready_at` is since when it can be asked (`time.monotonic`), `images` counts what it has in native code, `error` is
    why it could not load the model, `ending` says that it was told to end.
    """

    def __init__(self, command: Sequence[str], first: tuple[Any, ...]) -> None:
        self._process, self.channel = start_process(command)
        self.pid = self._process.pid
        self.files: list[str] = []
        self.images: Counter[str] = Counter()
        self.error: OpsinError | None = None
        self.ready_at: float | None = None
        self.ending = False
        self._kill_at = 0.0
        self._reason = ""
        self._outgoing: queue.SimpleQueue[tuple[tuple[Any, ...], Pixels | None] | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="opsin-worker-send", daemon=True)
        self._sender.start()
        self.post(first)

    def post(self, message: tuple[Any, ...], pixels: Pixels | None = None) -> None:
        """Send a message soon; a worker that is gone gets nothing."""
        self._outgoing.put((message, pixels))

    def submit(self, number: int, prompt: Prompt, params: SamplingParams, options: dict[str, Any]) -> None:
        """Send a request, its pixels first."""
        for index, image in enumerate(prompt.images):
            if isinstance(image.rgb, Pixels):
                self.post(("pixels", number, index, len(image.rgb)), image.rgb)
        self.post(("submit", number, prompt, params, options))

    def end(self) -> None:
        """Tell it to end; twice does no harm. One that is not ready has nothing to put in order."""
        if self.ready_at is None:
            self._process.kill()
        elif not self.ending:
            self._kill_at = time.monotonic() + GRACE_SECONDS
            self.post(("close",))
        self.ending = True

    def kill_if_late(self) -> None:
        """Kill it when it was told to end long ago."""
        if time.monotonic() >= self._kill_at:
            self._process.kill()

    def kill(self, reason: str) -> None:
        """Kill it for what it did, said as the end of "the worker …"."""
        self._reason = self._reason or reason
        self._process.kill()

    def reap(self) -> int:
        """Wait for its end, and close the connection; the exit code, negative for a signal."""
        try:
            code = self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._outgoing.put(None)
        self._sender.join()
        self.channel.close()
        return code

    def end_of(self, code: int) -> str:
        """How it ended, as the end of "the worker …"."""
        return self._reason or f"ended by {signal_name(code)}"

    def load_error(self, code: int) -> OpsinError:
        """What a crash before it was ready says about the model."""
        files = " with ".join(self.files) or "the model"
        if code == -signal.SIGKILL:
            return ModelError(
                f"The process that loaded {files} was killed, probably because memory ran out: "
                "give a smaller context (--ctx), fewer layers on the GPU (--gpu-layers), or a smaller model."
            )
        return ModelUnreadable(
            f"llama.cpp crashed ({signal_name(code)}) on {files}: a file is damaged or of a kind that it does not "
            "support; download it again, or use another model."
        )

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            while (item := self._outgoing.get()) is not None:
                message, pixels = item
                self.channel.send(message, None if pixels is None else pixels.fd)
                del item, message, pixels  # the pixels are the worker's now


def signal_name(code: int) -> str:
    """An exit code in words; negative ones are signals."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
    return f"{name} (out of memory, or killed by hand)" if name == "SIGKILL" else name
