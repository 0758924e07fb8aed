"""Keeps decoders from talking over the program: Pillow's warnings, its last-resort log, libtiff's own lines on stderr.

A damaged picture gives one sentence, raised by this room; what the decoders had to say goes to the debug log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
import threading
import warnings
from typing import TYPE_CHECKING

from opsin.media.words import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

_STDERR = 2
# stderr belongs to the process, so one at a time
_turn = threading.Lock()
# libtiff names the function, or Pillow's name for the file, in front of each complaint
_LIBTIFF = re.compile(
    rb"(_?TIFF|LZW|ZIP|Deflate|O?JPEG|Fax|PackBits|Pixar|Log[LS]|LUV|Luv|WEBP|WebP|ZSTD|LZMA|LERC|Thunder|NeXT|Dump|"
    rb"JBIG|tempfile\.tif|Predictor|horizontal|[Oo]ld|MissingRequired|[A-Z]\w*(Decode|Setup|Strip|Tile|Directory))"
    rb"[\w./ ]*: | *Value \d+ of NumberOfInks| *Apparently should be"
)


def hush_pillow() -> None:
    """Keep Pillow's remarks on metadata from reaching the caller as warnings, or as errors under `-W error`.

    Done anew before each picture, as filters are process-wide and others may put theirs in front. What it logs goes
    where the program sends logs, and not to stderr when it sends them nowhere.
    """
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
    log = logging.getLogger("PIL")
    if not log.handlers:
        log.addHandler(logging.NullHandler())


@contextlib.contextmanager
def hushed_libtiff() -> Iterator[None]:
    """Hold back stderr while libtiff decodes, then let through every line that is not libtiff's.

    Pillow leaves libtiff's error handler as it is, which writes to file descriptor 2. Other threads' lines of the
    meantime come a little later, but they come.
    """
    with _turn, contextlib.ExitStack() as stack:
        try:
            own = os.dup(_STDERR)
        except OSError:  # there is no stderr to keep clean
            yield
            return
        stack.callback(os.close, own)
        held = stack.enter_context(tempfile.TemporaryFile())
        _flush()
        os.dup2(held.fileno(), _STDERR)
        try:
            yield
        finally:
            _flush()
            os.dup2(own, _STDERR)
            held.seek(0)
            for line in held:
                if _LIBTIFF.match(line):
                    logger.debug("libtiff: %s", line.decode("utf-8", "replace").rstrip())
                else:
                    os.write(_STDERR, line)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # replaced, closed or none at all
        sys.stderr.flush()
