"""What a log says of the build, of where model and encoder are, and of memory; read line by line."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from opsin.doctor.explain.lines import LONGEST_FACT, Line

_GPU = r"CUDA\d|ROCm\d|Vulkan\d|SYCL\d|Metal|MTL\d|CANN\d|OpenCL"
_FACTS = {
    "layers": r"offloaded (\d{1,9})/(\d{1,9}) layers to GPU",
    "ollama_layers": r"layers\.model=(\d{1,9}) layers\.offload=(\d{1,9})",
    "clip": r"CLIP using (\w+) backend",
    "gpu": rf"\b(?:{_GPU})\s+(?:\w+ )?buffer size|library=(?:CUDA|ROCm|Vulkan|Metal|cuda|rocm|metal)\b"
    r"|loaded (?:CUDA|ROCm|HIP|Vulkan|SYCL) backend",
    "no_gpu_build": r"not compiled with GPU offload support",
    "parked": r'disabling multimodal projector offload"? reason=([\w-]+)',
    "flash_failed": r"flash attention (?:is )?not supported",
    "flash_off": r"flash attention is disabled|--?(?:flash-attn|fa) (?:off|0)\b",
    "flash_on": r"flash attention is enabled",
    "threads": r"n_threads = (\d{1,9})(?: \(n_threads_batch = \d+\))? / (\d{1,9})",
    "debug": r"warning: (?:asserts enabled|debug build)|^build: .* \(debug\)|\[unoptimized",
    "no_memory": r"out of memory|failed to allocate (?:buffer|compute|CUDA)|unable to allocate|cudaMalloc failed",
    "cut_prompt": r'truncating input prompt"? limit=(\d{1,9}) prompt=(\d{1,9})',
    "faults": r"Major \(requiring I/O\) page faults: (\d{1,9})",
    "cpu_share": r"Percent of CPU this job got: (\d{1,9})%",
    "elapsed_s": r"Elapsed \(wall clock\) time \([^)]*\): (?:(\d{1,9}):)??(\d{1,9}):(\d{1,9}(?:\.\d{1,9})?)",
}
"""Facts by the lines that tell them: llama.cpp's, Ollama's, and those of GNU time -v."""
_PATTERNS = {name: re.compile(pattern) for name, pattern in _FACTS.items()}
_ANY = re.compile("|".join(_FACTS.values()))
_UNSUPPORTED = re.compile(r":\s+([A-Z][A-Z0-9_]+): type = ")
_LOADING = re.compile(r"(?:llama_model_loader: loaded meta data|load_model: loading model|loading model via)[^,]*")
_VOCABULARY = re.compile(r"vocab_only\s*= 1\b")
_STARTED = re.compile(r"runner started in (\d{1,9}(?:\.\d{1,9})?) seconds")
_BEGUN = re.compile(r"model loaded|add_text|encoding |launch_slot|Llama\.generate|eval time")
_MANY = 64


@dataclass(frozen=True, slots=True)
class Machine:
    """Placement, build and memory; None and empty where the log is silent.

    `layers` are those on a GPU and all of them. `flash` is False when flash attention is off or not supported, with
    `flash_failed` for the latter. `loads` counts how often one model was loaded, `load_s` the seconds that are known.
    `faults` are major page faults, `cpu_share` the share of one core that the process got (both of GNU time).
    """

    clip: str | None = None
    layers: tuple[int, int] | None = None
    gpu: bool = False
    no_gpu_build: bool = False
    parked: str | None = None
    unsupported: tuple[str, ...] = ()
    flash: bool | None = None
    flash_failed: bool = False
    threads: tuple[int, int] | None = None
    debug: bool = False
    loads: int = 0
    load_s: tuple[float, ...] = ()
    no_memory: int = 0
    cut_prompt: tuple[int, int] | None = None
    faults: int | None = None
    cpu_share: float | None = None
    elapsed_s: float | None = None

    @property
    def known(self) -> bool:
        """Something that only llama.cpp and its front ends say; any program runs out of memory, or is timed."""
        return replace(self, no_memory=0, debug=False, faults=None, cpu_share=None, elapsed_s=None) != Machine()

    @property
    def on_gpu(self) -> bool:
        """The language model has a GPU."""
        return self.gpu or (self.layers is not None and self.layers[0] > 0)


class MachineReader:
    """Keeps the facts of the lines seen so far in `machine`."""

    def __init__(self) -> None:
        self.machine = Machine()
        self._loading_since: float | None = None
        self._listing = False
        self._models: dict[str, int] = {}
        self._model = ""

    def feed(self, line: Line) -> None:
        """Read a line."""
        text = line.text[:LONGEST_FACT]
        if _ANY.search(text):
            for name, pattern in _PATTERNS.items():
                if found := pattern.search(text):
                    self._set(**self._fact(name, found))
        if "unsupported ops" in text or "****" in text:
            self._listing = "unsupported ops" in text
        elif self._listing and (found := _UNSUPPORTED.search(text)):
            self._set(unsupported=tuple(dict.fromkeys((*self.machine.unsupported, found.group(1))))[:_MANY])
        self._loads(line, text)

    def _set(self, **values: Any) -> None:
        self.machine = replace(self.machine, **values)

    def _fact(self, name: str, found: re.Match[str]) -> dict[str, Any]:
        groups = found.groups()
        if name == "no_memory":
            return {name: self.machine.no_memory + 1}
        if name.startswith("flash"):
            return {"flash": name == "flash_on", "flash_failed": self.machine.flash_failed or name == "flash_failed"}
        if name == "elapsed_s":
            return {name: int(groups[0] or 0) * 3600 + int(groups[1]) * 60 + float(groups[2])}
        if name in {"faults", "cpu_share"}:
            return {name: int(groups[0]) / 100 if name == "cpu_share" else int(groups[0])}
        if name == "ollama_layers":
            return {"layers": (int(groups[1]), int(groups[0]))}
        return {name: (int(groups[0]), int(groups[1])) if len(groups) > 1 else groups[0] if groups else True}

    def _loads(self, line: Line, text: str) -> None:
        if found := _LOADING.search(text):
            # One load is told by several voices, and a draft model is another model: the same words count.
            self._model = found.group()
            if self._model in self._models or len(self._models) < _MANY:
                self._models[self._model] = self._models.get(self._model, 0) + 1
            self._set(loads=max(self._models.values()))
            self._loading_since = line.clock if self._loading_since is None else self._loading_since
        elif self._models.get(self._model) and _VOCABULARY.search(text):
            # Ollama looks at the vocabulary before it starts a runner, which loads the model.
            self._models[self._model] -= 1
            self._set(loads=max(self._models.values()))
            self._loading_since = None
        elif found := _STARTED.search(text):
            self._loading_since = None
            self._loaded(float(found.group(1)))
        elif self._loading_since is not None and _BEGUN.search(text):
            since, self._loading_since = self._loading_since, None
            if line.clock is not None and line.clock >= since:
                self._loaded(line.clock - since)

    def _loaded(self, seconds: float) -> None:
        if len(self.machine.load_s) < _MANY:
            self._set(load_s=(*self.machine.load_s, seconds))
