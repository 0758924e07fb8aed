"""A conversation as the caller writes it: roles, texts and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from opsin.core.errors import BadPrompt
from opsin.core.picture import Picture

Role = Literal["system", "user", "assistant", "tool"]
Content = str | Picture

ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `content` is a text, or texts and pictures in reading order.

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
        if self.role not in ROLES:
            raise BadPrompt(f"A message's role is {self.role!r}: use one of {', '.join(ROLES)}.")
        if not isinstance(self.content, (str, Sequence)) or not all(
            isinstance(part, (str, Picture)) for part in self.parts
        ):
            raise BadPrompt("A message's content is neither a text nor a list of texts and pictures.")

    @property
    def parts(self) -> tuple[Content, ...]:
        """The content in order; a plain text is its only part."""
        return (self.content,) if isinstance(self.content, str) else tuple(self.content)
