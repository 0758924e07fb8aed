"""Chat templates written for these tests in the manner of each family, and what belongs to them."""

import functools

from opsin.core.request import Image, ImagePart, Prompt, TextPart
from opsin.prompt import PromptBuilder, TemplateSource

CHATML_LISTS = """\
{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'image' \
%}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}\
{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set lead = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set lead = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set lead = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for m in turns -%}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must take turns: user, assistant, user') }}
    {%- endif -%}
    {%- set who = 'model' if m['role'] == 'assistant' else m['role'] -%}
    {{ '<start_of_turn>' + who + '\\n' + (lead if loop.first else '') }}
    {%- if m['content'] is string -%}
        {{ m['content'] | trim }}
    {%- elif m['content'] is iterable -%}
        {%- for item in m['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception('bad content') }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

LLAMA32 = """\
{{- bos_token }}
{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else '1 Jan 2025' %}
{%- if messages[0].role == 'system' %}
    {%- if messages[0].content is string %}
        {%- set system = messages[0].content | trim %}
    {%- else %}
        {%- set system = messages[0].content[0].text | trim %}
    {%- endif %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
    {%- if m.content is string %}
        {{- m.content }}
    {%- else %}
        {%- for c in m.content %}
            {%- if c.type == 'image' %}{{- '<|image|>' }}{%- elif c.type == 'text' %}{{- c.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

SMOLVLM = """\
<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}{{ ':' }}\
{% else %}{{ ': ' }}{% endif %}{% for line in m['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}\
{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

INTERNVL = """\
{{ '<|im_start|>system\\nYou are a vision model.<|im_end|>\\n' if messages[0].role != 'system' }}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"""

MINICPM = """\
{% if messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\
{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}\
{% if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}\
{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}\
{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

GLM4V = """\
[gMASK]<sop>
{%- macro show(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}
        {%- for item in content -%}
            {%- if item.type == 'text' -%}{{ item.text }}
            {%- elif item.type == 'image' or 'image' in item -%}<|begin_of_image|><|image|><|end_of_image|>
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for m in messages -%}
    {%- if m.role == 'user' -%}<|user|>
{{ show(m.content) }}{{ '/nothink' if enable_thinking is defined and not enable_thinking else '' }}
    {%- elif m.role == 'assistant' -%}<|assistant|>
{{ m.content.split('</think>')[-1].strip() if m.content is string else show(m.content) }}
    {%- else -%}<|{{ m.role }}|>
{{ show(m.content) }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
<think>{% endif -%}
"""

KIMI = """\
{%- for m in messages -%}
    {%- if m.role == 'system' -%}<|im_system|>{{ m.role }}<|im_middle|>
    {%- elif m.role == 'user' -%}<|im_user|>{{ m.role }}<|im_middle|>
    {%- elif m.role == 'assistant' -%}<|im_assistant|>{{ m.role }}<|im_middle|>
    {%- endif -%}
    {%- if m.content is string -%}{{ m.content }}
    {%- else -%}
        {%- for c in m.content -%}
            {%- if c.type == 'image' -%}<|media_start|>image<|media_content|><|media_pad|><|media_end|>
            {%- else -%}{{ c.text }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{{ '◁think▷' if thinking else '' }}{%- endif -%}
"""

VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}"
    "USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)

IMAGES_LISTS_ONLY = """\
{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] | selectattr('type', 'equalto', 'image') %}\
<image>
{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}\
{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""

_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")

# name: template, begin token, end token, control tokens
FAMILIES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "qwen2-vl": (CHATML_LISTS, "", "<|im_end|>", _CHATML_TOKENS),
    "gemma3": (GEMMA3, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")),
    "llama3.2": (
        LLAMA32,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image|>"),
    ),
    "smolvlm": (SMOLVLM, "<|im_start|>", "<end_of_utterance>", ("<image>", "<fake_token_around_image>")),
    "internvl": (INTERNVL, "", "<|im_end|>", (*_CHATML_TOKENS, "<img>", "</img>", "<IMG_CONTEXT>")),
    "minicpm": (MINICPM, "", "<|im_end|>", (*_CHATML_TOKENS, "<image>", "</image>", "<slice>", "<think>", "</think>")),
    "glm4v": (
        GLM4V,
        "",
        "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|begin_of_image|>", "<|begin_of_box|>"),
    ),
    "kimi": (KIMI, "", "<|im_end|>", ("<|im_user|>", "<|im_middle|>", "<|im_end|>", "<|media_pad|>")),
    "vicuna": (VICUNA, "<s>", "</s>", ("<s>", "</s>", "<unk>")),
    "mistral": (MISTRAL, "<s>", "</s>", ("<s>", "</s>", "[INST]", "[/INST]", "[IMG]")),
    "lists-only": (IMAGES_LISTS_ONLY, "<s>", "</s>", ("<s>", "</s>", "<image>")),
}


def source(family: str) -> TemplateSource:
    template, bos, eos, tokens = FAMILIES[family]
    return TemplateSource(template, "llama", family, None, bos, eos, frozenset(tokens) | {bos, eos} - {""})


@functools.cache
def builder(family: str) -> PromptBuilder:
    return PromptBuilder(source(family))


def bare(
    template: str | None, *, tokens: tuple[str, ...] = ("</s>",), bos: str = "", eos: str = "</s>"
) -> PromptBuilder:
    return PromptBuilder(TemplateSource(template, "llama", "a model", None, bos, eos, frozenset(tokens)))


def image(number: int = 0) -> Image:
    return Image(rgb=bytes((number, 0, 0)), width=1, height=1, sha256=f"{number:064x}", format="PNG")


def flat(prompt: Prompt, mark: str = "¤") -> str:
    """All parts in one text, an image as `mark`."""
    return "".join(mark if isinstance(part, ImagePart) else part.text for part in prompt.parts)


def plain_texts(prompt: Prompt) -> list[str]:
    """What goes to the tokenizer as plain text."""
    return [part.text for part in prompt.parts if isinstance(part, TextPart) and not part.special]


def special_text(prompt: Prompt) -> str:
    """What goes to the tokenizer with its control tokens."""
    return "\0".join(part.text for part in prompt.parts if isinstance(part, TextPart) and part.special)
