"""Continuous batching: from a prompt to a stream of events, with a clock on every stage.

Refuses to know llama.cpp, files, templates, HTTP and the terminal; it runs on whatever implements core.backend.
"""

from opsin.engine.engine import Engine
from opsin.engine.request import AnswerStream

__all__ = ["AnswerStream", "Engine"]
