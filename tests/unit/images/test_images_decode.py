"""Every format, every mode and every turn gives the pixels it should."""

from __future__ import annotations

import hashlib
import struct
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import image_samples as samples
import numpy as np
import pytest
from image_samples import LIMITS, encode, rgb_of, scene
from PIL import Image

from opsin.core.errors import BadImage, BadInput, ImageTooLarge, ImageUnsupported
from opsin.core.settings import ImageSettings
from opsin.images import load_image

TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def as_stored(image: Image.Image, orientation: int) -> Image.Image:
    """The pixels a camera would store so that `orientation` turns them back into `image`."""
    way = TURNS[orientation]
    return image if way is None else image.transpose(way)


def oriented(kind: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(as_stored(scene(), orientation), kind, exif=exif.tobytes(), **options)


def closeness(image: Any, pil: Image.Image) -> float:
    assert (image.width, image.height) == pil.size
    return float(np.abs(rgb_of(image).astype(int) - np.asarray(pil).astype(int)).mean())


@pytest.mark.parametrize("kind", samples.LOSSLESS)
def test_lossless_formats_give_the_exact_pixels_and_one_identity(kind: str) -> None:
    image = load_image(encode(scene(), kind, **samples.LOSSLESS[kind]), LIMITS)
    assert image.format == kind
    assert np.array_equal(rgb_of(image), np.asarray(scene()))
    assert image.sha256 == load_image(np.asarray(scene()), LIMITS).sha256
    assert image.sha256 == hashlib.sha256(struct.pack("<II", 48, 32) + image.rgb).hexdigest()
    assert (image.orientation, image.notes) == (1, ())
    assert image.decode_ms > 0


@pytest.mark.parametrize("kind", samples.LOSSY)
def test_lossy_formats_come_close(kind: str) -> None:
    image = load_image(encode(scene(), kind, **samples.LOSSY[kind]), LIMITS)
    assert image.format == kind
    assert closeness(image, scene()) < 5


def test_identity_tells_shapes_and_pixels_apart() -> None:
    pixels = np.arange(36, dtype=np.uint8)
    shapes = [pixels.reshape(3, 4, 3), pixels.reshape(4, 3, 3), pixels[::-1].reshape(3, 4, 3)]
    assert len({load_image(array, LIMITS).sha256 for array in shapes}) == 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", samples.LOSSLESS["WEBP"]), ("TIFF", {})])
def test_all_eight_orientations_give_the_same_pixels(kind: str, options: dict[str, Any], orientation: int) -> None:
    image = load_image(oriented(kind, orientation, **options), LIMITS)
    assert np.array_equal(rgb_of(image), np.asarray(scene()))
    assert image.orientation == orientation
    assert image.notes == ((f"turned upright (EXIF orientation {orientation})",) if orientation != 1 else ())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", samples.LOSSY["JPEG"]),
        ("AVIF", samples.LOSSY["AVIF"]),
        ("HEIF", samples.LOSSY["HEIF"]),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg", "quality": 97}),
    ],
)
def test_lossy_and_compressed_orientations_are_turned_exactly_once(
    kind: str, options: dict[str, Any], orientation: int
) -> None:
    """HEIC comes turned out of libheif, TIFF out of Pillow: a second turn would show as a large distance."""
    image = load_image(oriented(kind, orientation, **options), LIMITS)
    assert closeness(image, scene()) < 3
    assert image.orientation == orientation


