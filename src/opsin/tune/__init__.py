"""Settings measured on this machine, and times predicted for others.

For: an opsin.toml that is faster than none, and an honest guess before a model is downloaded. It refuses to know
llama.cpp and the terminal: whoever can open an engine with given settings can have it tuned.
"""

__all__: list[str] = []
