"""The pieces of the native room that need no llama.cpp: handles, projector headers, chunk descriptions, cores."""

import ctypes
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from opsin.core.errors import BadParameter, EngineClosed
from opsin.core.request import EmbeddingRows, TokenBatch
from opsin.native import devices
from opsin.native.context import BatchArrays
from opsin.native.devices import Device, default_threads, physical_cores, pick
from opsin.native.model import Owned
from opsin.native.projector import fingerprint
from opsin.native.vision import parse_meta


def test_children_are_freed_before_parents_and_the_youngest_first() -> None:
    freed: list[int] = []
    model = Owned("model", 1, freed.append)
    context = Owned("context", 2, freed.append, model)
    Owned("sampler", 3, freed.append, context)
    Owned("sampler", 4, freed.append, context)
    Owned("encoder", 5, freed.append, model)
    model.close()
    model.close()
    context.close()
    assert freed == [5, 4, 3, 2, 1]


def test_a_child_that_was_closed_is_forgotten_by_its_parent() -> None:
    freed: list[int] = []
    parent = Owned("parent", 1, freed.append)
    for number in range(2, 100):
        Owned("child", number, freed.append, parent).close()
    assert not parent._children
    parent.close()
    assert freed == [*range(2, 100), 1]


def test_a_closed_handle_gives_no_pointer_and_takes_no_child() -> None:
    handle = Owned("model", 1, lambda _: None)
    handle.close()
    with pytest.raises(EngineClosed, match="The model was closed already"):
        handle.pointer  # noqa: B018
    with pytest.raises(EngineClosed):
        Owned("context", 2, lambda _: None, handle)
    with pytest.raises(ValueError, match="null pointer"):
        Owned("model", 0, lambda _: None)


def test_a_fingerprint_follows_content_not_time_or_name(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(data)
    two.write_bytes(data)
    os.utime(two, (1, 1))
    assert fingerprint(one) == fingerprint(two)
    two.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert fingerprint(one) != fingerprint(two)


def test_a_large_file_is_sampled_from_first_to_last_byte(tmp_path: Path) -> None:
    size, path = 17 * 2**20, tmp_path / "large"
    path.write_bytes(b"\0" * size)
    plain = fingerprint(path)
    for at in (0, 999, 1000, size - 1):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"\1")
        assert fingerprint(path) != plain, at
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"\0")
    path.write_bytes(b"\0" * (size + 1))
    assert fingerprint(path) != plain


def saved(entries: list[tuple[int, int]], identity: bytes = b"0") -> bytes:
    body = struct.pack("<QIQ?", 2, 1, 0, True) + struct.pack("<IIIII", 16, 1, 0, 0, 1)
    body += struct.pack("<Q", len(identity)) + identity + struct.pack("<?Q", False, len(entries))
    for width, height in entries:
        body += struct.pack("<??iii", False, False, 0, width, height)
    return body + struct.pack("<?", False)


def test_a_chunks_description_is_read() -> None:
    meta = parse_meta(saved([(336, 336), (672, 336)], b"a longer name"))
    assert meta.sizes == ((336, 336), (672, 336))
    assert (meta.n_x, meta.n_y, meta.order) == (16, 1, (0, 0, 1))
    assert parse_meta(saved([(336, 336)], b"1")) == parse_meta(saved([(336, 336)], b"22"))


@pytest.mark.parametrize("cut", [0, 7, 20, 40, 60, 70])
def test_a_cut_description_is_refused(cut: int) -> None:
    with pytest.raises((ValueError, struct.error)):
        parse_meta(saved([(336, 336)])[:cut])


PRESENT = (Device("CPU", "a processor", "cpu", 1, 1, 11), Device("CUDA0", "a card", "gpu", 1, 1, 12))


def test_a_device_is_picked_by_name() -> None:
    assert pick("cuda0", "--device", PRESENT) == [PRESENT[1]]
    assert pick(None, "--device", PRESENT) == [PRESENT[1]]
    assert pick("none", "--device", PRESENT) == pick("CPU", "--device", PRESENT) == []
    with pytest.raises(BadParameter, match="this build sees CUDA0, or give none"):
        pick("Metal", "--mmproj-device", PRESENT)
    with pytest.raises(BadParameter, match="sees no GPU"):
        pick("Metal", "--device", PRESENT[:1])


@pytest.mark.parametrize(("kind", "names"), [("Metal", ["MTL0"]), ("cuda", ["CUDA0", "CUDA1"]), ("MTL0", ["MTL0"])])
def test_a_device_is_picked_by_kind(kind: str, names: list[str]) -> None:
    """llama.cpp calls Apple's GPU MTL0, and everybody else Metal."""
    present = [*PRESENT, Device("CUDA1", "a card", "gpu", 1, 1, 13), Device("MTL0", "Apple M4", "igpu", 1, 1, 14)]
    assert [device.name for device in pick(kind, "--device", present)] == names


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux counts siblings")
def test_siblings_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for cpu in range(4):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert physical_cores(tmp_path) == 2
    assert physical_cores(tmp_path / "nothing") == 4


def test_a_small_model_gets_one_thread() -> None:
    assert default_threads(4_000_000) == 1
    assert default_threads(7_000_000_000) == physical_cores()


def test_a_model_on_a_gpu_gets_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "physical_cores", lambda: 64)
    assert default_threads(7_000_000_000) == 64
    assert default_threads(7_000_000_000, offloaded=True) == 4
    assert default_threads(4_000_000, offloaded=True) == 1


class Batch(ctypes.Structure):
    """The shape of `llama_batch`."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def test_an_embedding_has_four_positions_section_after_section_under_mrope() -> None:
    """The library's own `llama_batch_init` has room for one: writing four went past its end."""
    arrays = BatchArrays(Batch, 8, 4)
    positions = np.arange(12, dtype=np.int32).reshape(4, 3)
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    batch = arrays.embeddings(EmbeddingRows(rows, positions, seq_id=5, logits=True), rows)
    assert batch.pos[:12] == list(range(12))
    assert batch.embd[:6] == [0, 1, 2, 3, 4, 5]
    assert (batch.n_tokens, bool(batch.token)) == (3, False)
    assert [batch.seq_id[index][0] for index in range(3)] == [5, 5, 5]
    assert (batch.n_seq_id[:3], batch.logits[:3]) == ([1, 1, 1], [0, 0, 1])
    beside, data = TokenBatch([7], [40], [1], [0]), np.arange(8, dtype=np.float32).reshape(4, 2)
    batch = arrays.embeddings(EmbeddingRows(rows, positions, seq_id=5, beside=beside), data)
    own = [40, 40, 40, 0]  # as llama.cpp makes four of a token's one
    assert np.array(batch.pos[:16]).reshape(4, 4).tolist() == [
        [p, *row] for p, row in zip(own, positions.tolist(), strict=True)
    ]
    assert [batch.seq_id[index][0] for index in range(4)] == [1, 5, 5, 5]
    assert (batch.n_tokens, batch.logits[:4]) == (4, [1, 0, 0, 0])
    batch = arrays.tokens(TokenBatch([7, 8], [40, 41], [1, 2], [1]))
    assert (batch.token[:2], batch.pos[:2], bool(batch.embd)) == ([7, 8], [40, 41], False)
    assert [batch.seq_id[index][0] for index in range(2)] == [1, 2]
    assert batch.logits[:2] == [0, 1]


def test_there_is_a_core() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


@pytest.mark.slow
def test_importing_the_room_loads_no_llama() -> None:
    import subprocess

    code = "import sys, opsin.native; print([name for name in sys.modules if name.startswith('llama_cpp')])"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
