"""`opsin predict`: how long a model will take on a device, before it is downloaded or bought."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli import options as o
from opsin.cli.console import say

if TYPE_CHECKING:
    from opsin.engine import Engine
    from opsin.prompt import PromptBuilder
    from opsin.tune.device_table import Kind
    from opsin.tune.history import Checked
    from opsin.tune.predict import Prediction, Request, Times
    from opsin.tune.predict_needs import Needs

THIS = "this"
ROUNDS = 3
BUSY = 0.5  # running programs a core, before this one: beyond it times waver more than predictions err


def predict(
    *,
    model: Annotated[
        str | None, typer.Option("--model", help="a GGUF file, a folder, a known name, or a shape of `opsin synth`")
    ] = None,
    mmproj: o.Mmproj = None,
    quantisation: Annotated[
        str | None, typer.Option("--type", help="weights of a shape: f16, bf16, q8_0 or q4_0; none: q8_0")
    ] = None,
    mmproj_type: Annotated[
        str | None, typer.Option("--mmproj-type", help="projector of a shape: f16, bf16, q8_0 or f32; none: f16")
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", help="a device of the table, or `this`: the machine at hand, measured first"),
    ] = THIS,
    devices: Annotated[bool, typer.Option("--devices", help="list the table of devices and end")] = False,
    ctx: Annotated[int, typer.Option("--ctx", min=64, help="context in tokens that memory is kept for")] = 4096,
    ctx_used: Annotated[int, typer.Option("--ctx-used", min=0, help="tokens in the context before the question")] = 0,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="tokens of text beside the picture")
    ] = 64,
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", min=1, help="tokens of the answer")] = 128,
    kv_type: o.KvType = None,
    threads: o.Threads = None,
    memory: Annotated[
        float | None, typer.Option("--memory", min=0.01, help="memory of the device in GiB, where the table is wrong")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="then load the pair, measure it, and keep the error for later predictions")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="questions that a measurement takes the median of; none: 3")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    json_out: Annotated[Path | None, typer.Option("--json-out", help="write the JSON object to this file too")] = None,
) -> None:
    """Predict encode, prefill and decode times of a pair on a device, and whether it fits there.

    Times come from bytes and operations; the error of predictions checked on this machine is shown with them.
    """
    from dataclasses import replace

    from opsin.core.errors import BadParameter
    from opsin.tune.device_table import find_device
    from opsin.tune.predict import Prediction, Request, Times, check_request, check_room, predict_on

    if devices:
        _list_devices(as_json=as_json)
        return
    here = device == THIS
    given = {"--threads": threads, "--measure": measure or None, "--rounds": rounds}
    named = [name for name, value in given.items() if value is not None]
    if named and not here:
        verb = "needs" if len(named) == 1 else "need"
        raise BadParameter(f"{' and '.join(named)} {verb} the machine at hand: leave it out, or give --device this.")
    known = None if here else find_device(device)
    if known is not None and memory:
        known = replace(known, memory=memory * 2**30)
    needs = _needs(model, mmproj, quantisation, mmproj_type, _kv(kv_type))
    request = Request(text_tokens=prompt_tokens, ctx_used=ctx_used, answer_tokens=answer_tokens, ctx=ctx)
    check_request(needs, request)
    checked = None
    if known is not None:
        prediction = predict_on(known, needs, request)
        check_room(prediction, _smaller(needs, ctx), known.kind)
    else:
        nothing = Times(0, 0, 0, 0, needs.image_tokens, request.text_tokens, 0)
        there = memory * 2**30 if memory else _host_memory()
        empty = Prediction(needs.name, _machine(), nothing, request, needs.memory(ctx), there, {}, needs.notes)
        check_room(empty, _smaller(needs, ctx))
        options = o.given(threads=threads, kv_type=kv_type)
        files = (model, mmproj) if measure else None
        times, notes, checked = _measure(needs, request, options, rounds or ROUNDS, files)
        prediction = replace(empty, times=times, notes=(*empty.notes, *notes))
    _show(prediction, checked, known.kind if known else None, as_json=as_json, json_out=json_out)


def _kv(kv_type: str | None) -> str:
    from opsin.bench.cost import KV_BYTES
    from opsin.core.errors import BadParameter

    if kv_type is not None and kv_type not in KV_BYTES:
        raise BadParameter(f"--kv-type cannot be {kv_type!r}: choose one of {', '.join(KV_BYTES)}.")
    return kv_type or "f16"


def _needs(model: str | None, mmproj: str | None, quantisation: str | None, mmproj_type: str | None, kv: str) -> Needs:
    """A shape when types are given or nothing of that name is here, else the files."""
    from opsin.core.errors import BadParameter, ModelNotFound
    from opsin.models import resolve
    from opsin.models.shapes import SHAPES
    from opsin.tune.predict_needs import file_needs, shape_needs

    typed = quantisation is not None or mmproj_type is not None
    if model not in SHAPES and typed:
        raise BadParameter(f"--type and --mmproj-type are for shapes ({', '.join(SHAPES)}): a file has its own.")
    if model in SHAPES and mmproj is not None:
        raise BadParameter(f"{model} is a shape with a projector of its own: leave out --mmproj.")
    if not typed:
        try:
            pair = resolve(model, mmproj)
            return file_needs(pair.llm, pair.mmproj, pair.name, kv)
        except ModelNotFound:
            if model not in SHAPES:
                raise
    assert model is not None
    kinds = _types(quantisation, mmproj_type)
    return shape_needs(SHAPES[model], kinds[0], kinds[1], kv)


def _types(quantisation: str | None, mmproj_type: str | None) -> tuple[Any, Any]:
    from opsin.core.errors import BadParameter
    from opsin.models.synth import LLM_TYPES, MMPROJ_TYPES

    chosen = quantisation or "q8_0", mmproj_type or "f16"
    for name, types, option in zip(chosen, (LLM_TYPES, MMPROJ_TYPES), ("--type", "--mmproj-type"), strict=True):
        if name not in types:
            raise BadParameter(f"{option} cannot be {name!r}: choose one of {', '.join(types)}.")
    return chosen


def _smaller(needs: Needs, ctx: int) -> list[tuple[str, float]]:
    """The same pair with fewer bits a weight, or with half of the context, and the bytes of it."""
    now, cost = needs.memory(ctx), needs.cost
    total = sum(now.values())
    # By bytes a weight: a mixture's file holds all experts, its cost those that a token uses.
    weights = now["model"] * (cost.weights + cost.head) / cost.weight_bytes
    sizes = {"q8_0": 34 / 32, "q4_0": 18 / 32}
    other = [(f"{needs.name} as {name}", total - now["model"] + weights * size) for name, size in sizes.items()]
    return [row for row in (*other, (f"--ctx {ctx // 2}", total - now["kv"] / 2)) if row[1] < total]


def _measure(
    needs: Needs, request: Request, options: dict[str, Any], rounds: int, files: tuple[str | None, str | None] | None
) -> tuple[Times, tuple[str, ...], Checked | None]:
    """Times of the pair on this machine and notes on them; files that are given are measured too, and that is kept."""
    from dataclasses import replace
    from datetime import datetime, timezone

    from opsin.compose import open_runtime
    from opsin.core.settings import EngineSettings
    from opsin.doctor.build import gpu_backends
    from opsin.tune.history import remember
    from opsin.tune.predict_measure import predict_here

    settings = EngineSettings(ctx=request.ctx, parallel=1, disk_cache=False, **options)

    def opened(llm: str | None, mmproj: str | None) -> tuple[Engine, PromptBuilder]:
        runtime = open_runtime(llm, mmproj, settings)
        return runtime.engine, runtime.prompts

    busy = tuple(_busy())
    how: dict[str, Any] = {"rounds": rounds, "kv_type": settings.kv_type, "gpu": bool(gpu_backends())}
    times, notes, check = predict_here(needs, request, opened, say, checked=files, **how)
    if check is not None:
        about = {"date": datetime.now(timezone.utc).date().isoformat(), **_versions(), **check.about}
        check = replace(check, machine=_machine(), about=about)
        say(f"kept in {remember(check)}")
    return times, busy + notes, check


def _busy() -> list[str]:
    import os

    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    busy = f"other programs use the processor (load {load:.1f} on {cores} cores): times waver"
    return [busy] if load > BUSY * cores else []


def _host_memory() -> float:
    """Bytes of main memory; 0 where the model goes to a GPU, or where the system does not say."""
    import os

    from opsin.doctor.build import gpu_backends

    names = getattr(os, "sysconf_names", {})
    if gpu_backends() or "SC_PHYS_PAGES" not in names:
        return 0.0
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _machine() -> str:
    from opsin.doctor.host import here, read_host, run_command

    # Programs that look for GPUs take seconds; `sysctl` names an Apple chip.
    found = read_host(here(lambda words: run_command(words) if words[0] == "sysctl" else None))
    return f"{found.system} {found.machine}, {found.cpu or found.machine}, {found.cores} cores"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from opsin import __version__

    return {"opsin": __version__, "llama_cpp_python": version("llama-cpp-python")}


def _list_devices(*, as_json: bool) -> None:
    from dataclasses import asdict

    from opsin.tune.device_table import DEVICES

    if as_json:
        typer.echo(json.dumps([asdict(device) for device in DEVICES.values()], indent=2))
        return
    for device in DEVICES.values():
        room = f"{device.memory / 2**30:.0f} GiB" if device.memory else ""
        rates = f"{device.bandwidth / 1e9:7.1f} GB/s  {device.rate / 1e12:6.1f} T/s {device.rate_of}"
        typer.echo(f"{device.name:<16} {rates:<52} {room:>8}  {device.title}; {device.source}")


def _show(
    prediction: Prediction, checked: Checked | None, kind: Kind | None, *, as_json: bool, json_out: Path | None
) -> None:
    """Print and write; errors are those of the table's devices of a kind, without one those checked here."""
    from opsin.tune.history import past_errors, read_history, table_errors

    here = [row for row in read_history() if row.machine == _machine()] if kind is None else []
    errors = table_errors(kind) if kind else past_errors(here)
    whose = f"errors of the table, each {kind} device by the others" if kind else "past errors here"
    document = {
        **_versions(),
        "kind": "predict",
        "machine": _machine(),
        "prediction": prediction.as_dict(),
        "check": None if checked is None else checked.as_dict(),
        "table_errors" if kind else "past_errors_here": errors,
    }
    if json_out is not None:
        o.write_out(json_out, json.dumps(document, indent=2) + "\n")
    typer.echo(json.dumps(document) if as_json else _text(prediction, checked, errors, whose))


