"""llama-cpp-python's `Llama` and chat handlers on Opsin's engine: change the import, keep the program.

Refuses to know llama.cpp, and refuses by name options that would change an answer and that Opsin does not have.
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
    "Gemma4ChatHandler", "Llama", "Llama3VisionAlpha", "Llama3VisionAlphaChatHandler", "LlamaGrammar",
    "Llava15ChatHandler", "Llava16ChatHandler", "MTMDChatHandler", "MiniCPMv26ChatHandler", "MoondreamChatHandler",
    "NanoLlavaChatHandler", "ObsidianChatHandler", "Qwen25VLChatHandler",
]  # fmt: skip
