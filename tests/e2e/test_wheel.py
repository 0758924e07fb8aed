"""A wheel that is built from the repository and installed into a fresh environment does all that the checkout does."""

import email
import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import httpx
import pytest
from serve_process import question, served

pytestmark = [pytest.mark.slow, pytest.mark.native]
ROOT = Path(__file__).parents[2]
LOG = ROOT / "tests" / "logs" / "lcp-0.2.56-founding.log"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT],
        check=True, timeout=240,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`opsin` of a fresh environment, which borrows its dependencies and nothing of the checkout."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, timeout=240)
    site = next((home / "lib").glob("python*/site-packages"))
    # Paths named in such a file are not searched for further such files: the checkout's own link is not followed.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = subprocess.run(
        [python, "-c", "import opsin; print(opsin.__file__)"], capture_output=True, text=True, check=True, cwd=home
    )
    assert str(home) in where.stdout
    return home / "bin" / "opsin"


def opsin(command: Path, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [command, *arguments], capture_output=True, text=True, timeout=240, check=False, cwd=cwd
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_metadata_stands_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = next(name for name in names if name.endswith("METADATA"))
        found = email.message_from_bytes(archive.read(about))
    text = str(found.get_payload())
    assert "](docs/" not in text
    assert "](tests/" not in text
    assert "<!--" not in text
    assert "opsin ask photo.jpg" in text
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)} <= set(
        found.get_all("Classifier") or ()
    )
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(part in name for name in names for part in ("tests/", "tools/", "__pycache__"))


def test_its_commands_work(command: Path, tmp_path: Path) -> None:
    site = next((command.parents[1] / "lib").glob("python*/site-packages"))
    example = site / "opsin" / "models" / "demo" / "shapes.png"
    row = json.loads(opsin(command, "ask", str(example), "What is in this picture?", "--json", cwd=tmp_path))
    assert row["error"] is None
    assert "circle" in row["text"]
    assert "ok" in opsin(command, "doctor", cwd=tmp_path)
    assert "runaway" in opsin(command, "explain", str(LOG), cwd=tmp_path)
    assert "llava-1.5-7b" in opsin(command, "models", "--known", cwd=tmp_path)
    assert "it fits" in opsin(
        command, "predict", "--model", "llava-1.5-7b", "--type", "q4_0", "--device", "rtx 3090", cwd=tmp_path
    )


def test_its_server_has_page_demo_and_dashboard(command: Path, tmp_path: Path) -> None:
    with served(command=[str(command)], cwd=tmp_path, env={"PYTHONPATH": ""}) as server:
        page = httpx.get(server.url).text
        assert "<html" in page
        assert httpx.get(f"{server.url}/page/page.js").status_code == 200
        assert httpx.get(f"{server.url}/page/example.png").content.startswith(b"\x89PNG")
        assert httpx.get(f"{server.url}/page/grafana.json").json()["panels"]
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=question(max_tokens=8), timeout=60)
        assert answer.json()["choices"][0]["message"]["content"]
