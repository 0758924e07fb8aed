"""`Opsin(isolated=True)` on the demo model: the same answers from a process of its own, which may crash."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

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
        pid = apart.engine.pid  # type: ignore[attr-defined]
        assert pid not in {None, os.getpid()}
        stream = apart.submit([_message()], temperature=0, max_tokens=400, ignore_eos=True, guard=False)
        next(iter(stream))
        os.kill(pid, signal.SIGSEGV)
        with pytest.raises(EngineDied):
            stream.result()
        assert apart.ask(SHAPES, QUESTION, temperature=0).text == wanted
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("start", ["Opsin(config=False).ask(IMAGE, QUESTION)", "run(['ask', IMAGE, QUESTION])"])
def test_the_class_and_ask_stay_in_process_by_default(opsin_env: dict[str, str], start: str) -> None:
    code = f"""
import subprocess, sys
class Popen(subprocess.Popen):
    def __init__(self, *_, **__):
        raise SystemExit("a process was started")
subprocess.Popen = Popen
from opsin import Opsin
from opsin.__main__ import main
def run(arguments):
    sys.argv[1:] = arguments
    main()
IMAGE, QUESTION = {str(SHAPES)!r}, {QUESTION!r}
{start}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=opsin_env, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()


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
