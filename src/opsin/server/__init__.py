"""The engine as a service: OpenAI-compatible HTTP, safe by default, every stage in sight, and a web page.

For: whoever speaks HTTP. It refuses to know llama.cpp and how an engine is put together: it is handed a loaded model.
"""
