"""llama.cpp's, ggml's and mtmd's own log as Python `logging` records of the logger "opsin.native".

The libraries hand over fragments, which are joined into whole lines here. The last lines are kept, so that an error
message can quote the cause.
"""

import ctypes
import logging
import sys
import threading
from collections import deque
from typing import Any

LOGGER = logging.getLogger("opsin.native")
# Without a handler of its own, `logging` prints warnings to stderr as a last resort; nothing may leak there unasked.
LOGGER.addHandler(logging.NullHandler())

# ggml_log_level of ggml.h: NONE 0, DEBUG 1, INFO 2, WARN 3, ERROR 4, CONT 5 (goes on with the line before).
_CONT = 5
_LEVELS = {0: logging.INFO, 1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_KEPT_LINES = 256


class LogSink:
    """Joins fragments into lines, keeps the last lines, and passes them to `logging`.

    `write` may be called by any thread, also from inside native code: it never raises. `mark` counts the lines so far:
    a point in the log, for `since` and `cause`.
    """

    def __init__(self, logger: logging.Logger = LOGGER, kept: int = _KEPT_LINES) -> None:
        self.mark = 0
        self._logger = logger
        self._lines: deque[tuple[int, int, str]] = deque(maxlen=kept)
        self._lock = threading.RLock()
        self._level = logging.INFO
        self._partial = ""
        self._interrupt: BaseException | None = None

    def write(self, level: int, fragment: bytes) -> None:
        """Take one fragment with its ggml level."""
        try:
            with self._lock:
                if level != _CONT:
                    self._flush()
                    self._level = _LEVELS.get(level, logging.INFO)
                *whole, self._partial = (self._partial + fragment.decode("utf-8", "replace")).split("\n")
                for line in whole:
                    self._emit(line.rstrip())
        except Exception:  # noqa: BLE001, S110 - a logging handler's failure must not unwind through native frames
            pass
        except BaseException as stop:  # noqa: BLE001 - Ctrl-C during a native call: raised when the call is back
            self._interrupt = stop

    def _emit(self, line: str) -> None:
        if line:
            self.mark += 1
            self._lines.append((self.mark, self._level, line))
            self._logger.log(self._level, "%s", line)

    def _flush(self) -> None:
        line, self._partial = self._partial, ""
        self._emit(line.rstrip())

    def since(self, mark: int, level: int = logging.DEBUG) -> list[str]:
        """The kept lines after `mark` of at least `level`."""
        with self._lock:
            self._flush()
            return [line for number, seen, line in self._lines if number > mark and seen >= level]

    def cause(self, mark: int, most: int = 2) -> str:
        """The last errors after `mark`, or else its warnings, as one clause; empty when there are none."""
        lines = self.since(mark, logging.ERROR) or self.since(mark, logging.WARNING)
        return "; ".join(line.strip() for line in lines[-most:])

    def raise_interrupt(self) -> None:
        """Raise the Ctrl-C that arrived while native code was logging, if one did."""
        stop, self._interrupt = self._interrupt, None
        if stop is not None:
            raise stop


SINK = LogSink()


def _write(level: int, text: bytes | None, _user_data: object) -> None:
    SINK.write(level, text or b"")


# typedef void (*ggml_log_callback)(enum ggml_log_level level, const char * text, void * user_data);
_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_write)


def install(llama: Any, mtmd: Any) -> None:
    """Send the log of all four libraries here; call it before any other native function."""
    callback = ctypes.cast(_callback, llama.llama_log_callback)
    for function in (llama.llama_log_set, mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
        function(callback, None)


_shown = logging.StreamHandler()  # to standard error, one line a record


def show(verbose: bool) -> None:
    """Print every native line to standard error, or no longer."""
    if verbose:
        _shown.setStream(sys.stderr)
        LOGGER.addHandler(_shown)
    elif _shown in LOGGER.handlers:
        LOGGER.removeHandler(_shown)
    else:
        return
    LOGGER.setLevel(logging.DEBUG if verbose else logging.NOTSET)
