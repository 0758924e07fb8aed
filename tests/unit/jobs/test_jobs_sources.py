"""The inputs of `opsin batch`: every form, what is wrong with them, and that none of them fills memory."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsin.core.errors import BadInput, OpsinError
from opsin.images.folder import natural
from opsin.jobs import tables, tars
from opsin.jobs.files import clean, is_address
from opsin.jobs.item import FilePart, Item
from opsin.jobs.sources import Source, all_differ, open_source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
fsspec = pytest.importorskip("fsspec")
PNG = b"\x89PNG\r\n\x1a\n and so on"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)


def ids(source: Source) -> list[str]:
    return [item.id for item in source]


def good(source: Source) -> list[Item]:
    return [item for item in source if item.error is None]


def rows(source: Source) -> list[tuple[str, Any]]:
    """Id and images of each row, or the class of its error."""
    return [(item.id, type(item.error).__name__ if item.error else item.images) for item in source]


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most bytes that Python held meanwhile."""
    most: list[int] = []
    tracemalloc.start()
    try:
        yield most
    finally:
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()


def refused(text: str | Path, **options: Any) -> str:
    with pytest.raises(OpsinError) as caught:
        list(open_source(str(text), **options))
    assert caught.value.exit_code == 2
    return str(caught.value)


# Folders, patterns, images, lists


def test_a_folder_gives_its_images_in_natural_order_and_counts_the_rest(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.png", "b/10.JPG", "a.png", "b/.hidden.png", "b/._2.png", ".git/x.png", "notes.txt", "b/x.CR3")
    touch(tmp_path, "b/c.txt", "README")
    (tmp_path / "gone.png").symlink_to("nowhere")
    source = open_source(str(tmp_path))
    assert ids(source) == ids(source) == ["a.png", "b/2.png", "b/10.JPG"]
    assert source.total == 3
    assert source.folder == tmp_path
    assert (source.columns, source.is_requests) == (None, False)
    assert sorted(source.skipped.values()) == [1, 1, 1, 2]
    assert source.skipped[".txt"] == 2
    first = next(iter(source))
    assert first.source == str(tmp_path / "a.png")
    assert first.images == (str(tmp_path / "a.png"),)
    assert ids(open_source(str(tmp_path), recursive=False)) == ["a.png"]


def test_the_folder_may_be_written_in_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "p/a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("p", "p/", "./p", "p/.", "../" + tmp_path.name + "/p", "~/p", f"file://{tmp_path}/p"):
        assert ids(open_source(text)) == ["a.png"], text
    assert ids(open_source(".")) == ["p/a.png"]
    assert [item.images for item in open_source(".")] == [("p/a.png",)]


@given(st.lists(st.text(st.sampled_from("aB2/10- ."), min_size=1, max_size=8)))
def test_natural_order_compares_parts_and_numbers(names: list[str]) -> None:
    import re

    def key(name: str) -> list[list[int | str]]:
        parts = (re.split(r"(\d+)", part) for part in name.casefold().split("/"))
        return [[int(piece) if piece.isdecimal() else piece for piece in part] for part in parts]

    assert sorted(sorted(names), key=natural) == sorted(sorted(names), key=key)


def test_names_that_are_no_text_give_ids_that_are(tmp_path: Path) -> None:
    try:
        (tmp_path / "caf\udce9.png").write_bytes(PNG)
    except OSError:
        pytest.skip("this disk takes names in UTF-8 alone")
    (item,) = open_source(str(tmp_path))
    item.id.encode()
    item.source.encode()
    (image,) = item.images
    assert isinstance(image, str)
    assert Path(image).read_bytes() == PNG


@given(st.text(st.characters()))
def test_clean_text_fits_utf8_and_stays_where_it_can(text: str) -> None:
    clean(text).encode()
    assert clean(clean(text)) == clean(text)


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "p/a1.jpg", "p/q/a10.jpg", "p/q/a9.jpg", "p/x.txt", "p/.h/b.jpg", "p/[1].jpg", "p/1.jpg")
    monkeypatch.chdir(tmp_path)
    deep = open_source("p/**/a*.jpg")
    assert ids(deep) == ["a1.jpg", "q/a9.jpg", "q/a10.jpg"]
    assert [item.images[0] for item in deep] == ["p/a1.jpg", "p/q/a9.jpg", "p/q/a10.jpg"]
    assert (deep.total, deep.folder) == (3, Path("p"))
    assert ids(open_source(f"{tmp_path}/p//q/*.jpg")) == ["a9.jpg", "a10.jpg"]
    assert open_source("p/*").skipped == {".txt": 1}
    assert ids(open_source("*/q/*")) == ["p/q/a9.jpg", "p/q/a10.jpg"]
    assert ids(open_source("p/[1].jpg")) == ["[1].jpg"]
    refused("p/*.gif")