def test_jpeg_orientations_share_one_identity_when_the_stored_blocks_are_flat() -> None:
    """Flat 8x8 blocks survive JPEG alike whichever way they lie, so the identity must be one."""
    blocks = scene(64, 32)
    identities = set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = encode(as_stored(blocks, orientation), "JPEG", exif=exif, **samples.LOSSY["JPEG"])
        identities.add(load_image(stored, LIMITS).sha256)
    assert len(identities) == 1


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_out_of_range_is_upright(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    image = load_image(encode(scene(), "PNG", exif=exif), LIMITS)
    assert image.orientation == 1
    assert np.array_equal(rgb_of(image), np.asarray(scene()))


@pytest.mark.parametrize("exif", [b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00garbage", b"", b"MM\x00*\x00"])
def test_damaged_exif_does_not_unmake_the_image(exif: bytes) -> None:
    image = load_image(encode(scene(), "PNG", exif=exif), LIMITS)
    assert np.array_equal(rgb_of(image), np.asarray(scene()))


def test_heic_exif_without_a_turn_in_the_container_is_not_believed() -> None:
    """The container's own turn counts in HEIC and AVIF; EXIF beside it is a copy, and turning by it turns twice."""
    exif = Image.Exif()
    exif[0x0112] = 6
    # handed over as an object, pillow-heif writes the EXIF and no turn
    stray = encode(scene(), "HEIF", exif=exif, **samples.LOSSY["HEIF"])
    assert b"irot" not in stray
    image = load_image(stray, LIMITS)
    assert closeness(image, scene()) < 3
    assert image.orientation == 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_alpha_goes_onto_white(mode: str) -> None:
    rgba = scene().convert("RGBA")
    rgba.putalpha(Image.new("L", rgba.size, 255))
    rgba.paste((0, 0, 0, 0), (0, 0, 8, 8))
    if mode == "PA":
        image: Image.Image = rgba.convert("RGB").quantize(16).convert("PA")
        image.putalpha(rgba.getchannel("A"))
    else:
        image = {"La": rgba.convert("LA"), "RGBa": rgba}.get(mode, rgba).convert(mode)
    pixels = rgb_of(load_image(image, LIMITS))
    assert (pixels[:8, :8] == 255).all()
    assert (pixels[20, 40] != 255).any()


def test_half_transparent_black_on_white_is_mid_grey_in_files_and_arrays() -> None:
    rgba = np.zeros((4, 5, 4), np.uint8)
    rgba[..., 3] = 128
    for source in (rgba, encode(Image.fromarray(rgba), "PNG"), Image.fromarray(rgba)):
        assert (rgb_of(load_image(source, LIMITS)) == 127).all()


@pytest.mark.parametrize("transparency", [0, b"\x00\xff\xff"])
def test_palette_with_transparency_goes_onto_white(transparency: int | bytes) -> None:
    palette = Image.new("P", (4, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2, 1])
    for kind in ("PNG", "GIF"):
        if kind == "GIF" and isinstance(transparency, bytes):
            continue
        pixels = rgb_of(load_image(encode(palette, kind, transparency=transparency), LIMITS))
        assert pixels[0].tolist() == [[255, 255, 255], [40, 50, 60], [70, 80, 90], [40, 50, 60]]


def test_sixteen_bit_grey_keeps_its_high_byte_in_png_tiff_and_arrays() -> None:
    values = np.array([[0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]], np.uint16)
    expected = [0, 0, 1, 0x7F, 0x80, 0xFF]
    files = [
        samples.png(6, 1, 16, 0, b"\x00" + values.astype(">u2").tobytes()),
        samples.grey_tiff(6, 1, 16, values.astype("<u2").tobytes()),
    ]
    identities = set()
    for source in (*files, values, Image.fromarray(values)):
        image = load_image(source, LIMITS)
        assert rgb_of(image)[0, :, 0].tolist() == expected
        identities.add(image.sha256)
    assert len(identities) == 1


def test_sixteen_bit_grey_with_white_as_zero_is_turned_round() -> None:
    data = np.array([[0, 0xFFFF]], "<u2").tobytes()
    assert rgb_of(load_image(samples.grey_tiff(2, 1, 16, data, white_is=0), LIMITS))[0, :, 0].tolist() == [255, 0]


def test_twelve_bit_grey_uses_the_whole_range() -> None:
    assert rgb_of(load_image(samples.grey_tiff(2, 1, 12, b"\xff\xf0\x00"), LIMITS))[0, :, 0].tolist() == [255, 0]


def test_sixteen_bit_colour_and_its_transparent_colour() -> None:
    row = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0xFF00, 0x8000, 0x0100)
    clear = samples.chunk(b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC))
    plain = load_image(samples.png(2, 1, 16, 2, b"\x00" + row), LIMITS)
    assert rgb_of(plain)[0].tolist() == [[0x12, 0x56, 0x9A], [0xFF, 0x80, 0x01]]
    keyed = load_image(samples.png(2, 1, 16, 2, b"\x00" + row, clear), LIMITS)
    assert rgb_of(keyed)[0].tolist() == [[255, 255, 255], [0xFF, 0x80, 0x01]]


@pytest.mark.parametrize(("depth", "row"), [(1, b"\x00\x40"), (2, b"\x00\x18"), (4, b"\x00\x06\x00"), (16, None)])
def test_the_transparent_grey_of_a_png_is_found_at_every_depth(depth: int, row: bytes | None) -> None:
    """Pillow widens 2- and 4-bit samples, but not the transparent colour beside them."""
    value = {1: 1, 2: 1, 4: 6, 16: 0x1234}[depth]
    body = row if row is not None else b"\x00" + struct.pack(">3H", 0, 0x1234, 0)
    file = samples.png(3, 1, depth, 0, body, samples.chunk(b"tRNS", struct.pack(">H", value)))
    pixels = rgb_of(load_image(file, LIMITS))[0]
    assert pixels[1].tolist() == [255, 255, 255]
    assert pixels[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("values", "expected", "noted"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255], False),
        ([0.0, 17.0, 255.0], [0, 17, 255], False),
        ([0.0, 256.0, 65535.0], [0, 1, 255], False),
        ([-1.0, 0.0, 1.0], [0, 128, 255], True),
        ([1e6, 1e6, 1e6], [0, 0, 0], True),
    ],
)
def test_float_tiffs_are_scaled_by_their_range(values: list[float], expected: list[int], noted: bool) -> None:
    file = samples.grey_tiff(3, 1, 32, np.array(values, "<f4").tobytes(), sample_format=3)
    image = load_image(file, LIMITS)
    assert rgb_of(image)[0, :, 0].tolist() == expected
    assert bool(image.notes) == noted


