"""`opsin batch --ray` on a cluster of several raylets, on the demo model."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image, ImageDraw

pq = pytest.importorskip("pyarrow.parquet")

from ray_cluster import Raylets, raylets, wait_for  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.native]
long = pytest.mark.jobs  # CI has the short form: one killed worker and one killed node

QUESTION = "What is in this picture?"
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
IMAGES, BAD = 60, ("p07.png", "p31.png")
# Blocks and parts of a few rows, so that a job of seconds has a middle.
SMALL = "from opsin.jobs import ray_data; ray_data.BLOCK_ROWS, ray_data.PART_ROWS = 4, 4;"
COMMAND = [sys.executable, "-c", f"{SMALL} from opsin.__main__ import main; main()", "batch"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        place = random.Random(number)
        image = Image.new("RGB", (112, 112), (230, 230, 225))
        x, y, r = place.randint(30, 80), place.randint(30, 80), place.randint(14, 28)
        draw = ImageDraw.Draw(image)
        shape = draw.ellipse if number % 2 else draw.rectangle
        shape((x - r, y - r, x + r, y + r), COLOURS[number % len(COLOURS)])
        image.save(folder / f"p{number:02}.png")
    for name in BAD:
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    return folder


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str | None, str | None]]:
    """The answers of one machine."""
    out = tmp_path_factory.mktemp("one") / "out.jsonl"
    command = [sys.executable, "-m", "opsin", "batch", photos, QUESTION, "-o", out, "--temperature", "0", "-q"]
    done = subprocess.run([*map(str, command), "--no-disk-cache"], capture_output=True, timeout=180, check=False)
    assert done.returncode == 1, done.stderr.decode()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {row["id"]: ((row["error"] or {}).get("code"), row["text"]) for row in rows}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with raylets(nodes=3, cpus=2) as made:
        yield made


def start(cluster: Raylets, photos: Path, out: Path, *flags: str) -> subprocess.Popen[bytes]:
    own = ("-o", str(out), "--ray", cluster.address, "--cpus-per-worker", "1", "--workers", "2", "--temperature", "0")
    question = () if "--different" in flags else (QUESTION,)
    command = [*COMMAND, str(photos), *(question or ("What colour is it?",)), *own, "--no-disk-cache"]
    flags = tuple(flag for flag in flags if flag != "--different")
    return subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def end(process: subprocess.Popen[bytes], code: int) -> str:
    _, told = process.communicate(timeout=150)
    assert process.returncode == code, told.decode()
    assert b"Traceback" not in told
    return told.decode()


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for part in out.glob("*.parquet") for row in pq.ParquetFile(part).read().to_pylist()]


def check(out: Path, undisturbed: dict[str, tuple[str | None, str | None]]) -> list[dict[str, Any]]:
    """Every row once, and equal to that of one machine."""
    rows = rows_of(out)
    assert sorted(row["id"] for row in rows) == sorted(undisturbed)
    differ = [row["id"] for row in rows if (row["error_code"], row["text"]) != undisturbed[row["id"]]]
    print("rows that differ, at near ties:", differ)
    assert len(differ) <= len(rows) // 1000
    return rows


def committed(out: Path) -> list[Path]:
    return [path for path in out.with_name(f"{out.name}.opsin").glob("ids/*.parquet") if ".pending." not in path.name]


@long
def test_a_job_equals_that_of_one_machine_goes_on_with_more_images_and_asks_failed_rows_again(
    cluster: Raylets, photos: Path, undisturbed: dict[str, tuple[str | None, str | None]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    end(start(cluster, photos, out), 1)
    rows = check(out, undisturbed)
    assert {row["id"] for row in rows if row["error_code"]} == set(BAD)
    assert {row["attempt"] for row in rows} == {1}
    assert len({row["job"] for row in rows}) == 1
    assert all(row["image_sha256"] and row["completion_tokens"] > 0 for row in rows if not row["error_code"])

    parts = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    end(start(cluster, photos, out), 1)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")} == parts

    told = end(start(cluster, photos, out, "--different"), 2)
    assert "What colour is it?" in told
    assert QUESTION in told

    end(start(cluster, photos, out, "--retry-failed"), 1)
    again = check(out, undisturbed)
    assert {row["id"]: row["attempt"] for row in again if row["attempt"] != 1} == dict.fromkeys(BAD, 2)
    before = {row["id"]: row for row in rows if not row["error_code"]}
    assert {row["id"]: row for row in again if not row["error_code"]} == before


def test_a_killed_worker_and_a_killed_node_lose_nothing(
    cluster: Raylets, photos: Path, undisturbed: dict[str, tuple[str | None, str | None]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(cluster, photos, out)
    wait_for(lambda: committed(out) or process.poll() is not None, what="the first part")
    [(_, worker), *_] = cluster.processes("ray::MapWorker")
    worker.kill()
    parts = len(committed(out))
    wait_for(lambda: len(committed(out)) > parts or process.poll() is not None, what="another part")
    [(node, _), *_] = cluster.processes("ray::MapWorker")
    assert process.poll() is None
    assert len(committed(out)) * 4 < IMAGES
    cluster.kill(node)
    end(process, 1)
    check(out, undisturbed)


@long
def test_a_job_whose_driver_was_killed_goes_on_and_a_second_run_is_refused(
    cluster: Raylets, photos: Path, undisturbed: dict[str, tuple[str | None, str | None]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(cluster, photos, out)
    wait_for(lambda: committed(out) or process.poll() is not None, what="the first part")
    end(start(cluster, photos, out), 2)  # another run on the same output
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    there = {row["id"] for row in rows_of(out)}
    assert 0 < len(there) < IMAGES
    end(start(cluster, photos, out), 1)
    check(out, undisturbed)


@long
def test_what_a_cluster_does_not_offer_is_refused_by_name(cluster: Raylets, photos: Path, tmp_path: Path) -> None:
    for flags in (["--new"], ["--order", "input"], ["--sidecar", "txt"], ["--report", "r.html"]):
        assert flags[0] in end(start(cluster, photos, tmp_path / "out", *flags), 2)
    assert "out.csv" in end(start(cluster, photos, tmp_path / "out.csv"), 2)
    assert not list(tmp_path.iterdir())


@long
def test_without_a_cluster_one_is_started_that_nobody_else_can_reach(photos: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [*COMMAND, photos, QUESTION, "-o", tmp_path / "out", "--cpus-per-worker", "1", "--limit", "8", "--ray"]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, env=env)
    addresses = set[str]()

    def look() -> bool:
        for one in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                addresses.update(link.laddr.ip for link in one.net_connections() if link.status == psutil.CONN_LISTEN)
        return bool(committed(tmp_path / "out")) or process.poll() is not None

    wait_for(look, what="the first part", every=1.0)
    assert addresses
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    end(process, 1)
    assert len(rows_of(tmp_path / "out")) == 8