def test_one_image(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "noending")
    for name in ("a.png", "noending"):
        source = open_source(str(tmp_path / name))
        assert rows(source) == [(name, (str(tmp_path / name),))]
        assert (source.total, source.folder) == (1, tmp_path)
    for address in ("https://example.org/a.png?size=3", "http://example.org/image"):
        assert rows(open_source(address)) == [(address, (address,))]
    (item,) = open_source("data:image/png;base64,AAAA.csv")
    assert item.images == ("data:image/png;base64,AAAA.csv",)
    assert "AAAA" not in item.id + item.source


def listed(monkeypatch: pytest.MonkeyPatch, data: bytes, *, block: int = 2**16) -> Source:
    class Slow(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            return super().read1(min(size or block, block))

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=Slow(data), isatty=lambda: False))
    return open_source("-")


def test_a_list_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"./a b.png\r\n\nhttps://h/x.png\ndata:image/png;base64,AAAA\n/abs/\xff.png"
    items = list(listed(monkeypatch, text))
    assert [item.images[0] for item in items] == [
        "./a b.png",
        "https://h/x.png",
        "data:image/png;base64,AAAA",
        "/abs/\udcff.png",
    ]
    assert [item.id for item in items] == ["./a b.png", "https://h/x.png", "3", "/abs/\\udcff.png"]
    assert listed(monkeypatch, b"").total is None
    assert ids(listed(monkeypatch, b"")) == []
    assert ids(listed(monkeypatch, b"a\nb\0c\nd\0")) == ["a\nb", "c\nd"]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    refused("-")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.binary(min_size=1, max_size=9).filter(lambda b: not {0, 10, 13} & set(b) and b[:5] != b"data:")),
    st.sampled_from([b"\n", b"\0", b"\r\n"]),
    st.integers(1, 7),
)
def test_a_list_is_the_same_in_any_pieces(
    monkeypatch: pytest.MonkeyPatch, names: list[bytes], separator: bytes, block: int
) -> None:
    source = listed(monkeypatch, separator.join(names), block=block)
    assert [item.images[0].encode("utf-8", "surrogateescape") for item in source] == names  # type: ignore[union-attr]


def test_a_list_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.jobs.sources.MAX_ROW", 100_000)
    with pytest.raises(BadInput):
        list(listed(monkeypatch, b"x" * 300_000))


# JSON Lines


def jsonl(path: Path, *lines: Any) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def test_a_batch_of_requests(tmp_path: Path) -> None:
    body = {"model": "m", "messages": []}
    whole = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    bad = [
        {**whole, "custom_id": ""},
        {**whole, "url": "/v1/embeddings"},
        {**whole, "body": 3},
        [],
        "{",
        {"body": body},
    ]
    source = open_source(jsonl(tmp_path / "in.jsonl", whole, *bad, {**whole, "custom_id": "two"}))
    assert source.is_requests
    assert (source.total, source.columns) == (8, None)
    items = list(source)
    assert [item.id for item in items if item.error is None] == ["one", "two"]
    assert all(item.body == body for item in items if item.error is None)
    assert len({item.id for item in items}) == 8
    assert all(isinstance(item.error, BadInput) for item in items[1:-1])
    refused(tmp_path / "in.jsonl", id_column="custom_id")


