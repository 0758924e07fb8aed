"""Where a pair really runs, judged by the nodes that were computed and not by what a log promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opsin.core.placement import BackendShare, Placement
from opsin.doctor.check import Check, Status
from opsin.doctor.pair import serve_command
from opsin.native.device_rate import DeviceRate
from opsin.native.devices import Device

CPU = "CPU"
# llama.cpp keeps the table of token embeddings in host memory, whatever is offloaded.
_AT_HOME_ON_THE_CPU = frozenset({"GET_ROWS"})
_POOR = 1 / 3  # of the ceiling
# Shorter stages are ruled by launches and Python, not by the device.
_LEAST_ENCODE, _LEAST_DECODE = 0.005, 0.001
_NO_FLASH = {"encoder": "--no-vision-flash-attention", "language_model": "--no-flash-attention"}
_Graph = Mapping[str, BackendShare]


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
    llm: Path,
    mmproj: Path | None,
    *,
    rates: Rates | None = None,
    rebuild: str | None = None,
) -> list[Check]:
    """The checks `placement.*` of one proof, on a machine of which ggml sees `devices`.

    `rebuild` is the command that makes a build for a GPU that is in this machine and that ggml does not see. Without
    an encoder, counted splits or rates the checks of these are left out.
    """
    gpus = [device.name for device in devices if device.is_gpu]
    graphs = {"encoder": placement.encoder, "language_model": placement.language_model}
    checks = [_where(name, placement, gpus, llm, mmproj, rebuild=rebuild) for name, graph in graphs.items() if graph]
    checks.append(_layers(placement, gpus, llm, mmproj))
    checks.append(_fallback(placement, llm, mmproj))
    if any(share.splits for graph in graphs.values() for share in graph.values()):
        checks.append(_splits(graphs, llm, mmproj))
    if rates is not None:
        checks.append(_rate(placement, rates))
    return checks


def _main(graph: _Graph) -> str:
    """The backend that did the most."""
    return max(graph, key=lambda name: graph[name].share_of_ops)


def _rows(graph: _Graph) -> dict[str, object]:
    return {
        name: {
            "nodes": share.nodes,
            "share_of_ops": round(share.share_of_ops, 4),
            "share_of_time": None if share.share_of_time is None else round(share.share_of_time, 4),
        }
        for name, share in graph.items()
    }


def _told(graph: _Graph) -> str:
    return ", ".join(
        f"{share.share_of_ops:.0%} on {name}"
        + (f" ({share.share_of_time:.0%} of the time)" if share.share_of_time is not None and len(graph) > 1 else "")
        for name, share in graph.items()
    )


def _where(
    name: str, placement: Placement, gpus: list[str], llm: Path, mmproj: Path | None, *, rebuild: str | None
) -> Check:
    """`placement.encoder` and `placement.language_model`: fails where a GPU is here and most ran on the CPU."""
    graph = placement.encoder if name == "encoder" else placement.language_model
    what = "vision encoder" if name == "encoder" else "language model"
    evidence = {"backends": _rows(graph), "gpus": gpus, "notes": list(placement.notes)}
    check = f"placement.{name}"
    told = f"Of the {what}'s operations {_told(graph)}"
    main = _main(graph)
    if main == CPU and gpus and name == "language_model" and 0 < placement.layers_offloaded < placement.layers:
        return Check(check, "warn", f"{told}, since not all layers are offloaded: see placement.layers.", evidence)
    if main == CPU and gpus:
        flags: tuple[object, ...] = ("--mmproj-device", gpus[0])
        if name == "language_model":
            flags = ("--device", gpus[0], "--gpu-layers", placement.layers + 1)  # one more is the output layer
        option = " ".join(map(str, flags))
        message = f"{told} although {gpus[0]} is here: give {option}, and prove it again."
        return Check(check, "fail", message, evidence, serve_command(llm, mmproj, *flags))
    if main == CPU and rebuild is not None:
        message = f"{told}, since this build cannot use the GPU of this machine: build it anew for that."
        return Check(check, "fail", message, evidence, rebuild)
    if main == "unknown":
        message = f"{told}: where most ran cannot be told; compare the time with --mmproj-device none."
        return Check(check, "warn", message, evidence)
    return Check(check, "ok", f"{told}.", evidence)


def _layers(placement: Placement, gpus: list[str], llm: Path, mmproj: Path | None) -> Check:
    done, of = placement.layers_offloaded, placement.layers
    evidence = {"layers_offloaded": done, "layers": of, "gpus": gpus}
    name, told = "placement.layers", f"{done} of {of} layers of the language model are offloaded"
    if not gpus:
        return Check(name, "ok", f"{told}; ggml sees none.", evidence)
    if done >= of:
        return Check(name, "ok", f"{told}.", evidence)
    message = (
        f"{told}, and the others set the pace: give --gpu-layers {of + 1}, or where memory is short a smaller "
        "quantisation, --ctx or --kv-type q8_0."
    )
    flags = ("--device", gpus[0], "--gpu-layers", of + 1)
    return Check(name, "warn", message, evidence, serve_command(llm, mmproj, *flags))


def _fallback(placement: Placement, llm: Path, mmproj: Path | None) -> Check:
    """Operations on the CPU in a graph that is on a GPU for the most: those that the GPU's backend does not know."""
    name, sentences, evidence, flags = "placement.fallback", [], {}, []
    for key, graph in (("encoder", placement.encoder), ("language_model", placement.language_model)):
        fallen = graph.get(CPU)
        if fallen is None or _main(graph) == CPU:
            continue
        # Layers that were left on the CPU are no fallback: `placement.layers` tells of them.
        wanted = key == "language_model" and placement.layers_offloaded < placement.layers
        ops = {} if wanted else dict(fallen.ops)
        if key == "language_model":
            ops = {op: count for op, count in ops.items() if op not in _AT_HOME_ON_THE_CPU}
        if not ops:
            continue
        if "FLASH_ATTN_EXT" in ops:
            flags.append(_NO_FLASH[key])
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
    mend = f"give {' '.join(flags)}" if flags else "update the build, or take another quantisation"
    message = f"Operations that {_main_gpu(placement)} does not support fall back to the CPU: "
    message += f"{'; '.join(sentences)}; {mend}."
    return Check(name, "warn", message, evidence, serve_command(llm, mmproj, *flags) if flags else None)


