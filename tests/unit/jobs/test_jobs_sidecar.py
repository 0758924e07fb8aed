"""Answers beside their images, read again by what reads them."""

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from opsin.core.errors import BadInput
from opsin.images.metadata import xmp_properties
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
    assert sidecar_path(tmp_path / "a.jpg", "txt").name == "a.txt"
    assert sidecar_path(tmp_path / "a.png", "txt").name == "a.png.txt"
    assert sidecar_path(tmp_path / "b.PNG", "xmp").name == "b.xmp"


def test_xmp_is_well_formed_whatever_the_answer(tmp_path: Path) -> None:
    write_sidecar(tmp_path / "a.xmp", "xmp", {"text": "\x00\x1b]]>&\ud800 ü", "output": None})
    ET.fromstring((tmp_path / "a.xmp").read_bytes())