def test_whole_32_bit_numbers_are_scaled_by_their_range() -> None:
    file = samples.grey_tiff(3, 1, 32, np.array([0, 256, 65535], "<i4").tobytes(), sample_format=2)
    assert rgb_of(load_image(file, LIMITS))[0, :, 0].tolist() == [0, 1, 255]


def test_floats_that_are_no_numbers_are_refused() -> None:
    file = samples.grey_tiff(2, 1, 32, np.array([0, np.nan], "<f4").tobytes(), sample_format=3)
    with pytest.raises(BadImage, match="finite"):
        load_image(file, LIMITS)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    image = load_image(encode(scene().convert("CMYK"), kind, **({"quality": 97} if kind == "JPEG" else {})), LIMITS)
    assert closeness(image, scene()) < 5


def test_ycck_jpeg_becomes_rgb() -> None:
    """Photoshop's kind of CMYK JPEG: Adobe marker with transform 2, inverted samples.

    Made of a four-component JPEG whose marker says 0, with inverted luma and chroma of mid grey put into its planes.
    """
    planes = [Image.new("L", (16, 16), value) for value in (200, 128, 128, 255)]
    cmyk = Image.merge("CMYK", [plane.point(lambda value: 255 - value) for plane in planes])
    data = encode(cmyk, "JPEG", quality=100)
    at = data.index(b"Adobe")
    assert data[at + 11] == 0
    ycck = data[: at + 11] + b"\x02" + data[at + 12 :]
    image = load_image(ycck, LIMITS)
    red, green, blue = rgb_of(image)[8, 8].tolist()
    assert max(red, green, blue) - min(red, green, blue) <= 2
    assert 50 <= red <= 205


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "RGBX", "HSV", "LAB"])
def test_other_modes_of_pillow_images(mode: str) -> None:
    pil = scene().convert(mode)
    image = load_image(pil, LIMITS)
    assert np.array_equal(rgb_of(image), np.asarray(pil.convert("RGB")))


def test_a_pillow_image_is_turned_and_not_changed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pil = scene()
    pil.info["exif"] = exif.tobytes()
    before = pil.tobytes()
    image = load_image(pil, LIMITS)
    assert (image.width, image.height, image.orientation) == (32, 48, 6)
    assert pil.tobytes() == before
    assert pil.getexif()[0x0112] == 6


def test_the_first_of_many_is_taken_and_said() -> None:
    others = [Image.new("RGB", (48, 32), (index, 0, 0)) for index in (1, 2)]
    for kind, options, closest in (
        ("GIF", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"big_tiff": True}, 0),
        ("PNG", {}, 0),
        ("WEBP", samples.LOSSLESS["WEBP"], 0),
        ("AVIF", samples.LOSSY["AVIF"], 3),
        ("HEIF", samples.LOSSY["HEIF"], 3),
    ):
        image = load_image(encode(scene(), kind, save_all=True, append_images=others, **options), LIMITS)
        assert len(image.notes) == 1, kind
        which = "main one" if kind == "HEIF" else "first"
        assert image.notes == (f"only the {which} of 3 frames or pages was read",), kind
        assert closeness(image, scene()) <= closest, kind


