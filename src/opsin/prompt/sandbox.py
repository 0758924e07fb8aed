"""A Jinja environment for templates from strangers: no way out, and no work that nobody counts.

Jinja's immutable sandbox keeps a template from Python's insides. It does not keep it from working for ever, so here
every loop body, call, operator, filter and output is charged to the `budget` in force, and what could still grow
without bound between two charges is left out.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Template, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from opsin.prompt.budget import ITEM_CHARS, MAX_INT_BITS, TemplateRefused, current
from opsin.prompt.filters import FILTERS, TESTS, charge_replace, check_format, check_percent, make_globals

MAX_TEMPLATE_NODES = 10_000  # the longest in use have about 1,300; compiling takes 0.1 ms each
_ALLOWED = (
    nodes.Template, nodes.Output, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With,
    nodes.Assign, nodes.AssignBlock, nodes.ExprStmt, nodes.Scope, nodes.Break, nodes.Continue,
    nodes.BinExpr, nodes.UnaryExpr, nodes.Name, nodes.NSRef, nodes.Literal, nodes.CondExpr, nodes.Filter, nodes.Test,
    nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat, nodes.Compare, nodes.Operand, nodes.Pair,
    nodes.Keyword,
)  # fmt: skip


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_METHODS: dict[type, frozenset[str]] = {
    str: _names(
        "strip lstrip rstrip split rsplit splitlines startswith endswith replace upper lower title capitalize join "
        "find rfind index count isdigit isalpha isalnum isspace isupper islower isnumeric removeprefix removesuffix "
        "partition rpartition format"
    ),
    dict: _names("get items keys values"),
    list: _names("index count"),
    tuple: _names("index count"),
    LoopContext: _names(
        "index index0 revindex revindex0 first last length depth depth0 previtem nextitem cycle changed"
    ),
    Macro: _names("name arguments caller"),
}


class _Instrument(NodeTransformer):
    """Puts the questions to the budget into a parsed template, and refuses statements that have no place in it."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if not isinstance(node, _ALLOWED):
            raise TemplateRefused(f"uses Jinja's {type(node).__name__.lower()}, which a chat template may not")
        return super().generic_visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja's visitor finds it by this name
        self.generic_visit(node)
        node.body.insert(0, _tick(0, node.lineno))
        if node.test is not None:
            node.test = nodes.And(_ask("opsin_tick", nodes.Const(0), node.lineno), node.test, lineno=node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:  # noqa: N802
        self.generic_visit(node)
        written = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        return [_tick(written, node.lineno), node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _ask("opsin_concat", nodes.Tuple(node.nodes, "load", lineno=node.lineno), node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _ask("opsin_operand", node.expr, node.lineno)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const):
                operand.expr = _ask("opsin_operand", operand.expr, node.lineno)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _ask("opsin_made", node, node.lineno) if isinstance(node.arg, nodes.Slice) else node

    def _container(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        if all(isinstance(child, nodes.Const) for child in node.iter_child_nodes()):
            return node
        return _ask("opsin_container", node, node.lineno)

    visit_List = _container  # noqa: N815
    visit_Dict = _container  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self._container(node) if node.ctx == "load" else self.generic_visit(node)


def _check_length(tree: nodes.Node) -> None:
    count, stack = 0, [tree]  # no recursion: a sum of a thousand terms is a tree a thousand deep
    while stack:
        count += 1
        stack.extend(stack.pop().iter_child_nodes())
        if count > MAX_TEMPLATE_NODES:
            raise TemplateRefused("is too long a program")


def _ask(filter_name: str, node: nodes.Expr, lineno: int) -> nodes.Expr:
    return nodes.Filter(node, filter_name, [], [], None, None, lineno=lineno)


def _tick(chars: int, lineno: int) -> nodes.Node:
    return nodes.ExprStmt(_ask("opsin_tick", nodes.Const(chars), lineno), lineno=lineno)


class _Generation(Extension):
    """`{% generation %}`, with which trainers mark an assistant's words: its body is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment every chat template is rendered in; one serves all templates and threads."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    intercepted_unops: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=_finalize,
            optimized=False,  # a constant folded at compile time would be computed outside every budget
        )
        self.globals.clear()
        self.globals.update(make_globals())
        self.filters.clear()
        self.filters.update(FILTERS)
        self.tests.clear()
        self.tests.update(TESTS)

    def compile_chat(self, text: str) -> Template:
        """Parse, instrument and compile. Raises TemplateRefused, and whatever Jinja raises for a faulty template."""
        tree = self.parse(text)
        _check_length(tree)
        tree = _Instrument().visit(tree)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: ARG002 - Jinja's signature
        """Only what chat templates need, so that nothing unthought-of is reachable."""
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS.items())

    # Names with two underscores, so that they cannot clash with a macro's own keywords.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, PYI063
        """Call what the sandbox lets through, after asking what it will cost."""
        budget = current()
        budget.tick()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check_str_method(owner, method.__name__, args, kwargs)
        with budget.deeper():
            result = super().call(__context, __obj, *args, **kwargs)
        if result is not owner:
            budget.charge_value(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse results that would not fit before they are made."""
        budget = current()
        budget.tick()
        if operator == "%" and isinstance(left, str):
            check_percent(left, right)
        elif operator == "+" and isinstance(left, (str, list, tuple)):
            budget.charge(_extent(left) + _extent(right))
        elif operator == "*" and not (_is_number(left) and _is_number(right)):
            many, times = (right, left) if isinstance(left, int) else (left, right)
            budget.charge(_extent(many) * max(times, 0) if isinstance(times, int) else 0)
        if isinstance(left, int) and isinstance(right, int):
            _check_numbers(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, (list, tuple)):
            budget.weigh(result)
        return result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _extent(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return ITEM_CHARS * len(value) if isinstance(value, (list, tuple)) else 0


def _check_numbers(operator: str, left: int, right: int) -> None:
    bits = max(left.bit_length(), right.bit_length())
    if operator == "**":
        bits = max(bits, left.bit_length() * abs(right))
    if bits > MAX_INT_BITS:
        raise TemplateRefused("computes too large a number")


def _check_str_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    budget = current()
    if name in {"format", "format_map"}:
        check_format(text, [args, kwargs])
    elif name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        charge_replace(text, args[0], args[1])
    elif name == "join" and args:
        budget.charge(budget.weigh(args[0]) + len(text) * _items(args[0]))
    elif name in {"split", "rsplit", "splitlines"}:
        separator = args[0] if args and isinstance(args[0], str) and args[0] else None
        budget.charge(ITEM_CHARS * (text.count(separator) if separator and name != "splitlines" else len(text) // 2))


def _items(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


@pass_context
def _finalize(context: Context, value: Any) -> str:  # noqa: ARG001 - needing the context keeps Jinja from folding it
    budget = current()
    if not isinstance(value, str):
        budget.weigh(value)
        value = str(value)
    budget.charge(len(value))
    return str(value)
