"""The chat handlers' names: each has its projector file, and knows how its family writes a conversation.

Where a model file ships its own template, or its family's is built into Opsin, that one is used: `template` is None.
llama-cpp-python's own formats drop line breaks behind tags; prompts here are those the models were trained with.
"""

import os
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit
from urllib.request import url2pathname

from opsin.core.errors import BadParameter, ModelNotFound


def _template(name: str) -> str:
    return (Path(__file__).with_name("templates") / f"{name}.jinja").read_text(encoding="utf-8")


class MTMDChatHandler:
    """A projector file, and the model's own template with images where the messages have them.

    `use_gpu` False keeps the vision encoder on the CPU; `verbose` changes nothing. Raises ModelNotFound.
    """

    template: ClassVar[str | None] = None
    images_first: ClassVar[bool] = False
    between: ClassVar[str] = ""

    def __init__(self, clip_model_path: str | os.PathLike[str], verbose: bool = True, use_gpu: bool = True) -> None:
        if not Path(clip_model_path).is_file():
            raise ModelNotFound(f"There is no projector file {os.fspath(clip_model_path)}: check clip_model_path.")
        self.clip_model_path = os.fspath(clip_model_path)
        self.verbose = verbose
        self.use_gpu = use_gpu

    def __init_subclass__(cls) -> None:
        for name in ("CHAT_FORMAT", "DEFAULT_SYSTEM_MESSAGE"):
            if name in vars(cls):
                raise BadParameter(
                    f"{cls.__name__}.{name} is not read by Opsin: set `template` to a chat template whose messages"
                    " have plain texts, with images already in their places."
                )

    def load_image(self, image_url: str) -> object:
        """What stands for an address: a path for `file://`, else the address itself. Subclasses may return bytes."""
        if image_url[:7].lower() == "file://":
            return Path(url2pathname(urlsplit(image_url).path))
        return image_url

    @classmethod
    def from_pretrained(cls, repo_id: str, filename: str | None, **kwargs: Any) -> Self:
        """Download the projector of a repository, as `download` does. Raises ModelNotFound, DownloadFailed."""
        return cls(clip_model_path=download(repo_id, filename, kwargs), **kwargs)


class Llava15ChatHandler(MTMDChatHandler):
    """LLaVA-1.5: images stand before the question, wherever the message has them."""

    images_first = True


class ObsidianChatHandler(Llava15ChatHandler):
    """Obsidian: ChatML whose turns end with three number signs."""

    template = _template("obsidian")


class MoondreamChatHandler(Llava15ChatHandler):
    """Moondream 2: bare questions and answers; it knows no system message."""

    template = _template("moondream")
    between = "\n\nQuestion: "


class NanoLlavaChatHandler(Llava15ChatHandler):
    """nanoLLaVA: ChatML without a line break after a turn."""

    template = _template("nanollava")
    between = "\n"


class Llama3VisionAlphaChatHandler(Llava15ChatHandler):
    """llama-3-vision-alpha: Llama 3's turns."""

    template = _template("llama-3-vision-alpha")


Llama3VisionAlpha = Llama3VisionAlphaChatHandler
# Through their own templates; LLaVA-1.6 in Vicuna's, Mistral's or Yi's format as the file says.
Gemma4ChatHandler = MTMDChatHandler
Qwen25VLChatHandler = MTMDChatHandler
Llava16ChatHandler = Llava15ChatHandler
MiniCPMv26ChatHandler = Llava15ChatHandler


def download(repo_id: str, filename: str | None, options: dict[str, Any]) -> Path:
    """Fetch the one file of a repository that fits `filename` (a name or a pattern); its path.

    llama-cpp-python's download options (`additional_files`, `cache_dir`, `local_dir`) are taken out of `options`.
    Raises ModelNotFound when no file fits or several do, DownloadFailed, BadParameter.
    """
    from opsin.models.hub import Hub

    patterns = (filename, *(options.pop("additional_files", None) or ()))
    cache, links = options.pop("cache_dir", None), options.pop("local_dir_use_symlinks", "auto")
    if options.pop("local_dir", None) is not None or links != "auto":
        raise BadParameter(
            "local_dir is not supported: downloads go to the cache that cache_dir or HF_HUB_CACHE names."
        )
    if not filename:
        raise BadParameter('filename is missing: give a name or a pattern, such as "*Q4_K_M.gguf".')
    hub = Hub.from_environment()
    hub = hub if cache is None else replace(hub, cache=Path(cache))
    files, wanted = hub.list_files(repo_id), []
    for pattern in patterns:
        fitting = [file for file in files if fnmatch(file.path, str(pattern))]
        if len(fitting) != 1:
            there = ", ".join(sorted(file.path for file in fitting or files)[:12])
            found = f"{len(fitting)} files" if fitting else "No file"
            raise ModelNotFound(f"{found} of {repo_id} fit {pattern!r}: name one of {there}.")
        wanted += fitting
    return hub.fetch(wanted)[0]
