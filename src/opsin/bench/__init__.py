"""Measures speed: five workloads, the machine's own limits, and the cost of a token beside the model.

Refuses to know llama.cpp and the terminal.
"""
