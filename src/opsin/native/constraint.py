"""Holding answers to JSON schemas and GBNF grammars, with llguidance.

A schema or grammar is compiled once, off the engine's thread, and shared by all answers that ask for it; each answer
gets a matcher of its own, a cheap copy. What llguidance refuses is refused before anything is computed. What becomes
too complex or too slow in mid-answer ends that answer with an error: an answer that is no longer held to its schema is
worse than none. Compiling is bounded by the sizes that `schema` and `gbnf` allow.
"""

from __future__ import annotations

import ctypes
import json
import re
import threading
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from opsin.core.errors import BadGrammar, ConstraintFailed
from opsin.native.gbnf import to_lark
from opsin.native.schema import Node, UniqueItems, prepare

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

    from opsin.core.request import SamplingParams
    from opsin.native.model import Model

REMEMBERED = 128  # compiled schemas and grammars of a model, and refusals: the oldest go first
STEP_SECONDS = 0.05  # of CPU time that one step of one answer may take in llguidance
# llguidance compares each item of a row with all others, and a lexer state takes 1 to 2 kB.
_LIMITS: dict[str, Any] = {"max_items_in_row": 1000, "step_max_items": 20_000, "max_lexer_states": 50_000}
_MAX_GRAMMAR_SYMBOLS = 5000  # of a GBNF grammar, whose rules may all be open at once
# Else it looks at each step for everything that can only follow in one way: 0.1 s where that is long.
_HEADER = '%llguidance {"no_forcing": true}\n'
# JSON on one line, with or without a blank behind a comma or a colon: free blanks are where small models never end.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_JSON_OPTIONS = {**_SPACING, "coerce_one_of": True, "lenient": False}


class Constraint:
    """The schema or grammar of one answer. Not for two threads at once."""

    def __init__(self, matcher: LLMatcher, schema: Node | None, bits: NDArray[np.int32], model: Model) -> None:
        """`schema` has unique items. `bits` is room for the mask, int32 [n_vocab / 32], which answers may share."""
        self._matcher, self._schema = matcher, schema
        self._unique = None if schema is None else UniqueItems(schema)
        self._bits, self._model = bits, model

    def copy(self) -> Constraint:
        """What was compiled, for one more answer."""
        return Constraint(self._matcher.deep_copy(), self._schema, self._bits, self._model)

    def permits(self, token: int) -> bool:
        """Whether this token may come next; much cheaper than a mask."""
        return self._matcher.validate_tokens([token]) == 1 and self.keeps_unique(token)

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
            reason = _reason(self._matcher.get_error())
            raise ConstraintFailed(f"The answer's schema or grammar became too complex: make it simpler ({reason}).")
        if time.thread_time() - started > STEP_SECONDS:
            raise ConstraintFailed("The answer's schema or grammar takes too long for each token: make it simpler.")


class Constraints:
    """The schemas and grammars of one model. Any thread may compile; one thread copies what is compiled."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._bits = np.zeros((model.n_vocab + 31) // 32, np.int32)
        self._lock = threading.Lock()
        self._compiled = lru_cache(REMEMBERED)(self._compile)
        self._tokenizer: LLTokenizer | str = ""  # or why there is none
        # A quarter of a second for 50,000 tokens: neither the first schema nor the engine's thread should wait for it.
        # Not a daemon: a thread inside llguidance while Python ends takes the process down (SIGSEGV).
        self._builder = threading.Thread(target=self._build_tokenizer, name="opsin-tokenizer")
        self._builder.start()

    def compile(self, params: SamplingParams) -> Constraint:
        """The request's schema or grammar, of which each answer takes a copy. Raises BadGrammar."""
        with self._lock:  # so that requests for the same schema wait for one compilation
            found = self._compiled(params.json_schema, params.grammar)
        if isinstance(found, str):
            raise BadGrammar(found)
        return found

    def close(self) -> None:
        """Wait until the model is not needed any more, and forget what was compiled."""
        self._builder.join()
        self._compiled.cache_clear()

    def _compile(self, schema: str | None, gbnf: str | None) -> Constraint | str:
        """What is remembered, or why the schema or grammar is refused."""
        from llguidance import LLMatcher, LLParserLimits

        self._builder.join()
        what, unique, most = "JSON schema", None, None
        try:
            if schema is not None:
                made, unique = prepare(schema)
                lark = f"start: %json {json.dumps({**made, 'x-guidance': _JSON_OPTIONS})}"
            else:
                lark, what, most = to_lark(gbnf or ""), "grammar", _MAX_GRAMMAR_SYMBOLS
        except BadGrammar as error:
            return str(error)
        if isinstance(self._tokenizer, str):
            return f"This model's vocabulary cannot be used with a {what}: {self._tokenizer}."
        limits = LLParserLimits(**_LIMITS, max_grammar_size=most, verbose_errors=False)
        # From log level 1 on it writes warnings to standard error.
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(_HEADER + lark), log_level=0, limits=limits)
        # The first mask is made here: it shows what no answer can fit, and what takes long the first time.
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error() or not any(mask):
            return f"The {what} cannot be used: {_reason(matcher.get_error()) or 'no answer fits it'}."
        return Constraint(matcher, unique, self._bits, self._model)

    def _build_tokenizer(self) -> None:
        model = self._model
        llama, vocab = model.lib.llama, model.vocab
        try:
            from llguidance import LLTokenizer

            # Control tokens are marked with a byte that no text holds: a schema never permits them.
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
        except Exception as error:  # noqa: BLE001 - the model works without; whoever sends a schema is told
            self._tokenizer = _reason(str(error)) or type(error).__name__


def _reason(message: str) -> str:
    """A complaint of llguidance's in one line, without what it shows of the grammar and of its own state."""
    # Of a bad pattern it shows the pattern first, and what is wrong with it last.
    found = re.search(r"^\s*error: (.*)", message, re.MULTILINE) or re.match(r"\s*(.*)", message)
    reason = re.sub(r"^(at )?\d+\(\d+\): |failed to compile JSON schema: ", "", found[1] if found else "")
    return "no answer fits it" if reason.startswith("NoExtension") else reason[:200].rstrip(". ")
