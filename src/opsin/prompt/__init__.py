"""Messages in, ordered parts out, through the model's own chat template.

For: turning a conversation with pictures into stretches of text and picture places. Refuses to know: any model
runtime, tokens and their numbers, files, HTTP, and how a picture's bytes were read; what it needs of a model comes as
plain values in `TemplateSource`.
"""

from __future__ import annotations

from opsin.prompt.builder import PromptBuilder
from opsin.prompt.message import Content, Message, Role
from opsin.prompt.source import TemplateSource

__all__ = [
    "Content",
    "Message",
    "PromptBuilder",
    "Role",
    "TemplateSource",
]
