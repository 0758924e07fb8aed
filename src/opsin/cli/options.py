"""The flags that several commands share; their help is the description of the setting they fill."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.core.errors import BadParameter
from opsin.core.settings import EngineSettings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pydantic import BaseModel
    from pydantic.fields import FieldInfo


def _help(name: str) -> str:
    field: FieldInfo = EngineSettings.model_fields[name]
    return field.description or ""


Model = Annotated[str | None, typer.Option("--model", help="language model: a GGUF file, a folder, or a known name")]
Mmproj = Annotated[str | None, typer.Option("--mmproj", help=_help("mmproj"))]
Ctx = Annotated[int | None, typer.Option("--ctx", help=_help("ctx"))]
GpuLayers = Annotated[int | None, typer.Option("--gpu-layers", help=_help("gpu_layers"))]
Device = Annotated[str | None, typer.Option("--device", help=_help("device"))]
MmprojDevice = Annotated[str | None, typer.Option("--mmproj-device", help=_help("mmproj_device"))]
Threads = Annotated[int | None, typer.Option("--threads", help=_help("threads"))]
ThreadsBatch = Annotated[int | None, typer.Option("--threads-batch", help=_help("threads_batch"))]
KvType = Annotated[str | None, typer.Option("--kv-type", help=f"{_help('kv_type')}: f16, bf16, f32, q8_0 or q4_0")]
ImageMax = Annotated[int | None, typer.Option("--image-max-tokens", help=_help("image_max_tokens"))]
ImageMin = Annotated[int | None, typer.Option("--image-min-tokens", help=_help("image_min_tokens"))]
DiskCache = Annotated[bool | None, typer.Option("--disk-cache/--no-disk-cache", help=_help("disk_cache"))]
Profile = Annotated[str | None, typer.Option("--profile", help=_help("profile"))]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="longest answer in tokens; none: by profile")]
MaxSeconds = Annotated[float | None, typer.Option("--max-seconds", help="longest time for an answer")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0 always takes the likeliest token")]
Seed = Annotated[int | None, typer.Option("--seed", help="draw the same answer again")]
UseGuard = Annotated[bool, typer.Option("--guard/--no-guard", help="end answers that go round in circles")]
System = Annotated[str | None, typer.Option("--system", help="a system message before the question")]
Thinking = Annotated[bool | None, typer.Option("--thinking/--no-thinking", help="for models that can reason first")]
Verbose = Annotated[bool | None, typer.Option("--verbose", help=_help("verbose"))]


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
