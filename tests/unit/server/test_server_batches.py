"""The Batch API on the fake backend: files, batches, what their files say, and whose they are."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sqlite3
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_driver import CHAT, QUESTION, Gate, World, data_url, run, until, world

from opsin.core.errors import BadParameter, EngineDied
from opsin.core.settings import ServerSettings
from opsin.server import batch_runner, batch_store
from opsin.server.batch_runner import BatchRunner, owner_of
from opsin.server.batch_store import CHUNK, BatchStore
from opsin.server.errors import StoreFailed

pytestmark = pytest.mark.slow

FINAL = {"completed", "failed", "expired", "cancelled"}
HOUR = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}


def row(name: str, text: str = "what is this?", **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **more.pop("body", {})}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body, **more}


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in rows)


@contextlib.asynccontextmanager
async def batching(folder: Path, *args: Any, **settings: Any) -> AsyncIterator[World]:
    async with world(*args, batch_store=f"sqlite:///{folder}/store/b.sqlite", **settings) as w:
        try:
            yield w
        finally:
            await w.app.state.batches.close()


async def upload(w: World, data: bytes, headers: dict[str, str] | None = None, **form: str) -> httpx.Response:
    files = {"file": ("rows.jsonl", data, "application/octet-stream")}
    return await w.client.post("/v1/files", files=files, data={"purpose": "batch", **form}, headers=headers)


async def begin(w: World, data: bytes, headers: dict[str, str] | None = None, **more: Any) -> Any:
    file = await upload(w, data, headers)
    assert file.status_code == 200, file.text
    body = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "24h", **more}
    made = await w.client.post("/v1/batches", json=body, headers=headers)
    assert made.status_code == 200, made.text
    return made.json()


async def ended(w: World, batch: Any, headers: dict[str, str] | None = None) -> Any:
    while True:  # `run` bounds it
        found = (await w.client.get(f"/v1/batches/{batch['id']}", headers=headers)).json()
        if found["status"] in FINAL:
            return found
        await asyncio.sleep(0.01)


async def lines(w: World, file: str, headers: dict[str, str] | None = None) -> list[Any]:
    reply = await w.client.get(f"/v1/files/{file}/content", headers=headers)
    assert reply.status_code == 200
    return [json.loads(line) for line in reply.content.splitlines()]


def test_a_batch_goes_through_and_each_result_is_that_of_a_live_request(tmp_path: Path) -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url()}}]}]
    wrong = row("wrong", body={"temperature": "hot"})
    rows = [*(row(f"n{i}") for i in range(20)), row("seen", body={"messages": image}), wrong]

    async def go() -> None:
        async with batching(tmp_path, requests_per_minute=9) as w:
            made = await begin(w, jsonl(*rows), metadata={"what": "a test"})
            assert (made["object"], made["status"], made["endpoint"]) == ("batch", "validating", CHAT)
            assert made["expires_at"] == made["created_at"] + 86_400
            done = await ended(w, made)
            assert (done["status"], done["metadata"]) == ("completed", {"what": "a test"})
            assert done["request_counts"] == {"total": 22, "completed": 21, "failed": 1}
            times = [done[f"{name}_at"] for name in ("created", "in_progress", "finalizing", "completed")]
            assert times == sorted(times)
            good = await lines(w, done["output_file_id"])
            assert [one["custom_id"] for one in good] == [one["custom_id"] for one in rows[:-1]]
            assert len({one["id"] for one in good}) == 21
            live = await w.chat(max_tokens=8)
            first = good[0]["response"]
            assert (first["status_code"], good[0]["error"]) == (200, None)
            assert first["body"]["choices"] == live["choices"]
            assert first["body"].keys() == live.keys()
            assert first["request_id"]
            refused = await w.post(**wrong["body"])
            (bad,) = await lines(w, done["error_file_id"])
            assert (bad["custom_id"], bad["error"]) == ("wrong", None)
            assert (bad["response"]["status_code"], bad["response"]["body"]) == (400, refused.json())
            file = (await w.client.get(f"/v1/files/{done['output_file_id']}")).json()
            assert (file["object"], file["purpose"], file["status"]) == ("file", "batch_output", "processed")

    run(go())
    assert stat.S_IMODE((tmp_path / "store" / "b.sqlite").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        ("/v1/completions", {"prompt": "once", "max_tokens": 4}, "choices"),
        ("/v1/responses", {"input": "what?", "max_output_tokens": 4}, "output"),
    ],
)
def test_the_other_endpoints(tmp_path: Path, path: str, body: dict[str, Any], key: str) -> None:
    async def go() -> None:
        async with batching(tmp_path) as w:
            data = jsonl({"custom_id": "a", "method": "POST", "url": path, "body": body})
            done = await ended(w, await begin(w, data, endpoint=path))
            (one,) = await lines(w, done["output_file_id"])
            assert one["response"]["body"][key]

    run(go())


@pytest.mark.parametrize(
    ("data", "code", "line"),
    [
        (b"", "empty_file", None),
        (b"\n \n", "empty_file", None),
        (jsonl(row("a")) + b"{no\n", "invalid_json_line", 2),
        (b"[" * 100_000, "invalid_json_line", 1),
        (b"\xff\n", "invalid_json_line", 1),
        (b"[]\n", "invalid_json_line", 1),
        (b"{" + b'"a":1,' * 60_000 + b'"b":1}\n', "invalid_json_line", 1),
        (jsonl(row("a"), row("b"), row("a")), "duplicate_custom_id", 3),
        (jsonl({**row("a"), "custom_id": 7}), "invalid_custom_id", 1),
        (jsonl(row("a\0b")), "invalid_custom_id", 1),
        (jsonl(row("a" * 513)), "invalid_custom_id", 1),
        (jsonl({**row("a"), "url": "/v1/embeddings"}), "invalid_url", 1),
        (jsonl({**row("a"), "method": "GET"}), "invalid_method", 1),
        (jsonl({**row("a"), "body": None}), "invalid_body", 1),
        (jsonl(row("a", body={"stream": True})), "streaming_unsupported", 1),
        (jsonl(*(row(f"{i}") for i in range(9))), "too_many_rows", 9),
        (jsonl(row("a", "x" * 3000)), "line_too_long", 1),
    ],
)
def test_a_wrong_file_fails_its_batch_and_names_the_line(
    tmp_path: Path, data: bytes, code: str, line: int | None
) -> None:
    async def go() -> None:
        async with batching(tmp_path, max_batch_rows=8, max_body_bytes=2048 if "long" in code else 2**20) as w:
            done = await ended(w, await begin(w, data))
            assert (done["status"], done["output_file_id"], done["error_file_id"]) == ("failed", None, None)
            (error,) = done["errors"]["data"]
            assert (error["code"], error["line"]) == (code, line)
            assert done["failed_at"]

    run(go())


def test_files_are_kept_in_chunks_and_lines_may_cross_them(tmp_path: Path) -> None:
    text = "y" * (CHUNK // 3)
    data = jsonl(*(row(f"n{i}", text) for i in range(9)))

    async def go() -> None:
        async with batching(tmp_path, lambda _: "short.", max_prompt_chars=10**7) as w:
            batch = await begin(w, data)
            assert (await w.client.get(f"/v1/files/{batch['input_file_id']}/content")).content == data
            done = await ended(w, batch)
            assert done["request_counts"]["total"] == 9
            bad = await lines(w, done["error_file_id"])  # far more than the context has room for
            assert {one["response"]["body"]["error"]["code"] for one in bad} == {"context_overflow"}

    run(go())


def test_lists_come_in_pages_and_files_are_deleted(tmp_path: Path) -> None:
    gate = Gate()

    async def go() -> None:
        async with batching(tmp_path, gate) as w:
            files = [(await upload(w, jsonl(row("a")))).json()["id"] for _ in range(3)]
            first = (await w.client.get("/v1/files", params={"limit": 2})).json()
            assert ([one["id"] for one in first["data"]], first["has_more"]) == ([files[2], files[1]], True)
            rest = (await w.client.get("/v1/files", params={"limit": 2, "after": first["last_id"]})).json()
            assert ([one["id"] for one in rest["data"]], rest["has_more"]) == ([files[0]], False)
            oldest = (await w.client.get("/v1/files", params={"order": "asc", "purpose": "batch"})).json()
            assert [one["id"] for one in oldest["data"]] == files
            assert (await w.client.get("/v1/files", params={"purpose": "batch_output"})).json()["data"] == []
            assert (await w.client.get("/v1/files", params={"limit": 0})).json()["error"]["param"] == "limit"
            deleted = (await w.client.delete(f"/v1/files/{files[0]}")).json()
            assert deleted == {"id": files[0], "object": "file", "deleted": True}
            assert (await w.client.get(f"/v1/files/{files[0]}")).status_code == 404
            body = {"endpoint": CHAT, "completion_window": "24h"}
            made = [(await w.post("/v1/batches", input_file_id=one, **body)).json()["id"] for one in files[1:]]
            page = (await w.client.get("/v1/batches", params={"limit": 1})).json()
            assert ([one["id"] for one in page["data"]], page["has_more"]) == ([made[1]], True)
            assert (await w.client.delete(f"/v1/files/{files[1]}")).json()["error"]["param"] == "file_id"
            assert (await w.post("/v1/batches", input_file_id=files[0], **body)).status_code == 404
            gate.open.set()

    run(go())


def test_another_key_sees_nothing(tmp_path: Path) -> None:
    mine, other = ({"authorization": f"Bearer {key}"} for key in ("sk-one", "sk-two"))

    async def go() -> None:
        async with batching(tmp_path, keys=("sk-one", "sk-two")) as w:
            done = await ended(w, await begin(w, jsonl(row("a")), mine), mine)
            files = [done["input_file_id"], done["output_file_id"]]
            paths = [
                f"/v1/batches/{done['id']}",
                *(f"/v1/files/{file}{end}" for file in files for end in ("", "/content")),
            ]
            for path in paths:
                assert (await w.client.get(path, headers=mine)).status_code == 200
                assert (await w.client.get(path, headers=other)).status_code == 404
                assert (await w.client.get(path)).status_code == 401
            assert (await w.client.delete(f"/v1/files/{files[0]}", headers=other)).status_code == 404
            assert (await w.client.post(f"{paths[0]}/cancel", headers=other)).status_code == 404
            for kind in ("files", "batches"):
                assert (await w.client.get(f"/v1/{kind}", headers=other)).json()["data"] == []
            taken = {"input_file_id": files[0], "endpoint": CHAT, "completion_window": "24h"}
            assert (await w.client.post("/v1/batches", json=taken, headers=other)).status_code == 404

    run(go())
    stored = b"".join(file.read_bytes() for file in (tmp_path / "store").iterdir())
    assert b"sk-one" not in stored


@pytest.mark.parametrize(
    ("form", "settings", "status"),
    [
        ({"purpose": "assistants"}, {}, 400),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, {}, 400),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "5"}, {}, 400),
        ({}, {"max_file_bytes": 1024}, 413),
        ({"x": "y" * 70_000}, {"max_file_bytes": 4096}, 413),
        ({}, {"max_stored_bytes": 1024}, 400),
        ({f"x{i}": "y" for i in range(9)}, {}, 400),
    ],
)
def test_uploads_that_are_refused(tmp_path: Path, form: dict[str, str], settings: dict[str, int], status: int) -> None:
    async def go() -> None:
        async with batching(tmp_path, **settings) as w:
            reply = await upload(w, b"x" * 2000, **form)
            assert reply.status_code == status
            assert reply.json()["error"]["message"]
            assert (await w.client.get("/v1/files")).json()["data"] == []

    run(go())


def test_what_is_no_form_is_refused(tmp_path: Path) -> None:
    async def go() -> None:
        async with batching(tmp_path) as w:
            assert (await w.post("/v1/files", purpose="batch")).status_code == 415
            for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
                reply = await w.client.post("/v1/files", content=b"--y\r\n", headers={"content-type": kind})
                assert reply.status_code == 400
            nothing = await w.client.post("/v1/files", files={"other": b"x"}, data={"purpose": "batch"})
            assert nothing.json()["error"]["param"] == "file"

    run(go())


def test_a_file_may_be_kept_shorter_but_not_longer_than_the_settings_say(tmp_path: Path) -> None:
    async def go() -> None:
        async with batching(tmp_path, keep_days=1) as w:
            short = (await upload(w, b"x", **HOUR)).json()
            long = (await upload(w, b"x", **{**HOUR, "expires_after[seconds]": "9999999"})).json()
            assert short["expires_at"] - short["created_at"] == 3600
            assert long["expires_at"] - long["created_at"] == 86_400

    run(go())


def test_without_a_store_there_is_nothing(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(batch_store="none") as w:
            await w.app.state.batches.start()
            assert (await w.client.get("/v1/batches")).status_code == 404
            assert (await upload(w, b"x")).status_code in {404, 405}

    run(go())


def test_a_cancelled_batch_keeps_what_is_answered(tmp_path: Path) -> None:
    gate = Gate()

    async def go() -> None:
        async with batching(tmp_path, gate, parallel=2) as w:
            batch = await begin(w, jsonl(*(row(f"n{i}") for i in range(6))))
            await until(lambda: len(w.app.state.batches._running) == 2)
            said = (await w.client.post(f"/v1/batches/{batch['id']}/cancel")).json()
            assert said["status"] == "cancelling"
            assert (await w.client.post(f"/v1/batches/{batch['id']}/cancel")).json()["status"] == "cancelling"
            gate.open.set()
            done = await ended(w, batch)
            assert (done["status"], done["request_counts"]["completed"]) == ("cancelled", 2)
            assert len(await lines(w, done["output_file_id"])) == 2
            assert done["error_file_id"] is None
            assert (await w.client.post(f"/v1/batches/{batch['id']}/cancel")).status_code == 400

    run(go())


def test_rows_run_behind_live_requests_with_their_owners_salt_and_outside_the_queue(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    async def go() -> None:
        async with batching(tmp_path, keys=("sk-one",), concurrent_requests=1) as w:
            submit = w.engine.submit
            w.engine.submit = lambda *a, **o: asked.append(o) or submit(*a, **o)  # type: ignore[method-assign,func-returns-value]
            mine = {"authorization": "Bearer sk-one"}
            await ended(w, await begin(w, jsonl(*(row(f"n{i}") for i in range(5))), mine), mine)
            assert (await w.post(headers=mine, messages=QUESTION)).status_code == 200
            assert len(w.records) == 1 + 2  # the rows are no requests of the log

    run(go())
    assert [one["priority"] for one in asked] == [-1] * 5 + [0]
    assert len({one["salt"] for one in asked}) == 1


@pytest.mark.parametrize("times", [2, 9])
def test_a_row_is_asked_again_when_the_model_dies_under_it_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(batch_runner, "_POLL_SECONDS", 0.01)
    give_back: Any = BatchStore.give_back
    monkeypatch.setattr(BatchStore, "give_back", lambda self, one, _, counted: give_back(self, one, 0, counted=counted))
    tries: list[int] = []

    async def go() -> None:
        async with batching(tmp_path) as w:
            submit = w.engine.submit

            def fail(*args: Any, **options: Any) -> Any:
                tries.append(1)
                if len(tries) <= times:
                    raise EngineDied("The worker died.")
                return submit(*args, **options)

            w.engine.submit = fail  # type: ignore[method-assign]
            done = await ended(w, await begin(w, jsonl(row("a"))))
            assert done["request_counts"]["failed"] == (times == 9)
            if times == 9:
                (bad,) = await lines(w, done["error_file_id"])
                assert bad["response"]["body"]["error"]["code"] == "engine_died"
            assert len(tries) == (4 if times == 9 else 3)

    run(go())


def test_the_end_of_a_batch_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(batch_runner, "_RENEW_SECONDS", 0.01)
    move: Any = BatchStore._move
    tries: list[str] = []

    def fail_once(self: BatchStore, c: Any, batch: Any, status: str, **values: Any) -> None:
        tries.append(status)
        if tries.count("completed") == 1:
            raise OSError(28, "No space left on device")
        move(self, c, batch, status, **values)

    monkeypatch.setattr(BatchStore, "_move", fail_once)

    async def go() -> None:
        async with batching(tmp_path) as w:
            done = await ended(w, await begin(w, jsonl(row("a"))))
            assert (done["status"], len(await lines(w, done["output_file_id"]))) == ("completed", 1)
            files = (await w.client.get("/v1/files", params={"purpose": "batch_output"})).json()["data"]
            assert len(files) == 1

    run(go())
    assert tries == ["in_progress", "completed", "completed"]


def test_an_expired_batch_says_which_rows_were_not_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.server.batches._WINDOW_SECONDS", 0)

    async def go() -> None:
        async with batching(tmp_path) as w:
            done = await ended(w, await begin(w, jsonl(row("a"), row("b"))))
            assert (done["status"], done["request_counts"]["failed"]) == ("expired", 2)
            bad = await lines(w, done["error_file_id"])
            assert [(one["custom_id"], one["response"], one["error"]["code"]) for one in bad] == [
                ("a", None, "batch_expired"),
                ("b", None, "batch_expired"),
            ]

    run(go())


def test_a_server_that_ends_gives_its_rows_back_and_the_next_one_finishes(tmp_path: Path) -> None:
    gate, found = Gate(), []

    async def go() -> None:
        async with batching(tmp_path, gate, parallel=2) as w:
            batch = await begin(w, jsonl(*(row(f"n{i}") for i in range(6))))
            await until(lambda: len(w.app.state.batches._running) == 2)
            await w.app.state.batches.close()
            gate.open.set()
        async with batching(tmp_path) as w:
            await w.app.state.batches.start()
            found.extend(await lines(w, (await ended(w, batch))["output_file_id"]))

    run(go())
    assert [one["custom_id"] for one in found] == [f"n{i}" for i in range(6)]


# The store alone, as several servers share it.


def held(path: Path, rows: int = 4) -> tuple[BatchStore, BatchStore, Any]:
    """Two servers' views of one store, and a batch that runs."""
    one, two = (BatchStore(path / "b.sqlite") for _ in range(2))
    made = add(one, "me", rows)
    return one, two, made


