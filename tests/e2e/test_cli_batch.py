"""`opsin batch` as a user types it, in a process of its own, on the shipped demo model."""

import base64
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

pytestmark = pytest.mark.slow

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
QUESTION = "What is in this picture?"
KILLS = int(os.environ.get("OPSIN_KILLS", "5"))


def paint(path: Path, number: int) -> None:
    """A disc or a square, somewhere, in some colour: each number has its own."""
    draw_from = random.Random(number)
    image = Image.new("RGB", (112, 112), (230, 230, 225))
    draw, x, y, r = (
        ImageDraw.Draw(image),
        draw_from.randint(30, 80),
        draw_from.randint(30, 80),
        draw_from.randint(14, 28),
    )
    shape = draw.ellipse if number % 2 else draw.rectangle
    shape((x - r, y - r, x + r, y + r), COLOURS[number % len(COLOURS)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(10):
        paint(folder / ("trip" if number % 3 == 0 else "") / f"p{number}.png", number)
    (folder / "p3.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    (folder / "._p1.png").write_bytes(b"\x00\x05\x16\x07")
    (folder / "notes.docx").write_bytes(b"PK")
    return folder


def batch(
    env: dict[str, str], *arguments: object, code: int = 0, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "opsin", "batch", *map(str, arguments), "--temperature", "0", "--no-disk-cache"]
    done = subprocess.run(command, input=stdin, capture_output=True, env=env, timeout=180, check=False)
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_becomes_json_lines_a_bad_image_is_one_row_and_the_job_goes_on(
    opsin_env: dict[str, str], photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    done = batch(opsin_env, photos, QUESTION, "-o", out, code=1)
    rows = lines(out)
    assert [row["id"] for row in rows] == [
        *("p1.png", "p2.png", "p3.png", "p4.png", "p5.png", "p7.png", "p8.png"),
        *("trip/p0.png", "trip/p3.png", "trip/p6.png", "trip/p9.png"),
    ]
    bad = rows.pop(2)
    assert bad["error"]["code"] == "bad_image"
    assert all(row["text"] and row["error"] is None and row["usage"]["completion_tokens"] for row in rows)
    assert all(row["attempt"] == 1 and row["job"] == bad["job"] for row in rows)
    assert b"docx" in done.stderr
    again = batch(opsin_env, photos, QUESTION, "-o", out, code=1)
    assert len(lines(out)) == 11
    assert b"11 were there before" in again.stderr


def test_another_question_for_the_same_output_is_refused_or_kept_apart(
    opsin_env: dict[str, str], photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    batch(opsin_env, photos / "p?.png", QUESTION, "-o", out, code=1)
    done = batch(opsin_env, photos / "p?.png", "Which colour?", "-o", out, code=2)
    assert QUESTION.encode() in done.stderr
    assert b"Which colour?" in done.stderr
    batch(opsin_env, photos / "p?.png", "Which colour?", "-o", out, "--new", code=1)
    rows = table(out)
    assert len(rows) == 14
    assert len({row["job"] for row in rows}) == 2
    batch(opsin_env, photos / "p?.png", "Which colour?", "-o", out, "--overwrite", code=1)
    assert len(table(out)) == 7
    other = tmp_path / "mine.csv"
    other.write_text("a,b\n")
    batch(opsin_env, photos, QUESTION, "-o", other, code=2)
    assert other.read_text() == "a,b\n"


def test_captions_beside_photographs(opsin_env: dict[str, str], photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "album"
    for number in range(4):
        paint(folder / f"p{number}.png", number)
    (folder / "p2.txt").write_text("mine")
    batch(opsin_env, folder, QUESTION, "--sidecar", "txt", "--skip-existing")
    assert (folder / "p2.txt").read_text() == "mine"
    assert all((folder / f"p{number}.txt").read_text().strip() for number in (0, 1, 3))
    paint(folder / "p7.png", 7)
    batch(opsin_env, folder, QUESTION, "--sidecar", "txt", "--skip-existing")
    assert (folder / "p7.txt").exists()


def test_tables_templates_schemas_and_columns(opsin_env: dict[str, str], photos: Path, tmp_path: Path) -> None:
    source, schema = tmp_path / "in.csv", tmp_path / "schema.json"
    names = ["p1.png", "p2.png", "p4.png", "nothing.png"]
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([("sku", "image", "thing"), *((f"s{n}", photos / n, "shape") for n in names)])
    schema.write_text(
        json.dumps(
            {
                "type": "object",
                "properties": {"colour": {"enum": ["red", "green", "blue"]}, "sure": {"type": "boolean"}},
                "required": ["colour", "sure"],
            }
        )
    )
    out = tmp_path / "out.parquet"
    arguments = (source, "Which {thing} is this? ({filename})", "--id", "sku", "--json-schema", schema)
    batch(opsin_env, *arguments, "-o", out, code=1)
    found = pq.read_table(out)
    assert found.schema.field("sure").type == pa.bool_()
    rows = found.to_pylist()
    assert [row["id"] for row in rows] == [f"s{name}" for name in names]
    assert all(row["colour"] in {"red", "green", "blue"} for row in rows[:3])
    assert rows[3]["error_code"] == "bad_image"
    batch(opsin_env, source, "Which {size} is this?", "-o", tmp_path / "x.csv", code=2)
    batch(opsin_env, *arguments, "-o", tmp_path / "out.csv", "--limit", "2")
    batch(opsin_env, *arguments[:-2], "-o", tmp_path / "out.csv", "--limit", "2", "--new", code=2)
    assert [row["id"] for row in table(tmp_path / "out.csv")] == ["sp1.png", "sp2.png"]


def test_paths_on_standard_input_and_bytes_in_parquet(opsin_env: dict[str, str], photos: Path, tmp_path: Path) -> None:
    listed = b"\0".join(str(photos / name).encode() for name in ("p1.png", "p2.png"))
    batch(opsin_env, "-", QUESTION, "-o", tmp_path / "a.jsonl", stdin=listed)
    source = tmp_path / "in.parquet"
    cells = [{"bytes": (photos / name).read_bytes(), "path": name} for name in ("p1.png", "p2.png")]
    pq.write_table(pa.table({"image": cells}), source)
    batch(opsin_env, source, QUESTION, "-o", tmp_path / "b.jsonl")
    texts = [[row["text"] for row in lines(tmp_path / name)] for name in ("a.jsonl", "b.jsonl")]
    assert texts[0] == texts[1]


def test_a_batch_in_openais_form(opsin_env: dict[str, str], photos: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    url = "data:image/png;base64," + base64.b64encode((photos / "p1.png").read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body = {"model": "any", "temperature": 0, "messages": [{"role": "user", "content": content}]}
    bad = {**body, "messages": "no"}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    bodies = {"good": body, "bad": bad, "schema": {**body, "response_format": schema}}
    requests = [{"custom_id": n, "method": "POST", "url": "/v1/chat/completions", "body": b} for n, b in bodies.items()]
    source.write_text("".join(json.dumps(one) + "\n" for one in requests))
    batch(opsin_env, source, "-o", out, code=1)
    rows = {row["id"]: row for row in lines(out)}
    assert rows["good"]["response"]["choices"][0]["message"]["content"] == rows["good"]["text"]
    assert rows["good"]["stages"]["total_ms"] > 0
    assert rows["bad"]["error"]
    assert rows["schema"]["output"] in {"yes", "no"}


def test_wrong_use_is_one_sentence(opsin_env: dict[str, str], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    for arguments in (
        (photos, QUESTION),
        (photos, "-o", out),
        (photos, QUESTION, "-o", tmp_path / "o.docx"),
        (tmp_path / "nothing", QUESTION, "-o", out),
        (photos, QUESTION, "-o", out, "--skip-existing"),
        (photos, QUESTION, "-o", tmp_path / "no" / "folder" / "o.jsonl"),
    ):
        done = batch(opsin_env, *arguments, code=2)
        assert done.stderr.count(b"\n") <= 2, done.stderr
    assert not out.exists()


def test_every_row_is_there_once_after_kills_at_random_moments(opsin_env: dict[str, str], tmp_path: Path) -> None:
    folder, names = tmp_path / "in", [f"p{number:03}.png" for number in range(40 * max(1, KILLS // 5))]
    for number, name in enumerate(names):
        paint(folder / name, number)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    begin = time.monotonic()
    batch(opsin_env, folder, QUESTION, "-o", whole)
    seconds = time.monotonic() - begin
    command = [
        sys.executable,
        "-m",
        "opsin",
        "batch",
        folder,
        QUESTION,
        "-o",
        out,
        "--temperature",
        "0",
        "--no-disk-cache",
    ]
    moments = random.Random(4)
    for _ in range(KILLS):
        process = subprocess.Popen(command, env=opsin_env, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(moments.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    batch(opsin_env, folder, QUESTION, "-o", out)
    rows = lines(out)
    assert [row["id"] for row in rows] == names
    texts = [[(row["id"], row["error"], row["text"]) for row in lines(path)] for path in (whole, out)]
    other = [one for one, two in zip(*texts, strict=True) if one != two]
    assert len(other) <= len(names) // 1000 + 1, other


def test_ctrl_c_and_a_full_disk_leave_what_was_written(opsin_env: dict[str, str], tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.jsonl"
    for number in range(300):
        paint(folder / f"p{number:03}.png", number)
    command = [
        sys.executable,
        "-m",
        "opsin",
        "batch",
        folder,
        QUESTION,
        "-o",
        out,
        "--no-disk-cache",
        "--max-tokens",
        "60",
    ]
    process = subprocess.Popen(command, env=opsin_env, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while (not out.exists() or out.stat().st_size < 1000) and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "same command" in said
    assert 0 < len(lines(out)) < 300
    limited = (
        f"ulimit -f 600; trap '' XFSZ; exec {sys.executable} -m opsin batch {folder} '{QUESTION}' -o {tmp_path}/b.jsonl"
    )
    done = subprocess.run(
        ["sh", "-c", limited], env=opsin_env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "same command" in done.stderr
    assert 0 < len(lines(tmp_path / "b.jsonl")) < 300


def test_a_second_run_on_one_output_is_refused(opsin_env: dict[str, str], tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out.jsonl"
    for number in range(400):
        paint(folder / f"p{number:03}.png", number)
    command = [sys.executable, "-m", "opsin", "batch", folder, QUESTION, "-o", out, "--no-disk-cache"]
    first = subprocess.Popen(command, env=opsin_env, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "out.jsonl.opsin-wal").exists() and time.monotonic() < end:
        time.sleep(0.01)
    done = batch(opsin_env, folder, QUESTION, "-o", out, code=2)
    assert b"Another" in done.stderr
    batch(opsin_env, folder, QUESTION, "-o", out, "--overwrite", code=2)
    assert first.wait(120) == 0
    assert len(lines(out)) == 400
