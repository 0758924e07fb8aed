"""What a model's file says about its prompts: its chat template, or the built-in one that stands in for it.

Jinja's sandbox keeps a template away from Python, but not from working for ever: a stranger's template is tried once in
a process of its own, which the operating system can end.
"""

import datetime as dt
import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opsin.core.errors import BadPrompt, ModelUnreadable

# For a machine so busy that a second of CPU time takes long; the only limit on Windows.
_WALL_SECONDS = 60


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """The parts of a model file that decide how its prompts are written, as plain values.

    `template` is the file's own Jinja chat template, if it ships one; `name` is any text that names the model.
    `control_tokens` are the texts that the tokenizer reads as one token when it parses special tokens: user text that
    looks like one is kept plain. `kv_groups`, query heads per key/value head, tells Mistral from Vicuna.
    """

    template: str | None
    architecture: str
    name: str
    projector: str | None
    bos_token: str
    eos_token: str
    control_tokens: frozenset[str]
    kv_groups: int = 1


class TooCostly(BadPrompt):
    """A rendering went over a limit; `what` says what the template does."""

    def __init__(self, what: str) -> None:
        super().__init__(f"The model's chat template {what}: use another file of this model.")


class _Generation(Extension):
    """`{% generation %}`, with which trainers mark an assistant's words: its body is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


def one_line(message: object) -> str:
    """The beginning of a text on one line, with a full stop."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(message)[:300])
    return " ".join(text.split()).rstrip(".") + "."


def _raise_exception(message: object = "") -> NoReturn:
    raise BadPrompt(f"The model's chat template refuses these messages: {one_line(message)}")


def _strftime_now(text: str) -> str:
    return dt.datetime.now().strftime(text)  # noqa: DTZ005 - a template asks for the user's own day


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON without HTML escapes, as `transformers` writes it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@cache
def environment() -> ImmutableSandboxedEnvironment:
    """The environment of all templates and threads, with the conventions of `transformers`."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    del made.globals["lipsum"]
    made.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    made.filters["tojson"] = _tojson
    return made


@cache
def check_template(text: str, *, bos_token: str, eos_token: str) -> None:
    """Raise ModelUnreadable unless the template compiles and renders a long conversation within the limits."""
    if hashlib.sha256(text.encode("utf-8", "replace")).hexdigest() in SHIPPED:
        return
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-c", "from opsin.prompt.trial import main; main()"],
            input=json.dumps([text, bos_token, eos_token]).encode(),
            capture_output=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
            timeout=_WALL_SECONDS,
            check=False,
        )
        late = sys.platform != "win32" and child.returncode == -signal.SIGPROF
    except subprocess.TimeoutExpired:
        late = True
    except OSError as error:
        why = error.strerror or error
        raise ModelUnreadable(f"The model's chat template cannot be tried in a process of its own: {why}.") from None
    if late or child.returncode != 0:
        raise ModelUnreadable(str(TooCostly("runs too long" if late else "ends the process that renders it")))
    if child.stdout:
        raise ModelUnreadable(child.stdout.decode())


# SHA-256 of the template in the demo model that is shipped; as ours it needs no trial.
SHIPPED = frozenset({"4714f8508613f80a22b94f62c73d02d4497a770de779fd568ced7b397445eb68"})

_LLAVA_PROJECTORS = ("mlp", "mlp_norm", "ldp", "ldpv2")
_LLAVA_TEMPLATES = ("vicuna", "mistral", "llava-chatml")


def choose(source: TemplateSource) -> str:
    """The name of the built-in template for a model that ships none.

    LLaVA-1.6-34B is known by its control tokens, Mistral by its name or its attention heads; any other LLaVA, and an
    unknown `llama`, gets Vicuna's.
    """
    name = source.name.lower()
    if (source.projector or "").startswith("deepseekocr") or "deepseek-ocr" in name:
        return "plain"
    if "<|im_start|>" in source.control_tokens:
        return "llava-chatml" if source.architecture == "llama" else "chatml"
    if source.architecture == "llama" or source.projector in _LLAVA_PROJECTORS:
        grouped = source.kv_groups > 1 and "vicuna" not in name and "1.6" in name
        return "mistral" if "mistral" in name or "bakllava" in name or grouped else "vicuna"
    return "chatml"


def built_in(name: str) -> tuple[str, str]:
    """The text of a built-in template, and what separates an image from the text beside it."""
    text = Path(__file__).with_name("templates").joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    return text, "\n" if name in _LLAVA_TEMPLATES else ""  # LLaVA was trained with a line break
