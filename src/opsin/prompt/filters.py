"""The filters, tests and functions a chat template may use, each charged to the budget in force."""

from __future__ import annotations

import datetime as dt
import json
import re
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from jinja2 import Environment
from jinja2 import filters as jinja_filters
from jinja2 import tests as jinja_tests
from jinja2.runtime import Context, Undefined, str_join
from jinja2.utils import Namespace, pass_context, pass_environment

from opsin.prompt.budget import ITEM_CHARS, MAX_INT_BITS, TemplateRefused, current

_Function = Callable[..., Any]

_WRITES_TEXT = (
    "trim", "upper", "lower", "capitalize", "title", "string", "escape", "e", "replace", "indent", "join", "tojson",
    "safe",
)  # fmt: skip
_TAKES_LISTS = (
    "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr", "reverse", "sort", "sum", "unique",
    "dictsort", "items",
)  # fmt: skip
_TAKES_ONE = ("abs", "count", "length", "default", "d", "first", "last", "float", "int", "round")
_MAX_PRECISION = 32
_NO_TESTS = ("filter", "test", "callable")
_MAX_RANGE = 100_000
_WIDE_FIELD = re.compile(r"%[^a-zA-Z%]*(\d{3}|\*)|%\(")  # a field three digits wide has no place in a prompt


class TemplateRaised(Exception):
    """The template itself refused the messages, with `raise_exception`."""


class ChatNamespace(Namespace):
    """Jinja's namespace, printing as its name: its insides may be shared and nested without end."""

    def __repr__(self) -> str:
        return "<namespace>"


def check_percent(text: str, values: Any) -> None:
    """Refuse a `%` format with wide or named fields, and charge what the others can write."""
    if _WIDE_FIELD.search(text):
        raise TemplateRefused("formats too wide a field")
    budget = current()
    budget.charge(len(text) + text.count("%") * (100 + budget.weigh(values)))


def check_format(text: str, values: Any) -> None:
    """The same for `str.format`; a field whose width is a field again is refused too."""
    fields = [spec or "" for _, name, spec, _ in string.Formatter().parse(text) if name is not None]
    if any("{" in spec or re.search(r"\d{3}", spec) for spec in fields):
        raise TemplateRefused("formats too wide a field")
    budget = current()
    budget.charge(len(text) + len(fields) * (100 + budget.weigh(values)))


def _charged(function: _Function, before: Callable[..., None] | None) -> _Function:
    wants = getattr(function, "jinja_pass_arg", None)

    @pass_context
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        budget = current()
        budget.tick()
        if before is not None:
            before(*args, **kwargs)
        result = function(*_passed(context, wants), *args, **kwargs)
        if isinstance(result, Iterator):
            result = list(_ticking(result))  # a lazy result would do its work where nobody counts
        elif isinstance(result, str):
            result = str(result)
        elif isinstance(result, int) and result.bit_length() > MAX_INT_BITS:
            raise TemplateRefused("computes too large a number")
        if not any(result is arg for arg in args):
            budget.charge_value(result)
        return result

    return run


def _passed(context: Context, wants: Any) -> tuple[Any, ...]:
    kind = getattr(wants, "name", None)
    if kind == "context":
        return (context,)
    if kind == "eval_context":
        return (context.eval_ctx,)
    return (context.environment,) if kind == "environment" else ()


def _ticking(items: Iterator[Any]) -> Iterator[Any]:
    budget = current()
    for item in items:
        budget.charge(ITEM_CHARS)
        yield item


def _before_text(value: Any = None, *args: Any, **kwargs: Any) -> None:
    budget = current()
    for each in (value, *args, *kwargs.values()):
        budget.weigh(each)


def _before_list(value: Any = None, *_args: Any, **_kwargs: Any) -> None:
    if isinstance(value, str):
        current().charge(ITEM_CHARS * len(value))


def charge_replace(text: str, old: str, new: str) -> None:
    """Charge what replacing every `old` by `new` makes of a text."""
    current().charge(len(text) + text.count(old) * max(len(new) - len(old), 0))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text = str(value)
    charge_replace(text, str(old), str(new))
    return text.replace(str(old), str(new), -1 if count is None else count)


