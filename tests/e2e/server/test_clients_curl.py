"""The curl commands of the documentation, as they stand there, against a running server."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("curl") is None, reason="the commands need curl"),
]

ROOT = Path(__file__).parents[3]
WRITTEN_FOR = "http://127.0.0.1:8000"


def commands() -> list[Any]:
    """Every block of shell commands that asks a running server, by its page and number."""
    found = []
    for page in ("docs/server.md",):  # tests/docs runs those of the other pages, beside the files they name
        blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        asking = [block for block in blocks if "curl" in block and WRITTEN_FOR in block]
        found += [pytest.param(block, id=f"{page}-{number}") for number, block in enumerate(asking)]
    return found


def test_the_documentation_has_commands() -> None:
    assert sum("docs/server.md" in str(command.id) for command in commands()) >= 5


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_is_answered(command: str, server: Any) -> None:
    script = f"set -euo pipefail\n{command.replace(WRITTEN_FOR, server.base_url)}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert '"error":{' not in done.stdout
    if '"stream": true' in command:
        *chunks, last = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line.startswith("data: ")]
        assert last == "[DONE]"
        assert json.loads(chunks[-1])["usage"]["completion_tokens"] > 0
    elif "/v1/chat" in command:
        assert json.loads(done.stdout)["choices"][0]["message"]["content"]
