"""How sure a model is of each value in its JSON answer."""

import itertools
import json
import math
import re
from collections.abc import Generator, Sequence

from opsin.core.answer import Confidence, TokenLogprob

_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s,:\]}]+')


def confidence_of(text: str, tokens: Sequence[TokenLogprob]) -> dict[str, Confidence]:
    """The confidence in each value of a JSON text that these tokens end with, by its JSON pointer (RFC 6901).

    A token that holds the end of one value and the beginning of another counts for both. Empty for half a document.
    """
    data = [len(one.piece) for one in tokens]
    shift = sum(data) - len(text.encode())  # thoughts and white space before
    spans = list(itertools.pairwise(itertools.accumulate(data, initial=-shift)))
    found = {}
    try:
        for pointer, start, end in _values(text):
            first, last = (len(text[:at].encode()) for at in (start, end))
            mine = [one for one, (begin, stop) in zip(tokens, spans, strict=True) if begin < last and stop > first]
            likely = math.exp(math.fsum(one.permitted or 0.0 for one in mine))
            found[pointer] = Confidence(likely, any(one.overruled for one in mine))
    except (ValueError, IndexError, AttributeError, RecursionError):
        return {}
    return found


def _values(text: str, at: int = 0, pointer: str = "") -> Generator[tuple[str, int, int], None, int]:
    """The pointer of every value that holds no others, and where in the text it stands; returns where it all ends."""
    at = _behind(_SPACE, text, at)
    if text[at] not in "{[":
        end = _behind(_SCALAR, text, at)
        yield pointer, at, end
        return end
    closing, named = {"{": "}", "[": "]"}[text[at]], text[at] == "{"
    at = _behind(_SPACE, text, at + 1)
    index = 0
    while text[at] != closing:
        name, index = str(index), index + 1
        if named:
            end = _behind(_SCALAR, text, at)
            name = str(json.loads(text[at:end])).replace("~", "~0").replace("/", "~1")
            at = _behind(_SPACE, text, end) + 1  # the colon
        at = _behind(_SPACE, text, (yield from _values(text, at, f"{pointer}/{name}")))
        if text[at] == ",":
            at = _behind(_SPACE, text, at + 1)
    return at + 1


def _behind(pattern: re.Pattern[str], text: str, at: int) -> int:
    if (found := pattern.match(text, at)) is None:
        raise ValueError(f"no JSON at {at}")
    return found.end()
