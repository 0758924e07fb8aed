"""The names users know, and the repository each stands for. Every row says where the repository was found."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from opsin.core.errors import ModelNotFound

_DOCS = "llama.cpp docs/multimodal.md"
_DOCS_OF = "llama.cpp docs/multimodal/"
_TESTS = "llama.cpp tools/mtmd/tests.sh"


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One model by the name users know.

    `quantisation` is the tag looked for when the user gives none; empty means llama.cpp's order (Q4_K_M, Q8_0, the
    first). `llm_file` and `mmproj_file` name files where a repository holds several models. `source` says where the
    repository was found.
    """

    name: str
    title: str
    repo: str
    source: str
    aliases: tuple[str, ...] = ()
    quantisation: str = ""
    llm_file: str | None = None
    mmproj_file: str | None = None


_LLAVA_16 = "https://huggingface.co/cmp-nct/llava-1.6-gguf, named by llama.cpp docs/multimodal/llava.md"

# fmt: off
KNOWN_MODELS: tuple[KnownModel, ...] = (
    KnownModel("llava-1.5-7b", "LLaVA-1.5 7B", "second-state/Llava-v1.5-7B-GGUF", _TESTS, ("llava", "llava-1.5")),
    KnownModel("llava-1.5-13b", "LLaVA-1.5 13B", "mys/ggml_llava-v1.5-13b",
               "llama-cpp-python README.md, and the files at https://huggingface.co/mys/ggml_llava-v1.5-13b/tree/main",
               quantisation="q4_k"),
    KnownModel("llava-1.6-mistral-7b", "LLaVA-1.6 Mistral 7B", "cjpais/llava-1.6-mistral-7b-gguf", _TESTS,
               ("llava-1.6", "llava-1.6-7b", "llava-next")),
    KnownModel("llava-1.6-vicuna-7b", "LLaVA-1.6 Vicuna 7B", "cmp-nct/llava-1.6-gguf", _LLAVA_16,
               llm_file="vicuna-7b-q5_k.gguf", mmproj_file="mmproj-vicuna7b-f16.gguf"),
    KnownModel("llava-1.6-vicuna-13b", "LLaVA-1.6 Vicuna 13B", "cmp-nct/llava-1.6-gguf", _LLAVA_16, ("llava-1.6-13b",),
               llm_file="vicuna-13b-q5_k.gguf", mmproj_file="mmproj-vicuna13b-f16.gguf"),
    KnownModel("smolvlm2-2.2b", "SmolVLM2 2.2B", "ggml-org/SmolVLM2-2.2B-Instruct-GGUF", _DOCS,
               ("smolvlm2", "smolvlm")),
    KnownModel("smolvlm2-500m", "SmolVLM2 500M", "ggml-org/SmolVLM2-500M-Video-Instruct-GGUF", _DOCS),
    KnownModel("smolvlm2-256m", "SmolVLM2 256M", "ggml-org/SmolVLM2-256M-Video-Instruct-GGUF", _DOCS),
    KnownModel("qwen2.5-vl-3b", "Qwen2.5-VL 3B", "ggml-org/Qwen2.5-VL-3B-Instruct-GGUF", _DOCS, ("qwen2.5-vl",)),
    KnownModel("qwen2.5-vl-7b", "Qwen2.5-VL 7B", "ggml-org/Qwen2.5-VL-7B-Instruct-GGUF", _DOCS),
    KnownModel("qwen2.5-vl-32b", "Qwen2.5-VL 32B", "ggml-org/Qwen2.5-VL-32B-Instruct-GGUF", _DOCS),
    KnownModel("qwen2.5-vl-72b", "Qwen2.5-VL 72B", "ggml-org/Qwen2.5-VL-72B-Instruct-GGUF", _DOCS),
    KnownModel("qwen3-vl-2b", "Qwen3-VL 2B", "ggml-org/Qwen3-VL-2B-Instruct-GGUF", _TESTS),
    KnownModel("qwen3-vl-4b", "Qwen3-VL 4B", "Qwen/Qwen3-VL-4B-Instruct-GGUF",
               "https://github.com/calcuis/gguf/issues/48", ("qwen3-vl", "qwen-vl")),
    KnownModel("qwen3-vl-8b", "Qwen3-VL 8B", "Qwen/Qwen3-VL-8B-Instruct-GGUF",
               "listed at https://huggingface.co/osintify/activity/all"),
    KnownModel("gemma-3-4b", "Gemma 3 4B", "ggml-org/gemma-3-4b-it-GGUF", _DOCS, ("gemma-3", "gemma")),
    KnownModel("gemma-3-12b", "Gemma 3 12B", "ggml-org/gemma-3-12b-it-GGUF", _DOCS),
    KnownModel("gemma-3-27b", "Gemma 3 27B", "ggml-org/gemma-3-27b-it-GGUF", _DOCS),
    KnownModel("internvl3-1b", "InternVL3 1B", "ggml-org/InternVL3-1B-Instruct-GGUF", _DOCS),
    KnownModel("internvl3-2b", "InternVL3 2B", "ggml-org/InternVL3-2B-Instruct-GGUF", _DOCS, ("internvl3", "internvl")),
    KnownModel("internvl3-8b", "InternVL3 8B", "ggml-org/InternVL3-8B-Instruct-GGUF", _DOCS),
    KnownModel("internvl3-14b", "InternVL3 14B", "ggml-org/InternVL3-14B-Instruct-GGUF", _DOCS),
    KnownModel("paddleocr-vl", "PaddleOCR-VL 1.5", "PaddlePaddle/PaddleOCR-VL-1.5-GGUF",
               "https://github.com/ggml-org/llama.cpp/pull/18825", ("paddleocr", "paddleocr-vl-1.5")),
    KnownModel("deepseek-ocr", "DeepSeek-OCR", "ggml-org/DeepSeek-OCR-GGUF", _TESTS),
    KnownModel("kimi-vl", "Kimi-VL A3B Thinking", "ggml-org/Kimi-VL-A3B-Thinking-2506-GGUF", _TESTS,
               ("kimi-vl-a3b", "kimi")),
    KnownModel("kimi-k2.5", "Kimi K2.5", "bartowski/moonshotai_Kimi-K2.5-GGUF",
               "https://github.com/ikawrakow/ik_llama.cpp/pull/1280"),
    KnownModel("glm-4.6v-flash", "GLM-4.6V Flash", "ggml-org/GLM-4.6V-Flash-GGUF", _TESTS,
               ("glm-4v", "glm-4.1v", "glm")),
    KnownModel("glm-4.6v", "GLM-4.6V", "ggml-org/GLM-4.6V-GGUF", "llama.cpp tests/test-gguf-model-data.cpp"),
    KnownModel("minicpm-v-2.6", "MiniCPM-V 2.6", "openbmb/MiniCPM-V-2_6-gguf", _DOCS_OF + "minicpmv2.6.md"),
    KnownModel("minicpm-v-4", "MiniCPM-V 4", "openbmb/MiniCPM-V-4-gguf", _DOCS_OF + "minicpmv4.0.md"),
    KnownModel("minicpm-v-4.5", "MiniCPM-V 4.5", "openbmb/MiniCPM-V-4_5-gguf", _DOCS_OF + "minicpmv4.5.md",
               ("minicpm-v", "minicpm")),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a user asked for: a repository, a quantisation tag ("" for none) and, when it is one we know, its row."""

    repo: str
    tag: str = ""
    known: KnownModel | None = None

    @property
    def name(self) -> str:
        """What a user would type to get this again."""
        base = self.known.name if self.known else f"hf:{self.repo}"
        return f"{base}:{self.tag}" if self.tag else base


_REPO = re.compile(r"[\w-]+(?:\.[\w-]+)*/[\w-]+(?:\.[\w-]+)*", re.ASCII)


def is_known(text: str) -> bool:
    """Whether `look_up` knows the name without asking a hub."""
    return _normal(text.partition(":")[0]) in _NAMES


def look_up(text: str) -> Wanted:
    """Understand NAME, NAME:QUANT, hf:OWNER/NAME or hf:OWNER/NAME:QUANT.

    Names are forgiving about case, dashes, dots and a v before a number. Raises ModelNotFound with the nearest names.
    """
    base, _, tag = text.removeprefix("hf:").partition(":")
    if text.startswith("hf:"):
        if not _REPO.fullmatch(base):
            raise ModelNotFound(f"{text!r} names no repository: write hf:OWNER/NAME or hf:OWNER/NAME:QUANT")
        row = next((row for row in KNOWN_MODELS if row.repo.lower() == base.lower() and row.llm_file is None), None)
        return Wanted(base, tag, row)
    row = _NAMES.get(_normal(base))
    if row is not None:
        return Wanted(row.repo, tag, row)
    if _REPO.fullmatch(base):
        raise ModelNotFound(f"there is no file or known model {base!r}: for a repository write hf:{text}")
    near = get_close_matches(_normal(base), _NAMES, n=3, cutoff=0.5)
    names = sorted({_NAMES[name].name for name in near}) or ["llava-1.5-7b", "smolvlm2-2.2b", "qwen3-vl-4b"]
    raise ModelNotFound(
        f"there is no file or known model {base!r}: did you mean {' or '.join(names)}?"
        " `opsin models --known` lists all names, and hf:OWNER/NAME takes any repository"
    )


def _normal(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"v(?=\d)", "", plain)


_NAMES: dict[str, KnownModel] = {
    _normal(name): row for row in KNOWN_MODELS for name in (row.name, row.title, *row.aliases)
}