def test_jsonl_of_plain_objects(tmp_path: Path) -> None:
    lines = [
        {"image": "a.png", "n": 1},
        {"image": ["b.png", "https://h/c.png"], "more": "x"},
        "",
        {"image": None},
        {"image": {"path": "sub/d.png"}},
        {"image": 7},
        {"image": {"bytes": "text"}},
        {"image": [["a.png"]]},
        "not json",
        "[1]",
        '{"image": "\\ud800"}',
        "[" * 100_000,
        {"image": "/abs.png"},
    ]
    source = open_source(jsonl(tmp_path / "in.jsonl", *lines))
    assert source.total == 12
    assert source.columns == ("image", "n", "more")
    items = list(source)
    assert [item.images for item in items if item.error is None] == [
        (f"{tmp_path}/a.png",),
        (f"{tmp_path}/b.png", "https://h/c.png"),
        (f"{tmp_path}/sub/d.png",),
        ("/abs.png",),
    ]
    assert (items[0].id, items[0].source, items[0].columns) == ("1", "a.png", {"image": "a.png", "n": 1})
    assert items[-1].id == "12"
    assert str(items[3].error) != ""
    assert len({item.id for item in items}) == 12
    for item in items:
        if item.error is not None:
            assert str(tmp_path / "in.jsonl") in str(item.error)


def test_ids_from_a_column(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"image": "a", "k": 7}, {"image": "b", "k": ""}, {"image": "c"}, {"k": "x"})
    assert [(item.id, item.error is None) for item in open_source(path, id_column="k")] == [
        ("7", True),
        ("row 2", False),
        ("row 3", False),
        ("x", False),
    ]
    refused(path, id_column="other")


def test_too_long_a_line_costs_one_row_and_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROW", 1000)
    long = json.dumps({"image": "x" * 5000})
    for ending, text in (("jsonl", f'{{"image": "a"}}\n{long}\n{{"image": "b"}}\n'), ("csv", f"image\na\n{long}\nb\n")):
        (tmp_path / f"in.{ending}").write_text(text)
        found = rows(open_source(str(tmp_path / f"in.{ending}")))
        assert [images != "BadInput" for _, images in found] == [True, False, True]


# CSV


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(tmp_path: Path, delimiter: str, encoding: str) -> None:
    path = tmp_path / "in.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["Path", "größe, a;b"], ["a.png", 'two\nlines, "quoted"; and\ttabs'], [], ["/b.png"], [""]])
        writer.writerow(["c.png", "", "surplus"])
        writer.writerow(["d.png", "", "", ""])
        writer.writerow(['["e.png", "data:,x"]', ""])
    source = open_source(str(path))
    assert source.columns == ("Path", "größe, a;b")
    assert source.total == 6
    items = list(source)
    assert items[0].columns == {"Path": "a.png", "größe, a;b": 'two\nlines, "quoted"; and\ttabs'}
    assert [item.images for item in items] == [
        (f"{tmp_path}/a.png",),
        ("/b.png",),
        (),
        (),
        (f"{tmp_path}/d.png",),
        (f"{tmp_path}/e.png", "data:,x"),
    ]
    assert [item.id for item in items][-1] == "6"
    assert "Path" in source.note


def test_the_image_column_is_found_or_named(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("photo,url,IMAGE\na,https://h/b,c\n")
    assert good(open_source(str(path)))[0].source == "c"
    named = open_source(str(path), image_column="photo")
    assert (good(named)[0].source, named.note) == ("a", "")
    refused(path, image_column="nothing")
    path.write_text("photo,text\na,b\n")
    assert "photo, text" in refused(path)


def test_text_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b"image,text\na,caf\xe9\nb,plain\n")
    assert [kind != "BadInput" for _, kind in rows(open_source(str(path)))] == [False, True]
    path.write_bytes("image,text\na,b\n".encode("utf-16"))
    refused(path)


