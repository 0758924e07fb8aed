"""Logs of llama.cpp's tools in, causes with their arithmetic out: text → facts → stages → causes.

Refuses to load a model, to measure, and to guess a number that the log does not hold.
"""

from opsin.doctor.explain.report import Explanation, explain

__all__ = ["Explanation", "explain"]
