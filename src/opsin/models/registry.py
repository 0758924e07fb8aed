"""The names users know, and the repository each stands for. Every row has a comment that says where it was found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from opsin.core.errors import ModelNotFound
from opsin.models.gguf import best_model, best_projectors


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One model by the name users know. The files are named where a repository holds several models.

    `quantisation` is the tag looked for when the user gives none; empty means llama.cpp's order.
    """

    name: str
    title: str
    repo: str
    aliases: tuple[str, ...] = ()
    quantisation: str = ""
    llm_file: str | None = None
    mmproj_file: str | None = None


# fmt: off
KNOWN_MODELS: tuple[KnownModel, ...] = (
    # llama.cpp docs/multimodal.md
    KnownModel("smolvlm2-2.2b", "SmolVLM2 2.2B", "ggml-org/SmolVLM2-2.2B-Instruct-GGUF", ("smolvlm2", "smolvlm")),
    KnownModel("smolvlm2-500m", "SmolVLM2 500M", "ggml-org/SmolVLM2-500M-Video-Instruct-GGUF"),
    KnownModel("smolvlm2-256m", "SmolVLM2 256M", "ggml-org/SmolVLM2-256M-Video-Instruct-GGUF"),
    KnownModel("qwen2.5-vl-3b", "Qwen2.5-VL 3B", "ggml-org/Qwen2.5-VL-3B-Instruct-GGUF", ("qwen2.5-vl",)),
    KnownModel("qwen2.5-vl-7b", "Qwen2.5-VL 7B", "ggml-org/Qwen2.5-VL-7B-Instruct-GGUF"),
    KnownModel("qwen2.5-vl-32b", "Qwen2.5-VL 32B", "ggml-org/Qwen2.5-VL-32B-Instruct-GGUF"),
    KnownModel("qwen2.5-vl-72b", "Qwen2.5-VL 72B", "ggml-org/Qwen2.5-VL-72B-Instruct-GGUF"),
    KnownModel("gemma-3-4b", "Gemma 3 4B", "ggml-org/gemma-3-4b-it-GGUF", ("gemma-3", "gemma")),
    KnownModel("gemma-3-12b", "Gemma 3 12B", "ggml-org/gemma-3-12b-it-GGUF"),
    KnownModel("gemma-3-27b", "Gemma 3 27B", "ggml-org/gemma-3-27b-it-GGUF"),
    KnownModel("internvl3-1b", "InternVL3 1B", "ggml-org/InternVL3-1B-Instruct-GGUF"),
    KnownModel("internvl3-2b", "InternVL3 2B", "ggml-org/InternVL3-2B-Instruct-GGUF", ("internvl3", "internvl")),
    KnownModel("internvl3-8b", "InternVL3 8B", "ggml-org/InternVL3-8B-Instruct-GGUF"),
    KnownModel("internvl3-14b", "InternVL3 14B", "ggml-org/InternVL3-14B-Instruct-GGUF"),
    # llama.cpp tools/mtmd/tests.sh; glm-4.6v: llama.cpp tests/test-gguf-model-data.cpp
    KnownModel("llava-1.5-7b", "LLaVA-1.5 7B", "second-state/Llava-v1.5-7B-GGUF", ("llava", "llava-1.5")),
    KnownModel("llava-1.6-mistral-7b", "LLaVA-1.6 Mistral 7B", "cjpais/llava-1.6-mistral-7b-gguf",
               ("llava-1.6", "llava-1.6-7b", "llava-next")),
    KnownModel("qwen3-vl-2b", "Qwen3-VL 2B", "ggml-org/Qwen3-VL-2B-Instruct-GGUF"),
    KnownModel("deepseek-ocr", "DeepSeek-OCR", "ggml-org/DeepSeek-OCR-GGUF"),
    KnownModel("kimi-vl", "Kimi-VL A3B Thinking", "ggml-org/Kimi-VL-A3B-Thinking-2506-GGUF", ("kimi-vl-a3b", "kimi")),
    KnownModel("glm-4.6v-flash", "GLM-4.6V Flash", "ggml-org/GLM-4.6V-Flash-GGUF", ("glm-4v", "glm-4.1v", "glm")),
    KnownModel("glm-4.6v", "GLM-4.6V", "ggml-org/GLM-4.6V-GGUF"),
    # llama.cpp docs/multimodal/: minicpmv2.6.md, minicpmv4.0.md, minicpmv4.5.md, llava.md
    KnownModel("minicpm-v-2.6", "MiniCPM-V 2.6", "openbmb/MiniCPM-V-2_6-gguf"),
    KnownModel("minicpm-v-4", "MiniCPM-V 4", "openbmb/MiniCPM-V-4-gguf"),
    KnownModel("minicpm-v-4.5", "MiniCPM-V 4.5", "openbmb/MiniCPM-V-4_5-gguf", ("minicpm-v", "minicpm")),
    KnownModel("llava-1.6-vicuna-7b", "LLaVA-1.6 Vicuna 7B", "cmp-nct/llava-1.6-gguf",
               llm_file="vicuna-7b-q5_k.gguf", mmproj_file="mmproj-vicuna7b-f16.gguf"),
    KnownModel("llava-1.6-vicuna-13b", "LLaVA-1.6 Vicuna 13B", "cmp-nct/llava-1.6-gguf", ("llava-1.6-13b",),
               llm_file="vicuna-13b-q5_k.gguf", mmproj_file="mmproj-vicuna13b-f16.gguf"),
    # llama-cpp-python's README.md; calcuis/gguf issue 48; huggingface.co/osintify/activity/all
    KnownModel("llava-1.5-13b", "LLaVA-1.5 13B", "mys/ggml_llava-v1.5-13b", quantisation="q4_k"),
    KnownModel("qwen3-vl-4b", "Qwen3-VL 4B", "Qwen/Qwen3-VL-4B-Instruct-GGUF", ("qwen3-vl", "qwen-vl")),
    KnownModel("qwen3-vl-8b", "Qwen3-VL 8B", "Qwen/Qwen3-VL-8B-Instruct-GGUF"),
    # ggml-org/llama.cpp pull request 18825; ikawrakow/ik_llama.cpp pull request 1280
    KnownModel("paddleocr-vl", "PaddleOCR-VL 1.5", "PaddlePaddle/PaddleOCR-VL-1.5-GGUF",
               ("paddleocr", "paddleocr-vl-1.5")),
    KnownModel("kimi-k2.5", "Kimi K2.5", "bartowski/moonshotai_Kimi-K2.5-GGUF"),
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

    def files_of(self, files: Sequence[str]) -> tuple[str | None, str | None]:
        """Language model and projector that are meant among the repository's files; None for one that is not there."""
        row = self.known
        if row and row.llm_file and not self.tag:
            llm, mmproj = (name if name in files else None for name in (row.llm_file, row.mmproj_file))
            return llm, mmproj
        llm = best_model(files, self.tag or (row.quantisation if row else "")) or (
            None if self.tag else best_model(files)
        )
        return llm, next(iter(best_projectors(files, llm)), None) if llm else None


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
    names = sorted({_NAMES[name].name for name in near}) or ["llava-1.5-7b", "qwen3-vl-4b"]
    raise ModelNotFound(
        f"there is no file or known model {base!r}: did you mean {' or '.join(names)}?"
        " `opsin models --known` lists all names, and hf:OWNER/NAME takes any repository"
    )


def _normal(name: str) -> str:
    return re.sub(r"v(?=\d)", "", re.sub(r"[^a-z0-9]", "", name.lower()))


_NAMES: dict[str, KnownModel] = {
    _normal(name): row for row in KNOWN_MODELS for name in (row.name, row.title, *row.aliases)
}