def add(store: BatchStore, owner: str, rows: int) -> Any:
    data = jsonl(*(row(f"{owner}{i}") for i in range(rows)))
    file = store.put(owner, "f", io.BytesIO(data), seconds=99, most_stored=10**6)
    values = {"model": "m", "endpoint": CHAT, "completion_window": "24h", "metadata": None, "output_seconds": 99}
    store.create(owner, 99, input_file_id=file["id"], **values)
    batch = store.take_batch()
    assert batch is not None
    places = [(f"{owner}{i}", start, len(line)) for i, (start, line) in enumerate(store.lines(batch, 10**6))]
    store.begin(batch, places)
    return batch


def test_a_row_is_held_by_one_server_and_comes_back_when_its_lease_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, _ = held(tmp_path)
    mine, theirs = one.claim("m", 3), two.claim("m", 3)
    assert [len(mine), len(theirs)] == [3, 1]
    assert not {row.n for row in mine} & {row.n for row in theirs}
    assert json.loads(mine[0].line) == row("me0")
    assert one.claim("another", 3) == []
    later = time.time() + batch_store.LEASE_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    two.renew(theirs)  # the other one has died
    again = two.claim("m", 9)
    assert {row.n for row in again} == {row.n for row in mine}
    assert two.finish(again[0], b"{}\n", good=True) is False
    one.finish(mine[0], b"{}\n", good=True)  # too late
    for row_ in (*again[1:], *theirs):
        last = two.finish(row_, b"{}\n", good=True)
    assert last
    batch = two.take_batch()
    assert batch is not None
    assert (batch["completed"], batch["status"]) == (4, "finalizing")
    assert one.take_batch() is None  # the other one ends it
    for store in (one, two):
        store.close()


