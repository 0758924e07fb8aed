"""An engine in a process of its own, behind the engine's own interface.

For: whoever must outlive llama.cpp (the server, batch jobs, `Opsin(isolated=True)`). Refuses to know HTTP; this file
and `client` import nothing native, so that the process in front stays small.
"""

from opsin.engine.request import AnswerStream
from opsin.worker.client import ImageBlocked, NotReady, WorkerEngine
from opsin.worker.messages import ENDING, Channel, Loaded, Pixels, portable, share, signal_name, start_process

__all__ = [
    "ENDING",
    "AnswerStream", "Channel", "ImageBlocked", "Loaded", "NotReady", "Pixels", "WorkerEngine", "portable", "share",
    "signal_name", "start_process",
]  # fmt: skip
