"""Colour profiles become sRGB, and what is transparent shows a ground on which the rest can be seen."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from image_samples import LIMITS, encode, rgb_of, scene
from PIL import Image, ImageCms

from opsin.images import load_image

Rows = tuple[tuple[float, float, float], ...]
# Red, green and blue in XYZ as seen under D50. Source: the profiles that Adobe, Apple and Kodak publish.
ADOBE = (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)
P3 = (0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)
PROPHOTO = (0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491)
SRGB = (0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)
WHITE = (0.9642, 1.0, 0.8249)


def profile(space: bytes, tags: dict[bytes, bytes], name: str) -> bytes:
    """An ICC profile of version 2 with these tags."""
    text = name.encode() + b"\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78), b"wtpt": xyz(WHITE), **tags}
    table, data, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, body in tags.items():
        table += tag + struct.pack(">II", at + len(data), len(body))
        data += body + bytes(-len(body) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s12s4s28s", at + len(data), b"", 0x0240_0000, kind, space, b"Lab " if space == b"CMYK"
                       else b"XYZ ", b"", b"acsp", b"") + xyz(WHITE)[8:]  # fmt: skip
    return head + bytes(128 - len(head)) + table + data


def xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def rgb_profile(primaries: Rows, power: float, name: str, before: int = 0) -> bytes:
    colours = {tag: xyz(row) for tag, row in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(power))
    return profile(b"RGB ", {b"some": bytes(before), **colours, **curves}, name)


def stored(colour: tuple[int, int, int], primaries: Rows, power: float) -> np.ndarray[Any, Any]:
    """The samples (floats of 0 to 255) that stand for an sRGB colour in another space, by the definition of both."""
    signal = np.array(colour) / 255
    linear = np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    there = np.linalg.inv(np.array(primaries).T) @ np.array(SRGB).T @ linear
    return np.asarray(255 * np.clip(there, 0, 1) ** (1 / power))


CASES = [
    ("AdobeRGB", ADOBE, 563 / 256, (60, 150, 45)),
    ("AdobeRGB", ADOBE, 563 / 256, (200, 30, 90)),
    ("Display P3", P3, 2.2, (230, 30, 31)),
    ("Display P3", P3, 2.2, (18, 150, 40)),
    ("ProPhoto", PROPHOTO, 1.8, (230, 30, 31)),
    ("ProPhoto", PROPHOTO, 1.8, (120, 110, 200)),
]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF", "HEIF"])
@pytest.mark.parametrize(("name", "primaries", "power", "colour"), CASES)
def test_colours_of_a_profile_become_srgb(
    kind: str, name: str, primaries: Rows, power: float, colour: tuple[int, int, int]
) -> None:
    there = tuple(round(float(value)) for value in stored(colour, primaries, power))
    lossless: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    lossless |= {"AVIF": {"quality": 100, "subsampling": "4:4:4"}, "HEIF": {"quality": -1, "chroma": 444}}
    file = encode(
        Image.new("RGB", (32, 32), there),
        kind,
        icc_profile=rgb_profile(primaries, power, name),
        **lossless.get(kind, {}),
    )
    image = load_image(file, LIMITS)
    assert image.notes == (f"colours were converted to sRGB from the profile {name}",)
    assert np.abs(rgb_of(image)[16, 16].astype(int) - colour).max() <= (8 if kind == "AVIF" else 3)  # AVIF is lossy


def test_a_pillow_image_has_its_profile_applied_and_is_not_changed() -> None:
    pil = Image.new("RGB", (8, 8), (200, 90, 40))
    pil.info["icc_profile"] = rgb_profile(ADOBE, 563 / 256, "AdobeRGB")
    before = pil.tobytes()
    image = load_image(pil, LIMITS)
    assert image.notes
    assert image.sha256 == load_image(rgb_of(image), LIMITS).sha256 != load_image(np.asarray(pil), LIMITS).sha256
    assert pil.tobytes() == before


def test_an_srgb_profile_changes_nothing_and_needs_no_note() -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for pil in (scene(), scene().convert("RGBA"), scene().convert("P")):
        with_it, without = (load_image(encode(pil, "PNG", **more), LIMITS) for more in ({"icc_profile": icc}, {}))
        assert (with_it.sha256, with_it.notes) == (without.sha256, ())


def test_transparent_palettes_and_greys_have_profiles_too() -> None:
    icc = rgb_profile(PROPHOTO, 1.8, "ProPhoto")
    rgba = Image.new("RGBA", (4, 4), (120, 60, 60, 255))
    plain = rgb_of(load_image(encode(rgba.convert("RGB"), "PNG", icc_profile=icc), LIMITS))[0, 0].tolist()
    assert plain != [120, 60, 60]
    for source in (rgba, rgba.convert("P"), rgba.convert("RGB").quantize(4)):
        assert rgb_of(load_image(encode(source, "PNG", icc_profile=icc), LIMITS))[0, 0].tolist() == plain
    grey = profile(b"GRAY", {b"kTRC": gamma(1.0)}, "linear grey")
    for mode in ("L", "LA", "I;16"):
        pil = Image.fromarray(np.full((4, 4), 128 << 8, np.uint16)) if mode == "I;16" else Image.new("L", (4, 4), 128)
        pil = pil.convert("LA") if mode == "LA" else pil
        image = load_image(encode(pil, "PNG", icc_profile=grey), LIMITS)
        assert image.notes == ("colours were converted to sRGB from the profile linear grey",)
        assert np.abs(rgb_of(image).astype(int) - 188).max() <= 1  # half of the light


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_follows_its_profile(kind: str) -> None:
    """A table of two points for each ink: without ink L is 100, with any full ink it is 50."""
    cells = b"".join(bytes((255 if not any(inks) else 128, 128, 128)) for inks in np.ndindex(2, 2, 2, 2))
    straight = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + struct.pack(">9i", *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536))
    icc = profile(b"CMYK", {b"A2B0": lut + straight * 4 + cells + straight * 3}, "press")
    for ink, light in (((0, 0, 0, 0), 255), ((255, 0, 0, 0), 119)):
        options = {"quality": 100} if kind == "JPEG" else {}
        image = load_image(encode(Image.new("CMYK", (16, 16), ink), kind, icc_profile=icc, **options), LIMITS)
        assert image.notes == ("colours were converted to sRGB from the profile press",)
        assert abs(int(rgb_of(image)[8, 8, 0]) - light) <= 3
        assert np.ptp(rgb_of(image)[8, 8]) <= 3


@pytest.mark.parametrize(
    "icc", [b"no profile", rgb_profile(P3, 2.2, "cut")[:150], profile(b"GRAY", {}, "grey"), b"\0" * 128]
)
def test_a_profile_that_cannot_be_used_is_said_and_harms_nothing(icc: bytes) -> None:
    image = load_image(encode(scene(), "PNG", icc_profile=icc), LIMITS)
    assert np.array_equal(rgb_of(image), np.asarray(scene()))
    assert "was not applied" in image.notes[0]


@pytest.mark.parametrize(("before", "used"), [(2 * 2**20, True), (5 * 2**20, False)])
def test_of_a_very_large_profile_only_the_beginning_is_read(before: int, used: bool) -> None:
    image = load_image(encode(scene(), "TIFF", icc_profile=rgb_profile(P3, 2.2, "P3", before)), LIMITS)
    assert ("was not applied" in image.notes[0]) != used


def drawing(*colours: int) -> Image.Image:
    """Stripes of these greys on a transparent ground."""
    pixels = np.zeros((60, 60, 4), np.uint8)
    pixels[..., :3] = 255 if colours[0] < 128 else 0  # what nobody sees
    for number, colour in enumerate(colours):
        pixels[10 * number : 10 * number + 8, 5:55] = (colour, colour, colour, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "array"])
@pytest.mark.parametrize(
    ("colours", "ground"),
    [((0, 40), "white"), ((255, 250, 230), "black"), ((255, 0, 255, 0), "grey"), ((90, 160, 255, 20, 60), "white")],
)
def test_the_ground_lets_the_content_be_seen(kind: str, colours: tuple[int, ...], ground: str) -> None:
    pil = drawing(*colours)
    source = np.asarray(pil) if kind == "array" else encode(pil, kind, **({"lossless": True} if kind == "WEBP" else {}))
    image = load_image(source, LIMITS)
    pixels = rgb_of(image)
    assert image.notes == (f"transparent parts were filled with {ground}",)
    assert pixels[-1, 0].tolist() == [{"white": 255, "black": 0, "grey": 128}[ground]] * 3
    assert pixels[4, 30].tolist() == [colours[0]] * 3
    assert pixels.std() > 10


def test_white_on_clear_stays_visible_in_grey_palette_and_deep_files() -> None:
    deep = np.zeros((40, 40), np.uint16)
    deep[10:20] = 65535
    for source in (
        encode(drawing(255, 255).convert("LA"), "PNG"),
        encode(drawing(255, 255).quantize(method=Image.Quantize.FASTOCTREE), "PNG"),
        encode(drawing(255, 255), "GIF"),
        encode(Image.fromarray(deep), "PNG", transparency=0),
    ):
        image = load_image(source, LIMITS)
        assert image.notes == ("transparent parts were filled with black",)
        assert set(np.unique(rgb_of(image))) == {0, 255}


def test_an_image_without_a_transparent_pixel_has_no_ground() -> None:
    assert load_image(encode(scene().convert("RGBA"), "PNG"), LIMITS).notes == ()
    assert load_image(encode(Image.new("RGBA", (4, 4), (255, 255, 255, 0)), "PNG"), LIMITS).notes == (
        "transparent parts were filled with white",
    )