@pass_environment
def _join(environment: Environment, value: Any, d: Any = "", attribute: Any = None) -> str:
    items = _members(environment, value, attribute)
    budget = current()
    budget.charge(budget.weigh(items) + len(str(d)) * len(items))
    return str(d).join(map(str, items))


def _members(environment: Environment, value: Any, attribute: Any) -> list[Any]:
    items = list(_ticking(iter(value)))
    return items if attribute is None else list(map(jinja_filters.make_attrgetter(environment, attribute), items))


def _indent(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    fill = width if isinstance(width, str) else " " * min(int(width), 64)
    lines = str(text).split("\n")
    current().charge(len(fill) * len(lines))
    return "\n".join(
        fill + line if (line or blank) and (first or number) else line for number, line in enumerate(lines)
    )


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(value, Undefined):
        raise TemplateRefused("writes a value as JSON that the messages do not have")
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise TemplateRefused("indents JSON too far")
    if separators is not None and sum(map(len, separators)) > 16:
        raise TemplateRefused("separates JSON too widely")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_environment
def _sum(environment: Environment, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    numbers = [start, *_members(environment, value, attribute)]
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise TemplateRefused("adds up what are no numbers")
    return sum(numbers)


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > _MAX_PRECISION:
        raise TemplateRefused("asks for too many digits")
    return jinja_filters.FILTERS["round"](value, precision, method)


def _string(value: Any) -> str:
    return str(value)


@pass_context
def _tick(context: Context, chars: int) -> bool:  # noqa: ARG001 - needing the context keeps Jinja from folding it
    current().charge(chars)
    return True


@pass_context
def _concat(context: Context, parts: tuple[Any, ...]) -> str:  # noqa: ARG001
    budget = current()
    budget.charge(budget.weigh(parts))
    return str(str_join(parts))


@pass_context
def _made(context: Context, value: Any) -> Any:  # noqa: ARG001
    current().charge_value(value)
    return value


@pass_context
def _container(context: Context, value: Any) -> Any:  # noqa: ARG001
    budget = current()
    budget.charge_value(value)
    budget.weigh(value)
    return value


@pass_context
def _operand(context: Context, value: Any) -> Any:  # noqa: ARG001
    current().tick()
    return value


def _range(*args: int) -> range:
    items = range(*args)
    if items and (abs(items.start - items.stop) // abs(items.step)) > _MAX_RANGE:
        raise TemplateRefused("counts too far")
    return items


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    made: dict[Any, Any] = dict(*args, **kwargs)
    current().weigh(made)
    return made


def _raise_exception(message: Any = "") -> NoReturn:
    current().weigh(message)
    raise TemplateRaised(str(message))


def _strftime_now(text: str) -> str:
    if len(text) > 128 or _WIDE_FIELD.search(text):
        raise TemplateRefused("formats too wide a field")
    return dt.datetime.now().strftime(text)  # noqa: DTZ005 - a template asks for the user's own day


def make_globals() -> dict[str, Any]:
    """The functions that chat templates expect."""
    return {
        "range": _range,
        "dict": _dict,
        "namespace": ChatNamespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }


def _make_filters() -> dict[str, _Function]:
    own: dict[str, _Function] = {
        "replace": _replace, "join": _join, "indent": _indent, "tojson": _tojson, "string": _string, "safe": _string,
        "sum": _sum, "round": _round,
    }  # fmt: skip
    known: Mapping[str, _Function] = {**jinja_filters.FILTERS, **own}
    return {
        **{name: _charged(known[name], _before_text) for name in _WRITES_TEXT},
        **{name: _charged(known[name], _before_list) for name in _TAKES_LISTS},
        **{name: _charged(known[name], None) for name in _TAKES_ONE},
        "opsin_tick": _tick,
        "opsin_concat": _concat,
        "opsin_made": _made,
        "opsin_container": _container,
        "opsin_operand": _operand,
    }


def _make_tests() -> dict[str, _Function]:
    known: Mapping[str, Any] = jinja_tests.TESTS
    return {name: _charged(test, _before_text) for name, test in known.items() if name not in _NO_TESTS}


FILTERS = _make_filters()
TESTS = _make_tests()
