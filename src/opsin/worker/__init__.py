"""An engine in a process of its own, behind the engine's own interface; and processes that decode images.

For: whoever must outlive llama.cpp (the server, batch jobs, `Opsin(isolated=True)`). Refuses to know HTTP; this file,
`client` and `pool` import nothing native, so that the process in front stays small.
"""

from opsin.engine.stream import AnswerStream
from opsin.worker.client import ImageBlocked, NotReady, WorkerEngine
from opsin.worker.decoders import DecoderPool
from opsin.worker.messages import ENDING, Loaded, share
from opsin.worker.pool import WorkerPool, may_have_gpus, open_workers

__all__ = [
    "ENDING",
    "AnswerStream",
    "DecoderPool",
    "ImageBlocked",
    "Loaded",
    "NotReady",
    "WorkerEngine",
    "WorkerPool",
    "may_have_gpus",
    "open_workers",
    "share",
]
