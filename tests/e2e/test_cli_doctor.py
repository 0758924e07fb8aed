"""`opsin doctor` as people and scripts call it: on a good pair, on bad ones, as text and as JSON."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import opsin.models
from opsin.models import Pair
from synth import write_pair

LIMIT = 300


def doctor(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opsin", "doctor", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=LIMIT, check=False)


def checks(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("tiny", tmp_path_factory.mktemp("tiny"))


def test_the_demo_pair_is_proved_and_found_well(tmp_path: Path) -> None:
    done = doctor("--json", cwd=tmp_path)
    found = checks(done)
    assert done.returncode == 0, done.stdout
    assert not {name for name, check in found.items() if check["status"] == "fail"}
    groups = {name.split(".")[0] for name in found}
    assert groups == {"build", "pair", "room", "safety", "placement", "behaviour"}
    proof = found["placement.encoder"]["evidence"]["backends"]
    assert sum(share["nodes"] for share in proof.values()) > 50
    assert sum(share["share_of_ops"] for share in proof.values()) == pytest.approx(1, abs=0.01)
    assert {"name", "status", "message", "evidence", "fix"} == set(found["build.version"])


def test_text_for_people_has_a_line_a_check_and_a_count(tmp_path: Path) -> None:
    done = doctor(cwd=tmp_path)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    rows = [line for line in lines if line.split(" ")[0] in {"ok", "warn", "fail"}]
    assert {row.split()[1] for row in rows} >= {"build.version", "placement.encoder", "behaviour.ends"}
    count, _ = lines[-1].split(" ok", 1)
    assert int(count) == sum(row.startswith("ok") for row in rows)
    assert "\x1b" not in done.stdout
    assert "Traceback" not in done.stderr


def test_a_projector_of_another_model_fails_before_anything_is_loaded(tiny: Pair, tmp_path: Path) -> None:
    demo = Path(opsin.models.__file__).parent / "demo" / "mmproj-opsin-demo.gguf"
    done = doctor("--model", tiny.llm, "--mmproj", demo, "--json", cwd=tmp_path)
    found = checks(done)
    assert done.returncode == 1
    assert found["pair.width"]["status"] == "fail"
    assert str(tiny.mmproj) in found["pair.width"]["fix"]
    assert not {name for name in found if name.startswith(("safety", "placement", "behaviour"))}


def test_a_damaged_file_is_a_finding_and_no_crash(tiny: Pair, tmp_path: Path) -> None:
    assert tiny.mmproj is not None
    short = tmp_path / "mmproj-short.gguf"
    short.write_bytes(tiny.mmproj.read_bytes()[: tiny.mmproj.stat().st_size // 2])
    done = doctor("--model", tiny.llm, "--mmproj", short, "--json", cwd=tmp_path)
    assert done.returncode == 1
    failed = [check for check in checks(done).values() if check["status"] == "fail"]
    assert ["cut short" in check["message"] for check in failed] == [True]
    assert "Traceback" not in done.stderr


def test_a_context_that_cuts_answers_is_a_finding_and_its_mend_ends_it(tmp_path: Path) -> None:
    found = checks(doctor("--ctx", 64, "--json", cwd=tmp_path))["pair.context"]
    assert found["status"] == "warn"
    program, command, *flags = shlex.split(found["fix"])
    assert (program, command) == ("opsin", "serve")
    assert checks(doctor(*flags, "--json", cwd=tmp_path))["pair.context"]["status"] == "ok"


def test_a_setting_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    done = doctor("--ctx", 3, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("opsin: ctx")
    assert "Traceback" not in done.stderr


def test_it_takes_the_flags_that_its_mends_give_and_leaves_no_drawn_image_behind(
    tmp_path: Path, opsin_env: dict[str, str]
) -> None:
    flags = [
        "--ubatch",
        "256",
        "--no-flash-attention",
        "--no-vision-flash-attention",
        "--image-cache-bytes",
        "9999999",
    ]
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-m", "opsin", "doctor", *flags, "--json"],
        cwd=tmp_path,
        env={**opsin_env, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    found = checks(done)
    assert found["pair.ubatch"]["evidence"]["ubatch_tokens"] == 256
    assert found["room.memory"]["evidence"]["images_bytes"] == 9_999_999
    assert {path.name for path in (cache / "opsin").iterdir()} == {"trials"}
