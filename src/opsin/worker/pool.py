"""Several workers on one machine: how many and where, and the pool that offers what one worker offers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opsin.core.backend import BackendLimits
from opsin.core.errors import OpsinError, copy_of
from opsin.core.model_info import ModelInfo, Placement
from opsin.core.request import Prompt, SamplingParams
from opsin.core.settings import EngineSettings
from opsin.engine import AnswerStream, Snapshot
from opsin.worker.client import State, WorkerEngine
from opsin.worker.messages import Loaded

log = logging.getLogger(__name__)

_LOOK = "import json, sys; from opsin.compose import machine_for; print(json.dumps(machine_for(*sys.argv[1:])))"
_LOOK_SECONDS = 60.0
_ROOM = 1.2  # of a pair's weights: what must be free on a GPU that is to hold a worker alone
_NO_GPU = re.compile(r"ggml-(base|cpu|blas|rpc)")
# The lower, the better for a new request.
_RANKS = ("ready", "reloading unloaded", "stalled", "restarting", "warming loading", "failed closed")
_RANK = {state: rank for rank, states in enumerate(_RANKS) for state in states.split()}


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """What decides where workers go: GPUs of one kind with their free bytes, bytes of weights, threads of one worker.

    `threads` is 0 where it is not known.
    """

    gpus: Sequence[tuple[str, int]] = ()
    weights: int = 0
    threads: int = 0


def open_workers(
    model: str | Path | None,
    mmproj: str | Path | None,
    settings: EngineSettings,
    *,
    workers: int | None = None,
    **options: Any,
) -> WorkerEngine | WorkerPool:
    """Start so many workers; None: one for each GPU if the pair fits on each of them, else one.

    `options` are those of `WorkerEngine`. Where it depends on the GPUs, a child process looks at them first, which
    takes a second or more.
    """
    look = workers > 1 if workers else not _placed(settings) and _may_have_gpus()
    every = spread(settings, workers, _look(model, mmproj) if look else Machine())
    if len(every) == 1:
        return WorkerEngine(model, mmproj, every[0], **options)
    log.info("%d workers, on %s", len(every), ", ".join(one.device or "the CPU" for one in every))
    return WorkerPool(model, mmproj, every, **options)


def spread(settings: EngineSettings, workers: int | None, machine: Machine) -> list[EngineSettings]:
    """The settings of each worker; devices and threads that the user gave are kept."""
    gpus = machine.gpus
    if workers is None:
        fits = not _placed(settings) and all(free >= _ROOM * machine.weights > 0 for _, free in gpus)
        workers = len(gpus) if fits else 1
    if workers <= 1:
        return [settings]
    found = []
    for index in range(workers):
        own: dict[str, Any] = {}
        if gpus:
            gpu, _ = gpus[index % len(gpus)]
            own = {name: gpu for name in ("device", "mmproj_device") if getattr(settings, name) is None}
        if machine.threads and settings.threads is None and (not gpus or _on_cpu(settings)):
            own["threads"] = max(1, machine.threads // workers)
        found.append(settings.model_copy(update=own))
    return found


def _placed(settings: EngineSettings) -> bool:
    """Whether the user said where the pair goes."""
    return settings.device is not None or settings.mmproj_device is not None or settings.gpu_layers == 0


def _on_cpu(settings: EngineSettings) -> bool:
    return settings.gpu_layers == 0 or (settings.device or "").strip().lower() in {"none", "cpu"}


def _may_have_gpus() -> bool:
    """Whether the installed llama.cpp can have a GPU, by the names of its libraries: loading them takes long."""
    spec = find_spec("llama_cpp")
    own = [Path(folder, "lib") for folder in (spec and spec.submodule_search_locations) or ()]
    given = os.environ.get("LLAMA_CPP_LIB_PATH")
    names = [path.name for folder in ([Path(given)] if given else own) for path in folder.glob("*ggml-*")]
    return not names or not all(_NO_GPU.search(name) for name in names)  # a static build has everything in one file


def _look(model: str | Path | None, mmproj: str | Path | None) -> Machine:
    """What a child process, which may load the native library, says of this machine."""
    command = [sys.executable, "-P", "-c", _LOOK, str(model or ""), str(mmproj or "")]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and modules
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LOOK_SECONDS, check=True, process_group=0
        )
        return Machine(**json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
        reason = type(error).__name__
        log.warning("llama.cpp could not be asked for its GPUs (%s): run opsin doctor, which says more", reason)
        return Machine()


class WorkerPool:
    """Workers with the same pair, one for each of the `settings`; offers what `WorkerEngine` offers.

    A request about an image goes to the worker that has seen that image, unless it has far more to do than another; one
    without images goes to the least busy worker. One that is started again or has failed gets nothing while another one
    lives. `changed` is called with the pool's state, in any worker's owner thread; `options` are those of
    `WorkerEngine`. An image that crashed workers twice is refused by all.
    """

    def __init__(
        self,
        model: str | Path | None,
        mmproj: str | Path | None,
        settings: Sequence[EngineSettings],
        *,
        changed: Callable[[State], object] = lambda _: None,
        **options: Any,
    ) -> None:
        self._changed = changed
        self._size = len(settings)
        crashes: dict[str, list[float]] = {}
        self.engines: list[WorkerEngine] = []
        options |= {"changed": self._on_change, "crashes": crashes}
        for one in settings:
            self.engines.append(WorkerEngine(model, mmproj, one, **options))

    @property
    def state(self) -> State:
        """`loading` or `warming` while one is loaded for the first time, else the state of the best one."""
        states = [engine.state for engine in self.engines]
        if len(states) < self._size or "loading" in states:
            return "loading"
        return "warming" if "warming" in states else min(states, key=lambda state: (_RANK[state], state))

    @property
    def error(self) -> OpsinError | None:
        """Why nothing can be asked any more; None while one worker lives."""
        errors = [engine.error for engine in self.engines]
        return errors[0] if all(errors) and len(errors) == self._size else None

    @property
    def loaded(self) -> Loaded | None:
        """The model as a worker loaded it; its context is that of all workers together."""
        every = [loaded for engine in self.engines if (loaded := engine.loaded)]
        if not every:
            return None
        limits = dataclasses.replace(
            every[0].limits,
            n_ctx=sum(one.limits.n_ctx for one in every),
            n_ctx_seq=min(one.limits.n_ctx_seq for one in every),
        )
        return dataclasses.replace(every[0], limits=limits, load_ms=max(one.load_ms for one in every))

    @property
    def info(self) -> ModelInfo:
        """Names of the loaded pair. This and the next three wait for the first loading."""
        return self.wait_ready().info

    @property
    def limits(self) -> BackendLimits:
        """Sizes of the loaded pair, the context of all workers together."""
        return self.wait_ready().limits

    @property
    def load_ms(self) -> float:
        """Milliseconds that the slowest worker took to load."""
        return self.wait_ready().load_ms

    def placement(self) -> Placement:
        """Where encoder and language model ran in the warm-up of the first worker."""
        return self.wait_ready().placement

    @property
    def stats(self) -> Snapshot:
        """Counters over all workers so far, and what is so now."""
        every = [dataclasses.astuple(engine.stats) for engine in self.engines]
        return Snapshot(*functools.reduce(lambda one, two: tuple(map(operator.add, one, two)), every))

    @property
    def restarts(self) -> int:
        """How many workers crashed or hung and were replaced."""
        return sum(engine.restarts for engine in self.engines)

    @property
    def progress(self) -> float:
        """How much of the language model the slowest worker that lives has loaded, from 0 to 1."""
        return min((engine.progress for engine in self.engines if engine.error is None), default=0.0)

    @property
    def slots(self) -> int:
        """How many answers are generated at the same time, at most."""
        return sum(engine.slots for engine in self.engines)

    @property
    def pids(self) -> list[int]:
        """The workers' processes."""
        return [pid for engine in self.engines if (pid := engine.pid) is not None]

    @property
    def pid(self) -> int | None:
        """The first of these; None while there is none."""
        return next(iter(self.pids), None)

    def wait_ready(self) -> Loaded:
        """Wait until each worker has loaded the model or failed. Raises the error of the first where all failed."""
        for engine in self.engines:
            with suppress(OpsinError):
                engine.wait_ready()
        return self.loaded or self.engines[0].wait_ready()

    def wake(self) -> None:
        """Start all unloaded workers for a request that is about to come."""
        for engine in self.engines:
            engine.wake()

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> AnswerStream:
        """See `WorkerEngine.submit`."""
        if (error := self.error) is not None:
            raise copy_of(error)
        return self._choose(prompt).submit(prompt, params, **options)

    def close(self) -> None:
        """End all workers at the same time. Twice does no harm."""
        with ThreadPoolExecutor(self._size) as threads:
            list(threads.map(WorkerEngine.close, self.engines))

    def _choose(self, prompt: Prompt) -> WorkerEngine:
        ranks = [_RANK[engine.state] for engine in self.engines]
        best = [index for index, rank in enumerate(ranks) if rank == min(ranks)]
        load = {index: self.engines[index].in_flight for index in best}
        chosen = least = min(best, key=lambda index: load[index])
        if prompt.images:
            # Rendezvous hashing: an image moves only when the worker that it belongs to is not there.
            image = prompt.images[0].sha256
            home = max(best, key=lambda index: hashlib.sha256(f"{image} {index}".encode()).digest())
            crowded = load[home] > self.engines[home].slots and load[home] >= 2 * load[least]
            chosen = least if crowded else home
        return self.engines[chosen]

    def _on_change(self, state: State) -> None:
        if state == "failed" and self.error is None:
            errors = {str(engine.error) for engine in self.engines if engine.error is not None}
            log.error("a worker cannot be used any more, the others go on: %s", "; ".join(sorted(errors)))
        self._changed(self.state)
