"""llama.cpp's own program is run as asked, and what it prints is read; anything else is one sentence."""

import sys
from pathlib import Path

import pytest

from opsin.bench.batched_peer import measure_peer
from opsin.core.errors import BadParameter


def program(folder: Path, body: str) -> Path:
    path = folder / "batched"
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(0o755)
    return path


def rate(path: Path, *, shared: bool = False, flash: bool | None = None) -> float:
    sizes = {"sequences": 8, "prompt": 77, "tokens": 128, "threads": 2, "n_ctx_seq": 1024}
    return measure_peer(path, Path("m.gguf"), **sizes, shared=shared, flash=flash)


@pytest.mark.parametrize(
    ("shared", "flash", "words"),
    [
        (True, None, ["--kv-unified"]),
        (False, None, []),
        (False, False, ["-fa", "off"]),
        (True, True, ["--kv-unified", "-fa", "on"]),
    ],
)
def test_it_is_asked_for_the_engines_sizes(tmp_path: Path, shared: bool, flash: bool | None, words: list[str]) -> None:
    body = """
words = sys.argv[1:]
expected = "-m m.gguf -c 8192 -npp 77 -ntg 128 -npl 8 -t 2 -tb 2 --output-format jsonl".split()
assert words == expected + MORE, words
print("noise")
print('{"pl": 8, "speed_tg": 181.5}')
""".replace("MORE", repr(words))
    assert rate(program(tmp_path, body), shared=shared, flash=flash) == 181.5


@pytest.mark.parametrize(
    ("body", "said"), [("sys.exit(3)", "failed"), ("print('hello')", "printed no result: is it llama-batched-bench?")]
)
def test_a_program_that_is_another_is_told(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(BadParameter, match=said):
        rate(program(tmp_path, body))


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="cannot be run"):
        rate(tmp_path / "none")