def _main_gpu(placement: Placement) -> str:
    mains = {_main(graph) for graph in (placement.encoder, placement.language_model) if graph}
    return " or ".join(sorted(mains - {CPU})) or "the GPU"


def _splits(graphs: Mapping[str, _Graph], llm: Path, mmproj: Path | None) -> Check:
    """Pieces a graph is cut into: values are copied between two, and the GPU waits."""
    counts = {name: sum(share.splits for share in graph.values()) for name, graph in graphs.items() if graph}
    # Token embeddings on the CPU, layers by device, the output layer: two stretches a backend are ordinary.
    many = {name: count for name, count in counts.items() if count > 2 * len(graphs[name])}
    told = ", ".join(f"the {name.replace('_', ' ')}'s graph in {count}" for name, count in counts.items())
    evidence = {"splits": counts}
    if not many:
        return Check("placement.splits", "ok", f"Graphs run in few pieces: {told}.", evidence)
    flags = [_NO_FLASH[name] for name in many if CPU in graphs[name] and "FLASH_ATTN_EXT" in graphs[name][CPU].ops]
    mend = f"give {' '.join(flags)}" if flags else "placement.fallback and placement.layers name the cause"
    message = (
        f"Graphs are cut into many pieces ({told}), and at each border values are copied and a device waits: {mend}."
    )
    fix = serve_command(llm, mmproj, *flags) if flags else None
    return Check("placement.splits", "warn", message, evidence, fix)


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
    if any(_main(graphs[stage]) == CPU for stage in poor):
        return (
            "likely other programs use the cores, --threads is not the number of physical ones, or the build knows "
            "less than this CPU (see build.*)"
        )
    return "likely operations fall back, other programs use the GPU, or its power is limited"
