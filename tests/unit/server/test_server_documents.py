"""Files in requests: documents become their pages, images are images, and what is neither is refused by name."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from api_driver import run, world
from pdf_files import RED_SQUARE, TEXT, pdf
from PIL import Image

THREE = pdf(RED_SQUARE, TEXT, b" ")


def coded(data: bytes, head: str = "data:application/pdf;base64,") -> str:
    return head + base64.b64encode(data).decode()


def file_part(data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "file", "file": {"filename": "x.pdf", "file_data": coded(data), **more}}


def asked(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what is this?"}]}]


def pages_of(reply: Any) -> list[int | None]:
    return [image["page"] for image in reply["images"]]


def test_a_file_part_is_the_pages_of_a_document_in_order() -> None:
    async def go() -> None:
        async with world() as w:
            assert pages_of(await w.chat(messages=asked(file_part(THREE)))) == [1, 2, 3]
            assert pages_of(await w.chat(messages=asked(file_part(THREE, pages="3,1")))) == [3, 1]
            plain = {"type": "file", "file": {"file_data": coded(THREE, "")}}
            assert pages_of(await w.chat(messages=asked(plain))) == [1, 2, 3]
            url = {"type": "image_url", "image_url": {"url": coded(THREE)}}
            assert pages_of(await w.chat(messages=asked(url))) == [1, 2, 3]

    run(go())


def test_many_questions_about_a_document_encode_each_page_once() -> None:
    async def go() -> None:
        async with world() as w:
            first = await w.chat(messages=asked(file_part(THREE)))
            encoded = len(w.backend.encoded)
            again = await w.chat(messages=asked(file_part(THREE, pages="2-3")))
            assert len(w.backend.encoded) == encoded == 3
            assert [one["sha256"] for one in again["images"]] == [one["sha256"] for one in first["images"]][1:]

    run(go())


def test_the_responses_api_takes_files_and_remembers_them() -> None:
    async def go() -> None:
        async with world() as w:
            part = {"type": "input_file", "filename": "x.pdf", "file_data": coded(THREE), "pages": "1-2"}
            text = {"type": "input_text", "text": "what is this?"}
            reply = await w.post("/v1/responses", input=[{"role": "user", "content": [part, text]}])
            assert reply.status_code == 200, reply.text
            assert pages_of(reply.json()) == [1, 2]
            more = {"previous_response_id": reply.json()["id"], "input": "and now?"}
            assert pages_of((await w.post("/v1/responses", **more)).json()) == [1, 2]
            fetched = {"type": "input_file", "file_url": "http://example.org/x.pdf"}
            refused = await w.post("/v1/responses", input=[{"role": "user", "content": [fetched, text]}])
            assert refused.status_code == 400
            assert "--fetch-images" in refused.text

    run(go())


def test_a_document_block_of_anthropics_clients_is_its_pages() -> None:
    async def go() -> None:
        async with world() as w:
            source = {"type": "base64", "media_type": "application/pdf", "data": coded(THREE, "")}
            content = [{"type": "document", "source": source}, {"type": "text", "text": "what is this?"}]
            body = {"model": "any", "max_tokens": 20, "messages": [{"role": "user", "content": content}]}
            assert (await w.post("/v1/messages", **body)).status_code == 200
            assert len(w.backend.encoded) == 3
            counted = await w.post("/v1/messages/count_tokens", **body)
            assert counted.json()["input_tokens"] > 3 * w.backend.image_tokens

    run(go())


def test_a_file_may_be_an_image_and_a_tiff_has_pages() -> None:
    file = io.BytesIO()
    colours = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime")]
    colours[0].save(file, "TIFF", save_all=True, append_images=colours[1:])

    async def go() -> None:
        async with world() as w:
            (first,) = (await w.chat(messages=asked(file_part(file.getvalue()))))["images"]
            assert "first of 2" in first["notes"][0]
            assert pages_of(await w.chat(messages=asked(file_part(file.getvalue(), pages="2")))) == [2]

    run(go())


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        (
            file_part(b"PK\x03\x04" + b"\0" * 40, filename="letter.docx"),
            415,
            "letter.docx is a ZIP archive or an Office",
        ),
        (file_part(b"Dear Sir", filename="a.txt"), 400, "a.txt is a text file"),
        (file_part(THREE, pages="9"), 400, "x.pdf has 3 pages"),
        (file_part(THREE, pages="x"), 400, "not a list of pages"),
        ({"type": "file", "file": {"file_id": "file-1"}}, 400, "file_id is not read"),
        ({"type": "file", "file": {"file_data": ""}}, 400, "file_data"),
        ({"type": "file"}, 400, "file_data"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_field(part: dict[str, Any], status: int, said: str) -> None:
    async def go() -> None:
        async with world() as w:
            reply = await w.post(messages=asked(part))
            assert (reply.status_code, said in reply.text) == (status, True), reply.text
            assert reply.json()["error"]["param"].startswith("messages[0].content[0]")

    run(go())


def test_pages_of_a_request_are_bounded_and_what_is_left_out_is_said() -> None:
    async def go() -> None:
        async with world(max_pages=4) as w:
            five = pdf(*[b" "] * 5)
            reply = await w.chat(messages=asked(file_part(five)))
            assert pages_of(reply) == [1, 2, 3, 4]
            assert "first 4 of 5" in reply["images"][0]["notes"][0]
            refused = await w.post(messages=asked(file_part(THREE), file_part(THREE)))
            assert refused.status_code == 413
            assert "6 pages and tiles together, and 4 are the limit" in refused.text
            tiled = await w.post(messages=asked(file_part(THREE)), image_tiles="2x2")  # each page is five images
            assert (tiled.status_code, "15 pages" in tiled.text) == (413, True)

    run(go())
