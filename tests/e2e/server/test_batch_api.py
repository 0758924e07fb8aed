"""OpenAI's batch example, as the `openai` package's users write it, against a server that is killed in the middle."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from serve_process import Served, image_url, question, served

openai = pytest.importorskip("openai", reason="the clients are tested where they are installed")
pytestmark = pytest.mark.slow

LIMIT = 90.0
FINAL = {"completed", "failed", "expired", "cancelled"}


def rows(count: int) -> list[dict[str, Any]]:
    """Questions about a few images."""
    images = [image_url(seed) for seed in range(3)]
    return [
        {
            "custom_id": f"request-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": question(images[i % 3], f"What is at place {i}?", max_tokens=12, temperature=0),
        }
        for i in range(count)
    ]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def connect(server: Served, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=2, timeout=60)


def wait(client: Any, batch: Any, enough: Any = lambda batch: batch.status in FINAL) -> Any:
    end = time.monotonic() + LIMIT
    while not enough(batch := client.batches.retrieve(batch.id)):
        assert time.monotonic() < end, batch
        time.sleep(0.05)
    return batch


def test_the_example_of_the_openai_package(tmp_path: Path) -> None:
    wrong = {**rows(1)[0], "custom_id": "wrong", "body": question(temperature=-7)}
    path = write(tmp_path / "batchinput.jsonl", [*rows(12), wrong])
    with served(env={"XDG_DATA_HOME": str(tmp_path / "data")}) as server, connect(server) as client:
        with path.open("rb") as file:
            batch_input_file = client.files.create(file=file, purpose="batch")
        assert (batch_input_file.purpose, batch_input_file.bytes) == ("batch", path.stat().st_size)
        batch = client.batches.create(
            input_file_id=batch_input_file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"description": "nightly eval job"},
        )
        assert batch.id in {one.id for one in client.batches.list(limit=10)}
        batch = wait(client, batch)
        assert batch.status == "completed", batch
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (13, 12, 1)
        file_response = client.files.content(batch.output_file_id)
        results = [json.loads(line) for line in file_response.text.splitlines()]
        assert {one["custom_id"] for one in results} == {f"request-{i}" for i in range(12)}
        live = client.chat.completions.create(**rows(1)[0]["body"])
        first = next(one for one in results if one["custom_id"] == "request-0")
        assert first["response"]["status_code"] == 200
        assert first["response"]["body"]["choices"][0]["message"]["content"] == live.choices[0].message.content
        (bad,) = [json.loads(line) for line in client.files.content(batch.error_file_id).iter_lines()]
        assert (bad["custom_id"], bad["response"]["status_code"]) == ("wrong", 400)
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve("file-nothing")
        with pytest.raises(openai.BadRequestError):
            client.batches.cancel(batch.id)
        assert client.files.delete(batch_input_file.id).deleted
        assert [one.purpose for one in client.files.list()] == ["batch_output"] * 2
        assert (tmp_path / "data" / "opsin" / "batches.sqlite").stat().st_mode & 0o777 == 0o600
        assert server.end() == 0


def test_a_server_that_is_killed_in_the_middle_goes_on_where_it_was(tmp_path: Path) -> None:
    env, wanted = {"XDG_DATA_HOME": str(tmp_path / "data")}, rows(60)
    path = write(tmp_path / "rows.jsonl", wanted)
    with served("--parallel", "2", env=env) as server, connect(server) as client:
        with path.open("rb") as file:
            upload = client.files.create(file=file, purpose="batch")
        batch = client.batches.create(input_file_id=upload.id, endpoint="/v1/chat/completions", completion_window="24h")
        wait(client, batch, lambda one: one.request_counts.completed >= 10)
        server.process.send_signal(signal.SIGKILL)
        server.exit_code()
    with served("--parallel", "2", env=env) as server, connect(server) as client:
        before = client.batches.retrieve(batch.id)
        assert 10 <= before.request_counts.completed < 60
        done = wait(client, batch)
        assert (done.status, done.request_counts.completed) == ("completed", 60)
        results = [json.loads(line)["custom_id"] for line in client.files.content(done.output_file_id).iter_lines()]
        assert results == [one["custom_id"] for one in wanted]


def test_a_store_that_cannot_be_opened_ends_the_start_with_a_sentence(tmp_path: Path) -> None:
    store = tmp_path / "b.sqlite"
    store.write_bytes(b"nothing that SQLite wrote" * 99)
    server = Served("--port", "0", "--no-disk-cache", "--batch-store", f"sqlite:///{store}")
    assert server.exit_code() == 2
    assert str(store) in server.lines[-1]
    assert not any("Traceback" in line for line in server.lines)
