"""The one exception tree. Every message is one plain sentence that says what is wrong and how to mend it.

OpsinError                      exit  HTTP
├── BadInput                       2   400   what the caller handed in cannot be used
│   ├── BadParameter               2   400   an option or field is out of range, or not supported
│   ├── BadPicture                 2   400   the bytes are no picture that can be read
│   │   ├── PictureTooLarge        2   413   over the limit on bytes or pixels
│   │   └── PictureUnsupported     2   415   a kind of file that is refused by name (PDF, video, audio)
│   ├── FetchFailed                2   400   the picture's address cannot be read
│   ├── BadPrompt                  2   400   the messages do not fit the model's template
│   ├── BadGrammar                 2   400   a JSON schema or GBNF grammar cannot be used
│   └── ContextOverflow            2   400   the prompt can never fit the context
├── ModelError                     3   500   the model cannot be used
│   ├── ModelNotFound              3   404   no such file or name
│   ├── ModelUnreadable            3   500   not a GGUF file, or llama.cpp refuses it
│   ├── PairMismatch               3   500   language model and projector do not belong together
│   ├── NativeMismatch             3   500   the llama-cpp-python installed is not the one Opsin was built for
│   └── DownloadFailed             3   502   a model could not be downloaded
├── EngineError                    4   500   the engine could not do its work
│   ├── EngineDied                 4   503   its thread ended; nothing more can be asked
│   ├── EngineClosed               4   503   it was closed
│   ├── EncodeFailed               4   500   the vision encoder failed
│   ├── DecodeFailed               4   500   the language model failed
│   ├── ConstraintFailed           4   422   an answer could not be held to its schema or grammar any further
│   └── QueueFull                  4   429   too many requests wait
└── Cancelled                    130   499   the caller went away
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
