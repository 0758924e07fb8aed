"""scripts/gpu and scripts/llama.sh: wrong options are refused, failed steps are no proof, no server is left behind."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "gpu"


def run(*arguments: object, script: str = "measure.sh", limit: float = 60) -> subprocess.CompletedProcess[str]:
    command = ["bash", SCRIPTS / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)


def steps(results: Path) -> dict[str, tuple[str, str]]:
    """Exit code and expected one of each step."""
    rows = [line.split("\t") for line in (results / "steps.tsv").read_text().splitlines()[1:]]
    return {name: (code, expected) for name, code, expected, _ in rows}


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("measure.sh", (), "name a folder"),
        ("measure.sh", ("--cuda", "x"), "no option --cuda"),
        ("measure.sh", ("--work",), "--work needs a value"),
        ("measure.sh", ("--seconds", "soon", "results"), "--seconds needs a whole number"),
        ("measure.sh", ("--archive", "/nowhere/x.tar.gz", "results"), "there is no folder for the archive"),
        ("measure.sh", ("results", "nothing"), "no step nothing: choose from machine"),
        ("measure.sh", ("--python", "/nowhere/python", "results"), "no such Python"),
        ("../llama.sh", (), "name a Python and a backend"),
        ("../llama.sh", ("/nowhere/python", "cuda"), "there is no Python /nowhere/python"),
        ("../llama.sh", ("/bin/sh", "opencl"), "there is no backend opencl"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, script: str, arguments: tuple[str, ...], told: str) -> None:
    done = run(*(str(tmp_path / a) if a == "results" else a for a in arguments), script=script)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr


def test_nothing_is_proved_where_nothing_runs(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = run("--python", "/bin/false", "--work", tmp_path / "work", "--shape", "tiny", results)
    assert done.returncode == 1
    ended = steps(results)
    assert ended["synth"] == ended["placed"] == ended["bench"] == ("1", "0")
    assert "synth ended with 1, not 0" in done.stderr


def test_no_step_begins_when_the_time_is_over(tmp_path: Path) -> None:
    results = tmp_path / "results"
    archive = tmp_path / "results.tar.gz"
    options = ("--python", "/bin/false", "--work", tmp_path / "work", "--shape", "tiny", "--seconds", 0)
    assert run(*options, "--archive", archive, results).returncode == 0
    with tarfile.open(archive) as packed:
        assert packed.extractfile("./steps.tsv").read() == (results / "steps.tsv").read_bytes()  # type: ignore[union-attr]
    ended = steps(results)
    assert set(ended.values()) == {("-", "0"), ("-", "any")}
    assert {"synth", "ceilings", "tune"} <= set(ended)


def program(folder: Path, body: str) -> None:
    """A llama-server on PATH, as a Python script plays it."""
    folder.mkdir(exist_ok=True)
    path = folder / "llama-server"
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)


SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
Path(given["-m"]).write_text(f"{os.getpid()} {' '.join(sys.argv[1:])}")
HTTPServer((given["--host"], int(given["--port"])), Answer).serve_forever()
"""
BENCH = "import sys, time; print(*sys.argv[1:], flush=True); time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))"


def beside(tmp_path: Path, *bench: str) -> list[object]:
    options = ("--model", tmp_path / "told", "--mmproj", "p.gguf", "--ctx", "32768", "--parallel", "8")
    return [
        *(sys.executable, SCRIPTS / "beside.py", *options, "--log", tmp_path / "log", "--"),
        *(sys.executable, "-c", BENCH, *bench),
    ]


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_llama_server_runs_beside_a_bench_and_no_longer(tmp_path: Path) -> None:
    program(tmp_path / "bin", SERVER)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(beside(tmp_path, "0", "0"), env=env, capture_output=True, text=True, timeout=60, check=True)
    pid, *given = (tmp_path / "told").read_text().split()
    assert {"-c 32768", "-np 8", "--host 127.0.0.1"} <= {" ".join(pair) for pair in pairwise(given)}
    port = given[given.index("--port") + 1]
    assert done.stdout.split() == ["0", "0", "--against", f"llama-server=http://127.0.0.1:{port}"]
    assert "was ready" in done.stderr
    assert not is_alive(int(pid))
    # The bench decides the exit code.
    assert subprocess.run(beside(tmp_path, "0", "7"), env=env, capture_output=True, check=False).returncode == 7


