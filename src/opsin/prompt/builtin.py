"""Templates for models whose files ship none, chosen by what the file says about the model."""

from __future__ import annotations

from dataclasses import dataclass

from opsin.prompt.template import TemplateSource


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A template, and what separates an image from the text beside it (LLaVA was trained with a line break)."""

    name: str
    template: str
    image_glue: str = ""


# What LLaVA-1.5 was trained with (haotian-liu/LLaVA, llava/conversation.py, conv_llava_v1).
_VICUNA = BuiltIn(
    "vicuna",
    """\
{%- if messages[0].role == 'system' -%}
    {{- messages[0].content | trim -}}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {{- 'A chat between a curious human and an artificial intelligence assistant. ' -}}
    {{- "The assistant gives helpful, detailed, and polite answers to the human's questions." -}}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if turn.role == 'assistant' -%}
        {{- ' ASSISTANT: ' + turn.content + eos_token -}}
    {%- elif turn.role == 'user' -%}
        {{- (' ' if loop.first or turns[loop.index0 - 1].role != 'assistant' else '') + 'USER: ' + turn.content -}}
    {%- else -%}
        {{- raise_exception('this model knows users and assistants, and a system message at the start') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
""",
    "\n",
)

# LLaVA-1.6 on Mistral-7B-Instruct; it has no system role, so that goes before the first question.
_MISTRAL = BuiltIn(
    "mistral",
    """\
{%- set ns = namespace(system='') -%}
{%- for turn in messages -%}
    {%- if turn.role == 'assistant' -%}
        {{- ' ' + turn.content + eos_token -}}
    {%- elif turn.role == 'user' -%}
        {{- '[INST] ' + ns.system + turn.content + ' [/INST]' -}}
        {%- set ns.system = '' -%}
    {%- elif turn.role == 'system' and loop.first -%}
        {%- set ns.system = (turn.content | trim) + '\n\n' -%}
    {%- else -%}
        {{- raise_exception('this model knows users and assistants, and a system message at the start') -}}
    {%- endif -%}
{%- endfor -%}
""",
    "\n",
)

# haotian-liu/LLaVA, conv_chatml_direct: no line break after a turn's end.
_LLAVA_CHATML = BuiltIn(
    "llava-chatml",
    """\
{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\nAnswer the questions.<|im_end|>' -}}{%- endif -%}
{%- for turn in messages -%}
    {{- '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
""",
    "\n",
)

_CHATML = BuiltIn(
    "chatml",
    "{% for turn in messages %}<|im_start|>{{ turn.role ~ '\\n' ~ turn.content }}<|im_end|>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
)

# Models that read pages take a bare instruction.
_PLAIN = BuiltIn("plain", "{%- for turn in messages -%}{{- turn.content -}}{%- endfor -%}")

# SHA-256 of the template in the demo model that is shipped; as ours it needs no trial.
SHIPPED = frozenset({"4714f8508613f80a22b94f62c73d02d4497a770de779fd568ced7b397445eb68"})

_LLAVA_PROJECTORS = ("mlp", "mlp_norm", "ldp", "ldpv2")


def choose(source: TemplateSource) -> BuiltIn:
    """The template for a model that ships none.

    LLaVA-1.6-34B is known by its control tokens, Mistral by its name or its attention heads; any other LLaVA, and an
    unknown `llama`, gets Vicuna's.
    """
    name = source.name.lower()
    if (source.projector or "").startswith("deepseekocr") or "deepseek-ocr" in name:
        return _PLAIN
    if "<|im_start|>" in source.control_tokens:
        return _LLAVA_CHATML if source.architecture == "llama" else _CHATML
    if source.architecture == "llama" or source.projector in _LLAVA_PROJECTORS:
        grouped = source.kv_groups > 1 and "vicuna" not in name and ("1.6" in name or "v1.6" in name)
        return _MISTRAL if "mistral" in name or "bakllava" in name or grouped else _VICUNA
    return _CHATML
