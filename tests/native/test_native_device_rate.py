"""A device's rates: right arithmetic on a device with a known clock, and sane numbers of this machine."""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from opsin.core.errors import ModelError
from opsin.native.devices import Device, devices, measure_device, physical_cores


class Ggml:
    """Each graph takes as long as `seconds` says; everything made is counted until it is freed."""

    def __init__(self, clock: list[float], seconds: Callable[[int], float], **answers: int) -> None:
        self.clock, self.seconds, self.answers = clock, seconds, answers
        self.threads = 0
        self.sizes: list[tuple[int, ...]] = []
        self.alive = 0
        self._set = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(self._set_threads)

    def _set_threads(self, _backend: int, count: int) -> None:
        self.threads = count

    def ggml_new_tensor_4d(self, _context: int, *shape: int) -> int:
        self.sizes.append(shape)
        return 1

    def ggml_backend_graph_compute(self, *_: int) -> int:
        self.clock[0] += self.seconds(self.threads)
        return self.answers.get("compute", 0)

    def ggml_backend_reg_get_proc_address(self, *_: object) -> int:
        return self.answers.get("set", ctypes.cast(self._set, ctypes.c_void_p).value or 0)

    def _made(self, name: str) -> int:
        answer = self.answers.get(name, 1)
        self.alive += bool(answer)
        return answer

    def __getattr__(self, name: str) -> Any:
        if name in {"ggml_backend_dev_init", "ggml_init", "ggml_backend_alloc_ctx_tensors"}:
            return lambda *_: self._made(name)
        if name in {"ggml_backend_free", "ggml_free", "ggml_backend_buffer_free"}:
            return lambda *_: setattr(self, "alive", self.alive - 1)
        return lambda *_: 1


def measured(
    monkeypatch: pytest.MonkeyPatch, kind: str, seconds: Callable[[int], float], free: int = 0, **answers: int
) -> tuple[Any, Ggml]:
    clock = [0.0]
    monkeypatch.setitem(measure_device.__globals__, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    ggml = Ggml(clock, seconds, **answers)
    device = Device("DEV0", "a device", kind, free, free, 7)
    try:
        return measure_device(device, SimpleNamespace(ggml=ggml)), ggml  # type: ignore[arg-type]
    finally:
        assert ggml.alive == 0


def test_a_graph_holds_four_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, _ = measured(monkeypatch, "gpu", lambda _: 0.0004)
    assert rate.ops_s == pytest.approx(4 * 2 * 4096 * 4096 * 2048 / 0.0004)
    assert rate.bytes_s == pytest.approx(256 * 2**20 / 0.0004)


def test_a_slow_gpu_is_not_given_work_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, ggml = measured(monkeypatch, "gpu", lambda _: 0.01)
    assert rate.ops_s == pytest.approx(4 * 2 * 1024 * 1024 * 128 / 0.01)
    assert (1, 4096, 4096, 1, 1) not in ggml.sizes


def test_a_quick_gpu_with_room_reads_more_so_that_a_start_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, _ = measured(monkeypatch, "gpu", lambda _: 0.0003, free=140 * 2**30)
    assert rate.bytes_s == pytest.approx(8 * 256 * 2**20 / 0.0003)
    rate, _ = measured(monkeypatch, "gpu", lambda _: 0.0003, free=6 * 2**30)
    assert rate.bytes_s == pytest.approx(256 * 2**20 / 0.0003)


def test_a_cpu_computes_with_all_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, ggml = measured(monkeypatch, "cpu", lambda _: 0.01)
    assert rate.ops_s == pytest.approx(4 * 2 * 1024 * 1024 * 128 / 0.01)
    assert ggml.threads == physical_cores()


def test_memory_that_is_short_makes_the_matrices_small(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, ggml = measured(monkeypatch, "gpu", lambda _: 0.01, free=64 * 2**20)
    assert rate.bytes_s == pytest.approx(16 * 2**20 / 0.01)
    assert (1, 8192, 256, 1, 1) in ggml.sizes
    _, ggml = measured(monkeypatch, "gpu", lambda _: 0.0001, free=64 * 2**20)
    assert (1, 4096, 4096, 1, 1) not in ggml.sizes, "four of these and what they give take 288 MiB"


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ({"ggml_backend_dev_init": 0}, "cannot be opened"),
        ({"ggml_backend_alloc_ctx_tensors": 0}, "has no room"),
        ({"compute": 1}, "computing failed"),
        ({"set": 0}, "threads cannot be set"),
    ],
)
def test_a_device_that_fails_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, int], why: str
) -> None:
    with pytest.raises(
        ModelError, match=rf"The rate of DEV0 cannot be measured, since it[s]? .*{why.split(' ', 1)[1]}"
    ):
        measured(monkeypatch, "cpu", lambda _: 0.01, **answers)


def test_the_devices_of_this_machine_have_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure_device.__globals__, "_SECONDS", 0.05)
    found = [device for device in devices() if device.type in {"cpu", "gpu", "igpu"}]
    assert any(device.type == "cpu" for device in found)
    for device in found:
        rate = measure_device(device)
        print(f"{device.name}: {rate.ops_s / 1e9:.1f} GFLOP/s, {rate.bytes_s / 1e9:.1f} GB/s")
        assert 5e8 < rate.ops_s < 1e16
        assert 1e8 < rate.bytes_s < 2e13
