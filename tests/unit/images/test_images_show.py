"""Parts, tiles and budgets: what the model gets of an image, and where it lies in the file."""

from __future__ import annotations

import math

import numpy as np
import pytest
from image_samples import LIMITS, encode, rgb_of, scene
from PIL import Image
from pydantic import ValidationError

from opsin.core.errors import BadParameter
from opsin.core.image_options import AS_IT_IS, ImageOptions, ImageSizes
from opsin.images import load_image, load_images
from opsin.images.show import size_within

KEEPS = ImageSizes(cell=28, least=8, most=4096)
FIXED = ImageSizes(edge=336)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def upright(size: tuple[int, int], orientation: int) -> tuple[bytes, np.ndarray]:
    """A file that is turned, and its pixels the right way up."""
    pixels = noise(*size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Which turn brings the stored pixels upright is what EXIF says; here the other way round.
    back = {
        1: None,
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
        5: Image.Transpose.TRANSPOSE,
    }[orientation]
    stored = pixels if back is None else pixels.transpose(back)
    return encode(stored, "PNG", exif=exif), np.asarray(pixels)


@pytest.mark.parametrize("cell", [14, 28, 32, 48])
@pytest.mark.parametrize("budget", [1, 7, 64, 280, 1120])
def test_a_size_within_a_budget_is_whole_cells_and_keeps_its_shape(budget: int, cell: int) -> None:
    rng = np.random.default_rng(budget * cell)
    for width, height in [(4000, 3000), (9000, 3), (5, 8000), *rng.integers(1, 6000, (60, 2)).tolist()]:
        across, down = size_within(width, height, budget, cell)
        tokens = math.prod(max(1, int(edge / cell + 0.5)) for edge in (across, down))  # as llama.cpp rounds
        assert tokens <= budget
        assert size_within(across, down, budget, cell) == (across, down)
        if (across, down) == (width, height):
            continue
        assert across % cell == down % cell == 0
        narrow = min(width, height) * math.sqrt(budget / (width * height)) < 1
        if not narrow:  # each edge lost less than one cell
            exact = [edge * cell * math.sqrt(budget / (width * height)) for edge in (width, height)]
            assert all(0 <= one - got < cell for one, got in zip(exact, (across, down), strict=True))


def test_a_budget_shrinks_and_says_where_the_pixels_are_from() -> None:
    file = encode(noise(1200, 900), "PNG")
    image = load_image(file, LIMITS, ImageOptions(max_tokens=100), KEEPS)
    assert (image.width, image.height) == (308, 224)
    assert (image.source_size, image.region) == ((1200, 900), None)
    assert "308 by 224" in image.notes[-1]
    assert image.sha256 == load_image(rgb_of(image), LIMITS).sha256
    whole = load_image(file, LIMITS, ImageOptions(max_tokens=4096), KEEPS)
    assert (whole.width, whole.source_size, whole.notes) == (1200, None, ())
    assert whole.sha256 == load_image(file, LIMITS).sha256 != image.sha256


@pytest.mark.parametrize(
    ("options", "sizes", "budget"),
    [
        (AS_IT_IS, KEEPS, None),
        (ImageOptions(detail="low"), KEEPS, 1024),
        (ImageOptions(detail="low"), ImageSizes(cell=48, most=200), 64),
        (ImageOptions(detail="high"), KEEPS, None),
        (ImageOptions(detail="low", max_tokens=90), KEEPS, 90),
        (ImageOptions(max_tokens=9000), ImageSizes(cell=28, most=700, usual=500), 500),
        (ImageOptions(max_tokens=9000), ImageSizes(cell=28, most=700), 700),
        (ImageOptions(max_tokens=9000), ImageSizes(), 9000),
    ],
)
def test_which_budget_holds(options: ImageOptions, sizes: ImageSizes, budget: int | None) -> None:
    assert options.budget(sizes) == budget


def test_what_a_budget_cannot_do_is_said() -> None:
    image = load_image(noise(640, 480), LIMITS, ImageOptions(max_tokens=4), KEEPS)
    assert "8 tokens or more" in image.notes[-1]
    small = load_image(noise(50, 30), LIMITS, ImageOptions(max_tokens=9), KEEPS)
    assert "8 tokens or more" in small.notes[-1], "it is made larger, to 12 tokens"
    assert load_image(noise(50, 30), LIMITS, ImageOptions(max_tokens=20), KEEPS).notes == ()
    for options in (ImageOptions(max_tokens=4), ImageOptions(detail="low")):
        fixed = load_image(noise(640, 480), LIMITS, options, FIXED)
        assert (fixed.width, len(fixed.notes)) == (640, 1)
        assert "336 by 336" in fixed.notes[0]
    assert load_image(noise(640, 480), LIMITS, ImageOptions(detail="high"), FIXED).notes == ()
    tiled = load_image(noise(640, 480), LIMITS, ImageOptions(max_tokens=4), ImageSizes())
    assert (tiled.width, "changes nothing" in tiled.notes[0]) == (640, True)
    assert load_image(noise(640, 480), LIMITS, AS_IT_IS, ImageSizes(usual=50)).notes == tiled.notes


def test_a_large_jpeg_is_read_in_part_and_then_resized_to_the_budget() -> None:
    photo = Image.fromarray(np.asarray(scene(12, 8).resize((2401, 1601), Image.Resampling.BICUBIC)))
    exif = Image.Exif()
    exif[0x0112] = 6
    file, plain = encode(photo, "JPEG", quality=92, exif=exif), encode(photo, "JPEG", quality=92)
    image = load_image(file, LIMITS, ImageOptions(max_tokens=60), KEEPS)
    assert (image.source_size, image.region) == ((1601, 2401), None)
    assert (image.width, image.height) == (168, 252)
    whole = Image.fromarray(rgb_of(load_image(file, LIMITS))).resize((168, 252), Image.Resampling.LANCZOS)
    assert np.abs(rgb_of(image).astype(int) - np.asarray(whole).astype(int)).mean() < 2
    assert load_image(plain, LIMITS, AS_IT_IS, FIXED).source_size == (2401, 1601)


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_a_part_is_cut_from_the_upright_pixels_before_anything_is_reduced(orientation: int) -> None:
    file, pixels = upright((60, 40), orientation)
    for region, (left, top, width, height) in (
        ("7,3,20,11", (7, 3, 20, 11)),
        ("50%,25%,50%,50%", (30, 10, 30, 20)),
        ([0, 0, 60, 40], (0, 0, 60, 40)),
        ("33.3%, 0, 33.3%, 100%", (20, 0, 20, 40)),
    ):
        image = load_image(file, LIMITS, ImageOptions.model_validate({"region": region}))
        assert (rgb_of(image) == pixels[top : top + height, left : left + width]).all()
        if (width, height) != (60, 40):
            assert (image.region, image.source_size) == ((left, top, width, height), (60, 40))
    small = load_image(file, LIMITS, ImageOptions(region="10,10,40,20", max_tokens=3), ImageSizes(cell=10, most=99))
    assert (small.width, small.height, small.region, small.source_size) == (20, 10, (10, 10, 40, 20), (60, 40))


def test_parts_in_percent_that_touch_share_no_pixel_and_leave_none_out() -> None:
    for width in (7, 100, 101, 333):
        cuts = [
            ImageOptions(region=f"{at}%,0,{size}%,1").parts(width, 1)[0] for at, size in ((0, 33), (33, 34), (67, 33))
        ]
        assert [cut[0] for cut in cuts[1:]] == [cut[0] + cut[2] for cut in cuts[:-1]]
        assert cuts[-1][0] + cuts[-1][2] == width


def test_tiles_follow_the_whole_and_cover_it() -> None:
    pixels = np.asarray(noise(101, 67))
    whole, *tiles = load_images(pixels, LIMITS, ImageOptions(tiles="3x2"))
    assert (whole.width, whole.height, whole.region) == (101, 67, None)
    rows = [np.concatenate([rgb_of(tile) for tile in tiles[row : row + 3]], axis=1) for row in (0, 3)]
    assert (np.concatenate(rows) == pixels).all()
    part, *of_part = load_images(pixels, LIMITS, ImageOptions(tiles="2X2", region="1,1,100,50"))
    assert [tile.region for tile in of_part] == [(1, 1, 50, 25), (51, 1, 50, 25), (1, 26, 50, 25), (51, 26, 50, 25)]
    assert part.region == (1, 1, 100, 50)


@pytest.mark.parametrize(
    "region", ["", "1,2,3", "1,2,3,4,5", "a,b,c,d", "-1,0,5,5", "1,1,0,5", "0,0,0%,5", "1.5,0,5,5"]
)
def test_what_is_no_region_is_refused(region: str) -> None:
    with pytest.raises(ValidationError):
        ImageOptions(region=region)


@pytest.mark.parametrize("tiles", ["", "2", "1x1", "0x4", "5x5", "2x2x2", "-2x2", "17x1"])
def test_what_are_no_tiles_is_refused(tiles: str) -> None:
    with pytest.raises(ValidationError):
        ImageOptions(tiles=tiles)


@pytest.mark.parametrize("region", ["50,0,11,10", "0,35,10,6", "60,0,1,1", "60%,0,41%,10"])
def test_a_part_that_does_not_lie_in_the_image_is_refused(region: str) -> None:
    with pytest.raises(BadParameter, match="60 by 40"):
        load_image(noise(60, 40), LIMITS, ImageOptions(region=region))


def test_too_few_pixels_for_tiles_are_refused() -> None:
    with pytest.raises(BadParameter, match="too few"):
        load_images(noise(3, 40), LIMITS, ImageOptions(tiles="4x2"))


def test_a_loaded_image_can_become_smaller_and_knows_its_file_still() -> None:
    options = ImageOptions(region="100,100,400,300")
    part = load_image(noise(600, 400), LIMITS, options)
    assert load_image(load_image(noise(600, 400), LIMITS), LIMITS, options).region == part.region
    assert load_image(part, LIMITS, AS_IT_IS, KEEPS) is part
    smaller = load_image(part, LIMITS, ImageOptions(max_tokens=20), KEEPS)
    assert (smaller.width, smaller.height) == (140, 84)
    assert (smaller.source_size, smaller.region) == ((600, 400), (100, 100, 400, 300))
    assert smaller.sha256 == load_image(rgb_of(smaller), LIMITS).sha256
    again = load_image(load_image(smaller, LIMITS, ImageOptions(max_tokens=4), FIXED), LIMITS, AS_IT_IS, FIXED)
    assert load_image(again, LIMITS, ImageOptions(max_tokens=4), FIXED).notes == again.notes
    with pytest.raises(BadParameter, match="loaded"):
        load_image(part, LIMITS, ImageOptions(region="0,0,5,5"))
