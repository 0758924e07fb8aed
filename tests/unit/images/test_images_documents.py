"""Documents: which pages are read, at what size, and what is said of those that are not."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import pytest
from pdf_files import RED_SQUARE, TEXT, hostile, pdf
from PIL import Image

from opsin.core.config import checked
from opsin.core.errors import BadImage, BadParameter, ImageTooLarge, ImageUnsupported
from opsin.core.image_options import ANY_SIZES, AS_IT_IS, ImageOptions, ImageSizes
from opsin.core.settings import ImageSettings, VideoSettings, page_ranges
from opsin.images import OpenPages, is_pdf, load_image
from opsin.images.documents import _chosen
from opsin.worker.decoders import load_source

LIMITS, SMALL = ImageSettings(), ImageSizes(edge=50)
MOST = 1536
BLANK = b" "


def tiff(*colours: str, size: tuple[int, int] = (60, 40)) -> bytes:
    file = BytesIO()
    first, *others = (Image.new("RGB", size, colour) for colour in colours)
    first.save(file, "TIFF", save_all=True, append_images=others)
    return file.getvalue()


def test_a_page_is_drawn_at_the_edge_that_is_wanted() -> None:
    (image,) = OpenPages(pdf(RED_SQUARE + b" 0 g " + TEXT), LIMITS, AS_IT_IS, SMALL).load()
    assert (image.width, image.height, image.page, image.format) == (100, 100, 1, "PDF")
    pixels = Image.frombytes("RGB", (100, 100), bytes(image.rgb))
    assert (pixels.getpixel((50, 50)), pixels.getpixel((99, 50))) == ((255, 0, 0), (255, 255, 255))
    assert min(pixels.crop((10, 12, 90, 26)).convert("L").tobytes()) < 100, "no text"
    (wide,) = OpenPages(pdf(RED_SQUARE, box=b"0 0 200 50"), LIMITS, AS_IT_IS, SMALL).load()
    assert (wide.width, wide.height) == (100, 25)


def test_equal_files_give_equal_pixels_and_other_pages_others() -> None:
    data = pdf(RED_SQUARE, TEXT)
    once, again = OpenPages(data, LIMITS).load(), OpenPages(data, LIMITS).load()
    assert [image.sha256 for image in once] == [image.sha256 for image in again]
    assert once[0].sha256 != once[1].sha256


@pytest.mark.parametrize(
    ("text", "pages"),
    [("2", [2]), ("2-3", [2, 3]), ("4-", [4, 5]), ("3, 1", [3, 1]), ("1-2,2-3", [1, 2, 3]), (None, [1, 2, 3, 4, 5])],
)
def test_pages_are_chosen(text: str | None, pages: list[int]) -> None:
    images = OpenPages(pdf(*[RED_SQUARE] * 5), LIMITS.model_copy(update={"pages": text})).load()
    assert [image.page for image in images] == pages
    assert not any(image.notes for image in images)


def test_pages_that_are_left_out_are_named() -> None:
    data = pdf(*[BLANK] * 5)
    images = OpenPages(data, LIMITS.model_copy(update={"max_pages": 2})).load()
    assert [image.page for image in images] == [1, 2]
    assert "first 2 of 5" in images[0].notes[0]
    images = OpenPages(data, LIMITS.model_copy(update={"pages": "4-2000000"})).load()
    assert [image.page for image in images] == [4, 5]
    assert "5 pages" in images[0].notes[0]
    with pytest.raises(BadImage, match="5 pages, so there is no page 6"):
        OpenPages(data, LIMITS.model_copy(update={"pages": "6"}))
    # As often as one may write it, of a file that claims a million pages: the third page ends it.
    with pytest.raises(BadImage, match="More than 2 pages"):
        _chosen(1_000_000, LIMITS.model_copy(update={"pages": ",".join(["1-"] * 300), "max_pages": 2}), "x")
    with pytest.raises(BadImage, match="More than 2 pages"):
        OpenPages(data, LIMITS.model_copy(update={"pages": "1-3", "max_pages": 2}))


@pytest.mark.parametrize("text", ["", "0", "3-1", "x", "1-2-3", "1,,2", "-3", "²", "1" * 10])
def test_what_is_no_list_of_pages_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write it as"):
        page_ranges(text)
    with pytest.raises(BadParameter, match="pages"):
        checked(ImageSettings, {"pages": text})


@pytest.mark.parametrize("why", hostile())
def test_what_cannot_be_read_is_an_error_of_one_sentence(why: str) -> None:
    with pytest.raises(BadImage, match=why) as caught:
        OpenPages(hostile()[why], LIMITS, name="x.pdf").load()
    assert "x.pdf" in str(caught.value)


@pytest.mark.parametrize("box", [b"0 0 1e9 1e9", b"0 0 0 0", b"0 0 1000000 1", b"200 200 0 0", b"/a /b /c /d"])
def test_the_size_of_a_page_never_makes_a_large_image(box: bytes) -> None:
    (image,) = OpenPages(pdf(RED_SQUARE, box=box), LIMITS).load()
    assert max(image.width, image.height) <= MOST


def test_a_document_without_its_end_says_so() -> None:
    data = pdf(RED_SQUARE)
    (image,) = OpenPages(data[: data.index(b"startxref")], LIMITS).load()
    assert "end of the PDF" in image.notes[0]


def test_of_a_tiff_the_first_page_is_read_unless_others_are_asked_for() -> None:
    data = tiff("red", "lime", "blue")
    (first,) = OpenPages(data, LIMITS).load()
    assert first.rgb[:3] == b"\xff\0\0"
    assert first.page is None
    assert "first of 3" in first.notes[0]
    third, second = OpenPages(data, LIMITS.model_copy(update={"pages": "3,2"})).load()
    assert (third.rgb[:3], second.rgb[:3]) == (b"\0\0\xff", b"\0\xff\0")
    assert (third.page, second.page, third.notes) == (3, 2, ())


def test_pages_of_a_tiff_have_no_more_pixels_together_than_two_images() -> None:
    data = tiff("red", "lime", "blue", size=(100, 100))
    few = LIMITS.model_copy(update={"max_pixels": 10_000, "pages": "1-2"})
    assert len(OpenPages(data, few).load()) == 2
    with pytest.raises(ImageTooLarge, match="30,000 pixels together"):
        OpenPages(data, few.model_copy(update={"pages": "1-3"}))


def test_an_image_is_a_document_of_one_page() -> None:
    file = BytesIO()
    Image.new("RGB", (300, 20), "red").save(file, "PNG")
    (image,) = OpenPages(file.getvalue(), LIMITS.model_copy(update={"pages": "1-3"}), name="x.png").load()
    assert (image.width, image.sha256) == (300, load_image(file.getvalue(), LIMITS).sha256)
    assert image.notes == ("x.png has 1 page, so not all of the pages 1-3 are there",)
    with pytest.raises(BadImage, match="1 page"):
        OpenPages(file.getvalue(), LIMITS.model_copy(update={"pages": "2"}))


def test_archives_and_office_documents_are_no_pdf() -> None:
    inside = pdf(RED_SQUARE)
    for data in (b"PK\x03\x04" + inside, b"x" * 257 + b"ustar" + inside, b"\x1f\x8b" + inside):
        assert not is_pdf(data)
    with pytest.raises(ImageUnsupported, match="PDF"):  # which says what is read
        OpenPages(b"PK\x03\x04" + b"\0" * 100, LIMITS, name="letter.docx")
    with pytest.raises(ImageUnsupported, match=r"Opsin\.images"):
        load_image(inside, LIMITS)


def test_a_page_has_the_pixels_that_the_model_wants() -> None:
    def size(box: bytes = b"0 0 600 800", sizes: ImageSizes = ANY_SIZES, **options: Any) -> tuple[int, int]:
        shown = ImageOptions.model_validate(options)
        opened = OpenPages(pdf(RED_SQUARE, box=box), ImageSettings(), shown, sizes)
        image, *_ = opened.load()
        assert image.width * image.height <= opened.pixels
        return image.width, image.height

    keeps = ImageSizes(cell=28, least=4, most=4096)
    assert size() == size(sizes=keeps) == (1152, 1536)
    assert size(sizes=ImageSizes(edge=336)) == (504, 672)
    width, height = size(sizes=keeps, max_tokens=256)
    assert 240 <= width * height / 28**2 <= 256
    assert width / height == pytest.approx(3 / 4, abs=0.02)
    assert size(b"0 0 72 72") == (300, 300), "no finer than 300 dpi"
    assert size(region="0%,0%,50%,50%") == (1250, 1667), "a part is cut out of the finest"


def test_pages_of_what_has_none_are_refused() -> None:
    chosen = LIMITS.model_copy(update={"pages": "2"})
    how = (VideoSettings(), ImageOptions(), lambda: ANY_SIZES)
    with pytest.raises(BadParameter, match="open already"):
        load_source(Image.new("RGB", (8, 8)), chosen, *how, frames=False)
    with pytest.raises(BadParameter, match="a video"):
        load_source("https://example.org/clip.mp4", chosen, *how, frames=False)
