"""Where a pair really runs, judged by the nodes that were computed and not by what a log promises."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from opsin.core.model_info import HOST, UNPROVEN, BackendShare, Placement
from opsin.core.settings import EngineSettings, as_flags
from opsin.doctor.build import in_software
from opsin.doctor.check import Check, Status, means_cpu, serve_command
from opsin.native.devices import Device
from opsin.native.trial import keep_record, read_record, record_file

_Graphs = Mapping[str, Mapping[str, BackendShare]]
_PLACEMENT = TypeAdapter(Placement)
_FLASH = {"encoder": "vision_flash_attention", "language_model": "flash_attention"}


def remembered_placement(
    setup: str, prove: Callable[[], Placement] | None = None, folder: Path | None = None
) -> Placement:
    """The placement of a setup (a fingerprint), if it was not proved before by `prove`; without that it is unproven."""
    file = record_file("placement", setup, folder)
    with suppress(ValueError):
        placement = _PLACEMENT.validate_python(data := read_record(file))
        if _PLACEMENT.dump_python(placement, mode="json") == data:  # else an older version wrote it, and knew less
            return placement
    if prove is None:
        return UNPROVEN
    placement = prove()
    keep_record(file, asdict(placement))
    return placement


def placement_checks(
    placement: Placement, devices: Sequence[Device], settings: EngineSettings, *, unused: Check | None = None
) -> list[Check]:
    """The checks `placement.*` of one proof, with ggml's `devices`; `unused`: the failed check of a GPU it lacks."""
    graphs = {"encoder": placement.encoder, "language_model": placement.language_model}
    graphs = {name: graph for name, graph in graphs.items() if graph}
    used = {name for graph in graphs.values() for name in graph}
    # A GPU made of software counts only where it was used.
    gpus = [device for device in devices if device.is_gpu and (device.name in used or not in_software(device))]
    gpus.sort(key=lambda device: (device.name not in used, device.type != "gpu"))
    checks = [_where(name, placement, gpus, settings, unused) for name in graphs]
    if placement.notes and settings.mmproj is not None and "encoder" not in graphs:
        checks.insert(0, Check("placement.encoder", "warn", " ".join(placement.notes), {"notes": [*placement.notes]}))
    return [*checks, _layers(placement, gpus, settings), _fallback(graphs, placement, settings), _splits(graphs)]


def _main(graph: Mapping[str, BackendShare]) -> str:
    """The backend that did the most."""
    return max(graph, key=lambda name: graph[name].share_of_ops)


def _where(
    name: str, placement: Placement, gpus: list[Device], settings: EngineSettings, unused: Check | None
) -> Check:
    """Fails where a GPU is here and most ran on the CPU; one that shares the CPU's memory may be no faster: warns."""
    graph = placement.encoder if name == "encoder" else placement.language_model
    evidence = {"backends": placement.as_dict()[name], "notes": list(placement.notes)}
    check = f"placement.{name}"
    shares = ", ".join(f"{share.share_of_ops:.0%} on {backend}" for backend, share in graph.items())
    told = f"Of the {name.replace('_', ' ')}'s operations {shares}"
    if _main(graph) == HOST and gpus:
        if name == "language_model" and 0 < placement.layers_offloaded < placement.layers:
            return Check(check, "warn", f"{told}, since not all layers are offloaded: see placement.layers.", evidence)
        update = _onto(gpus[0].name, name, placement, settings)
        status: Status = "fail" if gpus[0].type == "gpu" else "warn"
        advice = f"give {' '.join(as_flags(update))}" if update else "no setting keeps it away, see placement.layers"
        fix = serve_command(settings, **update) if update else None
        return Check(check, status, f"{told} although {gpus[0].name} is here: {advice}.", evidence, fix)
    if _main(graph) == HOST and unused is not None:
        message = f"{told} although a GPU is in this machine: see {unused.name}."
        return Check(check, "fail", message, evidence, unused.fix)
    if _main(graph) == "unknown":
        message = f"{told}: where most ran cannot be told; compare the time with --mmproj-device none."
        return Check(check, "warn", message, evidence)
    return Check(check, "ok", f"{told}.", evidence)