def test_a_quote_that_never_ends_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROW", 10_000)
    path = tmp_path / "in.csv"
    path.write_text('image,text\na,b\nb,"open\n' + "x,y\n" * 5000 + "last,z\n")
    items = list(open_source(str(path)))
    assert items[1].error is not None
    assert (items[0].source, items[-1].source) == ("a", "last")
    path.write_text("image,text\na,b\n" + '"x\n",' * 50_000)  # fields are short, the row is not
    with peak() as most:
        assert any(item.error for item in open_source(str(path)))
    assert most[0] < 3_000_000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_bad_input(tmp_path: Path, data: bytes) -> None:
    for name, head in (
        ("x.csv", b"image,a\n"),
        ("x.jsonl", b'{"image": "a"}\n'),
        ("x.tar", b""),
        ("x.parquet", b"PAR1"),
    ):
        for start in (b"", head):
            (tmp_path / name).write_bytes(start + data)
            with suppress(BadInput):
                for item in open_source(str(tmp_path / name)):
                    item.id.encode()
                    item.source.encode()
                    assert item.error is None or isinstance(item.error, BadInput)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.tuples(st.text(min_size=1), st.text()), min_size=1))
def test_csv_and_jsonl_agree(tmp_path: Path, cells: list[tuple[str, str]]) -> None:
    cells = [(f"/{one}", two) for one, two in cells if clean(one + two) == one + two and "\r" not in one + two]
    if not cells:
        return
    with (tmp_path / "in.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "text"), *cells])
    jsonl(tmp_path / "in.jsonl", *({"image": one, "text": two} for one, two in cells))
    seen = [
        [(item.id, item.images, dict(item.columns)) for item in open_source(str(tmp_path / name))]
        for name in ("in.csv", "in.jsonl")
    ]
    assert seen[0] == seen[1]
    assert [images for _, images, _ in seen[0]] == [(one,) for one, _ in cells]


# Parquet


def test_parquet_with_every_kind_of_cell(tmp_path: Path) -> None:
    images = [b"\xff\xd8bytes", None, b""]
    pq.write_table(pa.table({"image": images, "n": [1, 2, 3]}), tmp_path / "bytes.parquet")
    source = open_source(str(tmp_path / "bytes.parquet"))
    assert (source.total, source.columns) == (3, ("image", "n"))
    assert rows(source) == [("1", (b"\xff\xd8bytes",)), ("2", "BadInput"), ("3", "BadInput")]
    first = next(iter(source))
    assert (first.source, first.columns) == (f"{tmp_path}/bytes.parquet#1", {"n": 1})
    structs = [{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    pq.write_table(pa.table({"image": structs}), tmp_path / "structs.parquet")
    assert [images for _, images in rows(open_source(str(tmp_path / "structs.parquet")))] == [
        (b"x",),
        (f"{tmp_path}/b.png",),
        "BadInput",
    ]
    lists = pa.table({"images": [["a", "http://h/b"], []], "k": ["x", "y"]})
    pq.write_table(lists, tmp_path / "lists.parquet")
    assert rows(open_source(str(tmp_path / "lists.parquet"), id_column="k")) == [
        ("x", (f"{tmp_path}/a", "http://h/b")),
        ("y", "BadInput"),
    ]


def test_a_folder_of_parts_keeps_its_numbers_where_one_is_damaged(tmp_path: Path) -> None:
    for part in (1, 2, 10):
        table = pa.table(
            {"image": [f"/{part}-{row}.png" for row in range(50)], "x": [str(row) * 99 for row in range(50)]}
        )
        pq.write_table(table, tmp_path / f"part-{part}.parquet", row_group_size=10, compression="snappy")
    touch(tmp_path, "_SUCCESS")
    source = open_source(str(tmp_path))
    assert source.total == 150
    whole = rows(source)
    assert whole[50] == ("51", ("/2-0.png",))
    damaged = tmp_path / "part-2.parquet"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    damaged.write_bytes(data)
    found = rows(open_source(str(tmp_path)))
    assert len(found) == 150
    assert found[:50] == whole[:50]
    assert found[100:] == whole[100:]
    assert "BadInput" in [images for _, images in found]
    assert ids(open_source(str(tmp_path / "*.parquet"))) == [str(number) for number in range(1, 151)]


def test_parquet_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for data in (b"", b"PAR1", b"PAR1" * 99, b"PAR1" + bytes(99) + b"\xff\xff\xff\x7fPAR1", b"PAR1" * 3 + b"PARE"):
        path.write_bytes(data)
        refused(path)
    pq.write_table(pa.table({"image": pa.array([], pa.string())}), path)
    refused(path)
    pq.write_table(pa.table({"text": ["a"]}), path)
    assert "text" in refused(path)


@pytest.mark.slow
def test_rows_of_a_dictionary_that_repeats_a_large_value_are_read_in_small_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_BATCH_BYTES", 2**24)
    path = tmp_path / "a.parquet"
    table = pa.table({"image": pa.array([bytes(2**20)] * 200, pa.binary())})
    pq.write_table(table, path, dictionary_pagesize_limit=2**30, data_page_size=2**30)
    del table
    assert path.stat().st_size < 2**20
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in open_source(str(path)))
    assert most < 2**26


# Tars


def tar_of(path: Path, files: dict[str, bytes], mode: Any = "w") -> str:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


SHARD = {
    "./a/000.jpg": b"first",
    "./a/000.json": b'{"n": 1, "caption": "x"}',
    "./a/000.txt": b" a dog\n",
    "./a/000.cls": b"3",
    "./a/._000.jpg": b"apple",
    "a/001.depth.png": b"depth",
    "a/001.png": b"second",
    "README.md": b"read me",
    "a/002.json": b"{}",
    "a/003.json": b'{"n": 3}',
    "a/004.webp": b"",
    "a/005.png": b"x",
    "a/005.json": b"[",
}


def test_a_webdataset(tmp_path: Path) -> None:
    plain = open_source(tar_of(tmp_path / "a.tar", SHARD))
    packed = open_source(tar_of(tmp_path / "b.tar.gz", SHARD, "w:gz"))
    assert plain.columns == packed.columns == ("n", "caption")
    kinds = [("a/000", True), ("a/001", True), ("a/003", False), ("a/004", True), ("a/005", False)]
    for source in (plain, packed):
        for _ in range(2):
            items = list(source)
            assert [(item.id, item.error is None) for item in items] == kinds
        assert items[0].columns == {"n": 1, "caption": "a dog"}
        assert source.skipped == {".cls": 1, ".md": 1}
    first, second = good(plain)[:2]
    assert first.source == f"{tmp_path}/a.tar#a/000.jpg"
    for item, data in ((first, b"first"), (second, b"second")):
        (part,) = item.images
        assert isinstance(part, FilePart)
        with Path(part.path).open("rb") as file:
            file.seek(part.offset)
            assert file.read(part.size) == data
    assert [item.images for item in good(packed)] == [(b"first",), (b"second",), (b"",)]
    other = open_source(str(tmp_path / "b.tar.gz"), image_column="depth.png")
    assert [item.images for item in good(other)] == [(b"depth",)]
    named = open_source(str(tmp_path / "a.tar"), id_column="n")
    assert [(item.id, item.error is None) for item in named][:2] == [("1", True), ("a/001", False)]


def test_shards(tmp_path: Path) -> None:
    for number in (8, 9, 10):
        tar_of(tmp_path / f"s-{number:03}.tar", {f"{number}.png": b"x"})
    for pattern in ("s-*.tar", "s-{008..010}.tar", ""):
        assert ids(open_source(f"{tmp_path}/{pattern}")) == ["8", "9", "10"]
    refused(tmp_path / "s-{008..011}.tar")
    refused(tmp_path / "s-{0..999999999}.tar")
    refused(tmp_path / "s-{9..8}.tar")


@pytest.mark.parametrize("how", ["cut", "header", "packed"])
def test_rows_before_damage_count(tmp_path: Path, how: str) -> None:
    files = {f"{number}.png": bytes([number]) * 3000 for number in range(9)}
    path = Path(tar_of(tmp_path / "a.tar", files))
    data = bytearray(path.read_bytes())
    if how == "packed":
        data = bytearray(gzip.compress(bytes(data), 0))
    if how == "header":
        data[4 * 3584 : 4 * 3584 + 400] = b"\x07" * 400
    else:
        del data[4 * 3584 + 2000 :]
    path.write_bytes(data)
    tar_of(tmp_path / "b.tar", {"next.png": b"x"})
    items = list(open_source(f"{tmp_path}/*.tar"))
    found = [(item.id, item.error is None) for item in items]
    before = 3 if how == "header" else 4
    assert found == [*((str(n), True) for n in range(before)), (str(before), False), ("next", True)]
    refused_alone = [item for item in items if item.error]
    assert str(path) in str(refused_alone[0].error)


def test_tars_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for data in (b"", b"hello" * 999, gzip.compress(b"hello" * 999), b"\x1f\x8b" + bytes(99), bytes(10240)):
        path.write_bytes(data)
        refused(path)
    tar_of(path, {"README.md": b"x"})
    refused(path)


@pytest.mark.parametrize("size", [10**9, -1024])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
@pytest.mark.parametrize("packed", [True, False])
def test_headers_that_ask_for_memory_or_lead_in_circles(
    tmp_path: Path, kind: bytes, size: int, *, packed: bool
) -> None:
    good_one, info = tarfile.TarInfo("0.png"), tarfile.TarInfo("1.png")
    info.type, info.size = kind, size
    headers = [one.tobuf(tarfile.GNU_FORMAT) for one in (good_one, info)]
    path, data = tmp_path / "a.tar", b"".join(headers) + bytes(9999)
    path.write_bytes(gzip.compress(data) if packed else data)
    tar_of(tmp_path / "b.tar", {"next.png": b"x"})
    items = list(open_source(f"{tmp_path}/*.tar"))
    assert items[-1].id == "next"
    assert [item for item in items if item.error]


def test_large_files_in_packed_tars_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MOST_BYTES", 50_000)
    large = {"0.png": b"x", "1.png": bytes(60_000), "2.png": b"x", "2.txt": bytes(60_000)}
    packed = open_source(tar_of(tmp_path / "b.tgz", large, "w:gz"))
    assert [(item.id, item.error is None) for item in packed] == [("0", True), ("1", False), ("2", False)]


# Remote


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_remote_inputs(memory: Any, tmp_path: Path) -> None:
    for name in ("d/2.png", "d/10.png", "d/.x.png", "d/e/1.png", "d/notes.txt"):
        memory.pipe(f"/{name}", PNG)
    folder = open_source("memory://d")
    assert ids(folder) == ["2.png", "10.png", "e/1.png"]
    assert all(isinstance(image, str) and is_address(image) for item in folder for image in item.images)
    with fsspec.open(next(iter(folder)).images[0], "rb") as file:
        assert file.read() == PNG
    assert (folder.folder, folder.total, folder.skipped) == (None, 3, {".txt": 1})
    assert ids(open_source("memory://d/*.png")) == ["2.png", "10.png"]
    assert ids(open_source("memory://d", recursive=False)) == ["2.png", "10.png"]
    assert rows(open_source("memory://d/2.png")) == [("memory://d/2.png", ("memory://d/2.png",))]

    memory.pipe("/t/in.csv", b"image\nx/a.png\nhttps://h/b\n")
    table = open_source("memory://t/in.csv")
    assert rows(table) == [("1", ("memory://t/x/a.png",)), ("2", ("https://h/b",))]
    assert table.total is None
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    memory.pipe("/t/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert rows(open_source("memory://t/a.parquet")) == [("1", (b"x",))]
    for number in (1, 2):
        packed = tar_of(tmp_path / "a.tar", {f"{number}.png": b"x"}, "w:gz" if number == 2 else "w")
        memory.pipe(f"/t/{number}.tar", Path(packed).read_bytes())
    assert rows(open_source("memory://t/{1..2}.tar")) == [("1", (b"x",)), ("2", (b"x",))]
    refused("memory://nothing/in.csv")
    refused("memory://nothing/{1..2}.tar")
    refused("nosuchscheme://x/in.csv")


def test_without_the_extra_one_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"image": ["a"]}), tmp_path / "a.parquet")
    for name in ("fsspec", "fsspec.core", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    for text in (str(tmp_path / "a.parquet"), "s3://bucket/in.csv"):
        assert "opsin[batch]" in refused(text)


# Inputs that are none


def test_inputs_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "in.png")
    for name, text in (("a.txt", "a.png\n"), ("a.csv", ""), ("b.csv", "image\n"), ("a.jsonl", ""), ("b.jsonl", "x\n")):
        (tmp_path / name).write_text(text)
        refused(tmp_path / name)
    for text in ("", " ", tmp_path / "nothing", tmp_path / "nothing.csv", tmp_path / "empty", "x" * 5000, "a\0b"):
        refused(text)
    refused("/dev/null")
    refused(tmp_path / "in.png", image_column="image")
    refused(tmp_path, id_column="image")
    (tmp_path / "secret.csv").write_text("image\na\n")
    (tmp_path / "secret.csv").chmod(0)
    if not (tmp_path / "secret.csv").is_file():
        refused(tmp_path / "secret.csv")


