"""Settings measured on this machine, and times predicted for others. Knows neither llama.cpp nor the terminal."""

__all__: list[str] = []
