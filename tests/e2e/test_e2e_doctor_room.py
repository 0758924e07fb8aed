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
from opsin.compose import open_runtime
from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings
from opsin.doctor.examine import behaviour_checks
from opsin.doctor.safety import room_checks
from opsin.models.facts import read_facts
from opsin.native.devices import cpu_features, devices
from opsin.native.memory import MemoryPlanner
from opsin.prompt import Message
from opsin.testing import image
from synth import SHAPES, write_pair, write_shape

# Loads the pair, encodes an image, fills every cell of the KV cache, and prints by how much it grew.
CHILD = """
import json, sys
import psutil
from pathlib import Path
from token_rows import TokenRow, batch
from opsin.core.request import ImageChunk
from opsin.core.request import ImagePart
from opsin.core.settings import EngineSettings
from opsin.native import open_backend
from opsin.native.devices import devices
from opsin.testing import image
devices()
process, settings = psutil.Process(), EngineSettings.model_validate(json.loads(sys.argv[1]))
before = process.memory_info().rss
backend = open_backend(settings)
tokenized = backend.tokenize([ImagePart(image(1, 336, 336))], add_bos=False)
backend.encode(next(run for run in tokenized.chunks if isinstance(run, ImageChunk)))
tokenized.close()
limits = backend.limits
for start in range(0, limits.n_ctx, limits.n_ubatch):
    part = range(start, min(start + limits.n_ubatch, limits.n_ctx))
    assert backend.decode(batch(TokenRow(3 + at % 100, at, 0, at == part[-1]) for at in part))
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
    [
        {"parallel": 2, "ctx": 2048, "kv_type": "q8_0"},
        {"ctx": 2048, "ubatch": 512, "flash_attention": False},
        {"ctx": 3072},
    ],
    ids=str,
)
def test_the_estimate_is_within_a_tenth_of_what_is_used(
    pair: Any, opsin_env: dict[str, str], options: dict[str, Any]
) -> None:
    settings = EngineSettings(model=pair.llm, mmproj=pair.mmproj, image_cache_bytes=0, **options)
    plan = MemoryPlanner(read_facts(pair.llm, pair.mmproj), devices(), settings, {}, cpu_features()).needed()
    asked = json.dumps(settings.model_dump(mode="json", exclude_unset=True))
    env = {**opsin_env, "PYTHONPATH": f"{opsin_env['PYTHONPATH']}:{Path(__file__).parents[1]}"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, asked], env=env, capture_output=True, text=True, timeout=250, check=True
    )
    told, used = sum(needs.total for needs in plan.by_device.values()), int(child.stdout)
    print(f"told {told / 2**20:.1f} MiB, used {used / 2**20:.1f} MiB ({told / used - 1:+.1%})")
    assert abs(told - used) <= 0.1 * used


def small_machine(root: Path, free: int) -> Path:
    (root / "proc").mkdir()
    (root / "proc" / "meminfo").write_text(f"MemTotal: 999999999 kB\nMemAvailable: {free // 1024} kB\n")
    return root


def test_what_is_advised_is_a_command_and_fits(pair: Any, tmp_path: Path, opsin_env: dict[str, str]) -> None:
    facts, settings = read_facts(pair.llm, pair.mmproj), EngineSettings(parallel=2, ctx=65536)
    asked = settings.model_copy(update={"model": pair.llm, "mmproj": pair.mmproj})
    root = small_machine(
        tmp_path, int(MemoryPlanner(facts, devices(), asked, {}).needed().by_device["CPU"].total * 0.8)
    )
    (check,) = room_checks(facts, devices(), asked, root=root)
    assert (check.name, check.status) == ("room.memory", "fail")
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
        image_cache_bytes=int(chosen["image_cache_bytes"].replace("_", "")),
    )
    assert again != settings
    assert Path(json.loads(chosen["model"])) == pair.llm
    (better,) = room_checks(facts, devices(), again, root=root)
    assert better.status == "ok"


def test_a_machine_without_room_is_told_what_takes_it(pair: Any, tmp_path: Path) -> None:
    facts = read_facts(pair.llm, pair.mmproj)
    (check,) = room_checks(facts, devices(), EngineSettings(ctx=2048), root=small_machine(tmp_path, 40 * 2**20))
    assert (check.status, check.fix) == ("fail", None)
    assert "no setting makes it fit" in check.message
    assert check.evidence["needed_bytes"] > check.evidence["free_bytes"]


def test_the_demo_pair_fits_this_machine_and_behaves() -> None:
    with Opsin() as model:
        checks = behaviour_checks(model.engine, model._runtime.prompts)
    found = {check.name: check for check in checks}
    assert found["behaviour.sees"].status == "ok"
    assert found["behaviour.ends"].status == "ok", found["behaviour.ends"]
    demo = Path(__file__).parents[2] / "src/opsin/models/demo"
    facts = read_facts(demo / "opsin-demo.gguf", demo / "mmproj-opsin-demo.gguf")
    (check,) = room_checks(facts, devices(), EngineSettings())
    assert check.status == "ok"


def test_a_load_raises_the_ubatch_for_images_that_are_read_at_once(tmp_path: Path) -> None:
    whole = write_pair("gemma3-tiny", tmp_path)
    runtime = open_runtime(whole.llm, whole.mmproj, EngineSettings(ubatch=32, ctx=512, disk_cache=False), trial=False)
    try:
        assert runtime.engine.limits.n_ubatch >= 64
        prompt = runtime.prompts.build([Message("user", [image(1, 224, 224), "What is this?"])])
        answer = runtime.engine.submit(prompt, SamplingParams(max_tokens=4, guard=False)).result()
        assert answer.usage.image_tokens == 64
    finally:
        runtime.close()
