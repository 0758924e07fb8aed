"""Embeddings on disk: nothing that can be wrong with a file or a disk reaches the engine."""

import io
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsin.cache import DiskStore, EmbeddingCache, default_folder

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def packed(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def kept(folder: Path, *names: str, max_bytes: int = 2**20) -> DiskStore:
    store = DiskStore(folder, max_bytes)
    for name in names:
        store.put(name, ROWS)
    store.close()
    return store


def file_of(folder: Path) -> Path:
    (path,) = folder.glob("*.npz")
    return path


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.npz"))


def test_what_was_put_is_there_after_a_restart(tmp_path: Path) -> None:
    kept(tmp_path, "a")
    found = DiskStore(tmp_path).get("a")
    assert found is not None
    np.testing.assert_array_equal(found, ROWS)
    assert found.dtype == np.float32
    assert DiskStore(tmp_path).get("b") is None


def test_putting_does_not_wait_for_the_disk_and_holds_a_bounded_amount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opsin.cache.disk._MAX_PENDING", 3 * ROWS.nbytes)
    store, go = DiskStore(tmp_path), threading.Event()
    written: list[str] = []

    def slow(identity: str) -> Path:
        go.wait(60)
        written.append(identity)
        return tmp_path / identity

    monkeypatch.setattr(store, "_path", slow)
    for name in "abcde":
        store.put(name, ROWS)  # would wait for ever if it waited
    go.set()
    store.close()
    assert written == ["a", "b", "c"]
    store.put("d", ROWS)
    store.close()
    assert written[-1] == "d"


@pytest.mark.slow
def test_the_end_of_a_process_waits_for_the_writer(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    code = (
        "import sys, pathlib, numpy\nfrom opsin.cache import DiskStore\n"
        "store = DiskStore(pathlib.Path(sys.argv[1]))\n"
        "for name in 'abcdef': store.put(name, numpy.ones((9, 9), numpy.float32))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=opsin_env, check=True, timeout=120)
    assert all(DiskStore(tmp_path).get(name) is not None for name in "abcdef")


def test_folder_and_files_are_their_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "images"
    kept(folder, "a")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file_of(folder).stat().st_mode) == 0o600
    folder.chmod(0o755)
    kept(folder, "b")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a test cannot move the user's cache")
def test_the_default_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "opsin" / "images"
    store = DiskStore(default_folder())
    store.put("a", ROWS)
    store.close()
    assert bytes_in(default_folder())


@pytest.mark.slow
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_damage_to_a_file_is_ever_believed(tmp_path: Path, data: st.DataObject) -> None:
    good = packed(embedding=ROWS)
    damaged = bytearray(good)
    if data.draw(st.booleans(), "cut off"):
        del damaged[data.draw(st.integers(0, len(good) - 1), "at") :]
    for place in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=4), "places"):
        if place < len(damaged):
            damaged[place] = data.draw(st.integers(0, 255), "byte")
    store = kept(tmp_path, "a")
    path = file_of(tmp_path)
    path.write_bytes(damaged)
    found = store.get("a")
    if found is not None:
        np.testing.assert_array_equal(found, ROWS)  # what the archive says beside the data may change
    else:
        assert not path.exists()


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("embedding.npy", data)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an archive at all",
        b"\xff" * 64,
        packed(other=ROWS),
        zipped(b"no array"),
        packed(embedding=np.array([{"a": "pickle"}])),
        packed(embedding=ROWS)[:-30],
        packed(embedding=ROWS).replace(ROWS.tobytes(), bytes(ROWS.nbytes)),
    ],
    ids=["empty", "text", "noise", "another array", "no array", "pickle", "cut short", "zeros"],
)
def test_a_bad_entry_is_dropped_and_can_be_written_again(tmp_path: Path, content: bytes) -> None:
    store = kept(tmp_path, "a")
    path = file_of(tmp_path)
    path.write_bytes(content)
    assert store.get("a") is None
    assert not path.exists()
    store.put("a", ROWS)
    store.close()
    assert store.get("a") is not None


