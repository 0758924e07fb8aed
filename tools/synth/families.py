"""Families of image models, as `families.toml` describes them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTENT = (
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Family:
    """What the files of a family have in common; the fields are described in `families.toml`."""

    title: str
    architecture: str
    projector: str
    template: str
    text: frozenset[str] = frozenset()
    vision: frozenset[str] = frozenset()
    activation: str = ""
    mean: float | None = None
    std: float | None = None
    pre: str = ""
    control: tuple[str, ...] = ()
    bos: str = ""
    eos: str = ""
    eot: str = ""


def _family(row: dict[str, Any]) -> Family:
    sets = {name: frozenset(row.get(name, ())) for name in ("text", "vision")}
    template = ROWS["templates"][row["template"]].replace("CONTENT", _CONTENT)
    return Family(**{**row, **sets, "control": tuple(row.get("control", ())), "template": template})


ROWS = tomllib.loads(Path(__file__).with_name("families.toml").read_text(encoding="utf-8"))
FAMILIES: dict[str, Family] = {name: _family(row) for name, row in ROWS["families"].items()}
