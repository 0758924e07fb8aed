"""The command line: one command a file, nothing heavy at import.

Refuses to decide anything: it reads options, calls the rooms, prints, and turns errors into exit codes.
"""
