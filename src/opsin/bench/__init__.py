"""Measures: five workloads, the machine's own limits, and how near the one comes to the other.

For: numbers that can be repeated. It refuses to know llama.cpp and the terminal; whoever can answer a question
about a picture's bytes with a stream of time stamps can be measured.
"""

from opsin.bench.batched import Batched, measure_batched
from opsin.bench.ceiling import Machine, measure_machine
from opsin.bench.cost import ModelCost, read_cost
from opsin.bench.engine_driver import EngineDriver
from opsin.bench.http_driver import HttpDriver
from opsin.bench.measure import Figures, Measured, measure_in_turn, measure_workload
from opsin.bench.report import as_document, as_text
from opsin.bench.workload import WORKLOADS, Ask, Driver, RequestFailed, Workload, choose

__all__ = [
    "WORKLOADS",
    "Ask",
    "Batched",
    "Driver",
    "EngineDriver",
    "Figures",
    "HttpDriver",
    "Machine",
    "Measured",
    "ModelCost",
    "RequestFailed",
    "Workload",
    "as_document",
    "as_text",
    "choose",
    "measure_batched",
    "measure_in_turn",
    "measure_machine",
    "measure_workload",
    "read_cost",
]
