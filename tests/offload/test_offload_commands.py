"""The commands on a machine with two devices, as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from opsin.core.settings import EngineSettings
from opsin.doctor.pair import read_pair
from opsin.doctor.safety import trial_check
from opsin.native.devices import devices

DEVICE = "Vulkan0"


def doctor(pair: Any, folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "opsin", "doctor", "--model", pair.llm, "--mmproj", pair.mmproj, "--json", *flags]
    # Mesa 22.3's llvmpipe dies in llama.cpp's flash attention over a prompt with an image.
    env = {**os.environ, "OPSIN_FLASH_ATTENTION": "false"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout, done.stderr
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_doctor_proves_the_encoder_on_the_device(pair: Any, tmp_path: Path) -> None:
    _, found = doctor(pair, tmp_path)
    encoder = found["placement.encoder"]
    assert encoder["status"] == "ok"
    assert set(encoder["evidence"]["backends"]) == {DEVICE}
    assert found["placement.layers"]["evidence"]["layers_offloaded"] == 2


def test_doctor_fails_an_encoder_on_the_cpu(pair: Any, tmp_path: Path) -> None:
    code, found = doctor(pair, tmp_path, "--mmproj-device", "none")
    encoder = found["placement.encoder"]
    assert (code, encoder["status"]) == (1, "fail")
    assert set(encoder["evidence"]["backends"]) == {"CPU"}
    assert f"--mmproj-device {DEVICE}" in encoder["fix"]


def test_a_device_that_dies_is_a_finding_with_a_setting_to_try(pair: Any, tmp_path: Path) -> None:
    """Mesa 22.3's llvmpipe dies; a later Mesa may not."""
    check = trial_check(read_pair(pair), EngineSettings(), devices(), folder=tmp_path)
    print(check.message)
    if check.status == "fail":
        assert "died of SIG" in check.message
        assert check.fix is not None
        assert "--no-flash-attention" in check.fix
