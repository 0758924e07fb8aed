"""Flags made of the fields of settings: a flag's help is its field's description, its default the field's own."""

import inspect
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel
from typer.core import TyperCommand

from opsin.core.config import current_folder, read_config
from opsin.core.errors import BadParameter
from opsin.core.files import expand, read_table, read_text
from opsin.core.request import SamplingParams
from opsin.core.settings import MAX_SCHEMA, RENAMED, RETIRED, EngineSettings, kind_of
from opsin.models import locate

Command = TypeVar("Command", bound=Callable[..., Any])
Flags = Mapping[str, Any]

PAIR = ("model", "mmproj", "ctx", "gpu_layers", "device", "mmproj_device", "kv_type", "verbose")
ENGINE = (*PAIR, "threads", "threads_batch", "speculation", "swa_full", "device_sampling")
IMAGES = ("region", "tiles")
PAGES = ("pages", "max_pages")
ANSWER = ("max_tokens", "max_seconds", "temperature", "seed", "guard", "thinking", "max_thinking_tokens")

GROUPS: dict[str, list[str]] = read_table(__file__, "groups.toml")
"""Under which heading of the help a field's flag stands."""
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def _under(panel: str) -> Callable[..., Any]:
    """What makes options that the help shows under this heading."""
    return partial(typer.Option, rich_help_panel=panel)


answer, job, output = _under("Answer"), _under("Job"), _under("Output")
AsJson = Annotated[bool, output("--json", help="print JSON instead of text")]
JsonOut = Annotated[Path | None, output("--json-out", help="also write the JSON document to this file")]
_CHOICES = "answer with one of these, and how likely each is"
_REASONS = "with these three: own words before the choice (default: where the model hardly begins with a label)"
_OWN: dict[str, tuple[type, Any]] = {
    "choices": (str, answer("--choices", metavar="A,B,…", help=_CHOICES)),
    "scale": (str, answer("--scale", metavar="1-5", help="answer with a number of a scale")),
    "boolean": (bool, answer("--bool", help="answer with yes or no")),
    "reasons": (bool, answer("--reasons/--no-reasons", help=_REASONS)),
    "system": (str, answer("--system", help="system message before the question")),
}  # flags that are not made of a field
LABELS = ("choices", "scale", "boolean", "reasons")


def answer_fields(flags: Flags, json_schema: Path | None) -> dict[str, Any]:
    """The fields of SamplingParams for `flags` and for a file with a schema; `choices` has commas or is a JSON list.

    Raises BadParameter.
    """
    found = given(SamplingParams, flags)
    if json_schema is not None:
        found["json_schema"] = read_text(expand(json_schema), MAX_SCHEMA)
    if (choices := found.get("choices")) is not None:
        found["choices"] = [one.strip() for one in choices.split(",")]
        if choices.lstrip().startswith("["):
            try:
                found["choices"] = json.loads(choices)
            except ValueError as error:
                raise BadParameter(f"--choices begins as a JSON list and is none ({error}).") from None
    return found


class GroupedCommand(TyperCommand):
    """A command whose help has its options under the headings of `GROUPS`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As always, but `--ray` may stand without its address."""
        pairs = zip(args, [*args, "-"][1:], strict=True)
        args = ["--ray=" if one == "--ray" and behind.startswith("-") else one for one, behind in pairs]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then options without a group, then the groups."""
        records: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], **{name: [] for name in GROUPS}}
        for one in self.get_params(ctx):
            if record := one.get_help_record(ctx):
                rest = "Arguments" if one.param_type_name == "argument" else "Options"
                records[getattr(one, "rich_help_panel", None) or rest].append(record)
        for name, rows in records.items():
            if rows:
                with formatter.section(name):
                    formatter.write_dl(rows)


def flags_of(model: type[BaseModel], *names: str, **defaults: str) -> Callable[[Command], Command]:
    """Give a command a flag for each of these fields that it has not itself; `defaults` are fields with one of its own.

    It gets their values as its `**flags`, None where the user set none.
    """
    names = (*names, *defaults)

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters
        parameters = [parameter for parameter in own.values() if parameter.kind is not parameter.VAR_KEYWORD]
        parameters += [_flag(model, name, defaults.get(name)) for name in names if name not in own]
        old = [*(old for old, new in RENAMED.items() if new in names), *(RETIRED if "threads" in names else ())]
        # Flags of earlier versions, which `core.config` warns about.
        parameters += [_keyword(name, str, typer.Option(_flag_name(name), hidden=True)) for name in old]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def given(model: type[BaseModel], flags: Flags) -> dict[str, Any]:
    """The flags that the user set and that are fields of the model; all others keep their default in one place."""
    known = {*model.model_fields, *((*RENAMED, *RETIRED) if issubclass(model, EngineSettings) else ())}
    return {name: value for name, value in flags.items() if name in known and value not in (None, [])}


def settings_of(flags: Flags, slots: int = 1) -> EngineSettings:
    """All settings; `slots` where nobody gives a number, or the context that they share. Raises BadParameter."""
    chosen = given(EngineSettings, flags)
    config = read_config(chosen, os.environ, current_folder(), locate=locate, parallel=1 if flags["ctx"] else slots)
    return config.engine(parallel=slots if config.origins["ctx"] == "default" else 1)


def write_out(path: Path | None, document: dict[str, Any]) -> None:
    """Write a JSON document to the file that a flag names, if it does. Raises OSError."""
    if path is not None:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _flag(model: type[BaseModel], name: str, default: str | None) -> inspect.Parameter:
    if name in _OWN:
        return _keyword(name, *_OWN[name])
    field = model.model_fields[name]
    kind, text, flag = kind_of(field), field.description or "", _flag_name(name)
    shape: Any = kind if kind in {bool, int, float} else str
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    elif get_origin(kind) is tuple:
        shape, text = list[str], f"{text}; may be given several times"
    elif get_origin(kind) is Literal:
        text = f"{text}: {', '.join(get_args(kind))}"
    if default is not None or field.default not in (None, ()):
        shown = default or ({True: "on", False: "off"}.get(field.default) if kind is bool else field.default)
        text = f"{text} [default: {', '.join(shown) if isinstance(shown, tuple) else shown}]"
    option = typer.Option(flag, help=text, show_default=False, rich_help_panel=_GROUP_OF.get(name))
    return _keyword(name, shape, option)


def _flag_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _keyword(name: str, shape: Any, option: Any) -> inspect.Parameter:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=None, annotation=Annotated[shape | None, option])
