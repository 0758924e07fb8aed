"""llama-cpp-python's `Llama` and chat handlers on Opsin's engine: change the import, keep the program.

For: programs written after llama-cpp-python's own examples for pictures. It refuses to know llama.cpp, and it refuses
options by name that would change an answer and that Opsin does not have; none is taken and passed over.
"""

from opsin.compat.handlers import (
    Gemma4ChatHandler,
    Llama3VisionAlpha,
    Llama3VisionAlphaChatHandler,
    Llava15ChatHandler,
    Llava16ChatHandler,
    MiniCPMv26ChatHandler,
    MoondreamChatHandler,
    MTMDChatHandler,
    NanoLlavaChatHandler,
    ObsidianChatHandler,
    Qwen25VLChatHandler,
)
from opsin.compat.llama import Llama
from opsin.compat.options import LlamaGrammar

__all__ = [
    "Gemma4ChatHandler",
    "Llama",
    "Llama3VisionAlpha",
    "Llama3VisionAlphaChatHandler",
    "LlamaGrammar",
    "Llava15ChatHandler",
    "Llava16ChatHandler",
    "MTMDChatHandler",
    "MiniCPMv26ChatHandler",
    "MoondreamChatHandler",
    "NanoLlavaChatHandler",
    "ObsidianChatHandler",
    "Qwen25VLChatHandler",
]
