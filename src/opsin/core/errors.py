"""The one exception tree. Every message is one plain sentence that says what is wrong and how to fix it.

A class says how a command ends (`exit_code`) and what a server answers (`http_status`); what it doesn't say is its
parent's. Exit codes: 1 anything else, 2 bad input, 3 the model, 4 the engine, 130 interrupted.
"""

import re
from typing import Any, ClassVar, TypeVar

E = TypeVar("E", bound=BaseException)
_SHOULD = re.compile("^(?:Input|List|String|Value|Dictionary|Tuple|Set|Data) should ")


class OpsinError(Exception):
    """Root of the tree. `code` is stable for machines: the class's name in snake case. The message is for people."""

    code: ClassVar[str] = "opsin_error"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init_subclass__(cls, *, exit_code: int = 0, http_status: int = 0, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "code" not in vars(cls):
            cls.code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        cls.exit_code = exit_code or cls.exit_code
        cls.http_status = http_status or cls.http_status


class BadInput(OpsinError, exit_code=2, http_status=400):
    """What the caller handed in cannot be used."""


class BadParameter(BadInput):
    """An option or a field is out of range, or not supported."""


class BadImage(BadInput):
    """The bytes are no image that can be read."""


class ImageTooLarge(BadImage, http_status=413):
    """The image is over the limit on bytes or pixels."""


class ImageUnsupported(BadImage, http_status=415):
    """A kind of file that is refused by name: an Office document, audio, a video where none can be read."""


class FetchFailed(BadInput):
    """The image's address cannot be read."""


class BadPrompt(BadInput):
    """The messages do not fit the model's template."""


class BadGrammar(BadInput):
    """A JSON schema or a GBNF grammar cannot be used."""


class ContextOverflow(BadInput):
    """The prompt can never fit the context."""


class ModelError(OpsinError, exit_code=3):
    """The model cannot be used."""


class ModelNotFound(ModelError, http_status=404):
    """No model file or model name like this."""


class ModelUnreadable(ModelError):
    """Not a GGUF file, or one that llama.cpp refuses."""


class PairMismatch(ModelError):
    """The language model and the projector do not belong together."""


class NativeMismatch(ModelError):
    """The llama-cpp-python installed is not the one Opsin was built for."""


class DownloadFailed(ModelError, http_status=502):
    """A model could not be downloaded."""


class EngineError(OpsinError, exit_code=4):
    """The engine could not do its work."""


class EngineDied(EngineError, http_status=503):
    """The engine's thread ended: nothing more can be asked of it."""


class EngineClosed(EngineError, http_status=503):
    """The engine was closed."""


class EncodeFailed(EngineError):
    """The vision encoder failed on an image."""


class DecodeFailed(EngineError):
    """The language model failed on a batch."""


class ConstraintFailed(EngineError, exit_code=1, http_status=422):
    """An answer that had begun could not be held to its JSON schema or grammar any further."""


class QueueFull(EngineError, http_status=429):
    """Too many requests wait already."""


class Cancelled(OpsinError, exit_code=130, http_status=499):
    """The caller went away, and the answer with it."""


def copy_of(error: E) -> E:
    """A copy of one of our errors: one that was raised holds the frames it went through, with all that is in them."""
    return type(error)(*error.args) if isinstance(error, OpsinError) else error


def found_wrong(name: str, finding: str) -> str:
    """A sentence without its stop about the value of that name, of what pydantic says is wrong with it."""
    said = finding.removeprefix("Value error, ").replace(" after validation", "").rstrip(".")
    said = said.replace("less than or equal to", "at most").replace("greater than or equal to", "at least")
    must = _SHOULD.sub("must ", said)
    return f"{name}: {said}" if must == said else f"{name} {must}"
