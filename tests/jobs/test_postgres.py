"""Two servers on one PostgreSQL, Debian's own: a batch is shared, also when one of them is killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_process import question, served

from opsin.server.batch_store import BatchStore

openai = pytest.importorskip("openai", reason="the clients are tested where they are installed")
pytest.importorskip("psycopg", reason="opsin[postgres] is not installed")
BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BIN is None, reason="no PostgreSQL: apt-get install -y --no-install-recommends postgresql"),
    pytest.mark.skipif(os.geteuid() != 0, reason="PostgreSQL is started as another user, which only root can do"),
]
LIMIT = 120.0


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The address of an empty database on loopback, which ends with the tests."""
    assert BIN is not None
    user = pwd.getpwnam("postgres")
    # Below /tmp itself: pytest's folders are closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="opsin-pg-"))
    os.chown(folder, user.pw_uid, user.pw_gid)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def call(program: str, *arguments: str) -> None:
        command = [str(BIN / program), *arguments]
        subprocess.run(command, user="postgres", group="postgres", cwd=folder, check=True, capture_output=True, env={})

    try:
        call("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "postgres", "-E", "UTF8")
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
        call("pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def rows(count: int) -> bytes:
    lines = [
        {
            "custom_id": f"row-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": question(None, f"Describe shape {i}.", max_tokens=16, temperature=0),
        }
        for i in range(count)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def begin(client: Any, count: int) -> Any:
    file = client.files.create(file=("rows.jsonl", rows(count)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")


def wait(client: Any, batch: Any, enough: Any = lambda one: one.status == "completed") -> Any:
    end = time.monotonic() + LIMIT
    while not enough(batch := client.batches.retrieve(batch.id)):
        assert time.monotonic() < end, batch
        time.sleep(0.05)
    return batch


def test_two_servers_share_a_batch_and_no_row_comes_twice(database: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        flags = ("--batch-store", database, "--parallel", "2")
        servers = [stack.enter_context(served(*flags, env={"XDG_DATA_HOME": str(tmp_path / name)})) for name in "ab"]
        first, second = (
            stack.enter_context(openai.OpenAI(base_url=f"{one.url}/v1", api_key="none", timeout=60)) for one in servers
        )
        before = [one.metric("generation_tokens_total") for one in servers]
        batch = begin(first, 200)
        done = wait(second, batch)
        assert (done.request_counts.completed, done.request_counts.failed) == (200, 0)
        names = [json.loads(line)["custom_id"] for line in second.files.content(done.output_file_id).iter_lines()]
        assert names == [f"row-{i}" for i in range(200)]
        work = [one.metric("generation_tokens_total") - was for one, was in zip(servers, before, strict=True)]
        assert min(work) > 0.1 * sum(work), f"both took part: {work}"
        # One of them is killed: the other one takes its rows over once their leases have ended.
        batch = begin(second, 200)
        wait(second, batch, lambda one: one.request_counts.completed >= 20)
        servers[0].process.send_signal(signal.SIGKILL)
        servers[0].exit_code()
        done = wait(second, batch)
        assert (done.request_counts.completed, done.request_counts.failed) == (200, 0)
        lines = second.files.content(done.output_file_id).iter_lines()
        assert Counter(json.loads(line)["custom_id"] for line in lines) == {f"row-{i}": 1 for i in range(200)}


def test_the_store_on_postgresql(database: str) -> None:
    stores = [BatchStore(database.replace("+psycopg", "")) for _ in range(2)]
    data = os.urandom(3 * 2**20) + b"\n"
    file = stores[0].put("me", "f", io.BytesIO(data), seconds=99, most_stored=2**30)
    assert b"".join(stores[1].chunk(file["number"], n) for n in range(4)) == data
    values = {"model": "m", "endpoint": "e", "completion_window": "24h", "metadata": {"ü": "x"}, "output_seconds": 99}
    made = stores[0].create("me", 99, input_file_id=file["id"], **values)
    batch = stores[1].take_batch()
    assert batch is not None
    assert stores[0].take_batch() is None
    assert (batch["id"], batch["metadata"]) == (made["id"], {"ü": "x"})
    # One row of the whole file: its place is not within one chunk.
    stores[1].begin(batch, [("a", 5, 2 * 2**20)])
    (row,) = stores[0].claim("m", 3)
    assert row.line == data[5 : 5 + 2 * 2**20]
    assert stores[1].claim("m", 3) == []
    assert stores[0].finish(row, b"{}\n", good=True)
    for store in stores:
        store.clean_up(10)
        store.close()
