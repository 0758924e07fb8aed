"""Where a pair really runs, judged by the nodes that were computed and not by what a log promises.

The proof costs an encode and a prefill of its own, so it is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opsin.core.placement import BackendShare, Placement
from opsin.core.settings import EngineSettings
from opsin.doctor.check import Check, Status, means_cpu, serve_command
from opsin.doctor.host import in_software
from opsin.native.device_rate import DeviceRate
from opsin.native.devices import HOST, Device
from opsin.native.memory import as_flags
from opsin.native.records import keep_record, read_record, record_file

# llama.cpp keeps the table of token embeddings in host memory, whatever is offloaded.
_AT_HOME_ON_THE_CPU = frozenset({"GET_ROWS"})
_POOR = 1 / 3  # of the ceiling
# Shorter stages are ruled by launches and Python, not by the device.
_LEAST_ENCODE, _LEAST_DECODE = 0.005, 0.001
_FLASH = {"encoder": "vision_flash_attention", "language_model": "flash_attention"}
_Graph = Mapping[str, BackendShare]


def remembered_placement(setup: str, prove: Callable[[], Placement], folder: Path | None = None) -> Placement:
    """The placement of a setup, proved now if nobody did before; `setup` is a fingerprint of it.

    A file that cannot be read or written costs a new proof and nothing else.
    """
    file = record_file("placement", setup, folder)
    try:
        return _read_placement(read_record(file))
    except (ValueError, TypeError, KeyError, AttributeError):
        placement = prove()
    keep_record(file, asdict(placement))
    return placement


def _read_placement(data: Any) -> Placement:
    fields = BackendShare.__dataclass_fields__
    encoder, model = (
        # A file of an older version lacks a field, and is as good as none.
        {name: BackendShare(**{f: row[f] for f in fields}) for name, row in data[key].items()}
        for key in ("encoder", "language_model")
    )
    return Placement(encoder, model, int(data["layers_offloaded"]), int(data["layers"]), tuple(map(str, data["notes"])))


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured of a pair, and what its devices can give; None where something is not known.

    `ceilings` are by device name. `encode_ops` are the operations of one picture and `encode_seconds` what its encode
    took; `weight_bytes` are what a decode step reads and `decode_seconds` what a token took with one answer running.
    """

    ceilings: Mapping[str, DeviceRate] = field(default_factory=dict)
    encode_ops: float | None = None
    encode_seconds: float | None = None
    weight_bytes: float | None = None
    decode_seconds: float | None = None


def placement_checks(
    placement: Placement,
    devices: Sequence[Device],
    settings: EngineSettings,
    *,
    rates: Rates | None = None,
    unused: Check | None = None,
) -> list[Check]:
    """The checks `placement.*` of one proof of the pair and settings, on a machine of which ggml sees `devices`.

    `unused` is the failed check of a GPU that is in this machine and that ggml does not see. Without an encoder,
    counted splits or rates the checks of these are left out. A GPU played by the CPU counts only where it was used.
    """
    used = {*placement.encoder, *placement.language_model}
    gpus = [device for device in devices if device.is_gpu and (device.name in used or not in_software(device))]
    gpus.sort(key=lambda device: (device.name not in used, device.type != "gpu"))
    graphs = {"encoder": placement.encoder, "language_model": placement.language_model}
    checks = [_where(name, placement, gpus, settings, unused) for name, graph in graphs.items() if graph]
    checks.append(_layers(placement, gpus, settings))
    checks.append(_fallback(placement, settings))
    if any(share.splits for graph in graphs.values() for share in graph.values()):
        checks.append(_splits(graphs))
    if rates is not None:
        checks.append(_rate(placement, rates))
    return checks


def _main(graph: _Graph) -> str:
    """The backend that did the most."""
    return max(graph, key=lambda name: graph[name].share_of_ops)


def _told(graph: _Graph) -> str:
    return ", ".join(
        f"{share.share_of_ops:.0%} on {name}"
        + (f" ({share.share_of_time:.0%} of the time)" if share.share_of_time is not None and len(graph) > 1 else "")
        for name, share in graph.items()
    )