def test_a_crash_in_the_middle_of_a_write_leaves_no_entry_and_its_rest_goes_as_others_do(tmp_path: Path) -> None:
    size = len(packed(embedding=ROWS))
    half = tmp_path / "half.tmp"
    half.write_bytes(packed(embedding=ROWS)[:50])
    store = kept(tmp_path, "a", max_bytes=2 * size)
    assert half.exists(), "somebody may be writing it now"
    os.utime(half, (1000, 1000))
    store.put("b", ROWS)
    store.close()
    assert not half.exists()
    assert all(store.get(name) is not None for name in "ab")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_writer_leaves_only_whole_entries(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    code = (
        "import sys, pathlib, numpy\nfrom opsin.cache import DiskStore\n"
        "store = DiskStore(pathlib.Path(sys.argv[1]))\n"
        "for i in range(10**6): store.put(str(i % 50), numpy.full((300, 300), i % 50, numpy.float32)); store.close()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=opsin_env)
    try:
        end = time.monotonic() + 120
        while len(list(tmp_path.glob("*.npz"))) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    before = sorted(tmp_path.glob("*.npz"))
    assert len(before) >= 3
    store = DiskStore(tmp_path)
    for i in range(50):
        found = store.get(str(i))
        assert found is None or (found == i).all()
    assert sorted(tmp_path.glob("*.npz")) == before, "a half-written entry was found and dropped"


def test_a_failing_replace_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        store = kept(tmp_path, "a", "b", "c")
    assert not list(tmp_path.iterdir())
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert store.get("a") is None
    monkeypatch.undo()
    store.put("a", ROWS)
    store.close()
    assert store.get("a") is not None, "a disk that has room again is used again"


def test_a_folder_that_cannot_be_made_or_written_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("in the way")
    store = kept(occupied / "images", "a", "b")
    assert store.get("a") is None

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    store = kept(tmp_path / "good", "a")
    monkeypatch.setattr(tempfile, "mkstemp", read_only)
    monkeypatch.setattr(os, "utime", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    caplog.clear()
    store.put("b", ROWS)
    store.close()
    assert store.get("a") is not None, "what can be read is read"
    file_of(tmp_path / "good").write_bytes(b"bad")
    assert store.get("a") is None
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


def test_a_file_that_cannot_be_read_is_a_miss_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = kept(tmp_path, "a")

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("opsin.cache.disk._read", broken)
    assert store.get("a") is None
    monkeypatch.undo()
    assert store.get("a") is not None


def test_the_folder_stays_in_its_bound_and_forgets_what_was_used_longest_ago(tmp_path: Path) -> None:
    size = len(packed(embedding=ROWS))
    store = DiskStore(tmp_path, 3 * size)
    for i in range(3):
        store.put(str(i), ROWS)
        store.close()
        os.utime(store._path(str(i)), (1000 + i, 1000 + i))
    assert store.get("0") is not None  # used now
    store.put("3", ROWS)
    store.close()
    assert [store.get(str(i)) is not None for i in range(4)] == [True, False, True, True]
    for i in range(40):
        store.put(str(i % 10), ROWS)
        store.close()
        assert bytes_in(tmp_path) <= 3 * size


def test_a_smaller_bound_holds_from_the_first_write_and_too_large_ones_are_not_kept(tmp_path: Path) -> None:
    kept(tmp_path, *"abcdefgh")
    size = len(packed(embedding=ROWS))
    store = kept(tmp_path, "z", max_bytes=2 * size)
    assert bytes_in(tmp_path) <= 2 * size
    assert store.get("z") is not None
    store = kept(tmp_path / "none", "a", max_bytes=size - 1)
    assert store.get("a") is None
    assert not (tmp_path / "none").exists() or not bytes_in(tmp_path / "none")


def test_two_stores_share_a_folder(tmp_path: Path) -> None:
    size = len(packed(embedding=ROWS))
    one, other = DiskStore(tmp_path, 10 * size), DiskStore(tmp_path, 10 * size)
    for i in range(10, 60):
        for number, store in enumerate((one, other)):
            store.put(str(i), ROWS + number)
        one.close()
        other.close()
        found = one.get(str(i))
        assert found is not None
        assert (found == ROWS).all() or (found == ROWS + 1).all()
    for i in range(60, 99):  # and each its own
        one.put(str(i), ROWS)
        one.close()
        other.put(str(i + 100), ROWS)
        other.close()
        assert bytes_in(tmp_path) <= (10 + 16) * size


def test_behind_the_image_cache_a_restart_costs_no_encode(tmp_path: Path) -> None:
    first = EmbeddingCache(2**20, DiskStore(tmp_path))
    first.put("a", ROWS.copy())
    first.close()
    second = EmbeddingCache(2**20, DiskStore(tmp_path))
    found = second.get("a")
    assert found is not None
    np.testing.assert_array_equal(found, ROWS)
    assert not found.flags.writeable
