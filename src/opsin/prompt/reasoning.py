"""Which tags a model puts around its thoughts."""

from __future__ import annotations

from opsin.core.reasoning import ReasoningStyle
from opsin.prompt.template import TemplateSource

_TAGS = (
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<think>", "</think>"),  # Qwen, GLM-4V, Kimi K2.5, MiMo, InternVL 3.5, …
)
_BOX = ("<|begin_of_box|>", "<|end_of_box|>")


def find_style(source: TemplateSource, template: str) -> ReasoningStyle | None:
    """The style of a model, by its template's text and its vocabulary; None for one that does not think aloud."""
    for opening, closing in _TAGS:
        if opening in template or opening in source.control_tokens:
            if _BOX[0] in source.control_tokens or _BOX[0] in template:  # GLM-4V
                return ReasoningStyle(opening, closing, ("<answer>", "</answer>"), _BOX)
            return ReasoningStyle(opening, closing)
    return None