def _where(
    name: str, placement: Placement, gpus: list[Device], settings: EngineSettings, unused: Check | None
) -> Check:
    """`placement.encoder` and `placement.language_model`: fails where a GPU is here and most ran on the CPU.

    One that shares the CPU's memory may be no faster, and is warned of only.
    """
    graph = placement.encoder if name == "encoder" else placement.language_model
    what = "vision encoder" if name == "encoder" else "language model"
    here, notes = [gpu.name for gpu in gpus], list(placement.notes)
    evidence = {"backends": placement.as_dict()[name], "gpus": here, "notes": notes}
    check = f"placement.{name}"
    told = f"Of the {what}'s operations {_told(graph)}"
    main = _main(graph)
    if main == HOST and gpus:
        update = _onto(gpus[0].name, name, placement, settings)
        done = placement.layers_offloaded
        if name == "language_model" and done < placement.layers and (done or not update):
            return Check(check, "warn", f"{told}, since not all layers are offloaded: see placement.layers.", evidence)
        status: Status = "fail" if gpus[0].type == "gpu" else "warn"
        mend = f": give {' '.join(as_flags(update))}, and prove it again."
        message = f"{told} although {gpus[0].name} is here{mend if update else ', and no setting keeps it away.'}"
        return Check(check, status, message, evidence, serve_command(settings, **update) if update else None)
    if main == HOST and unused is not None:
        message = f"{told} although a GPU is in this machine: see {unused.name}."
        return Check(check, "fail", message, evidence, unused.fix)
    if main == "unknown":
        message = f"{told}: where most ran cannot be told; compare the time with --mmproj-device none."
        return Check(check, "warn", message, evidence)
    return Check(check, "ok", f"{told}.", evidence)


def _onto(gpu: str, part: str, placement: Placement, settings: EngineSettings) -> dict[str, object]:
    """What to change so that a part goes to a GPU; empty where memory or llama.cpp keeps it away and no setting."""
    if part == "encoder":
        return {"mmproj_device": gpu} if settings.mmproj_device is None or means_cpu(settings.mmproj_device) else {}
    update: dict[str, object] = {"device": gpu} if means_cpu(settings.device) else {}
    if settings.gpu_layers is not None and settings.gpu_layers <= placement.layers:
        update["gpu_layers"] = placement.layers + 1  # one more is the output layer
    return update


def _layers(placement: Placement, gpus: list[Device], settings: EngineSettings) -> Check:
    done, of = placement.layers_offloaded, placement.layers
    evidence = {"layers_offloaded": done, "layers": of, "gpus": [gpu.name for gpu in gpus]}
    name, told = "placement.layers", f"{done} of {of} layers of the language model are offloaded"
    if not gpus:
        return Check(name, "ok", f"{told}; ggml sees no GPU.", evidence)
    if done >= of:
        return Check(name, "ok", f"{told}.", evidence)
    update = _onto(gpus[0].name, "language_model", placement, settings)
    mend = "take a smaller quantisation, since more do not fit"
    if update:
        mend = f"give {' '.join(as_flags(update))}, or where memory is short a smaller quantisation, --ctx or --kv-type"
    fix = serve_command(settings, **update) if update else None
    return Check(name, "warn", f"{told}, and the others set the pace: {mend}.", evidence, fix)


def _fallback(placement: Placement, settings: EngineSettings) -> Check:
    """Operations on the CPU in a graph that is on a GPU for the most: those that the GPU's backend does not know."""
    name, sentences, evidence, update = "placement.fallback", [], {}, {}
    for key, graph in (("encoder", placement.encoder), ("language_model", placement.language_model)):
        fallen = graph.get(HOST)
        if fallen is None or _main(graph) == HOST:
            continue
        # Layers that were left on the CPU are no fallback: `placement.layers` tells of them.
        wanted = key == "language_model" and placement.layers_offloaded < placement.layers
        ops = {} if wanted else dict(fallen.ops)
        if key == "language_model":
            ops = {op: count for op, count in ops.items() if op not in _AT_HOME_ON_THE_CPU}
        if not ops:
            continue
        if "FLASH_ATTN_EXT" in ops:
            update[_FLASH[key]] = False
        nodes = sum(share.nodes for share in graph.values())
        evidence[key] = {
            "ops": ops,
            "nodes": sum(ops.values()),
            "nodes_of": nodes,
            "share_of_ops": round(fallen.share_of_ops, 4),
            "share_of_time": None if fallen.share_of_time is None else round(fallen.share_of_time, 4),
        }
        named = ", ".join(f"{op} × {count}" for op, count in ops.items())
        time = "" if fallen.share_of_time is None else f" and {fallen.share_of_time:.0%} of the time"
        sentences.append(
            f"the {key.replace('_', ' ')}'s {named} ({sum(ops.values())} of {nodes} nodes, "
            f"{fallen.share_of_ops:.1%} of the operations{time})"
        )
    if not sentences:
        return Check(name, "ok", "No operation falls back from a GPU to the CPU.", evidence)
    mend = f"give {' '.join(as_flags(update))}" if update else "update the build, or take another quantisation"
    message = f"Operations that {_main_gpu(placement)} does not support fall back to the CPU: "
    message += f"{'; '.join(sentences)}; {mend}."
    return Check(name, "warn", message, evidence, serve_command(settings, **update) if update else None)