def test_a_llama_server_does_not_outlive_a_step_that_is_cut_off(tmp_path: Path) -> None:
    program(tmp_path / "bin", SERVER)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["timeout", "60", *beside(tmp_path, "60", "0")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as step:
        assert step.stdout is not None
        assert "--against" in step.stdout.readline()
        pid = int((tmp_path / "told").read_text().split()[0])
        assert is_alive(pid)
        step.terminate()
        step.wait(30)
        until = time.monotonic() + 10
        while is_alive(pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert not is_alive(pid)


@pytest.mark.parametrize(("there", "told", "code"), [(False, "no llama-server on PATH", 0), (True, "did not start", 1)])
def test_a_bench_runs_without_a_llama_server(tmp_path: Path, there: bool, told: str, code: int) -> None:
    if there:
        program(tmp_path / "bin", "import sys; sys.exit('no such file')")
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}"}
    done = subprocess.run(beside(tmp_path, "0", "0"), env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "0 0\n")
    assert told in done.stderr


@pytest.mark.slow
def test_steps_run_one_by_one_and_write_their_results_as_they_come(tmp_path: Path) -> None:
    results = tmp_path / "results"
    options = ("--python", sys.executable, "--work", tmp_path / "work", "--shape", "tiny", results)
    for names in (("machine", "synth"), ("ask",), ("doctor", "placed"), ("bench",)):
        done = run(*options, *names, limit=280)
        assert done.returncode == 0, done.stderr
        assert set(names) <= set(steps(results))
    assert list(steps(results)) == ["machine", "synth", "ask", "doctor", "placed", "bench"]
    assert json.loads((results / "ask.out").read_text())["usage"]["completion_tokens"] == 54
    assert json.loads((results / "bench.json").read_text())["workloads"]["W1"]["invalid"] is None


@pytest.mark.slow
def test_a_rehearsal_without_a_gpu_runs_every_step_and_leaves_all_files(tmp_path: Path) -> None:
    results, began = tmp_path / "results", time.monotonic()
    done = run("--python", sys.executable, "--work", tmp_path / "work", "--shape", "tiny", results, limit=290)
    assert done.returncode == 0, done.stderr
    shapes = {f"shape-{name}" for name in ("tiny-f16", "qwen2.5vl-tiny-q4_0", "gemma3-tiny-q4_0")}
    assert set(steps(results)) == {
        *("machine", "synth", "ask", "ask_again", "quick", "doctor", "placed", "founding", "bench", "questions"),
        *("batched-1", "batched-8", "ceilings", "long-64", "captions", "sampling-pair", "sampling-tiny-152k", *shapes),
        *("overhead", "tune", "predict"),
    }
    documents = {
        *("founding", "bench", "questions", "long-64", "batched-1", "batched-8", "captions", "ceilings", "overhead"),
        *("sampling-pair", "sampling-tiny-152k", "tune", "predict", "bounds", *shapes),
    }
    found = {name: json.loads((results / f"{name}.json").read_text()) for name in documents}
    assert {name: found["founding"][name]["completion_tokens"] for name in ("first", "same_image", "warm")} == {
        "first": 54,
        "same_image": 54,
        "warm": 54,
    }
    assert found["founding"]["same_image"]["cached_tokens"] > found["founding"]["warm"]["cached_tokens"]
    assert {row["streams"] for row in found["sampling-pair"]["rows"]} == {1, 8}
    assert found["shape-qwen2.5vl-tiny-q4_0"]["model"]["projector"] == "qwen2.5vl_merger"
    assert not (tmp_path / "work" / "shape").exists()
    kept = {bound["name"]: bound["kept"] for bound in found["bounds"]["bounds"]}
    assert kept["one image, 54 tokens, warm, in seconds"] != "not measured"
    assert kept["32 streams by llama-batched-bench"] == "not measured"
    if shutil.which("llama-server"):
        assert "not measured" not in {kept["W3 by llama-server's"], kept["W4's median first token by llama-server's"]}
    print(f"{time.monotonic() - began:.0f} s")
