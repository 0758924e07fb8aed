"""llama.cpp's log is silent until it is asked for, and then whole."""

import logging
from collections.abc import Callable
from typing import Any

import pytest

from opsin.native import logs

ASK = """
backend = opened(verbose=VERBOSE)
tokenized = backend.tokenize([TextPart("USER: "), ImagePart(draw()), TextPart(" what? ASSISTANT:")], add_bos=True)
pos = prefill(backend, tokenized)
sampler = backend.sampler(SamplingParams(seed=1), 1)
generate(backend, sampler, pos, 4)
backend.placement()
sampler.close(); tokenized.close(); backend.close()
print("done")
"""


def test_nothing_reaches_stderr_unasked(in_child: Callable[[str], Any]) -> None:
    child = in_child(ASK.replace("VERBOSE", "False"))
    assert (child.code, child.out, child.err) == (0, "done\n", "")


def test_verbose_shows_the_log_of_all_libraries_in_whole_lines(in_child: Callable[[str], Any]) -> None:
    child = in_child(ASK.replace("VERBOSE", "True"))
    assert child.code == 0
    for part in ("llama_model_loader:", "llama_context:", "clip_ctx", "llama_kv_cache"):
        assert part in child.err, part
    # "load_tensors: ....." arrives dot by dot and must be one line
    assert not [line for line in child.err.splitlines() if line == "."]


def test_a_refused_load_quotes_the_cause_and_stays_silent(in_child: Callable[[str], Any]) -> None:
    child = in_child("""
import tempfile
from opsin.core.errors import ModelUnreadable
path = Path(tempfile.mkdtemp()) / "cut.gguf"
path.write_bytes(LLM.read_bytes()[:100_000])
try:
    opened(model=path, mmproj=None)
except ModelUnreadable as error:
    print(error)
""")
    assert (child.code, child.err) == (0, "")
    assert child.out.startswith("llama.cpp cannot load cut.gguf (")
    assert "data is not within the file bounds" in child.out


def test_continued_lines_are_joined_under_the_level_of_their_beginning(caplog: pytest.LogCaptureFixture) -> None:
    sink = logs.LogSink(logging.getLogger("opsin.native.test"))
    with caplog.at_level(logging.DEBUG, "opsin.native.test"):
        sink.write(3, b"half a ")
        sink.write(5, b"warning\nand its second line\n")
        sink.write(2, b"a line without an end")
        sink.write(4, b"an error\n")
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "half a warning"),
        ("WARNING", "and its second line"),
        ("INFO", "a line without an end"),
        ("ERROR", "an error"),
    ]


def test_a_character_may_arrive_broken() -> None:
    sink = logs.LogSink(logging.getLogger("opsin.native.test"))
    sink.write(2, b"caf\xc3\n")
    assert sink.since(0) == ["caf\ufffd"]


def test_the_cause_prefers_errors_and_starts_at_the_mark() -> None:
    sink = logs.LogSink(logging.getLogger("opsin.native.test"))
    sink.write(4, b"old error\n")
    mark = sink.mark
    sink.write(3, b"a warning\n")
    assert sink.cause(mark) == "a warning"
    sink.write(4, b"new error\n")
    assert sink.cause(mark) == "new error"


def test_only_the_last_lines_are_kept() -> None:
    sink = logs.LogSink(logging.getLogger("opsin.native.test"), kept=10)
    for number in range(1000):
        sink.write(2, b"line %d\n" % number)
    assert sink.since(0) == [f"line {number}" for number in range(990, 1000)]


def test_a_failing_handler_does_not_unwind_into_native_code() -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("full disk")

    logger = logging.getLogger("opsin.native.broken")
    logger.addHandler(Broken())
    logger.setLevel(logging.DEBUG)
    logs.LogSink(logger).write(4, b"an error\n")


def test_ctrl_c_while_native_code_logs_is_raised_when_it_is_back() -> None:
    class Interrupted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise KeyboardInterrupt

    logger = logging.getLogger("opsin.native.interrupted")
    logger.addHandler(Interrupted())
    logger.setLevel(logging.DEBUG)
    sink = logs.LogSink(logger)
    sink.write(2, b"loading\n")
    with pytest.raises(KeyboardInterrupt):
        sink.raise_interrupt()
    sink.raise_interrupt()