def _main_gpu(placement: Placement) -> str:
    mains = {_main(graph) for graph in (placement.encoder, placement.language_model) if graph}
    return " or ".join(sorted(mains - {HOST})) or "the GPU"


def _splits(graphs: Mapping[str, _Graph]) -> Check:
    """Pieces a graph is cut into: values are copied between two, and the GPU waits."""
    counts = {name: sum(share.splits for share in graph.values()) for name, graph in graphs.items() if graph}
    told = ", ".join(f"the {name.replace('_', ' ')}'s graph in {count}" for name, count in counts.items())
    # Token embeddings on the CPU, layers by device, the output layer: two pieces a backend are ordinary.
    if all(count <= 2 * len(graphs[name]) for name, count in counts.items()):
        return Check("placement.splits", "ok", f"Graphs run in few pieces: {told}.", {"splits": counts})
    message = (
        f"Graphs are cut into many pieces ({told}), and at each border values are copied and a device waits: "
        "placement.fallback and placement.layers name the cause."
    )
    return Check("placement.splits", "warn", message, {"splits": counts})


def _rate(placement: Placement, rates: Rates) -> Check:
    """How near encode and decode come to what their devices were measured to give."""
    shown: dict[str, object] = {}
    poor: list[str] = []
    told: list[str] = []
    encode = _expected(placement.encoder, rates.encode_ops, {n: rate.ops_s for n, rate in rates.ceilings.items()})
    decode = _expected(
        placement.language_model, rates.weight_bytes, {n: rate.bytes_s for n, rate in rates.ceilings.items()}
    )
    for stage, least, shortest, seconds in (
        ("encode", encode, _LEAST_ENCODE, rates.encode_seconds),
        ("decode", decode, _LEAST_DECODE, rates.decode_seconds),
    ):
        if least is None or not seconds:
            continue
        share = least / seconds
        shown[stage] = {"seconds": seconds, "least_seconds": round(least, 6), "share_of_ceiling": round(share, 3)}
        if least < shortest:
            told.append(f"{stage} is too short to be judged")
            continue
        told.append(f"{stage} reaches {share:.0%} of what its device gives ({least:.3g} s of {seconds:.3g} s)")
        if share < _POOR:
            poor.append(stage)
    ceilings = {name: {"ops_s": rate.ops_s, "bytes_s": rate.bytes_s} for name, rate in rates.ceilings.items()}
    status: Status = "warn" if poor else "ok"
    message = f"{'; '.join(told) or 'encode and decode were not measured'}."
    if poor:
        message = f"{message[:-1]}: {_reasons(placement, poor)}."
    return Check("placement.rate", status, message[0].upper() + message[1:], {**shown, "ceilings": ceilings})


def _expected(graph: _Graph, work: float | None, ceilings: Mapping[str, float]) -> float | None:
    """Seconds that `work` would take at the ceilings of the backends that share it; None where one is not known."""
    if work is None or not graph:
        return None
    total = 0.0
    for name, share in graph.items():
        if share.share_of_ops > 0.001:
            if not ceilings.get(name):
                return None
            total += work * share.share_of_ops / ceilings[name]
    return total


def _reasons(placement: Placement, poor: list[str]) -> str:
    graphs = {"encode": placement.encoder, "decode": placement.language_model}
    if any(_main(graphs[stage]) == HOST for stage in poor):
        return (
            "likely other programs use the cores, --threads is not the number of physical ones, or the build knows "
            "less than this CPU (see build.*)"
        )
    return "likely operations fall back, other programs use the GPU, or its power is limited"
