"""Templates come with model files from strangers: nothing one does may take long, take much memory, or get out."""

import resource
import sys
import threading
import time

import pytest

from opsin.core.errors import BadPrompt
from opsin.prompt.template import ChatTemplate

pytestmark = pytest.mark.slow  # together they take seconds, so `make check` leaves them out

GROW = "{% set ns = namespace(x=START) %}{% for i in range(200) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"


def grow(start, step):
    return GROW.replace("START", start).replace("STEP", step)


TOO_LONG = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that keep nothing": "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
    "nested loops without a call": "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% endfor %}"
    "{% endfor %}",
    "loops in a row that keep nothing": "{% set r = range(99999) | list %}"
    + "{% for b in r if false %}{% endfor %}" * 700,
    "a call in a loop": "{% macro m() %}{% endmacro %}{% for a in range(99999) %}{% for b in range(9) %}{{ m() }}"
    "{% endfor %}{% endfor %}",
    "a deep list": "{% set ns = namespace(x=1) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}",
    "long comparisons": "{% set a = 'x' * 2000000 %}{% set b = 'x' ~ a[1:] %}{% for i in range(99999) %}"
    "{% if a == b %}{% endif %}{% endfor %}",
    "long searches": "{% set a = 'ab' * 1000000 %}{% for i in range(99999) %}{{ 'abb' in a }}{% endfor %}",
    "searching a range": "{% for i in range(90000) %}{{ 'a' in range(90000) }}{% endfor %}",
}

TOO_LARGE = {
    "a range": "{% for a in range(10**12) %}{% endfor %}",
    "text times a number": "{{ 'a' * 10**10 }}",
    "a number times text": "{{ 10**10 * 'a' }}",
    "a list times a number": "{{ [0] * 10**9 }}",
    "doubling by plus": grow("'aa'", "ns.x + ns.x"),
    "doubling by tilde": grow("'aa'", "ns.x ~ ns.x"),
    "doubling by times": grow("[0]", "ns.x * 2"),
    "doubling by adding lists": grow("[0]", "ns.x + ns.x"),
    "doubling by a block": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}"
    "{% endset %}{% endfor %}",
    "doubling by format": grow("'aa'", "'{0}{0}'.format(ns.x)"),
    "doubling by percent": grow("'aa'", "'%s%s' % (ns.x, ns.x)"),
    "doubling by join": grow("'aa'", "[ns.x, ns.x] | join"),
    "doubling by str.join": grow("'aa'", "ns.x.join([ns.x, ns.x])"),
    "doubling by replace": grow("'aa'", "ns.x.replace('a', 'aa')"),
    "doubling by the replace filter": grow("'aa'", "ns.x | replace('a', 'aa')"),
    "doubling by a macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + grow("'aa'", "m(ns.x)"),
    "a shared list, printed": grow("['a']", "[ns.x, ns.x]"),
    "a shared list, as JSON": grow("['a']", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x | tojson }}"),
    "a shared dict": grow("'a'", "dict(a=ns.x, b=ns.x)"),
    "a shared dict literal": grow("'a'", "{'a': ns.x, 'b': ns.x}"),
    "shared lists, compared": "{% set ns = namespace(x=['a'], y=['a']) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "a shared tuple": grow("'a'", "(ns.x, ns.x)"),
    "one text many times in a list": "{{ (['b' * 1000000] * 1000) | join }}",
    "replacing nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "joining letters": "{{ ('b' * 100000).join('a' * 100000) }}",
    "splitting": "{% for i in range(1000) %}{% set x = ('a ' * 100000).split() %}{% endfor %}",
    "indenting far": "{{ ('\n' * 100000) | indent(10**6) }}",
    "indenting with a text": "{{ ('\n' * 100000) | indent('a' * 10**6) }}",
    "indented JSON": "{{ [[1]] | tojson(indent=10**9) }}",
    "separated JSON": "{{ [1] * 1000 | tojson(separators=('a' * 10**6, 'b')) }}",
    "literal text in loops": "{% set x %}{% for i in range(99999) %}" + "D" * 1000 + "{% endfor %}{% endset %}",
    "a filter block": "{% filter upper %}{% for i in range(99999) %}" + "D" * 100 + "{% endfor %}{% endfilter %}",
    "macros of macros": "{% macro a() %}xxxxxxxxxx{% endmacro %}"
    + "".join(f"{{% macro {chr(98 + n)}() %}}{f'{{{{ {chr(97 + n)}() }}}}' * 10}{{% endmacro %}}" for n in range(12))
    + "{{ m() }}",
    "sorting ranges": "{% for i in range(90000) %}{% set x = range(99999) | sort %}{% endfor %}",
    "summing lists": "{{ [[0]] | sum(start=[]) }}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "negative powers": "{{ 7 ** (-99999999) }}",
    "squaring": grow("9", "ns.x * ns.x"),
    "a long hexadecimal number": "{{ ('f' * 1000000) | int(0, 16) }}",
    "rounding": "{{ 1.5 | round(10**9, 'ceil') }}",
}

