"""One chat template: compiled once in Jinja's sandbox, rendered on bounded input, and asked what it understands.

The sandbox keeps a template away from Python, but not from working for ever: `opsin.prompt.trial` finds out about
that, in a process of its own, before a stranger's template is rendered here.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, NoReturn

from jinja2 import Template, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opsin.core.errors import BadPrompt

_MAX_TEMPLATE_CHARS = 65_536  # the longest in use have about 17,000
_MAX_INPUT_CHARS = 2_000_000
_MAX_OUTPUT_CHARS = 4_000_000
_OUTPUT_PER_INPUT = 32  # a template may write each character of the messages this often
_MAX_SECONDS = 2.0  # CPU time of one rendering; honest ones take milliseconds

Json = Mapping[str, Any]
Shape = Literal["string", "list"]


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """The parts of a model file that decide how its prompts are written, as plain values.

    `template` is the file's own Jinja chat template, if it ships one; `name` is any text that names the model.
    `control_tokens` are the texts that the tokenizer reads as one token when it parses special tokens: user text that
    looks like one is kept plain. `kv_groups`, query heads per key/value head, tells Mistral from Vicuna.
    """

    template: str | None
    architecture: str
    name: str
    projector: str | None
    bos_token: str
    eos_token: str
    control_tokens: frozenset[str]
    kv_groups: int = 1


@dataclass(frozen=True, slots=True)
class Abilities:
    """Whether a user's content may be a string, or a list of typed parts; the shape of a system message, if any."""

    strings: bool
    lists: bool
    system: Shape | None


class TooCostly(BadPrompt):
    """A rendering went over a limit; `what` says what the template does."""

    def __init__(self, what: str) -> None:
        super().__init__(f"The model's chat template {what}: use another file of this model.")


class _Generation(Extension):
    """`{% generation %}`, with which trainers mark an assistant's words: its body is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


def _raise_exception(message: object = "") -> NoReturn:
    raise BadPrompt(f"The model's chat template refuses these messages: {_one_line(message)}")


def _strftime_now(text: str) -> str:
    return dt.datetime.now().strftime(text)  # noqa: DTZ005 - a template asks for the user's own day


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON without HTML escapes, as `transformers` writes it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """The environment of all templates and threads, with the conventions of `transformers`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _tojson
    return environment


class ChatTemplate:
    """A Jinja chat template with the conventions of the models' publishers; threads may share it.

    Raises BadPrompt when the text is not a template that can be used.
    """

    def __init__(self, text: str, *, bos_token: str, eos_token: str) -> None:
        if len(text) > _MAX_TEMPLATE_CHARS:
            raise TooCostly(f"has {len(text):,} characters, more than the {_MAX_TEMPLATE_CHARS:,} that are read")
        self.text = text
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        with _one_sentence():
            self._template: Template = _environment().from_string(text)

    def render(
        self,
        messages: Sequence[Json],
        *,
        tools: Sequence[Json] | None = None,
        add_generation_prompt: bool = True,
        switches: Json | None = None,
    ) -> str:
        """The prompt's text. Raises BadPrompt when the template refuses the messages, fails, or costs too much."""
        given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        deadline = time.thread_time() + _MAX_SECONDS
        pieces = []
        with _one_sentence():
            size = len(json.dumps(given, ensure_ascii=False, default=str))
            if size > _MAX_INPUT_CHARS:
                raise BadPrompt(f"The messages have {size:,} characters: at most {_MAX_INPUT_CHARS:,} are taken.")
            left = _MAX_OUTPUT_CHARS + _OUTPUT_PER_INPUT * size
            for piece in self._template.generate({**self._tokens, **(switches or {}), **given}):
                pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    raise TooCostly("writes too much text")
                if time.thread_time() > deadline:
                    raise TooCostly("runs too long")
        return "".join(pieces)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names the template reads from outside, such as `enable_thinking`."""
        return frozenset(find_undeclared_variables(_environment().parse(self.text)))

    @cached_property
    def abilities(self) -> Abilities:
        """What the template understands; a template that fails at every try is taken to want plain strings."""
        lists = self._shows("opsinuser", _message("user", "opsinuser", "list"))
        strings = self._shows("opsinuser", _message("user", "opsinuser", "string")) or not lists
        shapes: tuple[Shape, ...] = ("string", "list") if strings else ("list", "string")
        question = _message("user", "opsinuser", shapes[0])
        for shape in shapes:
            if self._shows("opsinsystem", _message("system", "opsinsystem", shape), question):
                return Abilities(strings, lists, shape)
        return Abilities(strings, lists, None)

    def keeps_thoughts(self, opening: str, closing: str) -> bool:
        """Whether a block of thoughts in an older answer comes out as text."""
        shape: Shape = "string" if self.abilities.strings else "list"
        question = _message("user", "opsinuser", shape)
        answer = _message("assistant", f"{opening}\nopsinthought\n{closing}\n\nopsinanswer", shape)
        return self._shows("opsinthought", question, answer, question)

    def _shows(self, word: str, *messages: Json) -> bool:
        try:
            text = self.render(messages)
        except BadPrompt:
            return False
        # A list that the template prints as Python or JSON writes one is not understood.
        return word in text and not any(f"{quote}{word}{quote}" in text for quote in "'\"")


def _message(role: str, text: str, shape: Shape) -> Json:
    return {"role": role, "content": text if shape == "string" else [{"type": "text", "text": text}]}


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn whatever a template can raise into one sentence."""
    try:
        yield
    except BadPrompt:
        raise
    except (MemoryError, OverflowError):
        raise TooCostly("takes too much memory") from None
    except TemplateSyntaxError as error:
        raise BadPrompt(f"The model's chat template has a mistake in line {error.lineno}: {_one_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - a template is a stranger's program and may raise anything
        what = f"{type(error).__name__}: {_one_line(error)}"
        raise BadPrompt(f"The model's chat template failed on these messages with a {what}") from None


def _one_line(message: object) -> str:
    text = "".join(letter if letter.isprintable() else " " for letter in str(message)[:300])
    return " ".join(text.split()).rstrip(".") + "."
