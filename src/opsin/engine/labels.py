"""Labels that an answer may be, as paths of tokens behind a prompt; knows no backend.

A label is scored by the probability that the model's own answer begins with it and with no longer label:

    P(label) = Σ over its spellings of P(t₁) P(t₂ | t₁) … P(tₙ | t₁ … tₙ₋₁) × (1 - Σ P(rest of a longer label | label))

Each factor is the model's own, behind the prompt and the tokens before. Answers that begin with different labels are
different events, so labels of different lengths can be compared as they are: none is favoured for having few tokens,
and what follows it (a full stop, a reason) does not matter.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from opsin.core.choice import Choice, Value, choose

Path = tuple[int, ...]
MAX_LABEL_TOKENS = 32
LEAST_COVERAGE = 0.1
"""A model whose answers begin with labels more rarely says something first. The demo's coverage is < 0.07 or > 0.97."""
_UNLIKELY = math.log(0.01)
_LEAST = -1e4
_SEAM = "\n"


def spellings(labels: Sequence[str], tokens: Callable[[str], Path], piece: Callable[[int], bytes]) -> dict[Path, str]:
    """The paths of tokens that the labels may be written with, at the start of an answer.

    A model begins answers in its own way: with a space or without, with a small letter or a capital. Sentencepiece puts
    a space before every text: then the way without is found behind a line break, whose tokens are taken off again. What
    is another label, too, counts for that one.
    """
    texts = {label: label for label in labels}
    for label in labels:
        texts.setdefault(label[0].swapcase() + label[1:], label)
    seam, found = tokens(_SEAM), dict[Path, str]()
    for text, label in texts.items():
        ways = [tokens(text)]
        if piece(ways[0][0]).startswith(b" "):
            behind = tokens(_SEAM + text)
            ways.append(behind[len(seam) :] if behind[: len(seam)] == seam else ())
        else:
            ways.append(tokens(f" {text}"))
        for way in ways:
            if b"".join(map(piece, way)).decode("utf-8", "replace").strip() == text:
                found.setdefault(way, label)
        if text == label and label not in found.values():
            found.setdefault(ways[0], label)  # a tokenizer that changes texts
    return found


class LabelTree:
    """The paths of all labels. `take` is told log probabilities; when `pending` is empty, `decide` says what they mean.

    Spellings that begin with a token a hundred times less likely than another spelling of their label are left out.
    """

    def __init__(self, paths: Mapping[Path, str]) -> None:
        self.choice: Choice | None = None
        self.behind = 0
        """Tokens of the model's own words that come before."""
        self._logprobs: dict[Path, float] = {}
        self._keep(paths)

    def _keep(self, paths: Mapping[Path, str]) -> None:
        """These are the paths; `_next` has the tokens behind each beginning of theirs."""
        self._paths, self._next = dict(paths), dict[Path, list[int]]()
        for path in sorted({one[:end] for one in paths for end in range(1, len(one) + 1)}):
            self._next.setdefault(path[:-1], []).append(path[-1])
        inner = sorted(path for path in self._next if path)
        # In this order the next one begins with whatever is a beginning at all.
        self._longest = [path for path, after in itertools.pairwise([*inner, ()]) if after[: len(path)] != path]

    @property
    def longest(self) -> int:
        """Tokens that are decoded behind the prompt, at most."""
        return max(map(len, self._longest), default=0)

    @property
    def pending(self) -> list[Path]:
        """Behind which tokens, and those before them, probabilities are wanted, once the prompt is decoded."""
        return [path for path in self._longest if self.unknown(path)]

    def unknown(self, path: Path) -> list[int]:
        """The tokens whose probabilities behind these are not known and wanted."""
        return [token for token in self._next[path] if (*path, token) not in self._logprobs]

    def take(self, path: Path, logprobs: Iterable[float]) -> None:
        """Natural log probabilities of `unknown(path)`."""
        found = zip(self.unknown(path), logprobs, strict=True)
        self._logprobs |= {(*path, token): max(one, _LEAST) for token, one in found}
        if not path:
            best: dict[str, float] = {}
            for way, label in self._paths.items():
                best[label] = max(best.get(label, -math.inf), self._logprobs[way[:1]])
            likely = (way for way, label in self._paths.items() if self._logprobs[way[:1]] >= best[label] + _UNLIKELY)
            self._keep({way: self._paths[way] for way in likely})

    def named_last(self, tokens: Sequence[int]) -> int:
        """Where among the tokens of an answer the label begins that ends last; 0 where there is none."""
        for end in range(len(tokens), 0, -1):
            lengths = [len(path) for path in self._paths if tuple(tokens[max(0, end - len(path)) : end]) == path]
            if lengths:
                return end - max(lengths)
        return 0

    def decide(self, values: Mapping[str, Value]) -> Choice:
        """The likeliest label; `values` are what the labels stand for."""
        self.choice = choose(self.scores(), values)
        return self.choice

    def scores(self) -> dict[str, float]:
        """The log probability of each label, see the module."""
        events: dict[str, list[float]] = {}
        for path, label in self._paths.items():
            rest = 1.0 - math.fsum(math.exp(self._sum(path, one)) for one in self._longer(path))
            events.setdefault(label, []).append(self._sum((), path) + math.log(max(rest, 1e-12)))
        return {label: _log_sum(some) for label, some in events.items()}

    def likeliest(self, label: str) -> Path:
        """The tokens that a label is most likely written with."""
        return max((path for path, one in self._paths.items() if one == label), key=lambda path: self._sum((), path))

    def _sum(self, start: Path, path: Path) -> float:
        """The log probability of a path behind its beginning."""
        return math.fsum(self._logprobs[path[:end]] for end in range(len(start) + 1, len(path) + 1))

    def _longer(self, path: Path) -> list[Path]:
        """Paths of other labels that go on from this one, each counted once: not those behind another of them."""
        found, ahead = list[Path](), [path]
        while ahead:
            start = ahead.pop()
            for one in ((*start, token) for token in self._next.get(start, ())):
                (found if one in self._paths else ahead).append(one)
        return found


def _log_sum(logarithms: Sequence[float]) -> float:
    """The logarithm of a sum whose terms are given by theirs."""
    peak = max(logarithms)
    return peak + math.log(math.fsum(math.exp(one - peak) for one in logarithms))
