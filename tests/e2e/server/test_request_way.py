"""How many files of the package one streamed chat request with an image passes, in the front and in the worker."""

import base64
import os
import signal
import sys
import time
from pathlib import Path

import httpx
import pytest
from serve_process import served

MOST_FILES = 25
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
    image = base64.b64encode((Path(__file__).parents[3] / "src/opsin/models/demo/shapes.png").read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": "What is in this picture?"},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "stream": True}
    with served(env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[3] / 'src'}"}) as server:
        processes = [server.process.pid, server.worker.pid]
        for process in processes:
            os.kill(process, signal.SIGUSR1)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200
            assert b"[DONE]" in b"".join(answer.iter_bytes())
        for process in processes:
            os.kill(process, signal.SIGUSR2)
        deadline = time.monotonic() + 20
        told = [tmp_path / f"{process}.txt" for process in processes]
        while not all(path.exists() for path in told):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    passed = sorted({line for path in told for line in path.read_text().split()})
    print(f"{len(passed)} files: {' '.join(passed)}", file=sys.stderr)
    assert len(passed) <= MOST_FILES
