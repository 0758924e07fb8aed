"""From a conversation to the parts of a prompt: contents in the template's own shape, rendered, cut at placeholders.

A placeholder, random for each prompt, stands for an image, or for a control token's text in what a user wrote. It is a
run of decimal digits: nothing a template does to text (trim, upper case, JSON) changes it, and nobody can guess it. So
a control token in a message never reaches the tokenizer as one, wherever the template moved the text around it.
"""

import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, get_args

from jinja2 import TemplateSyntaxError
from jinja2.meta import find_undeclared_variables

from opsin.core.answer import ReasoningStyle
from opsin.core.errors import BadPrompt
from opsin.core.files import read_table
from opsin.core.request import Image, ImagePart, Part, Prompt, TextPart
from opsin.prompt.template import TemplateSource, TooCostly, built_in, check_template, choose, environment, one_line

Role = Literal["system", "user", "assistant", "tool"]
Content = str | Image
Json = Mapping[str, Any]
Shape = Literal["string", "list"]
"""A content's: a string, or a list of typed parts."""

_ROLES: tuple[str, ...] = get_args(Role)
_SHAPES: tuple[Shape, ...] = get_args(Shape)
_SWITCHES = ("enable_thinking", "thinking")  # the second is Kimi's and DeepSeek's
_STYLES = read_table(__file__, "styles.toml")

_MAX_INPUT_CHARS = 2_000_000
_MAX_OUTPUT_CHARS = 4_000_000
_OUTPUT_PER_INPUT = 32  # a template may write each character of the messages this often
_MAX_SECONDS = 2.0  # CPU time of one rendering; honest ones take milliseconds

