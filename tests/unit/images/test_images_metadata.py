"""What files say of themselves, in the forms that cameras and agencies write, and in damaged ones."""

import io
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, TiffImagePlugin

from opsin.core.errors import BadImage
from opsin.core.settings import ImageSettings
from opsin.images.metadata import NAMES, read_metadata

XMP = """<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" photoshop:City="Bergen" xmp:Rating="4">
 <dc:description><rdf:Alt><rdf:li xml:lang="x-default">A boat &amp; a pier</rdf:li></rdf:Alt></dc:description>
 <dc:subject><rdf:Bag><rdf:li>boat</rdf:li><rdf:li>sea</rdf:li></rdf:Bag></dc:subject>
 <photoshop:Credit>Agency</photoshop:Credit></rdf:Description></rdf:RDF></x:xmpmeta>"""


def saved(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind, **options)
    return file.getvalue()


def exif() -> Image.Exif:
    made = Image.Exif()
    made[0x010E], made[0x010F], made[0x0110] = "from exif", "NIKON CORPORATION", "NIKON D750"
    made[0x8769] = {
        0x9003: "2024:05:01 10:20:30",
        0x9011: "+02:00",
        0x829A: TiffImagePlugin.IFDRational(1, 250),
        0x8827: 400,
    }
    made[0x8825] = {1: "S", 2: (33.0, 51.0, 36.0), 3: "E", 4: (151.0, 12.0, 0.0)}
    return made


def iptc(**texts: str) -> bytes:
    numbers = {"caption": 120, "city": 90, "keywords": 25, "date": 55, "time": 60}
    body = b""
    for name, text in texts.items():
        data = text.encode()
        body += bytes((0x1C, 2, numbers[name])) + len(data).to_bytes(2) + data
    block = b"8BIM\x04\x04\x00\x00" + len(body).to_bytes(4) + body + b"\x00" * (len(body) % 2)
    return b"Photoshop 3.0\x00" + block


def with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    return jpeg[:2] + bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2) + body + jpeg[2:]


def test_exif_of_a_camera() -> None:
    found = read_metadata(saved("JPEG", exif=exif()))
    assert found["camera"] == "NIKON D750"
    assert found["date"] == "2024-05-01T10:20:30+02:00"
    assert found["caption"] == "from exif"
    assert (found["latitude"], found["longitude"]) == ("-33.860000", "151.200000")
    assert found["iso"] == "400"
    assert found["exposure"] == "0.004"
    assert found["exif_make"] == "NIKON CORPORATION"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_xmp_in_every_kind_of_file(kind: str) -> None:
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP)
        data = saved(kind, pnginfo=info)
    elif kind == "TIFF":
        data = saved(kind, tiffinfo={700: XMP.encode()})
    else:
        data = saved(kind, xmp=XMP.encode())
    found = read_metadata(data)
    assert found["caption"] == "A boat & a pier"
    assert found["keywords"] == "boat, sea"
    assert (found["city"], found["credit"], found["rating"]) == ("Bergen", "Agency", "4")
    assert found["xmp_photoshop_credit"] == "Agency"


def test_an_agencys_caption_comes_before_the_cameras() -> None:
    data = with_segment(saved("JPEG", exif=exif()), 0xED, iptc(caption="A café", city="Oslo", keywords="cup"))
    found = read_metadata(data)
    assert (found["caption"], found["city"], found["keywords"]) == ("A café", "Oslo", "cup")


def test_a_document_type_is_refused_and_spoils_nothing() -> None:
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa">]>' + XMP.partition("?>")[2]
    found = read_metadata(saved("JPEG", exif=exif(), xmp=bomb.encode()))
    assert "keywords" not in found
    assert found["camera"] == "NIKON D750"


