"""The only room that may import `ctypes` or `llama_cpp`: llama.cpp and mtmd behind `core.backend.Backend`.

It turns parts into tokens and chunks, images into embeddings, batches into logits and logits into tokens, and says
where the computing happened. Every call that could end the process is checked before it is made.

Refuses to know: requests, schedules, prompts and templates, files other than the two of a pair, and HTTP.
"""

from opsin.native.backend import NativeBackend, open_backend

__all__ = ["NativeBackend", "open_backend"]