_STEM_DIGITS = 32
_INDEX_DIGITS = 6
_CUT_APART = (
    "The model's chat template cuts texts apart, so that images cannot be placed: use another file of this model."
)


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `content` is a text, or texts and images in reading order.

    `reasoning` is what an assistant thought before this answer; most templates drop it from older turns.
    `tool_calls`, `tool_call_id` and `name` go to the template as they are, in the shape of OpenAI's API.
    Raises BadPrompt for a role or a content of another kind.
    """

    role: Role
    content: str | Sequence[Content]
    reasoning: str | None = None
    tool_calls: Sequence[Json] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.role not in _ROLES:
            raise BadPrompt(f"A message's role is {self.role!r}: use one of {', '.join(_ROLES)}.")
        if not isinstance(self.content, Sequence) or not all(isinstance(part, str | Image) for part in self.parts):
            raise BadPrompt("A message's content is neither a text nor a list of texts and images.")

    @property
    def parts(self) -> tuple[Content, ...]:
        """The content in order; a plain text is its only part."""
        return (self.content,) if isinstance(self.content, str) else tuple(self.content)


class PromptBuilder:
    """Builds prompts for one model. Threads may share it.

    A model file's own template is tried in a child process first. Raises ModelUnreadable when it cannot be used.
    """

    def __init__(self, source: TemplateSource) -> None:
        self.source = source
        text, self._glue = source.template or "", ""
        if text.strip():
            check_template(text, bos_token=source.bos_token, eos_token=source.eos_token)
        else:
            text, self._glue = built_in(choose(source))
        self.template = text
        """The chat template's text: the model's own, or the built-in one that stands in for it."""
        self._template = ChatTemplate(text, bos_token=source.bos_token, eos_token=source.eos_token)
        outside = find_undeclared_variables(environment().parse(text))  # names that the template does not define
        self.knows_tools = "tools" in outside
        """Whether the template has a place for `tools`."""
        self._tokens = ControlTokens({*source.control_tokens, source.bos_token, source.eos_token})
        written = [marker for marker in _STYLES["turns"] if marker in text]
        self._stop = tuple(marker for marker in written if marker not in source.control_tokens | {source.eos_token})
        if "USER:" in text and "ASSISTANT:" in text:
            self._stop += ("USER:",)
        self.reasoning = style = find_style(source, text)
        """How this model marks its thoughts; None where it has none."""
        self.can_think = style is not None or not outside.isdisjoint(_SWITCHES)
        """Whether thoughts can be asked for."""
        # Found out by rendering: now, not at the first request.
        _ = self._template.system_shape, self._template.system_anywhere, self._template.result_shape
        self._thinks_apart = style is not None and (
            "reasoning_content" in text or not self._template.keeps_thoughts(style.opening, style.closing)
        )

    def build(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Json] | None = None,
        thinking: bool | None = None,
        options: Json | None = None,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """The prompt for a conversation, with its images in order. A last text of the assistant's is continued.

        `thinking` switches a model's thoughts on or off; None leaves that to its template, which gets `options`, too.
        `tools` are functions in the shape of OpenAI's API. Raises BadPrompt when the template refuses the conversation,
        drops an image, or does not support what is asked of it.
        """
        if not messages:
            raise BadPrompt("There is no message: ask something.")
        style, begun = self.reasoning, ""
        if add_generation_prompt and len(messages) > 1 and messages[-1].role == "assistant":
            *before, last = messages
            if not last.tool_calls and all(isinstance(part, str) for part in last.parts):
                messages, begun = before, "\n".join(map(str, last.parts)).rstrip()
        if thinking and not self.can_think:
            raise BadPrompt("This model does not think before it answers: leave `thinking` out.")
        if tools and not self.knows_tools:
            raise BadPrompt("This model's chat template knows no tools: leave them out.")
        placeholders, taken = Placeholders(self._tokens), self._folded(messages)
        rendered = self._template.render(
            [self._shape(message, placeholders) for message in taken],
            tools=placeholders.protect(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            options={**(options or {}), **({} if thinking is None else dict.fromkeys(_SWITCHES, thinking))},
        )
        opened = style is not None and add_generation_prompt and rendered.rstrip().endswith(style.opening)
        if style is not None and opened and (begun or thinking is False):
            rendered, opened = f"{rendered.rstrip()}\n\n{style.closing}\n\n", False
        parts = placeholders.cut(rendered + placeholders.protect(begun))
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        if len(texts) == len(parts) and not any(text.strip() for text in texts):
            raise BadPrompt("The messages are empty: ask something.")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise BadPrompt("A message has half a character (a lone surrogate): send whole Unicode text.") from None
        bos = self.source.bos_token
        add_bos = not (bos and rendered.startswith(bos))
        return Prompt(parts, add_bos, opened, style, self._stop, continues=bool(begun), folded=taken is not messages)

    def _folded(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The conversation without what the template would drop or refuse, which is told in other words.

        System messages behind the first are joined with it, calls and results of functions become text.
        """
        calls = any(message.role == "tool" or message.tool_calls for message in messages)
        if calls and self._template.result_shape is None:
            messages = list(_as_text(messages))
        systems = [message for message in messages if message.role == "system"]
        if (len(systems) > 1 or messages[0] not in systems[:1]) and systems and not self._template.system_anywhere:
            rest = [message for message in messages if message.role != "system"]
            joined = "\n\n".join(part for message in systems for part in message.parts if isinstance(part, str))
            if any(isinstance(part, Image) for message in systems for part in message.parts):
                raise BadPrompt("An image stands in a system message: put it into a user's message.")
            messages = [Message("system", joined), *rest]
        first, *others = messages
        if first.role != "system" or self._template.system_shape is not None:
            return messages
        if not others or others[0].role != "user":
            return [Message("user", first.content), *others]
        head = list(first.parts)
        if head and isinstance(head[-1], str):
            head[-1] += "\n"
        return [replace(others[0], content=[*head, *others[0].parts]), *others[1:]]

    def _shape(self, message: Message, placeholders: "Placeholders") -> Json:
        """The message as the template wants it: strings, or lists of typed parts where images need them."""
        parts, thoughts = message.parts, message.reasoning
        # Templates drop older thoughts by looking for the closing tag in the text. It may be a control token, which
        # user text must not smuggle in; so the block is taken out here, before the text is protected. A template that
        # would write the block as text gets it as text.
        text, style = "".join(part for part in parts if isinstance(part, str)), self.reasoning
        if message.role == "assistant" and parts == (text,) and style is not None and self._thinks_apart:
            found, answer = style.split(text)
            parts, thoughts = (answer,), thoughts if found is None else found
        shapes = self._template.user_shapes
        own = {"system": self._template.system_shape, "tool": self._template.result_shape}.get(message.role)
        shape = own or shapes[0]
        if "list" in shapes and message.role != "tool" and any(isinstance(part, Image) for part in parts):
            shape = "list"
        texts: list[str] = []
        for is_image, group in groupby(parts, lambda part: isinstance(part, Image)):
            if is_image:
                texts += map(placeholders.place, group)
            else:  # joined with a line break, so that two of them cannot form a control token
                texts.append(placeholders.protect("\n".join(map(str, group))))
        optional = {
            "reasoning_content": thoughts,
            "tool_calls": message.tool_calls,
            "tool_call_id": message.tool_call_id,
            "name": message.name,
        }
        given = {name: placeholders.protect(value) for name, value in optional.items() if value is not None}
        content = [{"type": "text", "text": text} for text in texts] if shape == "list" else self._glue.join(texts)
        return {"role": message.role, "content": content, **given}