def test_values_are_bounded_and_cannot_steer_a_terminal() -> None:
    made = Image.Exif()
    made[0x010E] = "a\x1b[31m" + "b" * 10_000
    found = read_metadata(saved("JPEG", exif=made))
    assert len(found["caption"]) <= 2_000
    assert "\x1b" not in found["caption"]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_metadata_never_raises(data: st.DataObject) -> None:
    whole = with_segment(saved("JPEG", exif=exif(), xmp=XMP.encode()), 0xED, iptc(caption="x"))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(4, min(1500, len(whole) - 4)))] = data.draw(st.integers(0, 255))
    try:
        found = read_metadata(bytes(damaged))
    except BadImage:
        return
    assert all(isinstance(value, str) for value in found.values())


def test_what_says_nothing_is_empty_and_what_is_no_image_is_refused() -> None:
    assert set(read_metadata(saved("PNG"))) <= set(NAMES)
    with pytest.raises(BadImage):
        read_metadata(b"no image")


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)


def test_metadata_behind_the_pixels_of_a_png_is_read_and_the_pixels_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: object) -> None:
        raise AssertionError(image)

    plain, exif_data = saved("PNG"), exif().tobytes().removeprefix(b"Exif\0\0")
    late = plain[:-12] + chunk(b"eXIf", exif_data) + chunk(b"tEXt", b"Title\0Late") + plain[-12:]
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    found = read_metadata(late)
    assert (found["title"], found["camera"]) == ("Late", "NIKON D750")
    assert "camera" not in read_metadata(plain)


def test_texts_in_utf_8_and_utf_16() -> None:
    made = Image.Exif()
    made[0x013B] = "M@@nchen"
    made[0x9C9B], made[0x9C9E] = "Café ☕\0".encode("utf-16-le"), "a;b\0".encode("utf-16-le")
    made[0x8769] = {0x9286: b"UNICODE\0" + "Grüße".encode("utf-16-le")}
    made.endian = "<"
    found = read_metadata(saved("JPEG", exif=made.tobytes().replace(b"M@@nchen", "München".encode())))
    assert (found["creator"], found["title"], found["keywords"]) == ("München", "Café ☕", "a, b")
    assert found["exif_user_comment"] == "Grüße"
    assert read_metadata(saved("JPEG", xmp=XMP.encode("utf-16")))["city"] == "Bergen"


def test_values_that_are_none_are_left_out() -> None:
    made = exif()
    made[0x8769] = {0x9003: "0000:00:00 00:00:00", 0x829D: 0.0, 0x920A: 0.0}
    made[0x8825] = {1: "N", 2: (99.0, 0.0, 0.0), 3: "W", 4: (10.0, 30.0, 0.0)}
    found = read_metadata(saved("JPEG", exif=made))
    assert not {"date", "aperture", "focal_length", "latitude"} & found.keys()
    assert found["longitude"] == "-10.500000"
    assert found["exif_gps_longitude_ref"] == "W"


def test_dates_of_agencies_and_of_xmp() -> None:
    data = with_segment(saved("JPEG"), 0xED, iptc(date="20240503", time="101112+0200"))
    assert read_metadata(data)["date"] == "2024-05-03T10:11:12+02:00"
    assert read_metadata(with_segment(saved("JPEG"), 0xED, iptc(date="20240503")))["date"] == "2024-05-03"
    for written, expected in (("2024-05", "2024-05"), ("2024-05-03T10:11:12.25Z", "2024-05-03T10:11:12+00:00")):
        xmp = XMP.replace("xmp:Rating", f'photoshop:DateCreated="{written}" xmp:Rating')
        assert read_metadata(saved("JPEG", xmp=xmp.encode()))["date"] == expected


def test_of_several_languages_the_default_is_taken() -> None:
    german = XMP.replace("<rdf:Alt>", '<rdf:Alt><rdf:li xml:lang="de">Ein Boot</rdf:li>')
    assert read_metadata(saved("JPEG", xmp=german.encode()))["caption"] == "A boat & a pier"


def test_the_jobs_limits_count() -> None:
    with pytest.raises(BadImage):
        read_metadata(saved("PNG"), ImageSettings(max_edge=4))
