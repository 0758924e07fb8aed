"""What front and worker send each other, pickled tuples over a local socket, and the worker's process itself.

Front to worker: `open` (settings), `expect` (a request comes soon), `submit`, `cancel`, `ping`, `close`. Worker to
front: `loading`, `warming`, `ready`, `failed`, `events` (what happened to each request since the last message),
`images` (those in native code now), `pong`.
The worker is our own child, which makes unpickling what it sends as safe as running it.
"""

import contextlib
import dataclasses
import mmap
import os
import pickle
import queue
import select
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from opsin.core.answer import Event, TextDelta
from opsin.core.backend import BackendLimits
from opsin.core.errors import EngineError, ModelError, ModelUnreadable, OpsinError, copy_of
from opsin.core.model_info import ModelInfo, Placement
from opsin.core.request import Image, ImagePart, Prompt
from opsin.prompt import TemplateSource

# Images from this size on are shared: smaller ones are copied faster, and each shared one takes open files, of which
# the kernel sends at most 253 with a message.
SHARED_BYTES, MOST_SHARED = 4 * 2**20, 250
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that ask for an end; Windows has no SIGHUP."""
_KILLED = -getattr(signal, "SIGKILL", 9)
GRACE_SECONDS = 15.0  # what a worker may take to end before it is killed
_HEAD = struct.Struct("<QB")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the front needs to know of a model that a worker has loaded.

    `source` is what prompts are written with, `setup` names files, settings and machine in one word, `placement` was
    measured in the warm-up, `notice` is a sentence for whoever started the worker.
    """

    info: ModelInfo
    limits: BackendLimits
    source: TemplateSource
    is_demo: bool
    setup: str
    load_ms: float
    placement: Placement
    notice: str | None = None


class Pixels(mmap.mmap):
    """The RGB bytes of one image in memory without a name; freed when the last process has dropped its reference."""

    fd: int

    def __new__(cls, fd: int, size: int) -> Self:
        """Map what is behind the file descriptor, which belongs to this object from now on."""
        made = super().__new__(cls, fd, size)
        made.fd = fd
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without the pixels: these go their own way."""
        return bytes, ()

    def __del__(self) -> None:
        os.close(self.fd)


def share(rgb: bytes | mmap.mmap) -> bytes | mmap.mmap:
    """The pixels where a worker can map them, if there are many. Raises OSError."""
    if isinstance(rgb, Pixels) or len(rgb) < SHARED_BYTES:
        return rgb
    named = hasattr(os, "memfd_create")
    with os.fdopen(os.memfd_create("opsin-pixels"), "wb") if named else tempfile.TemporaryFile() as file:
        file.write(rgb)
        file.flush()
        return Pixels(os.dup(file.fileno()), len(rgb))


def share_all(prompt: Prompt) -> Prompt:
    """The prompt with the pixels of its large images where a worker can map them."""
    parts = list(prompt.parts)
    images = [(index, part.image) for index, part in enumerate(parts) if isinstance(part, ImagePart)]
    for index, image in images[:MOST_SHARED]:
        parts[index] = ImagePart(dataclasses.replace(image, rgb=share(image.rgb)))
    return dataclasses.replace(prompt, parts=tuple(parts))


def take_pixels(images: Iterable[Image], fds: Sequence[int]) -> None:
    """Give images that came without their pixels those that came apart, in the same order."""
    for image, fd in zip([one for one in images if not one.rgb], fds, strict=True):
        object.__setattr__(image, "rgb", Pixels(fd, image.width * image.height * 3))


class Channel:
    """One end of the connection. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._buffer = bytearray()
        self._files: deque[int] = deque()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, message: tuple[Any, ...], *fds: int) -> None:
        """Send a message, and with it open files. Waits while the other side does not read. Raises OSError."""
        body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        data = _HEAD.pack(len(body), len(fds)) + body
        with self._sending:
            sent = socket.send_fds(self._sock, [data], fds) if fds else 0
            self._sock.sendall(data[sent:])

    def receive(self, seconds: float | None = None) -> tuple[Any, ...] | None:
        """The next message, open files that came with it as its last elements; None when none came in time.

        Raises EOFError when the other side is gone.
        """
        while (message := self._next()) is None:
            if not self._poll.poll(None if seconds is None else seconds * 1e3):
                return None
            try:
                data, files, _, _ = socket.recv_fds(self._sock, 1 << 18, MOST_SHARED)
            except ConnectionError as error:
                raise EOFError from error
            if not data:
                raise EOFError
            self._buffer += data
            self._files.extend(files)
        return message

    def close(self) -> None:
        """Close this end, and files that were received and never taken."""
        self._sock.close()
        while self._files:
            os.close(self._files.popleft())

    def _next(self) -> tuple[Any, ...] | None:
        if len(self._buffer) < _HEAD.size:
            return None
        length, count = _HEAD.unpack_from(self._buffer)
        end = _HEAD.size + length
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer)[_HEAD.size : end] as body:
            message: tuple[Any, ...] = pickle.loads(body)  # noqa: S301 - see the module
        del self._buffer[:end]
        return (*message, *(self._files.popleft() for _ in range(count)))