def _text(prediction: Prediction, checked: Checked | None, errors: dict[str, dict[str, float]], whose: str) -> str:
    row = prediction.as_dict()
    times, room = prediction.times, prediction.memory
    lines = [f"{prediction.model} on {prediction.device}", ""]
    if times.image_tokens:
        lines += [f"  encode a picture   {row['encode_ms']:>10,.1f} ms"]
        lines += [f"  prefill, picture   {row['image_prefill_ms']:>10,.1f} ms   {times.image_tokens} tokens"]
    lines += [
        f"  prefill, text      {row['text_prefill_ms']:>10,.1f} ms   {times.text_tokens} tokens",
        f"  first token        {row['first_token_ms']:>10,.1f} ms",
        f"  decode             {row['decode_token_ms']:>10,.2f} ms   a token, {row['decode_tokens_s']} tokens a second",
        f"  {prediction.request.answer_tokens:>4} tokens answer  {row['answer_ms']:>10,.1f} ms",
        "",
    ]
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in room.items() if size)
    there = f" of {prediction.memory_there / 1e9:.1f} GB: it fits" if prediction.memory_there else ""
    lines += [f"  memory about {sum(room.values()) / 1e9:.2f} GB ({parts}; context {prediction.request.ctx}){there}"]
    for name, share in prediction.shares.items():
        spread = f", {share.least:.0%} to {share.most:.0%}" if share.least != share.most else ""
        lines += [f"  {name}: {share.value:.0%} of the roofline{spread}; from {'; '.join(share.sources)}"]
    lines += [f"  note: {note}" for note in prediction.notes]
    if checked is not None:
        lines += ["", "  checked            predicted    measured   error"]
        for name, error in checked.errors.items():
            both = f"{checked.predicted[name]:>8,.2f} ms {checked.measured[name]:>8,.2f} ms"
            lines += [f"  {name:<18} {both}  {error:+.1%}"]
    past = "; ".join(
        f"{name} {found['median']:.1%} (largest {found['largest']:.1%}, {found['checks']:.0f} checks)"
        for name, found in errors.items()
    )
    lines += ["", f"  {whose}: {past or 'none was checked yet, `--measure` does it'}"]
    return "\n".join(lines)