def find_style(source: TemplateSource, template: str) -> ReasoningStyle | None:
    """The style of a model, by its template's text and its vocabulary; None for one that does not think aloud."""
    for opening, closing in _STYLES["thoughts"]:
        if opening in template or opening in source.control_tokens:
            box = _STYLES["boxes"][0]
            boxed = box in source.control_tokens or box in template
            return ReasoningStyle(opening, closing, tuple(_STYLES["boxes"]) if boxed else ())
    return None


class ChatTemplate:
    """A Jinja chat template with the conventions of the models' publishers; threads may share it.

    Raises BadPrompt when the text is not a template that can be used.
    """

    def __init__(self, text: str, *, bos_token: str, eos_token: str) -> None:
        self._given = {"bos_token": bos_token, "eos_token": eos_token}
        with _one_sentence():
            self._template = environment().from_string(text)

    def render(
        self,
        messages: Sequence[Json],
        *,
        tools: Sequence[Json] | None = None,
        add_generation_prompt: bool = True,
        options: Json | None = None,
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
            for piece in self._template.generate({**(options or {}), **self._given, **given}):
                pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    raise TooCostly("writes too much text")
                if time.thread_time() > deadline:
                    raise TooCostly("runs too long")
        return "".join(pieces)

    @cached_property
    def user_shapes(self) -> tuple[Shape, ...]:
        """Those a user's content may have; a template that fails at every try is taken to want plain strings."""
        shown = (shape for shape in _SHAPES if self._shows("opsinuser", message_of("user", "opsinuser", shape)))
        return tuple(shown) or ("string",)

    @cached_property
    def system_shape(self) -> Shape | None:
        """That of a system message's content; None where the template has no such message."""
        question = message_of("user", "opsinuser", self.user_shapes[0])
        for shape in dict.fromkeys((*self.user_shapes, *_SHAPES)):
            if self._shows("opsinsystem", message_of("system", "opsinsystem", shape), question):
                return shape
        return None

    @cached_property
    def system_anywhere(self) -> bool:
        """Whether a second system message, and one behind a question, come out where they stand."""
        shape, inner = self.system_shape or "string", self.user_shapes[0]
        texts = ["opsinfirst", "opsinsecond", "opsinuser", "opsinthird", "opsinlast"]
        roles = ["system", "system", "user", "system", "user"]
        messages = [message_of(r, t, shape if r == "system" else inner) for r, t in zip(roles, texts, strict=True)]
        return self._shows(texts, *messages)

    @cached_property
    def result_shape(self) -> Shape | None:
        """That of a function's result; None where the call or the result does not come out."""
        function = {"name": "opsincall", "arguments": {}}
        call = {"id": "call_1", "type": "function", "function": function}
        asked = message_of("user", "opsinuser", self.user_shapes[0])
        called: Json = {"role": "assistant", "content": "", "tool_calls": [call]}
        about, words = {"tool_call_id": "call_1", "name": "opsincall"}, ["opsinuser", "opsincall", "opsinresult"]
        results = ((shape, {**message_of("tool", "opsinresult", shape), **about}) for shape in _SHAPES)
        return next((shape for shape, result in results if self._shows(words, asked, called, result)), None)

    def keeps_thoughts(self, opening: str, closing: str) -> bool:
        """Whether a block of thoughts in an older answer comes out as text."""
        shape = self.user_shapes[0]
        question = message_of("user", "opsinuser", shape)
        answer = message_of("assistant", f"{opening}\nopsinthought\n{closing}\n\nopsinanswer", shape)
        return self._shows("opsinthought", question, answer, question)

    def _shows(self, words: str | Sequence[str], *messages: Json) -> bool:
        """Whether these words come out, in this order."""
        try:
            text = self.render(messages)
        except BadPrompt:
            return False
        if not isinstance(words, str):
            return re.search(".*".join(words), text, re.DOTALL) is not None
        # A list that the template prints as Python or JSON writes one is not understood.
        return words in text and not any(f"{quote}{words}{quote}" in text for quote in "'\"")


def _as_text(messages: Sequence[Message]) -> Iterator[Message]:
    """The conversation with calls of functions as JSON, and their results as messages of the user."""
    waiting: list[Content] = []
    for message in messages:
        if message.role == "tool":
            waiting += [f"Result of {message.name or message.tool_call_id or 'the call'}:", *message.parts]
            continue
        if waiting and message.role == "user":
            message, waiting = replace(message, content=[*waiting, *message.parts]), []  # noqa: PLW2901
        if waiting:
            yield Message("user", waiting)
            waiting = []
        if message.tool_calls:
            functions = [call["function"] for call in message.tool_calls if "function" in call]
            lines = [json.dumps({name: one.get(name) for name in ("name", "arguments")}) for one in functions]
            message = Message("assistant", "\n".join((*map(str, message.parts), *lines)).strip())  # noqa: PLW2901
        yield message
    if waiting:
        yield Message("user", waiting)


def message_of(role: str, text: str, shape: Shape) -> Json:
    """A message as templates take it, its content a text or a list with one text."""
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
        raise BadPrompt(f"The model's chat template has a mistake in line {error.lineno}: {one_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - a template is a stranger's program and may raise anything
        what = f"{type(error).__name__}: {one_line(error)}"
        raise BadPrompt(f"The model's chat template failed on these messages with a {what}") from None


class ControlTokens:
    """Finds control tokens in a text, longest first. Built once per model; threads may share it."""

    def __init__(self, tokens: Iterable[str]) -> None:
        # A token of spaces alone reads the same whether special or not, and templates trim it.
        self._tokens = frozenset(token for token in tokens if token.strip())
        self._lengths: dict[str, list[int]] = {}
        for length, first in sorted({(len(token), token[0]) for token in self._tokens}, reverse=True):
            self._lengths.setdefault(first, []).append(length)
        self._firsts = re.compile("[" + re.escape("".join(self._lengths)) + "]") if self._tokens else None

    def split(self, text: str) -> list[str]:
        """Pieces of the text, plain and token alternating, plain first; joined they are the text."""
        pieces, end = [], 0
        # Not one pattern of all tokens: a vocabulary may have 6,000 that begin alike.
        for match in self._firsts.finditer(text) if self._firsts else ():
            start = match.start()
            candidates = (text[start : start + length] for length in self._lengths[match[0]])
            token = next((token for token in candidates if token in self._tokens), "")
            if token and start >= end:
                pieces += [text[end:start], token]
                end = start + len(token)
        return [*pieces, text[end:]]


class Placeholders:
    """The placeholders of one prompt."""

    def __init__(self, tokens: ControlTokens) -> None:
        self._stem = "".join(secrets.choice("123456789") for _ in range(_STEM_DIGITS))
        self._tokens = tokens
        self._originals: list[str | Image] = []

    def place(self, original: str | Image) -> str:
        """A new placeholder; images must come in the order of the conversation."""
        if len(self._originals) >= 10**_INDEX_DIGITS:
            raise BadPrompt(f"The conversation has more than {10**_INDEX_DIGITS:,} images and control tokens.")
        self._originals.append(original)
        return f"{self._stem}{len(self._originals) - 1:0{_INDEX_DIGITS}d}"

    def protect(self, value: Any) -> Any:
        """A text, or a JSON value of texts (keys too), with each control token replaced by a placeholder."""
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(each) for key, each in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [self.protect(each) for each in value]
        if not isinstance(value, str):
            return value
        pieces = self._tokens.split(value)
        pieces[1::2] = map(self.place, pieces[1::2])
        return "".join(pieces)

    def cut(self, rendered: str) -> tuple[Part, ...]:
        """The parts: what the template wrote as special text, the users' control tokens as plain text, images.

        Raises BadPrompt when an image is missing, doubled or out of order.
        """
        parts: list[Part] = []
        found: list[int] = []
        for at, piece in enumerate(re.split(f"{self._stem}([0-9]{{{_INDEX_DIGITS}}})", rendered)):
            if at % 2 == 0:
                if self._stem[: _STEM_DIGITS // 2] in piece:
                    raise BadPrompt(_CUT_APART)
                _add_text(parts, piece, special=True)
                continue
            if int(piece) >= len(self._originals):
                raise BadPrompt(_CUT_APART)
            original = self._originals[int(piece)]
            if isinstance(original, str):
                _add_text(parts, original, special=False)
            else:
                parts.append(ImagePart(original))
                found.append(int(piece))
        wanted = [index for index, original in enumerate(self._originals) if isinstance(original, Image)]
        if found != wanted:
            raise BadPrompt(
                "The model's chat template does not keep each image once and in order: "
                "put images into a user's message, or ask about one."
            )
        return tuple(parts)


def _add_text(parts: list[Part], text: str, *, special: bool) -> None:
    """Append a text, joined with the one before it if that is of the same kind."""
    if text and parts and isinstance(parts[-1], TextPart) and parts[-1].special == special:
        parts[-1] = TextPart(parts[-1].text + text, special)
    elif text:
        parts.append(TextPart(text, special))
