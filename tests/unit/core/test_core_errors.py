"""Codes, exit codes and HTTP statuses are a contract: renaming a class must not change them unseen."""

import pytest

from opsin.core import errors

CONTRACT = {
    "OpsinError": ("opsin_error", 1, 500),
    "BadInput": ("bad_input", 2, 400),
    "BadParameter": ("bad_parameter", 2, 400),
    "BadImage": ("bad_image", 2, 400),
    "ImageTooLarge": ("image_too_large", 2, 413),
    "ImageUnsupported": ("image_unsupported", 2, 415),
    "FetchFailed": ("fetch_failed", 2, 400),
    "BadPrompt": ("bad_prompt", 2, 400),
    "BadGrammar": ("bad_grammar", 2, 400),
    "ContextOverflow": ("context_overflow", 2, 400),
    "ModelError": ("model_error", 3, 500),
    "ModelNotFound": ("model_not_found", 3, 404),
    "ModelUnreadable": ("model_unreadable", 3, 500),
    "PairMismatch": ("pair_mismatch", 3, 500),
    "NativeMismatch": ("native_mismatch", 3, 500),
    "DownloadFailed": ("download_failed", 3, 502),
    "EngineError": ("engine_error", 4, 500),
    "EngineDied": ("engine_died", 4, 503),
    "EngineClosed": ("engine_closed", 4, 503),
    "EncodeFailed": ("encode_failed", 4, 500),
    "DecodeFailed": ("decode_failed", 4, 500),
    "QueueFull": ("queue_full", 4, 429),
    "Cancelled": ("cancelled", 130, 499),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_codes_are_those_that_clients_know(name: str) -> None:
    kind = getattr(errors, name)
    assert (kind.code, kind.exit_code, kind.http_status) == CONTRACT[name]


def test_a_copy_of_an_error_has_no_frames() -> None:
    with pytest.raises(errors.BadPrompt) as caught:
        raise errors.BadPrompt("no")
    copy = errors.copy_of(caught.value)
    assert (type(copy), str(copy), copy.__traceback__) == (errors.BadPrompt, "no", None)


@pytest.mark.parametrize(
    ("finding", "sentence"),
    [
        ("Input should be less than or equal to 2", "x must be at most 2"),
        ("List should have at least 1 item after validation, not 0", "x must have at least 1 item, not 0"),
        ("Value error, give one of them.", "x: give one of them"),
    ],
)
def test_what_pydantic_finds_is_said_in_plain_words(finding: str, sentence: str) -> None:
    assert errors.found_wrong("x", finding) == sentence
