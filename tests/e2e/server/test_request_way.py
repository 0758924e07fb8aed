"""How many files of the package one streamed chat request with an image passes, in the front and in the worker."""

import base64
import io
import itertools
import os
import signal
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image
from serve_process import Served, served

MOST_FILES = 32
"""What a reader can follow; what decodes images runs in a third process and is not counted."""

NOTE = """
import os, signal, sys, threading
files = set()
def note(frame, event, arg):
    code = frame.f_code
    if event == "call" and code.co_name != "<module>" and "/src/opsin/" in code.co_filename:
        files.add(code.co_filename.rpartition("/src/opsin/")[2])
def told(number, frame):
    if number == signal.SIGUSR1:
        files.clear()
    else:
        with open(os.path.join(os.environ["WAY_FOLDER"], f"{os.getpid()}.part"), "w") as file:
            file.write("\\n".join(sorted(files)))
        os.replace(file.name, file.name.replace(".part", ".txt"))
signal.signal(signal.SIGUSR1, told)
signal.signal(signal.SIGUSR2, told)
sys.setprofile(note)
threading.setprofile(note)
"""


@pytest.mark.slow
def test_one_request_passes_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOTE)
    monkeypatch.setenv("WAY_FOLDER", str(tmp_path))
    with served(env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[3] / 'src'}"}) as server:
        # What runs now and then beside requests is not on their way: it is not there every time.
        ways = [way_of_one(server, tmp_path, colour) for colour in ("red", "green", "blue")]
    passed = sorted(set.intersection(*ways))
    print(f"{len(passed)} files: {' '.join(passed)}", file=sys.stderr)
    assert len(passed) <= MOST_FILES


def way_of_one(server: Served, folder: Path, colour: str) -> set[str]:
    """The files that one request with a new image passes."""
    file = io.BytesIO()
    Image.new("RGB", (96, 64), colour).save(file, "PNG")
    parts = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
        },
        {"type": "text", "text": "What is in this picture?"},
    ]
    messages = [{"role": "user", "content": parts}]
    body = {"messages": messages, "max_tokens": 300, "ignore_eos": True, "stream": True}
    told = [folder / f"{process}.txt" for process in (server.process.pid, server.worker.pid)]
    for path in told:
        path.unlink(missing_ok=True)
        os.kill(int(path.stem), signal.SIGUSR1)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        pieces = (line for line in answer.iter_lines() if '"content":' in line)
        for _ in itertools.islice(pieces, 5):
            pass
        for path in told:  # in the midst: later tokens pass the same files, and what comes behind the last is the log's
            os.kill(int(path.stem), signal.SIGUSR2)
        assert list(pieces)
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in told):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return {line for path in told for line in path.read_text().split()}