WIDE_FIELDS = {
    "str.format": "{{ '{:>1000000000}'.format(1) }}",
    "str.format, the width a value": "{{ '{:{w}}'.format('x', w=10**9) }}",
    "str.format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent, the width a value": "{{ '%*d' % (10**9, 1) }}",
    "percent, named": "{{ '%(a)1000000000d' % {'a': 1} }}",
    "precision": "{{ '%.1000000000f' % 1 }}",
    "strftime": "{{ strftime_now('%1000000000d') }}",
    "center": "{{ 'a' | center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
}

ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by item": "{{ ''['__class__']['__mro__'] }}",
    "a function's globals": "{{ raise_exception.__globals__['sys'] }}",
    "a class's constructor": "{{ namespace.__init__.__globals__ }}",
    "attributes by filter": "{{ '' | attr('__class__') }}",
    "format's attributes": "{{ '{0.__class__.__mro__}'.format(1).x.y }}",
    "changing messages": "{{ messages.append(1) }}",
    "changing a message": "{{ messages[0].update({'role': 'x'}) }}",
    "setting an item": "{{ messages[0].__setitem__('a', 1) }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "from import": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
    "a block that calls itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "the template itself": "{{ self._TemplateReference__context.environment }}",
    "an unknown function": "{{ lipsum(n=100000) }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "a loop that calls itself": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
}

SOURCES = {
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "sums": "{{ 1" + "+1" * 30000 + " }}",
    "nots": "{{ " + "not " * 15000 + "1 }}",
    "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "fors": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "many outputs": "{{a}}" * 13000,
    "comments": "{#" * 30000,
    "braces": "{" * 65000,
    "quotes": "{{ " + "'" * 60001,
    "digits": "{{ " + "1" * 60000 + " }}",
    "white space": "{{" + " " * 60000 + "}}",
    "too many characters": "x" * 65537,
    "an unclosed loop": "{% for a in b %}",
}


def peak_mib():
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(template, id=f"{group}-{name}")
        for group, templates in {
            "time": TOO_LONG, "size": TOO_LARGE, "width": WIDE_FIELDS, "escape": ESCAPES, "source": SOURCES,
        }.items()
        for name, template in templates.items()
    ],
)  # fmt: skip
def test_a_hostile_template_ends_soon_with_one_sentence(template):
    before, start = peak_mib(), time.thread_time()
    with pytest.raises(BadPrompt) as error:
        ChatTemplate(template, bos_token="", eos_token="").render([{"role": "user", "content": "hi"}])
    assert time.thread_time() - start < 2, "CPU time, which a busy machine does not stretch"
    assert peak_mib() - before < 64
    sentence = str(error.value)
    assert sentence.endswith(".")
    assert len(sentence) < 450
    assert "\n" not in sentence
    assert "memory" not in sentence, "it is refused before it asks for memory"


def test_what_is_withheld_is_simply_undefined():
    for template in ("{{ ''.__class__ }}", "{{ self.__init__ }}", "{{ [''] | map(attribute='__class__') | join }}"):
        assert ChatTemplate(template, bos_token="", eos_token="").render([]) == ""


def test_namespaces_within_namespaces_print_as_their_name():
    """Their insides may be shared, so that printing them would take 2**60 steps."""
    template = grow("'a'", "namespace(a=ns.x, b=ns.x)")
    assert ChatTemplate(template, bos_token="", eos_token="").render([]) == "<namespace>"


def test_one_renderings_budget_is_not_anothers():
    spend = ChatTemplate("{{ 'a' * 1500000 }}", bos_token="", eos_token="")
    for _ in range(5):
        assert len(spend.render([])) == 1_500_000


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
