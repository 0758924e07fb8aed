"""Writes the reference in `docs/` that is made of the code: `python tools/reference.py`; `--check` only compares.

Whole pages: settings, commands, the rows of `opsin ask --json`, and the families of models. Tables between markers in
other pages: fields of requests, metrics, limits. What the code cannot say is in `reference.toml`; a field without a
text there is an error.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def settings_page() -> str:
    """All settings, made of their own fields."""
    from opsin.core.config import KEY_VARIABLE, PREFIX
    from opsin.core.settings import RETIRED, ServerSettings, kind_of

    rows = []
    for name, field in ServerSettings.model_fields.items():
        value, default = _value(kind_of(field)), _default(field.default)
        flag, variable = f"--{name.replace('_', '-')}", f"{PREFIX}{name.upper()}"
        rows.append((f"`{name}`", f"`{variable}`", f"`{flag}`", value, default, field.description or ""))
    table = _table(("setting", "variable", "flag", "value", "default", "what it is"), rows)
    retired = ", ".join(f"`{name}`" for name in RETIRED)
    return TEXTS["settings"]["head"].format(prefix=PREFIX, key=KEY_VARIABLE, retired=retired) + table


def commands_page() -> str:
    """All commands with their arguments and options, as `--help` has them."""
    import typer

    from opsin.cli.app import COMMANDS, app

    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="opsin")
    parts = [TEXTS["commands"]["head"]]
    for name in COMMANDS:
        parts += _command(name, group.get_command(context, name), context, 2)
    return "\n".join(parts)


def _command(name: str, command: Any, context: Any, level: int) -> Iterator[str]:
    yield f"{'#' * level} opsin {name}\n\n{' '.join((command.help or '').split())}\n"
    shown = [one for one in command.params if not getattr(one, "hidden", False)]
    arguments = [one for one in shown if one.param_type_name == "argument"]
    usage = " ".join(["opsin", name, "[OPTIONS]", *(_shown(one) for one in arguments)])
    panels: dict[str, list[tuple[str, str]]] = {}
    for one in shown:
        names = _shown(one) if one in arguments else ", ".join((*one.opts, *one.secondary_opts))
        panel = "Arguments" if one in arguments else getattr(one, "rich_help_panel", None) or "Options"
        panels.setdefault(panel, []).append((f"`{names}`", one.help or ""))
    if panels or not hasattr(command, "list_commands"):
        yield f"```text\n{usage}\n```\n"
    for panel, rows in panels.items():
        yield _table((panel.lower(), ""), rows)
    if hasattr(command, "list_commands"):
        for sub in command.list_commands(context):
            yield from _command(f"{name} {sub}", command.get_command(context, sub), context, level + 1)


def _shown(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def rows_page() -> str:
    """Every field of a row of `opsin ask --json`."""
    from opsin.core.answer import Answer
    from opsin.core.choice import CHOICE_FIELDS, Choice
    from opsin.core.model_info import ModelInfo, Placement
    from opsin.jobs.row import NOT_IN_JSON

    texts = dict(TEXTS["json"]["fields"])
    rows = [(f"`{name}`", kind, texts.pop(name)) for name, kind in (("source", "text or texts"), ("error", "object"))]
    hints = get_type_hints(Answer)
    for name in ("text", "reasoning", "finish_reason", "usage", "guard", "boxes", "images", "stages", "timings"):
        rows += [(f"`{path}`", kind, texts.pop(path)) for path, kind in _paths(name, hints[name], NOT_IN_JSON)]
    hints = get_type_hints(Choice)
    rows += [("`confidence`", "object", texts.pop("confidence"))]
    rows += [
        (f"`{path}`", kind, texts.pop(path)) for one in CHOICE_FIELDS for path, kind in _paths(one, hints[one], set())
    ]
    for name, made in (("placement", Placement), ("model", ModelInfo)):
        rows += [(f"`{path}`", kind, texts.pop(path)) for path, kind in _paths(name, made, set())]
    if texts:
        raise KeyError(f"no such fields: {', '.join(texts)}")
    return TEXTS["json"]["head"] + _table(("field", "value", ""), rows)


def families_page() -> str:
    """Which families of image models pass which checks, as `tools/families.py` found."""
    found = json.loads((DOCS / "results" / "families.json").read_text(encoding="utf-8"))
    columns = TEXTS["families"]["columns"]
    rows = []
    for row in found["families"]:
        marks = {name: "yes" if row["checks"][name] else "no" for name in columns}
        if row["checks"]["caches"] and not row["keeps_prefixes"]:
            marks["caches"] = "images only"
        if row["checks"]["agrees"]:
            marks["agrees"] = f"yes, {row['off_by']:.4f}"
        rows.append((row["title"], f"`{row['projector']}`", f"`{row['architecture']}`", *marks.values()))
    head = TEXTS["families"]["head"].format(version=found["llama_cpp_python"], server=found["server"])
    return head + _table(("family", "projector", "language model", *columns.values()), rows)


def _paths(name: str, kind: Any, left_out: set[str]) -> Iterator[tuple[str, str]]:
    """A field and the fields in it, with the kind of value each has."""
    options = [one for one in get_args(kind) if one is not type(None)] if isinstance(kind, UnionType) else [kind]
    inner, null = options[0], " or null" if isinstance(kind, UnionType) else ""
    if get_origin(inner) is tuple:
        inner, null, name = get_args(inner)[0], "", f"{name}[]"
    if not is_dataclass(inner):
        named = {int: "number", float: "number", bool: "true or false", str: "text", dict: "object"}
        choices = [f"`{one}`" for one in get_args(inner) if isinstance(one, str)]
        yield name, (" or ".join(choices) or named.get(get_origin(inner) or inner, "object")) + null
        return
    yield name, "object" + null
    hints = get_type_hints(inner)
    for field in fields(inner):
        if field.name not in left_out:
            yield from _paths(f"{name}.{field.name}", hints[field.name], left_out)


def request_fields(api: str) -> str:
    """The fields of a request; `api` is chat, responses, completions, messages, or common for what all share."""
    from opsin.server import blocks, responses, schema

    models = {
        "chat": schema.ChatRequest,
        "completions": schema.CompletionRequest,
        "responses": responses.ResponsesRequest,
        "messages": blocks.MessagesRequest,
        "common": schema.Common,
    }
    texts = dict(TEXTS["requests"][api])
    known = set(models[api].model_fields) - (set() if api == "common" else set(schema.Common.model_fields))
    mentioned = {name for key in texts for name in re.split(r"[ ,]+", key)}
    if known - mentioned or {name for name in mentioned if "." not in name} - set(models[api].model_fields):
        raise KeyError(f"{api}: {known ^ mentioned}")
    rows = [(", ".join(f"`{name}`" for name in key.split(", ")), text) for key, text in texts.items()]
    return _table(("field", ""), rows)


def metrics(kind: str) -> str:
    """The metrics of a kind: gauge, counter or histogram."""
    from opsin.core.settings import ServerSettings
    from opsin.engine import Snapshot
    from opsin.server.app import create_app
    from opsin.server.handler import ModelManager

    nothing: Any = SimpleNamespace(stats=Snapshot(), loaded=None, state="loading")
    app = create_app(ModelManager(ServerSettings(), nothing), nothing)
    found = [one for one in app.state.metrics.registry.collect() if one.type == kind]
    ending = "_total" if kind == "counter" else ""
    labels = TEXTS["metrics"]["labels"]
    rows = [(f"`{one.name}{ending}`", one.documentation + labels.get(one.name, "")) for one in found]
    return _table(("name", ""), rows)


def limits(of: str) -> str:
    """What is bounded, for one request, for all together, or for files; from the constants that hold."""
    from opsin.core.settings import ImageSettings, ServerSettings

    rows = []
    for row in TEXTS["limits"][of]:
        if setting := row.get("setting"):
            value, name = ServerSettings.model_fields[setting].default, f"`--{setting.replace('_', '-')}`"
        elif of_image := row.get("image"):
            value, name = ImageSettings.model_fields[of_image].default, ""
        else:
            module, _, constant = row["constant"].rpartition(".")
            value, name = getattr(__import__(module, fromlist=[constant]), constant), ""
        rows.append((row["what"], row.get("shown", "{}").format(_amount(value)), name, row["gets"]))
    return _table(("what", "limit", "setting", "beyond it"), rows)


def _amount(value: Any) -> str:
    if value is None:
        return "any"
    if isinstance(value, int) and value >= 2**20 and value % 2**20 == 0:
        return f"{value // 2**20:,} Mi"
    return f"{value:,.10g}" if isinstance(value, (int, float)) else str(value)


def _value(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "list of texts"
    if not isinstance(kind, type):
        return " or ".join(f"`{choice}`" for choice in get_args(kind))
    return {bool: "switch", int: "whole number", float: "number", Path: "path"}.get(kind, "text")


def _default(value: Any) -> str:
    if value is None or value == ():
        return "unset"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else f"{value}" or "empty"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *rows]
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in lines)
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "cli.md": commands_page,
    "json.md": rows_page,
    "families.md": families_page,
}
TABLES: dict[str, Callable[[str], str]] = {"fields": request_fields, "metrics": metrics, "limits": limits}
_MARKED = re.compile(r"(<!-- table: (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> Iterator[tuple[Path, str]]:
    """Every page and what it has to contain."""
    for name, make in PAGES.items():
        yield DOCS / name, make()
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if path.name not in PAGES and _MARKED.search(text):
            yield path, _MARKED.sub(lambda m: f"{m[1]}\n{TABLES[m[2]](m[3])}\n{m[4]}", text)


def main() -> None:
    """Write what differs, or say so with exit code 1."""
    differing = [(path, text) for path, text in pages() if not path.is_file() or path.read_text("utf-8") != text]
    if "--check" in sys.argv:
        sys.exit(", ".join(path.name for path, _ in differing) + ": run tools/reference.py" if differing else 0)
    for path, text in differing:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