def test_a_table_that_is_gone_later_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("image\na\n")
    source = open_source(str(path))
    path.unlink()
    with pytest.raises(BadInput):
        list(source)


# Memory


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "tar"])
def test_memory_is_flat(tmp_path: Path, ending: str) -> None:
    count, path = 100_000, tmp_path / f"in.{ending}"
    if ending == "tar":
        count = 10_000
        tar_of(path, {f"{number}.png": b"x" for number in range(count)})
    elif ending == "parquet":
        names = [f"images/{number}.png" for number in range(count)]
        pq.write_table(pa.table({"image": names, "caption": ["text"] * count}), path)
    else:
        with path.open("w") as file:
            file.write("image,caption\n" if ending == "csv" else "")
            for number in range(count):
                row = f"images/{number}.png,text\n", f'{{"image": "images/{number}.png", "caption": "text"}}\n'
                file.write(row[ending == "jsonl"])
    with peak() as most:
        source = open_source(str(path))
        assert sum(item.error is None for item in source) == count
    assert source.total in {count, None}
    assert most[0] < 5_000_000


def test_bytes_of_data_addresses_are_not_repeated(tmp_path: Path) -> None:
    address = "data:image/png;base64," + base64.b64encode(PNG * 99).decode()
    path = tmp_path / "in.csv"
    path.write_text(f'image\n"{address}"\n')
    (item,) = open_source(str(path))
    assert item.images == (address,)
    assert len(item.id) + len(item.source) < 500


def test_whether_each_row_is_about_an_image_of_its_own(tmp_path: Path) -> None:
    def differ(name: str, text: str) -> bool:
        (tmp_path / name).write_text(text)
        return all_differ(open_source(str(tmp_path / name)))

    assert differ("one.csv", "image,a\nx.png,1\ny.png,2\n")
    assert not differ("two.csv", "image,a\nx.png,1\nx.png,2\n")
    assert not differ("document.csv", "image,a\nx.png,1\ny.PDF,2\n")
    assert not differ("address.csv", "image,a\nhttps://example.com/show?id=3,1\n")
    assert differ("wrong.csv", "image,a\nx.png,1\n,2\n")
    assert not differ("requests.jsonl", '{"custom_id": "1", "body": {}}\n')
    assert differ("none.jsonl", '{"image": "x.png"}\n{"image": null}\n')
    assert not all_differ(Source(lambda: iter(()), once=True))
    for number in range(200):
        (tmp_path / f"{number}.png").write_bytes(PNG)
    assert all_differ(open_source(str(tmp_path)))
    (tmp_path / "zz.pdf").write_bytes(b"%PDF-1.4")
    assert not all_differ(open_source(str(tmp_path)))
