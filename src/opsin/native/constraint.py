"""Holding answers to JSON schemas and GBNF grammars, with llguidance.

A schema or grammar is compiled once, off the engine's thread, and shared by all answers that ask for it; each answer
has a matcher of its own, a cheap copy. At each step the matcher says which tokens may follow, as a bit mask. What
llguidance refuses is refused before anything is computed. What becomes too complex in mid-answer ends that answer with
an error: an answer that is no longer held to its schema is worse than none.

llguidance bounds itself while it masks, and where that is not enough (some steps take quadratic time), `STEP_SECONDS`
ends an answer whose steps take too long. Compiling is bounded by the sizes that `schema` and `gbnf` allow.
"""

from __future__ import annotations

import ctypes
import json
import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from opsin.core.errors import BadGrammar, ConstraintFailed
from opsin.native.gbnf import to_lark
from opsin.native.schema import prepare
from opsin.native.unique import UniqueItems

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

    from opsin.core.sampling import SamplingParams
    from opsin.native.model import Model

REMEMBERED = 128
"""Compiled schemas and grammars kept for a model, and refusals: the oldest go first."""
STEP_SECONDS = 0.05
"""CPU time that one step of one answer may take in llguidance."""
ASKING_SECONDS = 0.002
"""CPU time for which a grammar is asked about single tokens before a whole mask is made."""
_MAX_ROW_ITEMS = 1000  # llguidance compares each item of a row with all others
_MAX_STEP_ITEMS = 20_000
_MAX_LEXER_STATES = 50_000  # 1 to 2 kB each
_MAX_GRAMMAR_SYMBOLS = 5000  # of a GBNF grammar, whose rules may all be open at once
_REASON_CHARACTERS = 200
# Else it looks at each step for all that can only follow in one way: 0.1 s where that is long.
_HEADER = '%llguidance {"no_forcing": true}\n'
# JSON on one line, with or without a blank behind a comma or a colon: free blanks are where small models never end.
_JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "coerce_one_of": True,
    "lenient": False,
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """A matcher at its start, the schema by which unique items are watched, and whether it is of a GBNF grammar."""

    matcher: LLMatcher
    unique: dict[str, Any] | None
    is_grammar: bool


