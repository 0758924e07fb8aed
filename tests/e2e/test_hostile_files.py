"""Broken and hostile files through the whole command: exit code 2 or an answer, one sentence, no growth."""

import contextlib
import ctypes
import importlib
import io
import sys
from pathlib import Path

import psutil
import pytest

from opsin.cli.app import main

SAMPLES = Path(__file__).parents[1] / "unit" / "images"


def ask(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["opsin", "ask", str(path), "what is this?", "--max-tokens", "4"])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        else:
            code = 0
    return code, out.getvalue(), err.getvalue()


def held(process: psutil.Process) -> int:
    """Resident bytes, without what is free and only kept by the allocator."""
    ctypes.CDLL(None).malloc_trim(0)
    return process.memory_info().rss


def test_forty_hostile_files_each_end_in_one_sentence_or_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SAMPLES))
    files = list(importlib.import_module("hostile").hostile_files())
    assert len(files) >= 40
    process = psutil.Process()
    before = 0
    refused = 0
    for number, (name, data) in enumerate(files):
        path = tmp_path / f"{number:02d}-{name}".replace("/", "_")
        path.write_bytes(data)
        code, out, err = ask(path, monkeypatch)
        assert code in {0, 2}, f"{name}: {code} {err}"
        assert "Traceback" not in err
        if code == 2:
            refused += 1
            sentences = [line for line in err.splitlines() if line.startswith("opsin: ")]
            assert len(sentences) == 1, f"{name}: {err}"
            assert sentences[0].endswith("."), f"{name}: {sentences[0]}"
            assert out == ""
        if number == 4:  # the model's own memory is there by now
            before = held(process)
    grown = (held(process) - before) / 2**20
    print(f"{refused} of {len(files)} files refused, memory grew by {grown:.1f} MiB")
    assert refused >= 30
    assert grown < 100  # one file that is unpacked whole would take more