def test_pages_are_counted_up_to_a_bound() -> None:
    pages = [Image.new("1", (1, 1))] * 1100
    begin = time.thread_time()
    image = load_image(encode(pages[0], "TIFF", save_all=True, append_images=pages), LIMITS)
    assert image.notes == ("only the first of 1,000 or more frames or pages was read",)
    assert time.thread_time() - begin < 5


def test_frames_of_a_very_large_gif_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.images.decode._MAX_COUNTED", 100)
    data = encode(scene(), "GIF", save_all=True, append_images=[Image.new("RGB", (48, 32))])
    assert load_image(data, LIMITS).notes == ("only the first of several frames or pages was read",)


def test_a_thin_image_within_the_limits_is_read() -> None:
    image = load_image(encode(Image.new("RGB", (1, 20_000)), "PNG"), LIMITS)
    assert (image.width, image.height) == (1, 20_000)


@pytest.mark.parametrize(("kind", "options"), samples.EVERY, ids=[f"{k}-{o}" for k, o in samples.EVERY])
def test_limits_hold_for_every_format(kind: str, options: dict[str, Any]) -> None:
    data = encode(scene(), kind, **options)
    assert load_image(data, ImageSettings(max_pixels=48 * 32, max_edge=48)).width == 48
    for limits in (
        ImageSettings(max_pixels=48 * 32 - 1),
        ImageSettings(max_edge=47),
        ImageSettings(max_bytes=len(data) - 1),
    ):
        with pytest.raises(ImageTooLarge):
            load_image(data, limits)


def test_images_over_pillows_own_pixel_limit_are_a_matter_of_our_settings_only() -> None:
    """Pillow warns beyond 89 million pixels and refuses beyond 178 million, whatever the caller allows."""
    rows = b"\x00" * (20_000 // 8 + 1) * 10_000
    data = samples.png(20_000, 10_000, 1, 0, rows)
    with pytest.raises(ImageTooLarge, match="100,000,000"):
        load_image(data, LIMITS)
    wide = samples.png(30_000, 6_200, 1, 0, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match="cut short"):
            load_image(wide, ImageSettings(max_pixels=200_000_000))


@pytest.mark.parametrize(("kind", "options"), samples.EVERY, ids=[f"{k}-{o}" for k, o in samples.EVERY])
def test_a_file_cut_anywhere_is_refused_or_whole(kind: str, options: dict[str, Any]) -> None:
    """A decoder that fills what is missing with grey would give other pixels here."""
    noise = np.random.default_rng(5).integers(0, 255, (24, 32, 3), np.uint8)
    pil = Image.fromarray(noise).quantize(64).convert("RGB") if kind == "GIF" else Image.fromarray(noise)
    data = encode(pil, kind, **options)
    whole = load_image(data, LIMITS).sha256
    refused = 0
    for cut in sorted({*range(0, len(data), max(1, len(data) // 60)), *range(len(data) - 12, len(data))}):
        try:
            image = load_image(data[:cut], LIMITS)
        except BadInput:
            refused += 1
        else:
            assert image.sha256 == whole, cut
    assert refused >= 40


def test_many_threads_decode_alike() -> None:
    files = [encode(scene(), kind, **options) for kind, options in samples.EVERY] * 4
    expected = [load_image(file, LIMITS).sha256 for file in files]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda file: load_image(file, LIMITS).sha256, files)) == expected


def test_pillows_remarks_never_reach_the_caller() -> None:
    """A TIFF tag that points past the end makes Pillow warn, which `-W error` would make an error."""
    tags = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 8 + 2 + 9 * 12 + 4), (278, 4, 1, 2), (279, 4, 1, 4), (65000, 2, 999, 5000)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(samples.tiff([*tags], b"\x01\x02\x03\x04"), LIMITS)
    assert rgb_of(image)[..., 0].tolist() == [[1, 2], [3, 4]]


def test_a_raw_file_that_looks_like_a_tiff_is_refused_rather_than_shown_as_its_thumbnail() -> None:
    tags = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 8 + 2 + 9 * 12 + 4), (278, 4, 1, 2), (279, 4, 1, 4), (0xC612, 1, 4, 0x0401)]
    with pytest.raises(ImageUnsupported, match="DNG"):
        load_image(samples.tiff([*tags], b"\x01\x02\x03\x04"), LIMITS)
