"""What the prompt room needs to know of a model, as plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """The parts of a model file that decide how its prompts are written.

    `template` is the file's own Jinja chat template, None when it ships none. `architecture` is GGUF's
    `general.architecture` ("llama", "qwen2vl", …); `name` is any text that names the model, best `general.name` and
    the file's name together; `projector` is the projector type ("mlp", "deepseekocr", …) when there is one.
    `control_tokens` holds the text of every token that the tokenizer reads as one token when it parses special
    tokens: text of a user that looks like one is kept plain. `kv_groups` is the number of query heads a key/value
    head serves; it tells Mistral from Vicuna where the names do not.
    """

    template: str | None
    architecture: str
    name: str
    projector: str | None
    bos_token: str
    eos_token: str
    control_tokens: frozenset[str]
    kv_groups: int = 1
