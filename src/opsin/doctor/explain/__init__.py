"""Logs of llama.cpp's tools in, causes with their arithmetic out: text → facts → stages → causes.

Refuses to load a model, to measure, and to guess a number that the log does not hold.
"""

from opsin.doctor.explain.cause import Cause
from opsin.doctor.explain.gather import Facts, gather
from opsin.doctor.explain.report import Explanation, explain
from opsin.doctor.explain.request import Request

__all__ = ["Cause", "Explanation", "Facts", "Request", "explain", "gather"]