def test_owners_take_turns(tmp_path: Path) -> None:
    store = BatchStore(tmp_path / "b.sqlite")
    for owner, rows in (("a", 9), ("b", 2), ("c", 9)):
        add(store, owner, rows)
    assert [row.custom_id for row in store.claim("m", 3)] == ["a0", "b0", "c0"]
    assert [store.claim("m", 1)[0].owner for _ in range(5)] == ["a", "b", "c", "a", "c"]
    store.close()


def test_old_files_and_batches_go_but_not_the_input_of_a_running_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, two, batch = held(tmp_path)
    store.put("me", "old", io.BytesIO(b"x"), seconds=9, most_stored=10**6)
    later = time.time() + 100
    monkeypatch.setattr(time, "time", lambda: later)
    store.clean_up(50)
    assert [file["filename"] for file in store.page("file", "me", None, 9)[0]] == ["f"]
    assert len(store.page("batch", "me", None, 9)[0]) == 1
    store.cancel("me", batch["id"])
    ending = store.take_batch()
    assert ending is not None
    store.end(ending, str.encode)
    store.clean_up(50)
    assert store.page("file", "me", None, 9)[0] == store.page("batch", "me", None, 9)[0] == []
    for one in (store, two):
        one.close()


@pytest.mark.parametrize("url", ["nonsense", "mysql://h/d", "postgresql://h", "sqlite://", "sqlite:////proc/none/b"])
def test_a_store_that_cannot_be_is_refused_with_a_sentence(url: str) -> None:
    with pytest.raises(BadParameter):
        BatchStore(url)


