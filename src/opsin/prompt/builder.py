"""From a conversation to a prompt: contents in the template's own shape, rendered, cut into parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, get_args

from opsin.core.errors import BadPrompt
from opsin.core.reasoning import ReasoningStyle
from opsin.core.request import Image, Part, Prompt, TextPart
from opsin.prompt.builtin import SHIPPED, choose
from opsin.prompt.placeholders import ControlTokens, Placeholders
from opsin.prompt.template import ChatTemplate, TemplateSource
from opsin.prompt.trial import check_template

Role = Literal["system", "user", "assistant", "tool"]
Content = str | Image

_ROLES: tuple[str, ...] = get_args(Role)
_SWITCHES = ("enable_thinking", "thinking")  # the second is Kimi's and DeepSeek's
# Markers that begin or end a turn. Where the vocabulary has no token for one, the model writes it as plain text.
_TURN_MARKERS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<end_of_utterance>", "<|end|>", "[INST]")


_TAGS = (
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<think>", "</think>"),  # Qwen, GLM-4V, Kimi K2.5, MiMo, InternVL 3.5, …
)
_BOX = ("<|begin_of_box|>", "<|end_of_box|>")


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
    tool_calls: Sequence[Mapping[str, Any]] | None = None
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

    A model file's own template is tried in a child process first; see `opsin.prompt.trial`. Raises ModelUnreadable
    when it cannot be used.
    """

    def __init__(self, source: TemplateSource) -> None:
        text, self._glue = source.template or "", ""
        if not text.strip():
            built_in = choose(source)
            text, self._glue = built_in.template, built_in.image_glue
        elif hashlib.sha256(text.encode("utf-8", "replace")).hexdigest() not in SHIPPED:
            check_template(text, bos_token=source.bos_token, eos_token=source.eos_token)
        self._template = ChatTemplate(text, bos_token=source.bos_token, eos_token=source.eos_token)
        self._bos = source.bos_token
        self._tokens = ControlTokens({*source.control_tokens, source.bos_token, source.eos_token})
        written = [marker for marker in _TURN_MARKERS if marker in text]
        self._stop = tuple(marker for marker in written if marker not in source.control_tokens | {source.eos_token})
        if "USER:" in text and "ASSISTANT:" in text:
            self._stop += ("USER:",)
        self.reasoning: ReasoningStyle | None = find_style(source, text)

    @property
    def template(self) -> str:
        """The chat template's text: the model's own, or the built-in one that stands in for it."""
        return self._template.text

    @property
    def knows_tools(self) -> bool:
        """Whether the template has a place for `tools`."""
        return "tools" in self._template.variables

    def build(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """The prompt for a conversation, with its images in order.

        `thinking` switches a model's thoughts on or off; None leaves that to its template. `tools` are functions in
        the shape of OpenAI's API. Raises BadPrompt when the template refuses the conversation, drops an image, or
        does not support what is asked of it.
        """
        if not messages:
            raise BadPrompt("There is no message: ask something.")
        if thinking and self.reasoning is None and not self._template.variables.intersection(_SWITCHES):
            raise BadPrompt("This model does not think before it answers: leave `thinking` out.")
        if tools and not self.knows_tools:
            raise BadPrompt("This model's chat template knows no tools: leave them out.")
        placeholders = Placeholders(self._tokens)
        rendered = self._template.render(
            [self._shape(message, placeholders) for message in self._fold_system(messages)],
            tools=placeholders.protect(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            switches=None if thinking is None else dict.fromkeys(_SWITCHES, thinking),
        )
        style = self.reasoning
        opened = style is not None and add_generation_prompt and rendered.rstrip().endswith(style.opening)
        if style is not None and opened and thinking is False:
            rendered, opened = f"{rendered.rstrip()}\n\n{style.closing}\n\n", False
        parts = placeholders.cut(rendered)
        _check_text(parts)
        add_bos = not (self._bos and rendered.startswith(self._bos))
        return Prompt(parts=parts, add_bos=add_bos, thinking=opened, reasoning=style, stop=self._stop)

    def _fold_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Put a system message before the first question where the template has no such role."""
        first, *others = messages
        if first.role != "system" or self._template.abilities.system is not None:
            return messages
        if not others or others[0].role != "user":
            return [Message("user", first.content), *others]
        head = list(first.parts)
        if head and isinstance(head[-1], str):
            head[-1] += "\n"
        return [replace(others[0], content=[*head, *others[0].parts]), *others[1:]]

    def _shape(self, message: Message, placeholders: Placeholders) -> dict[str, Any]:
        """The message as the template wants it: strings, or lists of typed parts where images need them."""
        parts, thoughts = self._split_thoughts(message)
        texts = [
            placeholders.place(part) if isinstance(part, Image) else placeholders.protect(part)
            for part in _merge(parts)
        ]
        abilities = self._template.abilities
        as_list = not abilities.strings
        if message.role == "system" and abilities.system is not None:
            as_list = abilities.system == "list"
        if abilities.lists and any(isinstance(part, Image) for part in parts):
            as_list = True
        content = [{"type": "text", "text": text} for text in texts] if as_list else self._glue.join(texts)
        optional = {
            "reasoning_content": thoughts,
            "tool_calls": message.tool_calls,
            "tool_call_id": message.tool_call_id,
            "name": message.name,
        }
        given = {name: placeholders.protect(value) for name, value in optional.items() if value is not None}
        return {"role": message.role, "content": content, **given}

    def _split_thoughts(self, message: Message) -> tuple[Sequence[Content], str | None]:
        """An older answer without its block of thoughts, and those thoughts.

        Templates drop older thoughts by looking for the closing tag in the text. That tag may be a control token,
        which user text must not smuggle in; so the block is taken out here, before the text is protected. A template
        that would write the block as text gets it as text.
        """
        parts = message.parts
        if message.role != "assistant" or len(parts) != 1 or not isinstance(parts[0], str):
            return parts, message.reasoning
        if self.reasoning is None or self._keeps_thoughts:
            return parts, message.reasoning
        thoughts, answer = self.reasoning.split(parts[0])
        return (answer,), message.reasoning if thoughts is None else thoughts

    @cached_property
    def _keeps_thoughts(self) -> bool:
        style = self.reasoning or ReasoningStyle()
        return "reasoning_content" not in self.template and self._template.keeps_thoughts(style.opening, style.closing)


def find_style(source: TemplateSource, template: str) -> ReasoningStyle | None:
    """The style of a model, by its template's text and its vocabulary; None for one that does not think aloud."""
    for opening, closing in _TAGS:
        if opening in template or opening in source.control_tokens:
            if _BOX[0] in source.control_tokens or _BOX[0] in template:  # GLM-4V
                return ReasoningStyle(opening, closing, ("<answer>", "</answer>"), _BOX)
            return ReasoningStyle(opening, closing)
    return None


def _merge(parts: Sequence[Content]) -> Iterator[Content]:
    """Join neighbouring texts with a line break, so that two of them cannot form a control token."""
    for is_image, group in groupby(parts, lambda part: isinstance(part, Image)):
        if is_image:
            yield from group
        else:
            yield "\n".join(str(text) for text in group)


def _check_text(parts: tuple[Part, ...]) -> None:
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    if len(texts) == len(parts) and not any(text.strip() for text in texts):
        raise BadPrompt("The messages are empty: ask something.")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise BadPrompt("A message has half a character (a lone surrogate): send whole Unicode text.") from None
