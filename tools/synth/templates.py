"""Short chat templates of the families; each takes content that is a string or a list of parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from synth.shapes import Family

_CONTENT = (
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}"
)

TEMPLATES: dict[Family, str] = {
    # Vicuna's
    "llava": (
        "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. "
        "{% for message in messages %}"
        "{% if message.role == 'user' %}USER: {% elif message.role == 'assistant' %}ASSISTANT: {% endif %}"
        + _CONTENT
        + "{% if message.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    # ChatML
    "qwen2vl": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n" + _CONTENT + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "gemma3": (
        "{{ bos_token }}{% for message in messages %}<start_of_turn>"
        "{% if message.role == 'assistant' %}model{% else %}{{ message.role }}{% endif %}\n"
        + _CONTENT
        + "<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}