# A delta is by far the most frequent event, and a dataclass is slow to pickle: its text goes as a plain string.
Packed = tuple[int, list["str | Event | BaseException"]]
"""A request's number, and what happened to it."""


def pack(event: Event | BaseException) -> str | Event | BaseException:
    """An event as it is sent."""
    if isinstance(event, TextDelta) and not event.reasoning and not event.logprobs:
        return event.text
    return portable(event) if isinstance(event, BaseException) else event


def portable(error: BaseException) -> OpsinError:
    """An error that can be pickled and raised again on the other side."""
    if isinstance(error, OpsinError):
        with contextlib.suppress(Exception):
            return copy_of(error)
    return EngineError(f"The engine failed on this request ({type(error).__name__}: {error}).")


def start_process(command: Sequence[str], **variables: str) -> tuple[subprocess.Popen[bytes], Channel]:
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
            env={**os.environ, "GGML_NO_BACKTRACE": "1", **variables},
        )
    return process, Channel(ours)


def signal_name(code: int) -> str:
    """An exit code in words; negative ones are signals."""
    if code >= 0:
        return f"exit code {code}"
    if code == _KILLED:
        return "SIGKILL (out of memory, or killed by hand)"
    return signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"


class Child:
    """A worker process, the connection to it, and a thread that sends so that nobody else waits for a full socket.

    `ready_at` is since when it can be asked (`time.monotonic`), `images` counts what it has in native code, `error` is
    why it could not load the model, `kill_at` when it is killed if it does not end, `reason` completes "the worker …".
    """

    def __init__(self, command: Sequence[str], first: tuple[Any, ...]) -> None:
        # Weights in pages of 2 MiB: a token of a 1 B model takes a tenth less on a CPU. What the user has set counts.
        tunables = f"glibc.malloc.hugetlb=1:{os.environ.get('GLIBC_TUNABLES', '')}".rstrip(":")
        self._process, self.channel = start_process(command, GLIBC_TUNABLES=tunables)
        self.pid = self._process.pid
        self.files = "the model"
        self.images: Counter[str] = Counter()
        self.error: OpsinError | None = None
        self.ready_at: float | None = None
        self.kill_at: float | None = None
        self.reason = ""
        self._outgoing: queue.SimpleQueue[tuple[tuple[Any, ...], Sequence[Pixels]] | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="opsin-worker-send", daemon=True)
        self._sender.start()
        self.post(first)

    def post(self, message: tuple[Any, ...], pixels: Sequence[Pixels] = ()) -> None:
        """Send a message soon; a worker that is gone gets nothing."""
        self._outgoing.put((message, pixels))

    def end(self) -> None:
        """Tell it to end; twice does no harm. One that is not ready has nothing to put in order."""
        if self.ready_at is None:
            self._process.kill()
        elif self.kill_at is None:
            self.post(("close",))
        self.kill_at = self.kill_at or time.monotonic() + GRACE_SECONDS

    def kill(self, reason: str) -> None:
        """Kill it for what it did, said as the end of "the worker …"."""
        self.reason = self.reason or reason
        self._process.kill()

    def reap(self) -> int:
        """Wait for its end, and close the connection; the exit code, negative for a signal."""
        self._process.kill()  # one that has closed its end of the connection is ending, and keeps its exit code
        code = self._process.wait()
        self._outgoing.put(None)
        self._sender.join()
        self.channel.close()
        self.reason = self.reason or f"ended by {signal_name(code)}"
        return code

    def load_error(self, code: int) -> OpsinError:
        """What a crash before it was ready says about the model."""
        if code == _KILLED:
            return ModelError(
                f"The process that loaded {self.files} was killed, probably because memory ran out: "
                "give a smaller context (--ctx), fewer layers on the GPU (--gpu-layers), or a smaller model."
            )
        return ModelUnreadable(
            f"llama.cpp crashed ({signal_name(code)}) on {self.files}: a file is damaged or of a kind that it does not "
            "support; download it again, or use another model."
        )

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            while (item := self._outgoing.get()) is not None:
                message, pixels = item
                self.channel.send(message, *[one.fd for one in pixels])
                del item, message, pixels  # the pixels are the worker's now
