"""`Opsin(isolated=True)` on the demo model: the same answers from a process of its own, which may crash."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from opsin import Opsin
from opsin.core.errors import EngineDied, ModelNotFound

pytestmark = [pytest.mark.slow, pytest.mark.native]

SHAPES = Path(__file__).parents[2] / "src" / "opsin" / "models" / "demo" / "shapes.png"
QUESTION = "What is in this picture?"


def test_the_answers_are_the_same_and_a_crash_costs_no_more_than_its_requests() -> None:
    with Opsin(config=False, disk_cache=False) as inside, Opsin(config=False, disk_cache=False, isolated=True) as apart:
        wanted = inside.ask(SHAPES, QUESTION, temperature=0).text
        assert apart.ask(SHAPES, QUESTION, temperature=0).text == wanted
        assert (apart.info, apart.is_demo, apart.setup) == (inside.info, inside.is_demo, inside.setup)
        assert apart.placement().encoder.keys() == inside.placement().encoder.keys()
        pid = apart.engine.pid  # type: ignore[union-attr]
        assert pid not in {None, os.getpid()}
        stream = apart.submit([_message()], temperature=0, max_tokens=400, ignore_eos=True, guard=False)
        next(iter(stream))
        os.kill(pid, signal.SIGSEGV)
        with pytest.raises(EngineDied):
            stream.result()
        assert apart.ask(SHAPES, QUESTION, temperature=0).text == wanted
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_class_and_ask_stay_in_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from opsin.cli.app import app

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with Opsin(config=False, disk_cache=False) as inside:
        assert inside.ask(SHAPES, QUESTION, temperature=0, max_tokens=2).text
    asked = CliRunner().invoke(app, ["ask", str(SHAPES), QUESTION, "--max-tokens", "2"], catch_exceptions=False)
    assert asked.exit_code == 0, asked.output


@pytest.mark.parametrize("gpus", [(), ("CUDA0",)])
def test_an_answer_has_1024_tokens_on_every_device(monkeypatch: pytest.MonkeyPatch, gpus: tuple[str, ...]) -> None:
    """On machines with CUDA it had 512."""
    monkeypatch.setattr("opsin.compose.gpu_names", lambda: gpus)
    with Opsin(config=False, disk_cache=False) as opsin:
        assert opsin.ask(SHAPES, QUESTION, temperature=0).max_tokens == 1024


def test_one_that_was_never_closed_ends_with_its_process(opsin_env: dict[str, str]) -> None:
    code = "from opsin import Opsin\nmodel = Opsin(config=False, isolated=True)\nprint(model.engine.pid)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=opsin_env, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert not psutil.pid_exists(int(done.stdout))


def test_a_model_that_is_not_there_is_told_as_ever() -> None:
    with pytest.raises(ModelNotFound):
        Opsin("no/such/file.gguf", config=False, isolated=True)


def _message() -> object:
    from opsin import Message

    return Message("user", "Tell me a story.")
