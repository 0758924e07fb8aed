"""The whole examination on two files and an engine without a model: what is told, in which order, and what not."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from opsin.cache import EmbeddingCache
from opsin.compose import Runtime
from opsin.core.backend import BackendLimits
from opsin.core.errors import BadParameter, EncodeFailed
from opsin.core.model_info import BackendShare, Placement
from opsin.core.settings import EngineSettings
from opsin.doctor import examine as room
from opsin.doctor.check import Check
from opsin.doctor.examine import examine
from opsin.engine import Engine
from opsin.models.gguf import read_header
from opsin.models.pairing import Pair
from opsin.native.devices import Build, Device
from opsin.prompt import PromptBuilder, TemplateSource
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import N_VOCAB, TURN_TEXT
from synth import write_pair

TEMPLATE = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}" + TURN_TEXT
SOURCE = TemplateSource(TEMPLATE, "llama", "fake", None, "", "", frozenset({TURN_TEXT}))
LIMITS = BackendLimits(n_ctx=2048, n_ubatch=64, n_seq_max=8, n_vocab=N_VOCAB, n_embd=4, n_ctx_seq=2048)
CPU = Device("CPU", "a CPU", "cpu", 2**33, 2**34, 1)
CARDS = tuple(Device(f"CUDA{index}", "a GPU", "gpu", 2**33, 2**34, 2 + index) for index in range(2))
ON_GPU = {"CUDA0": BackendShare(90, 1.0)}
ON_CPU = {"CPU": BackendShare(90, 1.0)}
OK = Check("build.gpu", "ok", "All is well.")


class Backend(FakeBackend):
    """With what a native one has besides, and a proof that a test chooses."""

    has_vision = True
    eog_texts = frozenset({"</s>"})
    proof = Placement(ON_GPU, ON_GPU, 1, 1)

    def __init__(self, **options: Any) -> None:
        super().__init__(lambda prompt: f"{prompt.partition('<')[2][:8]}: a square.", **options)

    def placement(self) -> Placement:
        return self.proof


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("tiny", tmp_path_factory.mktemp("pair"))


def opener(backend: FakeBackend) -> Callable[[], Runtime]:
    def open_runtime() -> Runtime:
        engine = Engine(lambda: backend, images=EmbeddingCache(2**20), now=backend.clock)
        return Runtime(engine, PromptBuilder(SOURCE), False, "setup", backend)  # type: ignore[arg-type]

    return open_runtime


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the native parts say, and how a pair is opened."""
    backend = Backend(limits=LIMITS)
    room_said = replace(OK, name="room.memory")
    said = SimpleNamespace(
        build=OK, room=room_said, devices=(CPU, *CARDS), backend=backend, open_runtime=opener(backend)
    )
    for name, value in {
        "build_info": Build,
        "build_checks": lambda *_, **__: [said.build],
        "room_checks": lambda *_: [said.room],
        "trial_check": lambda *_: replace(OK, name="safety.trial"),
        "devices": lambda: said.devices,
        "open_runtime": lambda *_, **__: said.open_runtime(),
    }.items():
        monkeypatch.setattr(room, name, value)
    return said


def examined(pair: Pair, **settings: Any) -> dict[str, Check]:
    found = list(examine(EngineSettings(model=pair.llm, mmproj=pair.mmproj, **settings)))
    by_name = {check.name: check for check in found}
    assert len(by_name) == len(found), "nothing is told twice"
    return by_name


def groups(found: dict[str, Check]) -> set[str]:
    return {name.partition(".")[0] for name in found}


def test_a_sound_pair_is_looked_at_from_all_sides(pair: Pair, machine: SimpleNamespace) -> None:
    found = examined(pair)
    assert groups(found) == {"build", "room", "safety", "pair", "behaviour", "placement"}
    assert "fail" not in {check.status for check in found.values()}
    assert machine.backend.closed


def test_a_quick_look_loads_nothing(pair: Pair, machine: SimpleNamespace) -> None:
    machine.open_runtime = lambda: pytest.fail("it was loaded")
    found = list(examine(EngineSettings(model=pair.llm, mmproj=pair.mmproj), quick=True))
    assert groups({check.name: check for check in found}) == {"build", "room", "pair"}


@pytest.mark.usefixtures("machine")
def test_the_loaded_pairs_word_stands_and_not_the_headers(pair: Pair) -> None:
    found = examined(pair, ubatch=512)
    assert found["pair.ubatch"].evidence["ubatch_tokens"] == LIMITS.n_ubatch
    assert found["pair.ubatch"].evidence["image_tokens"] == 4, "what the backend lays out"


def test_an_image_that_does_not_fit_ends_it_before_one_is_asked_about(pair: Pair, machine: SimpleNamespace) -> None:
    backend = Backend(limits=replace(LIMITS, n_ctx=256, n_ctx_seq=256), image_tokens=300)
    machine.open_runtime = opener(backend)
    found = examined(pair)
    assert found["pair.context"].status == "fail"
    assert groups(found) == {"build", "room", "safety", "pair"}
    assert backend.closed


def test_an_answer_that_fails_is_a_finding_behind_the_others(pair: Pair, machine: SimpleNamespace) -> None:
    machine.backend.fail_encode = EncodeFailed("no memory")
    found = examined(pair)
    assert list(found)[-1] == "pair.usable"
    assert "no memory" in found["pair.usable"].message
    assert "pair.context" in found


def test_a_setting_that_loading_refuses_is_a_finding_behind_the_headers(pair: Pair, machine: SimpleNamespace) -> None:
    def refuse() -> Runtime:
        raise BadParameter("--ctx is too small: give more.")

    machine.open_runtime = refuse
    found = list(examined(pair).values())
    assert (found[-1].name, found[-1].status) == ("pair.usable", "fail")
    assert found[-1].message == "--ctx is too small: give more."
    assert "pair.width" in {check.name for check in found}


def test_a_pair_without_room_is_not_loaded_and_its_headers_are_told(pair: Pair, machine: SimpleNamespace) -> None:
    machine.room = replace(machine.room, status="fail")
    machine.open_runtime = lambda: pytest.fail("it was loaded")
    found = examined(pair)
    assert "pair.width" in found
    assert "safety.trial" not in found


def test_a_gpu_that_the_build_cannot_use_is_told_by_its_check(pair: Pair, machine: SimpleNamespace) -> None:
    def on_cpu() -> Check:
        backend = Backend(limits=LIMITS)
        backend.proof = Placement(ON_CPU, ON_CPU, 0, 1)
        machine.open_runtime = opener(backend)
        return examined(pair)["placement.encoder"]

    machine.devices = (CPU,)
    machine.build = replace(OK, status="warn", fix="pip install something")
    assert on_cpu().status == "ok", "a warning is no fault of the pair"
    machine.build = replace(OK, status="fail", fix="env -u CUDA_VISIBLE_DEVICES opsin doctor")
    check = on_cpu()
    assert (check.status, check.fix) == ("fail", "env -u CUDA_VISIBLE_DEVICES opsin doctor")
    assert "see build.gpu" in check.message


@pytest.mark.usefixtures("machine")
def test_every_header_is_read_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reading(path: Any) -> Any:
        read.append(path.name)
        return read_header(path)

    for module in ("opsin.models.gguf", "opsin.models.facts", "opsin.doctor.pair"):
        monkeypatch.setattr(f"{module}.read_header", reading)
    examined(pair)
    assert pair.mmproj is not None
    assert sorted(read) == sorted([pair.llm.name, pair.mmproj.name])
