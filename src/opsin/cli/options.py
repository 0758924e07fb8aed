"""The flags that several commands share; their help is the description of the setting they fill."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.core.errors import BadParameter
from opsin.core.settings import MAX_ANSWER_TOKENS, EngineSettings

if TYPE_CHECKING:
    from pydantic import BaseModel


def _flag(name: str, more: str = "", *, switch: bool = False) -> Any:
    """The flag of an engine setting, with its description as help."""
    flag = f"--{name.replace('_', '-')}"
    text = f"{EngineSettings.model_fields[name].description}{more}"
    return typer.Option(f"{flag}/--no-{flag[2:]}" if switch else flag, help=text)


Model = Annotated[str | None, _flag("model")]
Mmproj = Annotated[str | None, _flag("mmproj")]
Ctx = Annotated[int | None, _flag("ctx")]
GpuLayers = Annotated[int | None, _flag("gpu_layers")]
Device = Annotated[str | None, _flag("device")]
MmprojDevice = Annotated[str | None, _flag("mmproj_device")]
Threads = Annotated[int | None, _flag("threads")]
ThreadsBatch = Annotated[int | None, _flag("threads_batch")]
KvType = Annotated[str | None, _flag("kv_type", ": f16, bf16, f32, q8_0 or q4_0")]
ImageMax = Annotated[int | None, _flag("image_max_tokens")]
ImageMin = Annotated[int | None, _flag("image_min_tokens")]
DiskCache = Annotated[bool | None, _flag("disk_cache", switch=True)]
Verbose = Annotated[bool | None, _flag("verbose", switch=True)]
Profile = Annotated[str | None, typer.Option("--profile", hidden=True)]  # core.config.RETIRED: warns
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", help=f"longest answer in tokens (default: {MAX_ANSWER_TOKENS:,})")
]
MaxSeconds = Annotated[float | None, typer.Option("--max-seconds", help="longest time for an answer, in seconds")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="randomness; 0 always takes the most likely token")
]
Seed = Annotated[int | None, typer.Option("--seed", help="number that makes a random answer repeatable")]
UseGuard = Annotated[bool, typer.Option("--guard/--no-guard", help="end answers that repeat themselves without end")]
System = Annotated[str | None, typer.Option("--system", help="system message before the question")]
Thinking = Annotated[
    bool | None, typer.Option("--thinking/--no-thinking", help="reasoning before the answer, for models that can")
]
MaxThinking = Annotated[
    int | None, typer.Option("--max-thinking-tokens", help="longest reasoning in tokens; 0: none at all")
]


def fields_of(model: type[BaseModel], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What of a command's arguments is a field of that model, and was given by the user."""
    return given(**{name: value for name, value in arguments.items() if name in model.model_fields})


def given(**options: Any) -> dict[str, Any]:
    """Only what the user set; what is left out keeps its default in one place."""
    return {name: value for name, value in options.items() if value is not None}


def write_out(path: Path, text: str) -> None:
    """Write the file that a flag names. Raises BadParameter."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadParameter(f"{path} cannot be written: {error.strerror or error}.") from error
