import datetime as dt

import pytest
from prompt_families import FAMILIES

from opsin.core.errors import BadPrompt
from opsin.prompt.builder import ChatTemplate


def render(text, messages=(), **others):
    return ChatTemplate(text, bos_token="<s>", eos_token="</s>").render(messages, **others)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("  {% if true %}\nx\n  {% endif %}\n{{ 'y' }}\n\n", "x\ny\n"),  # blocks are trimmed, one last line break too
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{{ add_generation_prompt }}", "True"),
        ("{{ tools is none }}", "True"),
        ("{{ nothing }}{{ nothing is defined }}", "False"),
        ("{% for i in range(9) %}{% if i==1 %}{% continue %}{% elif i>2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
         "02"),
        ("{{ {'b': '<é>', 'a': [1, None, true, 1.5]} | tojson }}", '{"b": "<é>", "a": [1, null, true, 1.5]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}", '{\n  "a": 2,\n  "b": 1\n}'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{% set ns = namespace(n=0) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "6"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{% macro m(x, y=3) %}{{ x ~ y }}{{ caller and caller() }}{% endmacro %}{{m(1)}}{% call m(2) %}{% endcall %}",
         "1323"),
        ("{{ ' a b '.strip().split(' ')[-1] }}{{ 'abc'[::-1] }}{{ 'abc'[:-1] }}", "bcbaab"),
        ("{{ 'a</think>b'.split('</think>')[-1].lstrip('\\n') }}", "b"),
        ("{{ '{} {:>3} {{x}}'.format('a', 1) }}{{ '%s-%02d' % ('b', 3) }}", "a   1 {x}b-03"),
        ("{{ 'Knowledge until 2023: {}'.format(1) }}", "Knowledge until 2023: 1"),
        ("{{ [{'a': 1}, {'a': 2}] | map(attribute='a') | join('+') }}", "1+2"),
        ("{{ [{'a': 1}, {'a': 2}] | selectattr('a', 'equalto', 2) | list | length }}", "1"),
        ("{{ [{'a': {'b': 1}}, {'a': {'b': 2}}] | sum(attribute='a.b') }}", "3"),
        ("{{ [{'a': 'x'}, {'a': 'y'}] | join('-', attribute='a') }}", "x-y"),
        ("{{ ['b', 'a'] | sort | join }}{{ [1, 2, 3] | reverse | list }}", "ab[3, 2, 1]"),
        ("{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}", "a2b1"),
        ("{% for k, v in {'b': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'a': 1} | items | list }}", "b1[('a', 1)]"),
        ("{{ 'a\\nb' | indent(2) }}|{{ 'a\\nb' | indent(2, true) }}", "a\n  b|  a\n  b"),
        ("{{ 1 + 2 * 3 // 2 - 7 % 4 }}{{ 2 ** 10 }}{{ 7 / 2 }}", "110243.5"),
        ("{{ 'x' ~ 1 ~ none }}{{ [1] + [2] }}{{ '-' * 3 }}", "x1None[1, 2]---"),
        ("{{ 1.25 | round(1) }}{{ '7' | int + 1 }}{{ '<b>' | e }}{{ '<b>' | safe }}", "1.28&lt;b&gt;<b>"),
        ("{{ x | default('d') }}{{ '' | default('e', true) }}{{ 'abc' | first }}{{ [1, 2] | last }}", "dea2"),
        ("{{ 'a' in 'abc' and 2 not in [1] and 1 < 2 <= 2 }}{{ 'b' is in ['b'] }}{{ 3 is divisibleby 3 }}",
         "TrueTrueTrue"),
        ("{% for i in [1, 2, 3] %}{{ loop.index }}{{ loop.cycle('a', 'b') }}{{ loop.last }} {% endfor %}",
         "1aFalse 2bFalse 3aTrue "),
        ("{% for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}", "123"),
        ("{% for i in [] %}a{% else %}b{% endfor %}{% for i in [1, 2, 3] if i > 1 %}{{ i }}{% endfor %}", "b23"),
        ("{% set x %}a{{ 1 }}{% endset %}{% filter upper %}{{ x }}b{% endfilter %}{% with y = 2 %}{{ y }}{% endwith %}",
         "A1B2"),
    ],
)  # fmt: skip
def test_conventions_of_the_publishers(template, expected):
    assert render(template) == expected


def test_the_day_is_todays():
    before, shown = dt.datetime.now().astimezone(), render("{{ strftime_now('%Y-%m-%d') }}")
    assert shown in {str(before.date()), str((before + dt.timedelta(minutes=1)).date())}


def test_switches_and_tools_arrive():
    text = "{{ enable_thinking }}{{ tools[0].name }}{{ add_generation_prompt }}"
    given = {"tools": [{"name": "f"}], "options": {"enable_thinking": False}, "add_generation_prompt": False}
    assert render(text, **given) == "FalsefFalse"


def test_what_the_template_refuses_is_told_in_its_own_words():
    with pytest.raises(BadPrompt, match=r"^The model's chat template refuses these messages: no\[31m such role\.$"):
        render("{{ raise_exception('no\x1b[31m such\nrole') }}".replace("\x1b", ""))


def test_terminal_control_sequences_of_a_template_are_not_passed_on():
    with pytest.raises(BadPrompt) as error:
        render("{{ raise_exception('\x1b[2Jgone' + 'x' * 1000) }}")
    assert "\x1b" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages[0].content.x.y }}", "{{ none + 'a' }}", "{{ [] < 1 }}"]
)
def test_any_failure_is_one_sentence(template):
    with pytest.raises(BadPrompt, match=r"^The model's chat template .*\.$"):
        render(template, [{"role": "user", "content": "x"}])


def test_a_mistake_in_the_template_names_its_line():
    with pytest.raises(BadPrompt, match="line 2"):
        ChatTemplate("a\n{% if %}", bos_token="", eos_token="")


@pytest.mark.parametrize(
    ("family", "user", "system"),
    [
        ("qwen2-vl", ("string", "list"), "string"),
        ("gemma3", ("string", "list"), "string"),
        ("llama3.2", ("string", "list"), "string"),
        ("smolvlm", ("list",), "list"),
        ("internvl", ("string",), "string"),
        ("minicpm", ("string",), "string"),
        ("glm4v", ("string", "list"), "string"),
        ("kimi", ("string", "list"), "string"),
        ("vicuna", ("string",), "string"),
        ("mistral", ("string",), None),
        ("lists-only", ("list",), "list"),
    ],
)
def test_what_each_family_understands(family, user, system):
    template, bos, eos, _ = FAMILIES[family]
    found = ChatTemplate(template, bos_token=bos, eos_token=eos)
    assert (found.user_shapes, found.system_shape) == (user, system)


@pytest.mark.parametrize("body", ["{{ m.content }}", "{{ m.content | tojson }}", "{{ m.content | string | trim }}"])
def test_a_list_printed_as_it_is_does_not_count_as_understood(body):
    found = ChatTemplate("{% for m in messages %}" + body + "{% endfor %}", bos_token="", eos_token="")
    assert found.user_shapes == ("string",)


def test_a_system_message_may_want_another_shape_than_the_users():
    text = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '|' }}"
        "{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    found = ChatTemplate(text, bos_token="", eos_token="")
    assert (found.user_shapes, found.system_shape) == (("list",), "string")
