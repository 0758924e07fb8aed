"""Checks as data: what this machine and this build can do, and what to change.

Refuses to change anything itself, and to print.
"""
