"""Measures speed: five workloads, the machine's own limits, and the cost of a token beside the model.

Refuses to know llama.cpp and the terminal.
"""

from opsin.bench.cost import Ceiling, ModelCost, read_cost
from opsin.bench.drivers import EngineDriver, HttpDriver, serving
from opsin.bench.run import Result, Stats, measure_in_turn, warm_up
from opsin.bench.workloads import WORKLOADS, Ask, Driver, RequestFailed, Workload, choose, image_file

__all__ = [
    "WORKLOADS",
    "Ask",
    "Ceiling",
    "Driver",
    "EngineDriver",
    "HttpDriver",
    "ModelCost",
    "RequestFailed",
    "Result",
    "Stats",
    "Workload",
    "choose",
    "image_file",
    "measure_in_turn",
    "read_cost",
    "serving",
    "warm_up",
]
