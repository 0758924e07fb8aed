"""The one exception tree. Every message is one plain sentence that says what is wrong and how to mend it.

A class says how a command ends (`exit_code`) and what a server answers (`http_status`); what it doesn't say is its
parent's. Exit codes: 1 anything else, 2 bad input, 3 the model, 4 the engine, 130 interrupted.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

E = TypeVar("E", bound=BaseException)


class OpsinError(Exception):
    """Root of the tree: `code` is stable for machines, the message is for people."""

    code: ClassVar[str] = "opsin_error"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500


class BadInput(OpsinError):
    """What the caller handed in cannot be used."""

    code = "bad_input"
    exit_code = 2
    http_status = 400


class BadParameter(BadInput):
    """An option or a field is out of range, or not supported."""

    code = "bad_parameter"


class BadPicture(BadInput):
    """The bytes are no picture that can be read."""

    code = "bad_picture"


class PictureTooLarge(BadPicture):
    """The picture is over the limit on bytes or pixels."""

    code = "picture_too_large"
    http_status = 413


class PictureUnsupported(BadPicture):
    """A kind of file that is refused by name: PDF, video, audio."""

    code = "picture_unsupported"
    http_status = 415


class FetchFailed(BadInput):
    """The picture's address cannot be read."""

    code = "fetch_failed"


class BadPrompt(BadInput):
    """The messages do not fit the model's template."""

    code = "bad_prompt"


class BadGrammar(BadInput):
    """A JSON schema or a GBNF grammar cannot be used."""

    code = "bad_grammar"


class ContextOverflow(BadInput):
    """The prompt can never fit the context."""

    code = "context_overflow"


class ModelError(OpsinError):
    """The model cannot be used."""

    code = "model_error"
    exit_code = 3


class ModelNotFound(ModelError):
    """No model file or model name like this."""

    code = "model_not_found"
    http_status = 404


class ModelUnreadable(ModelError):
    """Not a GGUF file, or one that llama.cpp refuses."""

    code = "model_unreadable"


class PairMismatch(ModelError):
    """The language model and the projector do not belong together."""

    code = "pair_mismatch"


class NativeMismatch(ModelError):
    """The llama-cpp-python installed is not the one Opsin was built for."""

    code = "native_mismatch"


class DownloadFailed(ModelError):
    """A model could not be downloaded."""

    code = "download_failed"
    http_status = 502


class EngineError(OpsinError):
    """The engine could not do its work."""

    code = "engine_error"
    exit_code = 4


class EngineDied(EngineError):
    """The engine's thread ended: nothing more can be asked of it."""

    code = "engine_died"
    http_status = 503


class EngineClosed(EngineError):
    """The engine was closed."""

    code = "engine_closed"
    http_status = 503


class EncodeFailed(EngineError):
    """The vision encoder failed on a picture."""

    code = "encode_failed"


class DecodeFailed(EngineError):
    """The language model failed on a batch."""

    code = "decode_failed"


class ConstraintFailed(EngineError):
    """An answer that had begun could not be held to its JSON schema or grammar any further."""

    code = "constraint_failed"
    http_status = 422


class QueueFull(EngineError):
    """Too many requests wait already."""

    code = "queue_full"
    http_status = 429


class Cancelled(OpsinError):
    """The caller went away, and the answer with it."""

    code = "cancelled"
    exit_code = 130
    http_status = 499


def again(error: E) -> E:
    """The same error unraised: one that was raised holds the frames it went through, with all that is in them."""
    # Ours are made of their sentence alone; of others nobody knows.
    return type(error)(*error.args) if isinstance(error, OpsinError) else error
