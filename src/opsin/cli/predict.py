"""`opsin predict`: how long a model will take on a device, before it is downloaded or bought."""

import json
from contextlib import closing
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from opsin import __version__
from opsin.cli import options as o
from opsin.cli.console import say
from opsin.compose import measured_device, open_runtime
from opsin.core.config import checked
from opsin.core.errors import BadParameter, ModelNotFound
from opsin.core.settings import EngineSettings
from opsin.models import Pair, resolve
from opsin.models.registry import is_known, look_up
from opsin.models.shapes import KNOWN_SHAPES, SHAPES
from opsin.tune.devices import DEVICES, THIS, Device, find_device, gpu_group
from opsin.tune.predict import Needs, Prediction, Request, check_fits, file_needs, measure_pair, shape_needs
from opsin.tune.predict import predict as predicted


@o.flags_of(EngineSettings, "mmproj", "kv_type")
def predict(
    *,
    model: Annotated[str | None, typer.Option(help="GGUF file, folder, known name, or a shape as small")] = None,
    weights: Annotated[str | None, typer.Option("--type", help="weights where there is no file, as q4_k_m")] = None,
    device: Annotated[str, typer.Option(help="one of the table, or `this`: the machine at hand, measured")] = THIS,
    devices: Annotated[bool, typer.Option("--devices", help="list the table of devices and exit")] = False,
    ctx: Annotated[int, typer.Option(min=64, help="context in tokens that memory is kept for")] = 4096,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="tokens of text beside the image")] = 64,
    answer_tokens: Annotated[int, typer.Option(min=1, help="tokens of the answer")] = 128,
    memory: Annotated[float | None, typer.Option(min=0.01, help="GiB of the device, where the table is wrong")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="then run the pair here, and show the error")] = False,
    as_json: o.AsJson = False,
    json_out: o.JsonOut = None,
    **flags: Any,
) -> None:
    """Predict encode, prefill and decode times of a pair on a device, and whether it fits there."""
    if devices:
        _list_devices(as_json=as_json)
        return
    if measure and device != THIS:
        raise BadParameter("--measure needs the machine at hand: leave it out, or give --device this.")
    asked = {**o.given(EngineSettings, flags), "ctx": ctx, "parallel": 1, "disk_cache": False}
    settings = checked(EngineSettings, asked)
    needs, pair = _needs(model, flags["mmproj"], weights, settings.kv_type)
    if measure and pair is None:
        raise BadParameter(
            f"--measure needs files, and there are none of {model}: pull it, or give --model and --mmproj."
        )
    found = _this_machine() if device == THIS else find_device(device)
    if memory is not None:
        found = replace(found, memory=memory * 2**30)
    prediction = predicted(needs, found, Request(prompt_tokens, answer_tokens, ctx))
    check_fits(prediction)
    check = None
    if measure and pair is not None:
        say(f"measuring {needs.name}")
        with closing(open_runtime(pair.llm, pair.mmproj, settings)) as runtime:
            check = measure_pair(runtime, prediction)
    document = {"kind": "predict", "opsin": __version__, "prediction": prediction.as_dict(), "check": check}
    o.write_out(json_out, document)
    typer.echo(json.dumps(document) if as_json else _text(prediction, check))


def _needs(model: str | None, mmproj: str | None, weights: str | None, kv_type: str) -> tuple[Needs, Pair | None]:
    """Those of the files, and these; those of a known model or a shape when a type is given or there are no files."""
    wanted = look_up(model) if model is not None and is_known(model) else None
    known, tag = (wanted.known, wanted.tag.lower()) if wanted else (None, "")
    shape = KNOWN_SHAPES[known.name] if known else SHAPES.get(model or "")
    if shape is None and weights is not None:
        raise BadParameter("--type is for known names and shapes without files: a file has its own.")
    if shape is None or weights is None:
        try:
            pair = resolve(model, mmproj)
            return file_needs(pair.llm, pair.mmproj, pair.name, kv_type), pair
        except ModelNotFound:
            if shape is None:
                raise
    if mmproj is not None:
        raise BadParameter(f"Without files {model} has a projector of its own: leave out --mmproj.")
    return shape_needs(shape, weights or tag or (known.weights if known else "q8_0"), kv_type), None


def _this_machine() -> Device:
    """The device that models go to here, with the rates that it was just measured to reach."""
    say("measuring this machine")
    device, rate = measured_device()
    group = gpu_group(device.description) if device.is_gpu else "measured-cpu"
    return Device(THIS, f"this machine ({device.description})", group, rate.bytes_s, rate.ops_s, device.memory_total)


def _list_devices(*, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([asdict(device) for device in DEVICES.values()], indent=2))
        return
    for device in DEVICES.values():
        memory = f"{device.memory / 2**30:.0f} GiB" if device.memory else ""
        rates = f"{device.bandwidth / 1e9:7.1f} GB/s  {device.rate / 1e12:6.1f} TFLOP/s"
        typer.echo(f"{device.name:<16} {rates}  {memory:>8}  {device.title}")


def _text(prediction: Prediction, check: dict[str, Any] | None) -> str:
    row = prediction.as_dict()
    times = [
        ("encode an image", "encode_ms", ""),
        ("prefill, image", "image_prefill_ms", f"{row['image_tokens']} tokens"),
        ("prefill, text", "text_prefill_ms", f"{row['text_tokens']} tokens"),
        ("first token", "first_token_ms", ""),
        ("decode", "decode_token_ms", f"a token, {row['decode_tokens_s']} tokens a second"),
        ("whole answer", "answer_ms", f"{row['answer_tokens']} tokens"),
    ]
    lines = [f"{prediction.needs.name} on {prediction.device.title}", ""]
    lines += [f"  {name:<16} {row[key]:>10,.1f} ms   {what}".rstrip() for name, key, what in times]
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in prediction.memory.items() if size)
    fits = f" of {prediction.device.usable / 1e9:.1f} GB: it fits" if prediction.device.usable else ""
    needed = row["memory_total_bytes"] / 1e9
    lines += ["", f"  memory about {needed:.2f} GB ({parts}; context {prediction.request.ctx}){fits}"]
    lines += [f"  note: {note}" for note in prediction.notes]
    if check is not None:
        lines += ["", "  checked           predicted    measured   error"]
        for name, error in check["errors"].items():
            both = f"{check['predicted_ms'][name]:>8,.2f} ms {check['measured_ms'][name]:>8,.2f} ms"
            lines.append(f"  {name:<16} {both}  {error:+.1%}")
    return "\n".join(lines)