def test_a_damaged_store_and_a_missing_driver_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.sqlite").write_bytes(b"no database at all" * 99)
    with pytest.raises(BadParameter):
        BatchStore(tmp_path / "b.sqlite")
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(BadParameter, match=r"opsin\[postgres\]"):
        BatchStore("postgresql://:secret@h/d")


def test_a_store_of_another_version_is_told_apart(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "b.sqlite")) as old:
        old.execute("CREATE TABLE opsin_rows (batch INTEGER, n INTEGER)")
    with pytest.raises(BadParameter, match="another version"):
        BatchStore(tmp_path / "b.sqlite")


def test_a_password_is_never_shown() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(BadParameter) as error:
        BatchStore("postgresql://me:secret@127.0.0.1:1/d")
    assert "secret" not in str(error.value)


def test_the_default_is_a_file_in_the_users_data_folder_made_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    file = tmp_path / "opsin" / "batches.sqlite"

    async def go() -> None:
        async with world() as w:
            runner: BatchRunner = w.app.state.batches
            await runner.start()
            assert not file.exists()
            assert (await upload(w, b"x")).status_code == 200
            assert file.exists()
            await runner.close()

    run(go())
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_owners_are_hashes() -> None:
    assert owner_of("") != owner_of("0123456789abcdef")
    assert "0123" not in owner_of("0123456789abcdef")
    assert ServerSettings().batch_store is None


def test_too_little_memory_is_a_failed_store_and_one_line_of_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = BatchStore(f"sqlite:///{tmp_path}/batches.sqlite")
    with pytest.raises(StoreFailed), store._begin():
        raise MemoryError
    assert [record.getMessage() for record in caplog.records] == ["the batch store failed: MemoryError"]
    store.close()
