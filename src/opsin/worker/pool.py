"""Several workers on one machine: how many and where, and the pool that offers what one worker offers."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from itertools import cycle, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

from opsin.core.errors import OpsinError
from opsin.core.request import Prompt, SamplingParams
from opsin.core.settings import EngineSettings
from opsin.engine import AnswerStream, Snapshot
from opsin.worker.client import Ready, State, WorkerEngine
from opsin.worker.messages import Loaded

log = logging.getLogger(__name__)

_LOOK = "import json, sys; from opsin.compose import machine_for; print(json.dumps(machine_for(*sys.argv[1:])))"
_LOOK_SECONDS = 60.0
_HOMES = 10_000  # images whose worker is known: more than any of them remembers
_ROOM = 1.2  # of a pair's weights: what must be free on a GPU that is to hold a worker alone
_NO_GPU = re.compile(r"ggml-(base|cpu|blas|rpc)")
# The lower, the better for a new request.
_RANK = {"ready": 0, "reloading": 1, "unloaded": 1, "stalled": 2, "restarting": 3, "warming": 4, "loading": 4}
_RANK |= {"failed": 5, "closed": 5}


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
) -> "WorkerEngine | WorkerPool":
    """Start so many workers; None: one for each GPU if the pair fits on each of them, else one.

    `options` are those of `WorkerEngine`. Where it depends on the GPUs, a child process looks at them first, which
    takes a second or more.
    """
    look = workers > 1 if workers else not _placed(settings) and may_have_gpus()
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
    own: dict[str, Any] = {}
    on_cpu = not gpus or settings.gpu_layers == 0 or (settings.device or "").strip().lower() in {"none", "cpu"}
    if machine.threads and settings.threads is None and on_cpu:
        own["threads"] = max(1, machine.threads // workers)
    unset = [name for name in ("device", "mmproj_device") if getattr(settings, name) is None]
    places = islice(cycle([name for name, _ in gpus] or [None]), workers)
    return [settings.model_copy(update=own | dict.fromkeys(unset, place)) for place in places]


def _placed(settings: EngineSettings) -> bool:
    """Whether the user said where the pair goes."""
    return settings.device is not None or settings.mmproj_device is not None or settings.gpu_layers == 0


def may_have_gpus() -> bool:
    """Whether the installed llama.cpp can have a GPU, by the names of its libraries: loading them takes long."""
    given, spec = os.environ.get("LLAMA_CPP_LIB_PATH"), find_spec("llama_cpp")
    folders = [given] if given else [f"{folder}/lib" for folder in (spec and spec.submodule_search_locations) or ()]
    names = [path.name for folder in folders for path in Path(folder).glob("*ggml-*")]
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


class WorkerPool(Ready):
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
        self._homes: dict[str, WorkerEngine] = {}  # by image
        self._given = Counter[int]()  # images of low priority, by engine: even counts end at the same time
        self._lock = threading.Lock()
        self.slots = sum(one.parallel for one in settings)
        options |= {"changed": self._on_change, "crashes": dict[str, list[float]]()}
        self.engines: list[WorkerEngine] = []  # until all are started
        self.engines = [WorkerEngine(model, mmproj, one, **options) for one in settings]

    @property
    def state(self) -> State:
        """`loading` or `warming` while one is loaded for the first time, else the state of the best one."""
        states = [engine.state for engine in self.engines] or ["loading"]
        first = [state for state in ("loading", "warming") if state in states]
        return first[0] if first else min(states, key=lambda state: (_RANK[state], state))

    @property
    def error(self) -> OpsinError | None:
        """Why nothing can be asked any more; None while one worker lives."""
        errors = [engine.error for engine in self.engines]
        return errors[0] if errors and all(errors) else None

    @property
    def loaded(self) -> Loaded | None:
        """The model as a worker loaded it; its context is that of all workers together, its time the longest."""
        every = [loaded for engine in self.engines if (loaded := engine.loaded)]
        if not every:
            return None
        sizes = [one.limits for one in every]
        n_ctx, n_ctx_seq = sum(one.n_ctx for one in sizes), min(one.n_ctx_seq for one in sizes)
        limits = dataclasses.replace(sizes[0], n_ctx=n_ctx, n_ctx_seq=n_ctx_seq)
        return dataclasses.replace(every[0], limits=limits, load_ms=max(one.load_ms for one in every))

    @property
    def stats(self) -> Snapshot:
        """Counters over all workers so far, and what is so now."""
        every = (dataclasses.astuple(engine.stats) for engine in self.engines)
        return Snapshot(*map(sum, zip(*every, strict=True)))

    @property
    def restarts(self) -> int:
        """How many workers crashed or hung and were replaced."""
        return sum(engine.restarts for engine in self.engines)

    @property
    def progress(self) -> float:
        """How much of the language model the slowest worker that lives has loaded, from 0 to 1."""
        return min((engine.progress for engine in self.engines if engine.error is None), default=0.0)

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

    def wake(self, *, low: bool = False) -> None:
        """See `WorkerEngine.wake`; all workers, as nobody knows which one will be asked."""
        for engine in self.engines:
            engine.wake(low=low)

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> AnswerStream:
        """See `WorkerEngine.submit`."""
        with self._lock:
            chosen = self._choose(prompt, low=options.get("priority", 0) < 0)
        return chosen.submit(prompt, params, **options)

    def close(self) -> None:
        """End all workers at the same time. Twice does no harm."""
        with ThreadPoolExecutor(len(self.engines)) as threads:
            list(threads.map(WorkerEngine.close, self.engines))

    def _choose(self, prompt: Prompt, *, low: bool) -> WorkerEngine:
        ranks = [_RANK[engine.state] for engine in self.engines]
        best = [engine for engine, rank in zip(self.engines, ranks, strict=True) if rank == min(ranks)]
        least = min(best, key=attrgetter("in_flight"))
        if not prompt.images:
            return least
        image = prompt.images[0].sha256
        home = self._homes.pop(image, None)
        crowded = False
        if home is None or home not in best:
            even = low and max(engine.in_flight for engine in best) < least.in_flight + 2 * least.slots
            home = min(best, key=lambda engine: self._given[id(engine)]) if even else least
            self._given[id(home)] += low
        else:
            most = home.slots * (2 if low else 1)
            crowded = home.in_flight > most and home.in_flight >= 2 * least.in_flight
        self._homes[image] = home
        if len(self._homes) > _HOMES:
            del self._homes[next(iter(self._homes))]
        return least if crowded else home

    def _on_change(self, state: State) -> None:
        if state == "failed" and self.error is None:
            errors = {str(engine.error) for engine in self.engines if engine.error is not None}
            log.error("a worker cannot be used any more, the others go on: %s", "; ".join(sorted(errors)))
        self._changed(self.state)
