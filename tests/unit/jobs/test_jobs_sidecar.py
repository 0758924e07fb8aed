"""Answers beside their images, read again by what reads them."""

import io
import json
import stat
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from PIL import Image

from opsin.core.errors import BadInput, OpsinError
from opsin.images.metadata import read_metadata, xmp_properties
from opsin.jobs.sidecar import sidecar_path, write_sidecar

ROW = {"text": "A <b>boat</b> & a pier\x07", "output": {"title": "Boat", "keywords": ["sea", "pier"], "rating": 4}}


def properties(path: Path) -> dict[str, str]:
    texts = {}
    for name, value in xmp_properties(path.read_bytes()):
        texts[name] = (
            value if isinstance(value, str) else "|".join(text.strip() for text in value.itertext() if text.strip())
        )
    return texts


def test_text_and_json(tmp_path: Path) -> None:
    write_sidecar(tmp_path / "a.txt", "txt", ROW)
    assert (tmp_path / "a.txt").read_text().startswith("A <b>boat")
    write_sidecar(tmp_path / "a.json", "json", ROW)
    assert json.loads((tmp_path / "a.json").read_text()) == ROW


def test_xmp_has_description_title_keywords_and_rating(tmp_path: Path) -> None:
    path = tmp_path / "a.xmp"
    for _ in range(2):  # a second answer replaces the first
        write_sidecar(path, "xmp", ROW)
        found = properties(path)
        assert found["xmp_dc_description"] == "A <b>boat</b> & a pier"
        assert found["xmp_dc_subject"] == "sea|pier"
        assert (found["xmp_dc_title"], found["xmp_xmp_rating"]) == ("Boat", "4")


def test_what_else_an_xmp_file_holds_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.xmp"
    path.write_text(
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:my="http://example.org/my/"'
        ' xmp:Rating="1" my:Flag="yes"/></rdf:RDF></x:xmpmeta>'
    )
    write_sidecar(path, "xmp", ROW)
    found = properties(path)
    assert found["xmp_my_flag"] == "yes"
    assert found["xmp_xmp_rating"] == "4"


@pytest.mark.parametrize("text", ["not XML", "<a/>", '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'])
def test_an_xmp_file_that_cannot_be_read_is_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.xmp"
    path.write_text(text)
    with pytest.raises(BadInput):
        write_sidecar(path, "xmp", ROW)
    assert path.read_text() == text


def test_two_images_of_one_name_have_two_sidecars(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.PNG"):
        (tmp_path / name).touch()
    assert sidecar_path(tmp_path / "a.jpg", "txt").name == "a.jpg.txt"
    assert sidecar_path(tmp_path / "a.png", "txt").name == "a.png.txt"
    assert sidecar_path(tmp_path / "b.PNG", "xmp").name == "b.xmp"


def test_xmp_is_well_formed_whatever_the_answer(tmp_path: Path) -> None:
    write_sidecar(tmp_path / "a.xmp", "xmp", {"text": "\x00\x1b]]>&\ud800 ü", "output": None})
    ET.fromstring((tmp_path / "a.xmp").read_bytes())


def test_no_two_images_of_a_folder_share_a_sidecar(tmp_path: Path) -> None:
    names = ["a.jpg", "a.JPG", "b.jpg", "b", "c.jpg", "c.png", "c.jpg.png", "d.dat", "d.webp", "e.jpg"]
    (tmp_path / "e").mkdir()
    for name in names:
        (tmp_path / name).touch()
    assert len({sidecar_path(tmp_path / name, "txt") for name in names}) == len(names)
    assert sidecar_path(tmp_path / "e.jpg", "txt").name == "e.txt"


def test_a_disk_that_ignores_case_gives_one_image_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.JPG").hardlink_to(tmp_path / "a.jpg")
    assert sidecar_path(tmp_path / "a.jpg", "txt").name == "a.txt"


FULL = """<?xpacket begin="" id="x"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF
 xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><r:Description r:about="" xmlns:my="http://example.org/my/"
 my:note="one&#10;two"><!-- mine --></r:Description><r:Description r:about=""
 xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:subject><r:Bag><r:li>mine</r:li><r:li>sea</r:li></r:Bag></dc:subject>
 <dc:description><r:Alt><r:li xml:lang="x-default">old</r:li><r:li xml:lang="de">Boot</r:li></r:Alt></dc:description>
</r:Description></r:RDF></x:xmpmeta><?xpacket end="w"?>"""


def test_prefixes_comments_languages_and_keywords_of_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.xmp"
    path.write_text(FULL)
    for _ in range(2):
        write_sidecar(path, "xmp", ROW)
    text = path.read_text()
    assert 'my:note="one&#10;two"' in text
    assert "<!-- mine -->" in text
    found = properties(path)
    assert found["xmp_dc_subject"] == "mine|sea|pier"
    assert found["xmp_dc_description"] == "A <b>boat</b> & a pier|Boot"


@pytest.mark.parametrize("before", ["", FULL])
def test_images_with_the_written_xmp_are_read(tmp_path: Path, before: str) -> None:
    path, file = tmp_path / "a.xmp", io.BytesIO()
    if before:
        path.write_text(before)
    write_sidecar(path, "xmp", ROW)
    Image.new("RGB", (8, 8)).save(file, "JPEG", xmp=path.read_bytes())
    found = read_metadata(file.getvalue())
    assert (found["caption"], found["title"], found["rating"]) == ("A <b>boat</b> & a pier", "Boat", "4")
    assert found["keywords"].endswith("sea, pier")


def test_fields_of_other_types_are_left_out(tmp_path: Path) -> None:
    output = {"title": 3, "tags": ["a", "a", 5, None, " "], "rating": True}
    write_sidecar(tmp_path / "a.xmp", "xmp", {"text": "x", "output": output})
    found = properties(tmp_path / "a.xmp")
    assert found["xmp_dc_subject"] == "a"
    assert not {"xmp_dc_title", "xmp_xmp_rating"} & found.keys()


def test_who_may_read_the_folder_may_read_the_sidecar(tmp_path: Path) -> None:
    for mode, expected in ((0o755, 0o644), (0o700, 0o600)):
        folder = tmp_path / oct(mode)
        folder.mkdir()
        folder.chmod(mode)
        write_sidecar(folder / "a.txt", "txt", ROW)
        assert stat.S_IMODE((folder / "a.txt").stat().st_mode) == expected


@pytest.mark.parametrize("kind", ["txt", "json", "xmp"])
def test_what_cannot_be_written_is_one_sentence(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "a", tmp_path / "none" / "a.txt"):
        with pytest.raises(OpsinError):
            write_sidecar(path, kind, ROW)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [3_000, 30_000])
def test_nesting_without_end_is_refused_not_followed(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "a.xmp"
    path.write_text(FULL.replace("<!-- mine -->", "<my:a>" * depth + "</my:a>" * depth))
    with pytest.raises(BadInput):
        write_sidecar(path, "xmp", ROW)