def _onto(gpu: str, part: str, placement: Placement, settings: EngineSettings) -> dict[str, object]:
    """The change of settings that moves a part to a GPU; empty where no setting keeps it away."""
    if part == "encoder":
        return {"mmproj_device": gpu} if settings.mmproj_device is None or means_cpu(settings.mmproj_device) else {}
    update: dict[str, object] = {"device": gpu} if means_cpu(settings.device) else {}
    if settings.gpu_layers is not None and settings.gpu_layers <= placement.layers:
        update["gpu_layers"] = placement.layers + 1  # one more is the output layer
    return update


def _layers(placement: Placement, gpus: list[Device], settings: EngineSettings) -> Check:
    done, of = placement.layers_offloaded, placement.layers
    name, evidence = "placement.layers", {"layers_offloaded": done, "layers": of}
    told = f"{done} of {of} layers of the language model are offloaded"
    if not gpus or done >= of:
        return Check(name, "ok", f"{told}{'' if gpus else '; ggml sees no GPU'}.", evidence)
    update = _onto(gpus[0].name, "language_model", placement, settings)
    advice = f"give {' '.join(as_flags(update))}" if update else "take a smaller quantisation, since more do not fit"
    fix = serve_command(settings, **update) if update else None
    return Check(name, "warn", f"{told}, and the others set the pace: {advice}.", evidence, fix)


def _fallback(graphs: _Graphs, placement: Placement, settings: EngineSettings) -> Check:
    """Operations on the CPU in a graph that is mostly on a GPU: those that its backend does not support."""
    name, sentences, evidence, update = "placement.fallback", [], {}, {}
    for key, graph in graphs.items():
        if HOST not in graph or _main(graph) == HOST:
            continue
        ops = dict(graph[HOST].ops)
        if key == "language_model":
            # llama.cpp keeps the token embeddings in host memory; layers left there belong to `placement.layers`.
            ops.pop("GET_ROWS", None)
            ops = ops if placement.layers_offloaded >= placement.layers else {}
        if ops:
            evidence[key] = {"ops": ops, "share_of_ops": round(graph[HOST].share_of_ops, 4)}
            named = ", ".join(f"{op} × {count}" for op, count in ops.items())
            share = f"{graph[HOST].share_of_ops:.1%} of its operations"
            sentences.append(f"the {key.replace('_', ' ')}'s {named} ({share})")
        if "FLASH_ATTN_EXT" in ops:
            update[_FLASH[key]] = False
    if not sentences:
        return Check(name, "ok", "No operation falls back from a GPU to the CPU.", evidence)
    advice = f"give {' '.join(as_flags(update))}" if update else "update the build, or take another quantisation"
    message = f"The GPU does not support these operations, which run on the CPU: {'; '.join(sentences)}; {advice}."
    return Check(name, "warn", message, evidence, serve_command(settings, **update) if update else None)


def _splits(graphs: _Graphs) -> Check:
    """Pieces a graph is cut into: between two, values are copied and a device waits."""
    counts = {name: sum(share.splits for share in graph.values()) for name, graph in graphs.items()}
    evidence = {"splits": counts}
    # Token embeddings on the CPU, layers by device, the output layer: two pieces a backend are ordinary.
    few = all(count <= 2 * len(graphs[name]) for name, count in counts.items())
    told = ", ".join(f"{name.replace('_', ' ')} in {count}" for name, count in counts.items())
    message = f"Graphs are cut into many pieces ({told}): placement.fallback and placement.layers name the cause."
    return Check("placement.splits", "ok" if few else "warn", "Graphs run in few pieces." if few else message, evidence)
