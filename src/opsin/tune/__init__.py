"""Settings measured on this machine, and times predicted for others. Refuses to know llama.cpp and the terminal."""
