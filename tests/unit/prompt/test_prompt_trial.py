"""Templates come with model files from strangers: none may take long, fill memory, or reach Python."""

import hashlib
import threading
import time

import pytest
from prompt_families import FAMILIES, bare

from opsin.core.errors import BadPrompt, ModelUnreadable
from opsin.models import resolve
from opsin.prompt import Message
from opsin.prompt import template as trial_module
from opsin.prompt.builder import ChatTemplate
from opsin.prompt.template import SHIPPED, check_template

GROW = "{% set ns = namespace(x=START) %}{% for i in range(200) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"


def grow(start, step):
    return GROW.replace("START", start).replace("STEP", step)


REFUSED = {
    "strip with long arguments": ("{% set x=('a'*1900000) %}{{ x.lstrip('b'*900000+'a') }}", "runs too long"),
    "nested loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "runs too long",
    ),
    "macros of macros": (
        "{% macro a() %}xxxxxxxxxx{% endmacro %}"
        + "".join(
            f"{{% macro {chr(98 + n)}() %}}{f'{{{{ {chr(97 + n)}() }}}}' * 10}{{% endmacro %}}" for n in range(12)
        )
        + "{{ m() }}",
        "runs too long",
    ),
    "only after a long conversation": (
        "{% if messages | length > 50 %}" + "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2 + "{% endif %}"
        "{{ messages[0].content }}",
        "runs too long",
    ),
    "only with tools": ("{% if tools %}{{ 'a' * 10**9 }}{% endif %}{{ messages[0].content }}", "memory"),
    "powers": ("{{ 9 ** (9 ** 9) }}", "runs too long|memory"),
    "shared lists, printed": (grow("['a']", "[ns.x, ns.x]"), "runs too long|memory"),
    "text times a number, while compiling": ("{{ 'a' * 10**10 }}", "memory"),
    "doubling": (grow("'aa'", "ns.x ~ ns.x"), "memory"),
    "a wide field": ("{{ '{:>1000000000}'.format(1) }}", "memory"),
    "much text": ("{% for i in range(99999) %}" + "D" * 1000 + "{% endfor %}", "too much text"),
    "a mistake": ("a\n{% if %}", "line 2"),
    "brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested|mistake|ends the process|failed|memory"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_template_is_refused_soon_with_one_sentence(name):
    template, word = REFUSED[name]
    start = time.thread_time()
    with pytest.raises(ModelUnreadable, match=word) as error:
        bare(template)
    assert time.thread_time() - start < 0.5, "the work is done, and ended, in another process"
    sentence = str(error.value)
    assert error.value.exit_code == 3
    assert sentence.startswith("The model's chat template")
    assert sentence.endswith(".")
    assert sentence.isprintable()
    assert len(sentence) < 450


def test_a_verdict_is_remembered(monkeypatch):
    assert check_template("{{ messages[0].content }}!", bos_token="", eos_token="") is None
    monkeypatch.setattr(trial_module.subprocess, "run", None)
    assert check_template("{{ messages[0].content }}!", bos_token="", eos_token="") is None


def test_a_python_that_cannot_be_started_is_told(monkeypatch):
    monkeypatch.setattr(trial_module.sys, "executable", "/no/such/python")
    with pytest.raises(ModelUnreadable, match="process of its own"):
        bare("{{ messages[0].content }}?")


@pytest.mark.parametrize("family", FAMILIES)
def test_honest_templates_pass(family):
    template, bos, eos, _ = FAMILIES[family]
    check_template(template, bos_token=bos, eos_token=eos)


def test_the_shipped_models_template_needs_no_trial():
    data = resolve(None, None).llm.read_bytes()
    at = data.index(b"tokenizer.chat_template") + len("tokenizer.chat_template") + 4
    size = int.from_bytes(data[at : at + 8], "little")
    assert hashlib.sha256(data[at + 8 : at + 8 + size]).hexdigest() in SHIPPED


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by item": "{{ ''['__class__']['__mro__'] }}",
    "a function's globals": "{{ raise_exception.__globals__['sys'] }}",
    "a class's constructor": "{{ namespace.__init__.__globals__ }}",
    "attributes by filter": "{{ ('' | attr('__class__')).__mro__ }}",
    "attributes by map": "{{ ([''] | map(attribute='__class__') | first).__mro__ }}",
    "format's attributes": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "format's attributes by map": "{{ ['{0.__class__.__mro__}'] | map('format', 1) | first }}",
    "changing messages": "{{ messages.append(1) }}",
    "changing a message": "{{ messages[0].update({'role': 'x'}) }}",
    "setting an item": "{{ messages[0].__setitem__('a', 1) }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "extends": "{% extends 'x' %}",
    "a block that calls itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "the template itself": "{{ self._TemplateReference__context.environment }}",
    "code": "{{ raise_exception.__code__.co_filename }}",
    "a generator's frame": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "an unknown function": "{{ lipsum(n=100000) }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_no_template_reaches_python(name):
    messages = [{"role": "user", "content": "hi"}]
    try:
        shown = ChatTemplate(ESCAPES[name], bos_token="", eos_token="").render(messages)
    except BadPrompt as error:
        shown = str(error)
    assert "<class" not in shown
    assert "module" not in shown
    assert "/" not in shown
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.slow
def test_a_template_that_passed_is_still_bounded_when_it_writes():
    """The trial cannot see every conversation."""
    many = "{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"
    for body, word in (
        (many, "too long"),
        ("{% for i in range(99999) %}" + "D" * 99 + "{% endfor %}", "too much text"),
    ):
        with pytest.raises(BadPrompt, match=word):
            ChatTemplate(body, bos_token="", eos_token="").render([])


def test_threads_render_side_by_side():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", bos_token="", eos_token="")
    results = {}

    def work(number):
        results[number] = template.render([{"content": str(number)}] * 500)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: str(n) * 500 for n in range(8)}


def test_user_text_is_never_run_as_a_template():
    prompt = bare("{{ messages[0].content }}").build([Message("user", "{{ 7 * 7 }}{% for %}")])
    assert prompt.parts[0].text == "{{ 7 * 7 }}{% for %}"
