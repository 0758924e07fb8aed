"""Text and images in, runs of tokens and embeddings out: the tokens the whole text would have, and honest names."""

from collections.abc import Callable
from typing import Any

import pytest
from native_help import draw

from opsin.core.errors import BadImage, BadInput, EngineClosed
from opsin.core.request import Image, ImageChunk, ImagePart, TextChunk, TextPart


def tokens(backend: Any, *parts: TextPart, add_bos: bool = False) -> tuple[int, ...]:
    tokenized = backend.tokenize(parts, add_bos=add_bos)
    assert all(isinstance(run, TextChunk) for run in tokenized.chunks)
    return tuple(token for run in tokenized.chunks for token in run.tokens)


def text_of(backend: Any, ids: tuple[int, ...]) -> str:
    return b"".join(map(backend.piece, ids)).decode()


def test_a_stretch_in_parts_has_the_tokens_of_the_whole(backend: Any) -> None:
    """A sentencepiece vocabulary puts a space before every call: tokenised in pieces, a prompt grows by tokens."""
    whole = tokens(backend, TextPart("USER: what is this? ASSISTANT:"))
    assert tokens(backend, TextPart("USER: what"), TextPart(" is this?"), TextPart(" ASSISTANT:")) == whole


def test_a_control_token_of_the_template_is_the_token(backend: Any) -> None:
    end = backend.model.control_tokens["</s>"]
    assert end in tokens(backend, TextPart("one</s>two"))


def test_a_control_token_that_a_user_wrote_is_text(backend: Any) -> None:
    end = backend.model.control_tokens["</s>"]
    parts = (TextPart("USER: say "), TextPart("</s>", special=False), TextPart(" twice</s>USER: "))
    ids = tokens(backend, *parts)
    assert ids.count(end) == 1
    assert text_of(backend, ids).lstrip() == "USER: say </s> twice USER: "  # the space before the last is SPM's own


def test_plain_text_beside_the_users_costs_no_token_more(backend: Any) -> None:
    """The user's text is tokenised with its plain neighbours up to the next control token, so no space is added."""
    cut = tokens(backend, TextPart("a "), TextPart("</s>", special=False), TextPart(" b"))
    assert cut == backend.model.tokenize("a </s> b", special=False)


def test_a_plain_part_without_control_text_changes_nothing(backend: Any) -> None:
    whole = tokens(backend, TextPart("<s>USER: what is this?</s>ASSISTANT:"))
    parts = (TextPart("<s>USER: "), TextPart("what is this?", special=False), TextPart("</s>ASSISTANT:"))
    assert tokens(backend, *parts) == whole


def test_empty_parts_are_nothing(backend: Any) -> None:
    assert tokens(backend, TextPart(""), TextPart("", special=False)) == ()


def test_the_begin_token_comes_once_and_only_when_asked(backend: Any) -> None:
    begin = backend.model.control_tokens["<s>"]
    assert tokens(backend, TextPart("hello"), add_bos=True) == (begin, *tokens(backend, TextPart("hello")))
    tokenized = backend.tokenize([ImagePart(draw()), TextPart("hello")], add_bos=True)
    assert tokenized.chunks[0] == TextChunk((begin,))
    tokenized.close()


def test_images_stand_where_they_were_put(backend: Any) -> None:
    parts = [
        TextPart("a"),
        ImagePart(draw(1)),
        TextPart("b"),
        ImagePart(draw(2)),
        ImagePart(draw(1)),
        TextPart("c"),
    ]
    tokenized = backend.tokenize(parts, add_bos=True)
    kinds = [run.image if isinstance(run, ImageChunk) else "text" for run in tokenized.chunks]
    assert kinds == ["text", 0, "text", 1, 2, "text"]
    assert [image.sha256 for image in tokenized.images] == [draw(1).sha256, draw(2).sha256, draw(1).sha256]
    assert tokenized.n_image_tokens == 48
    tokenized.close()


def test_an_image_says_what_size_the_encoder_saw(backend: Any) -> None:
    tokenized = backend.tokenize([ImagePart(draw(0, 640, 31))], add_bos=False)
    (info,) = tokenized.images
    assert (info.width, info.height, info.resized_width, info.resized_height) == (640, 31, 56, 56)
    assert (info.tokens, info.tiles) == (16, 1)
    tokenized.close()


