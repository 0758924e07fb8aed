"""What the server is handed when a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from opsin.engine import Engine
from opsin.prompt import PromptBuilder


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A running engine, what writes prompts for its model, and the name it is served under. `close` frees it.

    `load_ms` is how long this request waited for its loading, for `Engine.submit`; 0 when it was there.
    """

    engine: Engine
    prompts: PromptBuilder
    name: str
    is_demo: bool
    close: Callable[[], None]
    load_ms: float = 0.0
