"""The Dockerfile's steps name files that there are and that its context lets in; compose builds both kinds of it."""

import runpy
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
steps = runpy.run_path(str(ROOT / "scripts" / "try_dockerfile.py"))["steps"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("base", ["cpu", "cuda"])
def test_every_stage_that_is_used_is_made_before(base: str) -> None:
    made: set[str] = set()
    for word, rest in steps(DOCKERFILE, {"BASE": base}):
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            assert source in made or ":" in source, source
            made.add(name)
        elif word == "COPY" and "--from=" in rest:
            assert rest.split()[0].removeprefix("--from=") in made
    assert "run" in made


def test_copied_files_exist_and_the_context_lets_them_in() -> None:
    let_in = [
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    for word, rest in steps(DOCKERFILE, {"BASE": "cpu"}):
        if word == "COPY" and "--from=" not in rest:
            for name in rest.split()[:-1]:
                assert (ROOT / name).exists()
                assert any(fnmatch(name, pattern) for pattern in let_in), name


def test_compose_serves_on_loopback_with_a_key_and_a_health_check() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert set(services) == {"opsin", "opsin-cuda"}
    for service in services.values():
        assert service["ports"] == ["127.0.0.1:8000:8000"]
        assert "OPSIN_API_KEY" in service["environment"]
        assert "/ready" in " ".join(service["healthcheck"]["test"])
    assert services["opsin-cuda"]["build"]["args"]["BASE"] == "cuda"