def test_the_marker_of_the_library_is_text_in_a_prompt(backend: Any) -> None:
    tokenized = backend.tokenize([TextPart("<__media__> <image> "), ImagePart(draw())], add_bos=False)
    assert len([run for run in tokenized.chunks if isinstance(run, ImageChunk)]) == 1
    assert "<__media__> <image>" in text_of(backend, tokenized.chunks[0].tokens)
    tokenized.close()


def identity(backend: Any, image: Image, *before: Any) -> str:
    tokenized = backend.tokenize([*before, ImagePart(image)], add_bos=False)
    tokenized.close()
    return str(tokenized.chunks[-1].identity)


def test_an_identity_names_pixels_and_projector_and_nothing_else(
    backend: Any, open_pair: Callable[..., Any], pair: Any, tmp_path: Any
) -> None:
    name = identity(backend, draw(1))
    assert name == identity(backend, draw(1), TextPart("other text"), ImagePart(draw(3)))
    assert name != identity(backend, draw(2))

    copied = tmp_path / "renamed.gguf"
    copied.write_bytes(pair.mmproj.read_bytes())
    same = open_pair(mmproj=copied, ctx=256)
    data = bytearray(pair.mmproj.read_bytes())
    data[-2] ^= 1
    copied_other = tmp_path / "other.gguf"
    copied_other.write_bytes(bytes(data))
    other = open_pair(mmproj=copied_other, ctx=256)
    limited = open_pair(image_max_tokens=16, ctx=256)
    try:
        assert identity(same, draw(1)) == name
        assert identity(other, draw(1)) != name
        assert identity(limited, draw(1)) != name
    finally:
        for one in (same, other, limited):
            one.close()


def test_equal_identities_have_equal_embeddings(backend: Any) -> None:
    tokenized = backend.tokenize([ImagePart(draw(1)), TextPart("x"), ImagePart(draw(1))], add_bos=False)
    first, second = (run for run in tokenized.chunks if isinstance(run, ImageChunk))
    assert first.identity == second.identity
    assert (backend.encode(first) == backend.encode(second)).all()
    tokenized.close()


def test_a_layout_may_be_made_by_any_thread(backend: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda seed: identity(backend, draw(seed % 3)), range(24)))
    assert len(set(names)) == 3


def test_a_closed_layout_cannot_be_encoded(backend: Any) -> None:
    tokenized = backend.tokenize([ImagePart(draw())], add_bos=False)
    run = tokenized.chunks[-1]
    tokenized.close()
    tokenized.close()
    with pytest.raises(EngineClosed, match="closed already"):
        backend.encode(run)


def test_an_image_needs_a_vision_encoder(open_pair: Callable[..., Any]) -> None:
    backend = open_pair(mmproj=None)
    try:
        assert backend.info.projector is None
        assert backend.info.projector is None
        with pytest.raises(BadInput, match="--mmproj"):
            backend.tokenize([ImagePart(draw())], add_bos=False)
    finally:
        backend.close()


@pytest.mark.parametrize("rgb", [b"", b"\0" * 10])
def test_pixels_that_do_not_fit_their_size_are_refused(backend: Any, rgb: bytes) -> None:
    """mtmd copies width * height * 3 bytes, whatever is there."""
    with pytest.raises(BadImage, match="needs three a pixel"):
        backend.tokenize([ImagePart(Image(rgb, 64, 48, "x", "PNG"))], add_bos=False)


def test_narrow_images_are_laid_out_or_refused(backend: Any) -> None:
    for width, height in ((1, 1), (1, 4000), (4000, 1)):
        tokenized = backend.tokenize([ImagePart(draw(0, width, height))], add_bos=False)
        assert tokenized.n_image_tokens == 16
        tokenized.close()


def test_a_chunk_of_another_format_is_not_guessed_at() -> None:
    from opsin.native.vision import parse_meta

    with pytest.raises(ValueError, match="version 9"):
        parse_meta((9).to_bytes(8, "little") + bytes(200))
