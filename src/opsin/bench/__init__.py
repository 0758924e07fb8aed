"""Measures speed: five workloads, the machine's own limits, and the cost of a token beside the model.

Refuses to know llama.cpp and the terminal.
"""

from opsin.bench.cost import Ceiling, read_cost
from opsin.bench.drivers import EngineDriver, HttpDriver, serving
from opsin.bench.workloads import Workload, choose, image_file, measure_in_turn, warm_up

__all__ = [
    "Ceiling",
    "EngineDriver",
    "HttpDriver",
    "Workload",
    "choose",
    "image_file",
    "measure_in_turn",
    "read_cost",
    "serving",
    "warm_up",
]