class Constraint:
    """What one answer is held to. Not for two threads at once."""

    def __init__(self, compiled: Compiled, bits: NDArray[np.int32], model: Model) -> None:
        """`bits` is room for the mask, int32 [n_vocab / 32], which may be shared by answers of one thread."""
        self._matcher = compiled.matcher.deep_copy()
        self._unique = None if compiled.unique is None else UniqueItems(compiled.unique)
        self._bits = bits
        self._model = model
        # A grammar's lexemes are single characters: a mask takes milliseconds where any text may follow.
        self.masks_slowly = compiled.is_grammar

    def permits(self, token: int) -> bool:
        """Whether this token may come next; much cheaper than a mask."""
        return self._matcher.validate_tokens([token]) == 1 and self.keeps_unique(token)

    def permitted(self, tokens: list[int], enough: int) -> list[int]:
        """The first so many of some tokens that may come next; fewer when asking takes longer than a mask might."""
        started, found = time.thread_time(), []
        for token in tokens:
            if self.permits(token):
                found.append(token)
            if len(found) == enough or time.thread_time() - started > ASKING_SECONDS:
                break
        return found

    def keeps_unique(self, token: int) -> bool:
        """Whether a token that the mask permits repeats no item of an array whose items must differ."""
        return self._unique is None or self._unique.fits(self._model.piece(token))

    def mask(self, forbidden: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Which tokens may come next, without those `forbidden`: bool [n_vocab], never all False.

        Raises ConstraintFailed.
        """
        started = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check(started)
        mask = np.unpackbits(self._bits.view(np.uint8), count=self._model.n_vocab, bitorder="little").view(np.bool_)
        mask[forbidden] = False
        if not mask.any():
            raise ConstraintFailed("No token of this model fits the answer's schema or grammar here: loosen it.")
        return mask

    def accept(self, token: int) -> None:
        """Take a permitted token in. Raises ConstraintFailed."""
        started = time.thread_time()
        if self._unique is not None:
            self._unique.take(self._model.piece(token))
        self._matcher.consume_token(token)
        self._check(started)

    def _check(self, started: float) -> None:
        if self._matcher.is_error():
            reason = reason_of(self._matcher.get_error())
            raise ConstraintFailed(
                f"The answer's schema or grammar became too complex here: make it simpler ({reason})."
            )
        if time.thread_time() - started > STEP_SECONDS:
            raise ConstraintFailed("The answer's schema or grammar takes too long for each token: make it simpler.")


class Constraints:
    """The schemas and grammars of one model. Any thread may compile; samplers start what is compiled."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._bits = np.zeros((model.n_vocab + 31) // 32, np.int32)
        self._lock = threading.Lock()
        self._compiled: dict[tuple[str | None, str | None], Compiled | str] = {}
        self._tokenizer: LLTokenizer | None = None
        self._why_not = ""
        # A quarter of a second for 50,000 tokens: nobody's first schema shall wait for it, nor the engine's thread.
        self._builder = threading.Thread(target=self._build_tokenizer, name="opsin-tokenizer", daemon=True)
        self._builder.start()

    def compile(self, params: SamplingParams) -> None:
        """Make what the request asks for ready for `start`. Raises BadGrammar."""
        asked = params.json_schema, params.grammar
        if asked == (None, None):
            return
        found = self._compiled.get(asked)
        if found is None:
            with self._lock:  # one after another, so that requests that ask for the same wait for one compile
                found = self._compiled.get(asked)
                if found is None:
                    found = self._compiled[asked] = self._compile(*asked)
                    if len(self._compiled) > REMEMBERED:
                        del self._compiled[next(iter(self._compiled))]
        _usable(found)

    def start(self, params: SamplingParams) -> Constraint | None:
        """A constraint for one answer, None without schema and grammar. Raises BadGrammar."""
        asked = params.json_schema, params.grammar
        if asked == (None, None):
            return None
        # What many others pushed out since it was compiled is compiled again, here and without waiting for theirs.
        compiled = _usable(self._compiled.get(asked) or self._compile(*asked))
        return Constraint(compiled, self._bits, self._model)

    def close(self) -> None:
        """Wait until the model is not needed any more."""
        self._builder.join()

    def _compile(self, schema: str | None, gbnf: str | None) -> Compiled | str:
        """A matcher at its start, or why there is none."""
        from llguidance import LLMatcher, LLParserLimits

        self._builder.join()
        what = "grammar" if schema is None else "JSON schema"
        try:
            unique = None
            if schema is not None:
                made, unique = prepare(schema)
                lark = f"start: %json {json.dumps({**made, 'x-guidance': _JSON_OPTIONS})}"
            else:
                lark = to_lark(gbnf or "")
        except BadGrammar as error:
            return str(error)
        if self._tokenizer is None:
            return f"This model's vocabulary cannot be held to a {what}: {self._why_not}."
        matcher = LLMatcher(
            self._tokenizer,
            LLMatcher.grammar_from_lark(_HEADER + lark),
            log_level=0,  # from 1 on it warns on standard error
            limits=LLParserLimits(
                max_items_in_row=_MAX_ROW_ITEMS,
                step_max_items=_MAX_STEP_ITEMS,
                max_lexer_states=_MAX_LEXER_STATES,
                verbose_errors=False,
                max_grammar_size=_MAX_GRAMMAR_SYMBOLS if schema is None else None,
            ),
        )
        # The first mask is made here: it shows what no answer can fit, and what takes long the first time.
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            return f"The {what} cannot be used: {reason_of(matcher.get_error())}."
        return (
            Compiled(matcher, unique, schema is None) if any(mask) else f"The {what} cannot be used: no answer fits it."
        )

    def _build_tokenizer(self) -> None:
        from llguidance import LLTokenizer

        model = self._model
        llama, vocab = model.lib.llama, model.vocab
        try:
            # Control tokens are told apart by a byte that no text holds: a schema never permits them.
            tokens = [model.piece(token) for token in range(model.n_vocab)]
            for text, token in model.control_tokens.items():
                tokens[token] = b"\xff" + text.encode()
            # The end that the model names comes first; the others end a turn as well.
            end = llama.llama_vocab_eos(vocab)
            self._tokenizer = LLTokenizer.from_llamacpp(  # type: ignore[attr-defined]  # its hints leave it out
                tokens=tokens,
                vocab_ptr=vocab,
                tokenize_fptr=ctypes.cast(llama.llama_tokenize, ctypes.c_void_p).value,
                eos_token=sorted(model.eog_tokens, key=lambda token: (token != end, token)),
                slices=None,
            )
        except Exception as error:  # noqa: BLE001 - a model that cannot have it answers without; told who asks for it
            self._why_not = reason_of(str(error)) or type(error).__name__


def _usable(found: Compiled | str) -> Compiled:
    if isinstance(found, str):
        raise BadGrammar(found)
    return found


def reason_of(message: str) -> str:
    """A complaint of llguidance's in one line, without what it shows of the grammar and of its own state."""
    lines = [line.strip() for line in message.splitlines()]
    # Of a bad pattern it shows the pattern first, and what is wrong with it last.
    said = next(
        (line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0] if lines else ""
    )
    said = re.sub(r"^at \d+\(\d+\): ", "", said).removeprefix("failed to compile JSON schema: ")
    if said.startswith("NoExtension"):
        said = "no answer fits it"
    return said[:_REASON_CHARACTERS].rstrip(". ")
