"""The small parent: keeps the listening socket, starts the child that does the work, and starts it again after a fall.

It imports nothing heavy: native code that aborts takes the child with it, never the socket that clients connect to.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opsin.core.errors import BadParameter
from opsin.server.ledger import Account

log = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.1, 30.0
HEALTHY_SECONDS = 60.0
"""A child that was ready for so long has proved itself: the next fall begins with the first delay again."""
MOST_STARTS = 5
"""So many children in a row that never became ready are enough."""
GRACE_SECONDS = 15.0
"""What a child may take to end besides the time for its running answers; then it is killed."""
BACKLOG = 2048
HOPELESS = frozenset({2, 3})
"""Exit codes that another start does not mend: bad input, and a model that cannot be used."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises BadParameter."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # the second for names that no host can have
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise BadParameter(
                f"Port {port} of {host} is in use by another program: give another (--port; 0 takes a free one)."
            ) from None
        if number == errno.EACCES:
            raise BadParameter(f"Port {port} needs more rights than you have: give one above 1023 (--port).") from None
        raise BadParameter(f"{host} is no address of this machine to listen on: give another (--host).") from None


def address_of(listener: socket.socket) -> str:
    """`HOST:PORT` of a listening socket, IPv6 in brackets; loopback where it listens on all addresses."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1" if listener.family == socket.AF_INET else "::1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(slots=True)
class Supervisor:
    """Starts `command` with the listening socket and a line of its own, whose descriptors it appends as two numbers.

    The first line the child reads is `hello` as JSON, with the pictures it must refuse under "blocked". All times in
    seconds; `drain_seconds` is how long a child that was told to end may go on answering.
    """

    command: Sequence[str]
    listener: socket.socket
    hello: Mapping[str, Any]
    drain_seconds: float
    sleep_first: float = FIRST_DELAY
    healthy_seconds: float = HEALTHY_SECONDS
    now: Callable[[], float] = time.monotonic
    account: Account = field(default_factory=Account)
    _told: list[int] = field(default_factory=list)
    _wake: socket.socket | None = None

    def run(self) -> int:
        """Watch over one child after another until a signal says stop; the exit code."""
        with self._signals():
            delay, unready = self.sleep_first, 0
            while True:
                began = self.now()
                code, ready_seconds = self._one_child()
                if self._told:
                    return self._end_code(code)
                unready = 0 if ready_seconds is not None else unready + 1
                if code in HOPELESS and ready_seconds is None:
                    return code
                if unready >= MOST_STARTS:
                    log.error(
                        "the server ended %d times in a row before it was ready (%s): see the lines above for the "
                        "cause, or try `opsin ask` with the same model",
                        unready,
                        describe(code),
                    )
                    return 4
                if ready_seconds is not None and ready_seconds >= self.healthy_seconds:
                    delay = self.sleep_first
                log.error(
                    "the server ended by %s after %.1f s; it is started again in %g s",
                    describe(code),
                    self.now() - began,
                    delay,
                )
                self._pause(delay)
                if self._told:
                    return self._end_code(0)
                delay = min(delay * 2, LONGEST_DELAY)

    def _end_code(self, code: int) -> int:
        if code not in {0, -signal.SIGTERM}:  # SIGTERM itself ends a child that has not begun to listen to it
            log.error("the server did not end in good order: %s", describe(code))
            return 4
        return 130 if self._told[0] == signal.SIGINT else 0

    def _one_child(self) -> tuple[int, float | None]:
        """Its exit code (negative: the signal), and how long it was ready (None: never)."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                numbers = (self.listener.fileno(), theirs.fileno())
                # A session of its own: Ctrl-C in the terminal reaches the child through its parent alone.
                child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                    [*self.command, *map(str, numbers)],
                    pass_fds=numbers,
                    start_new_session=True,
                    # ggml would start a debugger to print where it aborts.
                    env={**os.environ, "GGML_NO_BACKTRACE": "1"},
                )
            hello = json.dumps({**self.hello, "blocked": self.account.blocked}) + "\n"
            with contextlib.suppress(BrokenPipeError):  # it fell at once: the watch below sees that
                ours.sendall(hello.encode())
            ours.setblocking(False)
            try:
                ready_at = self._watch(child, ours)
            except BaseException:
                child.kill()
                raise
            finally:
                code = child.wait()
            self._drain_line(ours)
        blocked = set(self.account.blocked)
        self.account.close(died=code != 0 and not self._told)
        for identity in set(self.account.blocked) - blocked:
            log.error("picture %s… was in flight at two falls and is refused from now on", identity[:16])
        return code, None if ready_at is None else self.now() - ready_at

    def _watch(self, child: subprocess.Popen[bytes], line: socket.socket) -> float | None:
        """Until the child has ended; since when it was ready."""
        ready_at: float | None = None
        sent, kill_at = 0, float("inf")
        with selectors.DefaultSelector() as selector:
            assert self._wake is not None
            selector.register(self._wake, selectors.EVENT_READ)
            selector.register(line, selectors.EVENT_READ)
            while child.poll() is None:
                if len(self._told) > sent:
                    # The first signal asks for a good end, a second one does not wait for it.
                    (child.terminate if sent == 0 else child.kill)()
                    sent = len(self._told)
                    kill_at = min(kill_at, self.now() + self.drain_seconds + GRACE_SECONDS)
                if self.now() >= kill_at:
                    child.kill()
                wait = None if kill_at == float("inf") else max(0.05, kill_at - self.now())
                for key, _ in selector.select(wait):
                    if key.fileobj is self._wake:
                        self._wake.recv(4096)
                    elif not self._drain_line(line):
                        selector.unregister(line)
                if self.account.ready and ready_at is None:
                    ready_at = self.now()
        return ready_at

    def _drain_line(self, line: socket.socket) -> bool:
        """Read what is there; False at the line's end."""
        try:
            while data := line.recv(65536):
                self.account.read(data)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _pause(self, seconds: float) -> None:
        until = self.now() + seconds
        with selectors.DefaultSelector() as selector:
            assert self._wake is not None
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._told and (left := until - self.now()) > 0:
                if selector.select(left):
                    self._wake.recv(4096)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals, a child's end among them, become bytes that `select` wakes up for."""
        self._wake, ours = socket.socketpair()
        self._wake.setblocking(False)
        ours.setblocking(False)
        before = {
            number: signal.signal(number, self._tell) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        old = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(old)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._wake.close()
            ours.close()

    def _tell(self, number: int, _frame: object) -> None:
        self._told.append(number)


def describe(code: int) -> str:
    """An exit code in words; negative ones are signals."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
    hint = " (out of memory, or killed by hand)" if name == "SIGKILL" else ""
    return f"{name}{hint}"
