"""One chat template: compiled once, rendered within a budget, and asked what it understands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, TypeVar

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables

from opsin.core.errors import BadPrompt
from opsin.prompt.budget import Budget, TemplateRefused
from opsin.prompt.filters import TemplateRaised
from opsin.prompt.sandbox import Sandbox

MAX_TEMPLATE_CHARS = 65_536  # the longest in use have about 17,000
MAX_INPUT_CHARS = 2_000_000

Json = Mapping[str, Any]
_PROBE = "opsinprobe"
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a template understands, found by rendering small conversations.

    `strings` and `lists`: a user's content may be a text, or a list of typed parts. `system`: the shape in which a
    system message comes out, None where it does not.
    """

    strings: bool
    lists: bool
    system: Literal["string", "list"] | None


@lru_cache(maxsize=1)
def _sandbox() -> Sandbox:
    return Sandbox()


class ChatTemplate:
    """A Jinja chat template with the conventions of the models' publishers.

    It is given `messages`, `tools`, `add_generation_prompt`, `bos_token`, `eos_token` and the switches of the
    caller. Safe to use from several threads. Raises BadPrompt when the text is no template that can be used.
    """

    def __init__(self, text: str, *, bos_token: str, eos_token: str) -> None:
        if len(text) > MAX_TEMPLATE_CHARS:
            raise BadPrompt(
                f"The model's chat template has {len(text):,} characters, more than the {MAX_TEMPLATE_CHARS:,} "
                "that are read: use another file of this model."
            )
        self.text = text
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._template: Template = _told(lambda: _sandbox().compile_chat(text))

    def render(
        self,
        messages: Sequence[Json],
        *,
        tools: Sequence[Json] | None = None,
        add_generation_prompt: bool = True,
        switches: Json | None = None,
    ) -> str:
        """The prompt's text. Raises BadPrompt when the template refuses the messages, fails, or costs too much."""
        budget = Budget(_chars(messages) + _chars(tools))
        variables = {
            **self._tokens,
            **(switches or {}),
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        return _told(lambda: self._run(variables, budget))

    def _run(self, variables: dict[str, Any], budget: Budget) -> str:
        with budget.in_force():
            context = self._template.new_context(variables)
            return "".join(self._template.root_render_func(context))

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names the template reads from outside, such as `enable_thinking`."""
        return frozenset(_told(lambda: find_undeclared_variables(_sandbox().parse(self.text))))

    @cached_property
    def abilities(self) -> Abilities:
        """What the template understands; a template that fails at every try is taken to want plain strings."""
        lists = self._says(_PROBE, _wrap("user", _PROBE, lists=True))
        strings = self._says(_PROBE, _wrap("user", _PROBE)) or not lists
        system: Literal["string", "list"] | None = None
        for shape in ("string", "list") if strings else ("list", "string"):
            messages = _wrap("system", "opsinsystem", lists=shape == "list"), _wrap("user", _PROBE, lists=not strings)
            if system is None and self._says("opsinsystem", *messages):
                system = "string" if shape == "string" else "list"
        return Abilities(strings, lists, system)

    def keeps_thoughts(self, opening: str, closing: str) -> bool:
        """Whether a block of thoughts in an older answer comes out as text."""
        lists = not self.abilities.strings
        asked = _wrap("user", _PROBE, lists=lists)
        answer = f"{opening}\nopsinthought\n{closing}\n\nopsinanswer"
        return self._says("opsinthought", asked, _wrap("assistant", answer, lists=lists), asked)

    def _says(self, word: str, *messages: Json) -> bool:
        try:
            text = self.render(messages)
        except BadPrompt:
            return False
        # A list that a template prints as Python or JSON writes one is not understood.
        return word in text and not any(f"{quote}{word}{quote}" in text for quote in "'\"")


def _wrap(role: str, text: str, *, lists: bool = False) -> Json:
    return {"role": role, "content": [{"type": "text", "text": text}] if lists else text}


def _chars(value: Any) -> int:
    total, stack = 0, [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            stack.extend((*item.keys(), *item.values()))
        elif isinstance(item, Sequence):
            stack.extend(item)
            total += len(item)
    if total > MAX_INPUT_CHARS:
        raise BadPrompt(f"The messages have {total:,} characters: at most {MAX_INPUT_CHARS:,} are taken.")
    return total


def _told(work: Callable[[], _Result]) -> _Result:
    """Do it, and turn whatever a stranger's template can raise into one sentence."""
    try:
        return work()
    except TemplateRaised as error:
        raise BadPrompt(f"The model's chat template refuses these messages: {_short(error)}") from None
    except TemplateRefused as error:
        raise BadPrompt(
            f"The model's chat template cannot be used, since it {error}: use another file of this model."
        ) from None
    except RecursionError:
        raise BadPrompt("The model's chat template is nested too deeply: use another file of this model.") from None
    except MemoryError:
        raise BadPrompt("The model's chat template takes too much memory: use another file of this model.") from None
    except TemplateSyntaxError as error:
        raise BadPrompt(f"The model's chat template has a mistake in line {error.lineno}: {_short(error)}") from None
    except TemplateError as error:
        raise BadPrompt(f"The model's chat template does not fit these messages: {_short(error)}") from None
    except Exception as error:  # noqa: BLE001 - a template is a program of a stranger, and may raise anything
        raise BadPrompt(
            f"The model's chat template failed on these messages with a {type(error).__name__}: {_short(error)}"
        ) from None


def _short(error: Exception) -> str:
    text = "".join(letter if letter.isprintable() else " " for letter in str(error)[:300])
    return " ".join(text.split()).rstrip(".") + "."
