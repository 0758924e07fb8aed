"""Files of one or more pages: a TIFF, any image, or a PDF, which is to be drawn in a process that can be stopped."""

import dataclasses
import math
import time
from typing import Any

from opsin.core.errors import BadImage, ImageTooLarge
from opsin.core.image_options import ANY_SIZES, AS_IT_IS, ImageOptions, ImageSizes
from opsin.core.request import Image
from opsin.core.settings import ImageSettings, page_ranges
from opsin.images.decode import OpenImage, make_images, one_sentence
from opsin.images.sniff import is_pdf
from opsin.images.source import check_bytes

_POINTS, _DPI = 72, 300  # a PDF's own units in an inch; and how fine a page is drawn, at most
_EDGE, _SPARE = 1536, 2  # pixels of a page's longer edge where nobody gives a budget; and for one that the model sees
_UNDER = 0.95  # of a budget, so that rounding to whole tokens keeps to it
_MOST = 2  # times the pixels that one image may have, for all pages together
_END = 2048  # last bytes of a PDF, where its end marker stands
_ENCRYPTED = 4  # PDFium's code: FPDF_ERR_PASSWORD


class OpenPages:
    """A file whose pages were counted and chosen as the settings say: `count` of them, with `pixels` in all.

    `options` and `sizes` are those of `load_images`. Raises BadImage and its kinds, also for pages that are not there.
    """

    def __init__(
        self,
        data: bytes,
        settings: ImageSettings,
        options: ImageOptions = AS_IT_IS,
        sizes: ImageSizes = ANY_SIZES,
        name: str = "",
    ) -> None:
        self._drawn = is_pdf(data)
        self._name = name = name or ("The document" if self._drawn else "The image")
        check_bytes(len(data), name, settings)
        self._data, self._settings, self._options, self._sizes = data, settings, options, sizes
        self._file: Any
        if self._drawn:
            self._file, pages = _open(data, name)
        else:
            self._file = OpenImage(data, settings, name)
            pages = self._file.pages if settings.pages else 1
        self._is_document = self._drawn or pages > 1
        self._pages, self._notes = _chosen(pages, settings, name)
        if self._drawn and b"%%EOF" not in data[-_END:]:
            self._notes += ("the end of the PDF is missing, or not at its end: pages may lack something",)
        self.count, self.pixels = len(self._pages), sum(map(self._pixels, self._pages))
        if self.pixels > _MOST * settings.max_pixels:
            raise ImageTooLarge(f"The pages of {name} have {self.pixels:,} pixels together; ask about fewer at a time.")

    def load(self) -> list[Image]:
        """The images, in the order of the pages. Equal files give equal pixels."""
        images = list[Image]()
        for page in self._pages:
            begin = time.perf_counter()
            first, *tiles = self._load(page)
            images += dataclasses.replace(first, decode_ms=(time.perf_counter() - begin) * 1e3), *tiles
        return [dataclasses.replace(images[0], notes=(*images[0].notes, *self._notes)), *images[1:]]

    def _load(self, page: int) -> list[Image]:
        how = self._options, self._sizes
        if not self._is_document:
            return list(self._file.decode(*how))
        if self._drawn:
            with one_sentence(f"page {page} of the PDF", self._name):
                drawn = self._file[page - 1].render(self._scale(page), rev_byteorder=True).to_pil()
            made = make_images(drawn, Image(b"", drawn.width, drawn.height, "", "PDF"), self._name, *how)
        else:
            made = OpenImage(self._data, self._settings, self._name, page).decode(*how)
        return [dataclasses.replace(image, page=page) for image in made]

    def _pixels(self, page: int) -> int:
        if self._drawn:
            scale = self._scale(page)
            return int(math.prod(edge * scale + 1 for edge in self._file.get_page_size(page - 1)))
        image = OpenImage(self._data, self._settings, self._name, page) if self._is_document else self._file
        return int(image.width * image.height)

    def _scale(self, page: int) -> float:
        """Pixels for each point of a page: what the model's budget of tokens makes, or twice what it sees."""
        with one_sentence(f"page {page} of the PDF", self._name):
            width, height = self._file.get_page_size(page - 1)
            longer, budget, most = max(width, height), self._options.budget(self._sizes), self._settings
            if self._options.region or self._options.tiles:
                scale = _DPI / _POINTS
            elif self._sizes.cell and budget:
                scale = self._sizes.cell * math.sqrt(_UNDER * budget / width / height)
            else:
                scale = (_SPARE * self._sizes.edge or _EDGE) / longer
            finest = min(_DPI / _POINTS, most.max_edge / longer, math.sqrt(most.max_pixels / width / height))
            return float(min(scale, finest))


def _chosen(count: int, settings: ImageSettings, name: str) -> tuple[list[int], tuple[str, ...]]:
    """The numbers of the pages that are read, of so many, and notes on those that are not."""
    most = settings.max_pages
    if settings.pages is None:
        left = (f"only the first {most} of {count:,} pages were read: `pages` chooses others",) if count > most else ()
        return list(range(1, min(count, most) + 1)), left
    ranges = page_ranges(settings.pages)
    # A file may claim a million pages, and each range may name all of them: the first one too many ends it.
    asked = (page for first, last in ranges for page in range(first, min(last or count, count) + 1))
    found: dict[int, None] = {}
    for page in asked:
        found[page] = None
        if len(found) > most:
            raise BadImage(
                f"More than {most} pages of {name} are asked for, which is the limit: choose fewer, or raise max_pages."
            )
    pages = list(found)
    has = f"{name} has {count:,} page{'s' * (count != 1)}"
    if not pages:
        raise BadImage(f"{has}, so there is no page {settings.pages}: choose others.")
    missing = any((last or first) > count for first, last in ranges)
    return pages, (f"{has}, so not all of the pages {settings.pages} are there",) if missing else ()


def _open(data: bytes, name: str) -> tuple[Any, int]:
    """The PDF, with what was filled into its form, and its number of pages. Raises BadImage."""
    import pypdfium2

    try:
        pdf = pypdfium2.PdfDocument(data)
        if pdf.get_formtype():
            pdf.init_forms()
    except pypdfium2.PdfiumError as error:
        # PDFium keeps the code of an earlier file where this one has no pages.
        if getattr(error, "err_code", None) == _ENCRYPTED and b"/Encrypt" in data:
            raise BadImage(f"{name} is encrypted with a password; save a copy of it without one.") from None
        raise BadImage(f"{name} is a damaged PDF, or one without pages; get a whole copy, or save it again.") from None
    return pdf, len(pdf)
