"""The vocabulary every room shares: errors, frozen values, settings, and the protocols the engine needs.

Refuses to know any other room of opsin, llama.cpp, HTTP, the terminal, and the file system.
"""
