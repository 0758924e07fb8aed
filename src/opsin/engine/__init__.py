"""Continuous batching: from a prompt to a stream of events, with a clock on every stage.

Refuses to know llama.cpp, files, templates, HTTP and the terminal; it runs on whatever implements core.backend.
"""

from opsin.engine.engine import Engine
from opsin.engine.policy import Policy
from opsin.engine.runner import Watch, unwatched
from opsin.engine.stats import Snapshot
from opsin.engine.stream import AnswerStream, Wake, wake_readers

__all__ = ["AnswerStream", "Engine", "Policy", "Snapshot", "Wake", "Watch", "unwatched", "wake_readers"]
