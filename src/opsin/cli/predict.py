"""`opsin predict`: how long a model will take on a device, before it is downloaded or bought."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli import options as o
from opsin.cli.console import say

if TYPE_CHECKING:
    from opsin.compose import Runtime
    from opsin.tune.history import Checked
    from opsin.tune.predict import Prediction, Request, Times
    from opsin.tune.predict_needs import Needs

THIS = "this"
ROUNDS = 3
TURNS = 3
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
        typer.Option("--device", help="a device of the table, or `this`: the machine at hand, measured for seconds"),
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
    from opsin.tune.history import read_history
    from opsin.tune.predict import Request, check_request, check_room, predict_on

    if devices:
        _list_devices(as_json=as_json)
        return
    here = device == THIS
    given = [
        name
        for name, value in (("--threads", threads), ("--measure", measure or None), ("--rounds", rounds))
        if value is not None
    ]
    if given and not here:
        raise BadParameter(f"{' and '.join(given)} need the machine at hand: leave it out, or give --device this.")
    known = None if here else find_device(device)
    needs = _needs(model, mmproj, quantisation, mmproj_type, _kv(kv_type))
    request = Request(text_tokens=prompt_tokens, ctx_used=ctx_used, answer_tokens=answer_tokens, ctx=ctx)
    check_request(needs, request)
    checked = None
    if known is not None:
        prediction = predict_on(known, needs, request)
    else:
        empty = _on_this(needs, request)
        check_room(replace(empty, memory_there=memory * 2**30 if memory else empty.memory_there), _smaller(needs, ctx))
        bench = _Bench(needs, o.given(threads=threads, kv_type=kv_type), ctx, rounds or ROUNDS)
        times, checked = bench.run(model, mmproj, measure=measure, request=request)
        prediction = replace(empty, times=times, notes=(*empty.notes, *bench.notes))
    if memory:
        prediction = replace(prediction, memory_there=memory * 2**30)
    check_room(prediction, _smaller(needs, ctx), known.kind if known else None)
    history = [row for row in read_history() if row.machine == _machine()]
    _show(prediction, checked, history, as_json=as_json, json_out=json_out)


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
    now = needs.memory(ctx)
    total, weights = sum(now.values()), needs.cost.weights + 2 * needs.cost.head
    sizes = {"q8_0": 34 / 32, "q4_0": 18 / 32}
    other = [(f"{needs.name} as {name}", total - now["model"] + weights * size) for name, size in sizes.items()]
    return [row for row in (*other, (f"--ctx {ctx // 2}", total - now["kv"] / 2)) if row[1] < total]


class _Bench:
    """Slice and pair on this machine, in turn, so that both meet the same good and bad minutes."""

    def __init__(self, needs: Needs, options: dict[str, Any], ctx: int, rounds: int) -> None:
        from opsin.doctor.build import gpu_backends
        from opsin.tune.predict_needs import shape_needs, slice_of

        self._needs, self._options, self._ctx, self._rounds = needs, options, ctx, rounds
        self._shape, *types = slice_of(needs, gpu=bool(gpu_backends()))
        self._piece = shape_needs(self._shape, types[0], types[1], options.get("kv_type", "f16"))
        wanted = [needs.llm_type] + ([needs.mmproj_type] if needs.cost.encode_ops and needs.mmproj_type else [])
        self.notes = tuple(_busy()) + tuple(
            f"{kind} weights are predicted from {taken} ones, the nearest that a slice can be written with"
            for kind, taken in zip(wanted, types, strict=False)
            if kind != taken
        )

    def run(
        self, model: str | None, mmproj: str | None, *, measure: bool, request: Request
    ) -> tuple[Times, Checked | None]:
        """The predicted times, and with `measure` the check of them."""
        import tempfile
        from dataclasses import replace

        from opsin.models.synth import write_pair, write_shape
        from opsin.tune.predict import scale
        from opsin.tune.predict_measure import ANSWER_TOKENS, middle

        with tempfile.TemporaryDirectory(prefix="opsin-predict-") as folder:
            say("writing a slice of the pair")
            types: Any = self._piece.llm_type, self._piece.mmproj_type
            piece = write_shape(self._shape, Path(folder), quantisation=types[0], mmproj_type=types[1])
            if measure and self._is_shape(model):
                say(f"writing {model}")
                kinds = self._needs.llm_type, self._needs.mmproj_type or "f16"
                pair = write_pair(str(model), Path(folder), quantisation=kinds[0], mmproj_type=kinds[1])
                model, mmproj = str(pair.llm), str(pair.mmproj)
            pieces: list[Times] = []
            wholes: list[Times] = []
            for turn in range(TURNS if measure else 1):
                say(f"measuring the slice, {turn + 1} of {TURNS if measure else 1}")
                pieces += self._times(str(piece.llm), str(piece.mmproj), turn)
                if measure:
                    say(f"measuring {self._needs.name}, {turn + 1} of {TURNS}")
                    wholes += self._times(model, mmproj, turn)
        found = middle(pieces)
        times = scale(found, self._piece, self._needs, request)
        if not wholes:
            return times, None
        real = middle(wholes)
        # The same prompt as was measured, whatever the request is.
        counted = replace(self._needs, image_tokens=real.image_tokens)
        asked = replace(request, text_tokens=real.text_tokens, ctx_used=0, answer_tokens=ANSWER_TOKENS)
        return times, self._checked(scale(found, self._piece, counted, asked), real, pieces, wholes)

    def _is_shape(self, model: str | None) -> bool:
        from opsin.models.shapes import SHAPES

        return model in SHAPES and self._needs.name == model

    def _times(self, model: str | None, mmproj: str | None, turn: int) -> list[Times]:
        from opsin.tune.predict_measure import measure_times

        runtime = self._open(model, mmproj)
        try:
            see = bool(self._needs.cost.encode_ops)
            return measure_times(runtime.engine, runtime.prompts, pictures=see, rounds=self._rounds, first=100 * turn)
        finally:
            runtime.close()

    def _open(self, model: str | None, mmproj: str | None) -> Runtime:
        from opsin.compose import open_runtime
        from opsin.core.settings import EngineSettings

        return open_runtime(model, mmproj, EngineSettings(ctx=self._ctx, parallel=1, disk_cache=False, **self._options))

    def _checked(self, times: Times, real: Times, pieces: list[Times], wholes: list[Times]) -> Checked:
        from datetime import datetime, timezone

        from opsin.tune.history import Checked, remember, stage_times

        about = {
            "date": datetime.now(timezone.utc).date().isoformat(),
            **_versions(),
            "llm_type": self._needs.llm_type,
            "mmproj_type": self._needs.mmproj_type,
            "prompt_tokens": real.image_tokens + real.text_tokens,
            "slice_layers": [self._shape.text.layers, self._shape.vision.layers],
            "layers": [self._needs.shape.text.layers, self._needs.shape.vision.layers],
            "slice_runs_ms": [stage_times(run) for run in pieces],
            "measured_runs_ms": [stage_times(run) for run in wholes],
        }
        checked = Checked(_machine(), self._needs.name, stage_times(times), stage_times(real), about)
        say(f"kept in {remember(checked)}")
        return checked


def _busy() -> list[str]:
    import os

    if not hasattr(os, "getloadavg"):
        return []
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return (
        [f"other programs use the processor (load {load:.1f} on {cores} cores): times waver"]
        if load > BUSY * cores
        else []
    )


def _on_this(needs: Needs, request: Request) -> Prediction:
    """A prediction for this machine without its times."""
    from opsin.tune.predict import Prediction, Times

    nothing = Times(0, 0, 0, 0, needs.image_tokens, request.text_tokens, 0)
    return Prediction(
        needs.name, _machine(), nothing, request, needs.memory(request.ctx), _host_memory(), {}, needs.notes
    )


def _host_memory() -> float:
    """Bytes of main memory; 0 where the model goes to a GPU, or where the system does not say."""
    import os

    from opsin.doctor.build import gpu_backends

    names = getattr(os, "sysconf_names", {})
    if gpu_backends() or "SC_PHYS_PAGES" not in names:
        return 0.0
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _machine() -> str:
    import os
    import platform

    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass  # only Linux has the file
    return f"{platform.system()} {platform.machine()}, {processor}, {os.cpu_count()} cores"


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
    prediction: Prediction, checked: Checked | None, history: list[Checked], *, as_json: bool, json_out: Path | None
) -> None:
    from opsin.core.errors import BadParameter
    from opsin.tune.history import past_errors

    errors = past_errors(history)
    document = {
        **_versions(),
        "kind": "predict",
        "machine": _machine(),
        "prediction": prediction.as_dict(),
        "check": None if checked is None else checked.as_dict(),
        "past_errors_here": errors,
    }
    if json_out is not None:
        try:
            json_out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise BadParameter(f"{json_out} cannot be written: {error.strerror or error}.") from error
    typer.echo(json.dumps(document) if as_json else _text(prediction, checked, errors))


def _text(prediction: Prediction, checked: Checked | None, errors: dict[str, dict[str, float]]) -> str:
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
            lines += [
                f"  {name:<18} {checked.predicted[name]:>8,.2f} ms {checked.measured[name]:>8,.2f} ms  {error:+.1%}"
            ]
    past = "; ".join(
        f"{name} {found['median']:.1%} (largest {found['largest']:.1%}, {found['checks']:.0f} checks)"
        for name, found in errors.items()
    )
    lines += ["", f"  past errors here: {past or 'none was checked yet, `--measure` does it'}"]
    return "\n".join(lines)
