"""What doctor says before a pair is loaded, against what a process that loads it and works with it then takes."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opsin import Opsin
from opsin.core.settings import EngineSettings
from opsin.doctor.behaviour import behaviour_checks
from opsin.doctor.room import estimate_room, room_checks
from opsin.models.shapes import SHAPES
from opsin.native import devices
from synth import write_shape

# Loads the pair, encodes a picture, fills every cell of every KV memory, and prints by how much it grew.
CHILD = """
import json, sys
import numpy as np, psutil
from pathlib import Path
from opsin.core.backend import EmbeddingRows, TokenRow
from opsin.core.layout import ImageRun
from opsin.core.parts import PicturePart
from opsin.core.settings import EngineSettings
from opsin.native import devices, open_backend
from opsin.native.places import cells_beside
from opsin.testing import picture
devices()
process, settings = psutil.Process(), EngineSettings.model_validate(json.loads(sys.argv[1]))
before = process.memory_info().rss
backend = open_backend(settings)
layout = backend.layout([PicturePart(picture(1, 336, 336))], add_bos=False)
backend.encode(next(run for run in layout.runs if isinstance(run, ImageRun)))
layout.close()
limits = backend.limits

def parts(first, size):
    return [range(start, min(start + limits.n_ubatch, size)) for start in range(first, size, limits.n_ubatch)]

def tokens(sequence, first, size):
    for part in parts(first, size):
        assert backend.decode([TokenRow(3 + at % 100, at, sequence, at == part[-1]) for at in part])

for sequence in range(1 if limits.shared else limits.n_seq_max):
    tokens(sequence, 0, limits.n_ctx_seq)
if limits.common:
    backend.kv_remove(0, 0, -1)
    for part in parts(0, cells_beside(limits.n_ctx_seq)[1]):
        positions, embedding = np.array([part], np.int32), np.ones((len(part), limits.n_embd), np.float32)
        assert backend.decode(EmbeddingRows(embedding, positions, 0))
    backend.kv_remove(0, 0, -1)
    tokens(0, 0, 9)
    backend.kv_join(0)
    tokens(0, 9, limits.common)
backend.synchronize()
print(process.memory_info().rss - before)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Wide and shallow: much memory for little work."""
    small = SHAPES["small"]
    shape = replace(small, name="wide", vision=replace(small.vision, layers=4), text=replace(small.text, layers=2))
    return write_shape(shape, tmp_path_factory.mktemp("wide"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted differently elsewhere")
@pytest.mark.parametrize(
    "options",
    [{"parallel": 2, "ctx": 2048}, {"ctx": 2048, "ubatch": 512, "flash_attention": False}, {"ctx": 3072}],
    ids=str,
)
def test_the_estimate_is_within_a_tenth_of_what_is_used(
    pair: Any, opsin_env: dict[str, str], options: dict[str, Any]
) -> None:
    settings = EngineSettings(model=pair.llm, mmproj=pair.mmproj, picture_cache_bytes=0, **options)
    estimate = estimate_room(pair.llm, pair.mmproj, settings)
    assert estimate.note is None
    asked = json.dumps(settings.model_dump(mode="json", exclude_unset=True))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, asked], env=opsin_env, capture_output=True, text=True, timeout=250, check=True
    )
    told, used = sum(parts.total for parts in estimate.by_device.values()), int(child.stdout)
    print(f"told {told / 2**20:.1f} MiB, used {used / 2**20:.1f} MiB ({told / used - 1:+.1%})")
    assert abs(told - used) <= 0.1 * used


def small_machine(root: Path, free: int) -> Path:
    (root / "proc").mkdir()
    (root / "proc" / "meminfo").write_text(f"MemTotal: 999999999 kB\nMemAvailable: {free // 1024} kB\n")
    return root


@pytest.mark.slow
def test_what_is_advised_is_a_command_and_fits(pair: Any, tmp_path: Path, opsin_env: dict[str, str]) -> None:
    settings = EngineSettings(parallel=2, ctx=65536)
    estimate = estimate_room(pair.llm, pair.mmproj, settings)
    needed = estimate.by_device["CPU"].total
    root = small_machine(tmp_path, int(needed * 0.8))
    (check,) = room_checks(estimate, devices(), root)
    assert check.name == "room.memory"
    assert check.status == "fail"
    assert check.fix is not None
    words = shlex.split(check.fix)
    assert words[:2] == ["opsin", "serve"]
    shown = subprocess.run(
        [sys.executable, "-m", "opsin", *words[1:], "--print-config"],
        env=opsin_env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    chosen = dict(line.split("  # ")[0].split(" = ") for line in shown.splitlines() if " = " in line)
    again = EngineSettings(
        parallel=int(chosen["parallel"]),
        ctx=int(chosen["ctx"]),
        kv_type=json.loads(chosen["kv_type"]),
        picture_cache_bytes=int(chosen["picture_cache_bytes"].replace("_", "")),
    )
    assert again != settings
    assert Path(json.loads(chosen["model"])) == pair.llm
    (better,) = room_checks(estimate_room(pair.llm, pair.mmproj, again), devices(), root)
    assert better.status == "ok"


def test_the_demo_pair_fits_this_machine_and_behaves() -> None:
    with Opsin() as model:
        checks = behaviour_checks(model.engine, model._runtime.prompts)
    found = {check.name: check for check in checks}
    assert found["behaviour.picture_cache"].status == "ok"
    assert found["behaviour.stages"].status != "fail"
    assert found["behaviour.ends"].status == "ok", found["behaviour.ends"]
    demo = Path(__file__).parents[2] / "src/opsin/models/demo"
    settings = EngineSettings()
    estimate = estimate_room(demo / "opsin-demo.gguf", demo / "mmproj-opsin-demo.gguf", settings)
    (check,) = room_checks(estimate, devices())
    assert check.status == "ok"
    assert check.evidence["needed_bytes"] == estimate.by_device["CPU"].total
