"""A grammar as llama-cpp-python's programs hand it in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opsin.core.errors import BadGrammar


@dataclass(frozen=True, slots=True)
class LlamaGrammar:
    """GBNF text, or a JSON schema as text. Whether it can be used is said by the first call that uses it."""

    gbnf: str | None = None
    json_schema: str | None = None

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> LlamaGrammar:  # noqa: ARG003 - the peer's signature
        """A GBNF grammar."""
        return cls(gbnf=grammar)

    @classmethod
    def from_file(cls, file: str | Path, verbose: bool = True) -> LlamaGrammar:
        """A GBNF grammar in a file. Raises BadGrammar when it cannot be read."""
        try:
            return cls.from_string(Path(file).read_text(encoding="utf-8"), verbose)
        except (OSError, UnicodeDecodeError) as error:
            raise BadGrammar(f"The grammar file {file} cannot be read: {error}.") from error

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> LlamaGrammar:  # noqa: ARG003
        """A JSON schema as text."""
        return cls(json_schema=json_schema)
