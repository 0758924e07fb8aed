"""The five workloads as data, and what must be able to run them."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Protocol

from opsin.core.answer import Usage
from opsin.core.errors import BadParameter, OpsinError

TOKENS = 32


class RequestFailed(OpsinError):
    """A server refused a question, or broke an answer off; the run counts it and goes on."""

    code = "request_failed"


class Driver(Protocol):
    """Whatever answers questions about pictures: an engine in this process, or a server. Used by several threads."""

    def ask(self, picture: bytes, question: str, max_tokens: int) -> Generator[float, None, Usage]:
        """Ask about a picture file: yields `time.perf_counter()` at each piece of text, and returns the counts.

        Temperature 0, the end token passed over, no guard: the answer has exactly `max_tokens` tokens.
        """
        ...


@dataclass(frozen=True, slots=True)
class Ask:
    """A question: `picture` counts the workload's pictures, `at` is when it is sent, in seconds after the start."""

    picture: int
    question: str = "what is this?"
    max_tokens: int = TOKENS
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Questions, sent one after another or (`at_once`) each at its time.

    `large` pictures are 12-megapixel JPEGs, all others PNGs of 640×480. With `stream` only the longest pause of that
    question's answer counts, else that of all.
    """

    name: str
    title: str
    asks: tuple[Ask, ...]
    at_once: bool = False
    large: frozenset[int] = frozenset()
    stream: int | None = None

    @property
    def pictures(self) -> int:
        """How many different pictures it takes."""
        return 1 + max(ask.picture for ask in self.asks)


_QUESTIONS = (
    "what is this?",
    "what colours are there?",
    "is it day or night?",
    "how many things are there?",
    "what is in front?",
    "where was it taken?",
    "what is on the left?",
    "is anybody there?",
)
_STREAM = (Ask(0, max_tokens=96), *(Ask(i, max_tokens=8, at=at) for i, at in enumerate((0.5, 0.8, 1.1), start=1)))

WORKLOADS = (
    Workload("W1", "4 new pictures, one after another", tuple(Ask(i) for i in range(4))),
    Workload("W2", "6 questions on one picture, one after another", tuple(Ask(0, q) for q in _QUESTIONS[:6])),
    Workload("W3", "8 questions on one new picture, at once", tuple(Ask(0, q) for q in _QUESTIONS), at_once=True),
    Workload("W4", "8 new pictures, at once", tuple(Ask(i) for i in range(8)), at_once=True),
    Workload("W5", "a stream of 96 tokens while 3 new pictures arrive", _STREAM, at_once=True, stream=0),
    Workload(
        "W5-12MP",
        "the same with 12-megapixel JPEGs",
        _STREAM,
        at_once=True,
        large=frozenset({1, 2, 3}),
        stream=0,
    ),
)


def choose(names: Iterable[str] | None) -> tuple[Workload, ...]:
    """The workloads of these names, in their own order; None: all. W5 stands for both of its kinds.

    Raises BadParameter.
    """
    if names is None:
        return WORKLOADS
    wanted = {name.strip().upper() for name in names}
    known = {workload.name for workload in WORKLOADS}
    if not wanted or wanted - known:
        wrong = ", ".join(sorted(wanted - known)) or "none"
        raise BadParameter(f"The workloads to run are {wrong}: choose some of {', '.join(sorted(known))}.")
    return tuple(w for w in WORKLOADS if w.name in wanted or w.name.partition("-")[0] in wanted)
