"""Messages in, ordered parts of a prompt out, through the model's own chat template.

This room knows no model runtime, token numbers, files or HTTP. What it needs of a model comes as plain values in
`TemplateSource`.
"""

from opsin.prompt.builder import Content, Message, PromptBuilder
from opsin.prompt.template import TemplateSource

__all__ = ["Content", "Message", "PromptBuilder", "TemplateSource"]
