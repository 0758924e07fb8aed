"""What a hollow load says equals what the true load then allocates, for every family and way of sizing."""

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from native_help import draw

from opsin.core.errors import ModelError, ModelUnreadable
from opsin.core.layout import ImageRun
from opsin.core.parts import PicturePart
from opsin.core.settings import EngineSettings
from opsin.doctor.room import by_hand, estimate_room, weights_by_device
from opsin.models.gguf import read_header
from opsin.models.shapes import SHAPES
from opsin.native import logs, memory, open_backend
from opsin.native.memory import HOST, Reserved, read_log, reserve, shorten
from synth import write_pair, write_shape

MIB = 2**20
ROUNDING = 0.02 * MIB  # the log has two decimals, and a device may have two buffers


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """More than a toy, of the type that is repacked: scores and repacked weights show."""
    small = SHAPES["small"]
    shape = replace(
        small,
        name="middle",
        vision=replace(small.vision, width=384, heads=6, layers=5, feed_forward=1536),
        text=replace(small.text, width=512, heads=8, kv_heads=4, layers=4, feed_forward=1408, vocabulary=4000),
    )
    return write_shape(shape, tmp_path_factory.mktemp("middle"), quantisation="q4_0")


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Every line of the native log while the test runs."""
    handler = memory._Lines()
    before = logs.LOGGER.level
    logs.LOGGER.addHandler(handler)
    logs.LOGGER.setLevel(logging.DEBUG)
    yield handler.lines
    logs.LOGGER.removeHandler(handler)
    logs.LOGGER.setLevel(before)


def load(settings: EngineSettings, log: list[str], edge: int) -> tuple[Reserved, int]:
    """What a true load and an encode of a square picture allocate by their own log, and the bytes of weights."""
    backend = open_backend(settings)
    layout = backend.layout([PicturePart(draw(0, edge, edge))], add_bos=False)
    backend.encode(next(run for run in layout.runs if isinstance(run, ImageRun)))
    layout.close()
    backend.close()
    weights = sum(
        float(line.split("=")[1].split()[0]) for line in log if "model buffer size" in line and "load_tensors" in line
    )
    return read_log(log), round(weights * MIB)


def near(ours: dict[str, int], true: dict[str, int]) -> bool:
    return ours.keys() == true.keys() and all(abs(ours[name] - true[name]) <= ROUNDING for name in true)


def assert_told(settings: EngineSettings, log: list[str], edge: int = 336) -> Reserved:
    (told,) = reserve([settings])
    assert told.error is None
    log.clear()
    true, weights = load(settings, log, edge)
    assert near(told.kv, true.kv)
    assert near(told.compute, true.compute)
    assert near(told.vision_compute, true.vision_compute)
    assert (told.cells, told.streams, told.beside) == (true.cells, true.streams, true.beside)
    assert told.rows == true.rows
    assert (told.flash, told.vision_flash, told.not_repacked) == (true.flash, true.vision_flash, true.not_repacked)
    ours = weights_by_device([read_header(settings.model)], told.layers, told.not_repacked)  # type: ignore[arg-type]
    assert ours.keys() == {HOST}
    assert abs(ours[HOST] - weights) <= max(2 * ROUNDING, 0.01 * weights)
    return told


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"parallel": 3, "ctx": 3072},
        {"parallel": 3, "ctx": 3072, "ubatch": 64, "flash_attention": True},
        {"flash_attention": False},
        {"kv_type": "q8_0", "parallel": 4},
    ],
    ids=str,
)
def test_a_hollow_load_says_what_the_true_one_takes(middle: Any, log: list[str], options: dict[str, Any]) -> None:
    settings = EngineSettings(
        **{"model": middle.llm, "mmproj": middle.mmproj, "ctx": 2048, "ubatch": 256, "threads": 1, **options}
    )
    told = assert_told(settings, log)
    assert told.not_repacked is not None, "q4_0 is repacked"
    assert told.streams == (4 if options.get("parallel") == 3 else 1)


@pytest.mark.parametrize("shape", ["tiny", "llava-1.6-tiny", "gemma3-tiny"])
def test_other_families_are_told_too(tmp_path: Path, log: list[str], shape: str) -> None:
    pair = write_pair(shape, tmp_path, quantisation="f16")
    settings = EngineSettings(model=pair.llm, mmproj=pair.mmproj, ctx=1024, threads=1)
    assert assert_told(settings, log, 64).not_repacked is None


def test_the_largest_picture_is_reckoned_with(tmp_path: Path, log: list[str]) -> None:
    pair = write_pair("qwen2vl-tiny", tmp_path, quantisation="f16")
    settings = EngineSettings(model=pair.llm, mmproj=pair.mmproj, ctx=4096, threads=1, image_max_tokens=1024)
    estimate = estimate_room(pair.llm, pair.mmproj, settings)
    true, _ = load(settings, log, 2000)
    ours, seen = estimate.by_device[HOST].vision_compute, true.vision_compute[HOST]
    assert true.vision_pixels > 0
    assert abs(ours - seen) <= 0.1 * seen


def test_arithmetic_alone_comes_near(middle: Any) -> None:
    for options in ({}, {"parallel": 3, "ctx": 3072}, {"flash_attention": False}):
        settings = EngineSettings(
            **{"model": middle.llm, "mmproj": middle.mmproj, "ctx": 2048, "picture_cache_bytes": 0, **options}
        )
        (told,) = reserve([settings])
        ours = by_hand(read_header(middle.llm), read_header(middle.mmproj), settings)
        assert (ours.cells, ours.streams, ours.rows, ours.flash) == (told.cells, told.streams, told.rows, told.flash)
        for mine, theirs in (
            (ours.kv, told.kv),
            (ours.compute, told.compute),
            (ours.vision_compute, told.vision_compute),
        ):
            assert abs(mine[HOST] - theirs[HOST]) <= 0.2 * theirs[HOST]


def test_one_setup_that_cannot_be_does_not_lose_the_others(pair: Any) -> None:
    base = EngineSettings(model=pair.llm, mmproj=pair.mmproj, ctx=512)
    wrong = base.model_copy(update={"kv_type": "q8_0", "flash_attention": False})
    first, bad, last = reserve([base, wrong, base])
    assert bad.error is not None
    assert "cannot make a context" in bad.error
    assert first == last
    assert first.error is None


def test_a_shortened_projector_keeps_all_but_the_later_layers(middle: Any, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    shorten(middle.mmproj, short, layers=2)
    ours, whole = read_header(short), read_header(middle.mmproj)
    assert ours.metadata == {**whole.metadata, "clip.vision.block_count": 2}
    assert ours.lengths == whole.lengths
    later = tuple(f"v.blk.{layer}." for layer in (2, 3, 4))
    kept = [(one.name, one.shape, one.type) for one in whole.tensors if not one.name.startswith(later)]
    assert [(one.name, one.shape, one.type) for one in ours.tensors] == kept
    assert short.stat().st_size >= max(one.end or 0 for one in ours.tensors)
    assert short.stat().st_blocks * 512 < 2**17, "weights are holes"


def test_what_is_no_projector_is_not_shortened(pair: Any, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"hello, this is text")
    (tmp_path / "cut").write_bytes(pair.mmproj.read_bytes()[:500])
    for source in (tmp_path / "text", tmp_path / "cut", pair.llm):
        with pytest.raises(ModelUnreadable):
            shorten(source, tmp_path / "out", layers=2)
    assert not (tmp_path / "out").exists()


def test_a_child_that_dies_becomes_a_sentence(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_COMMAND", (sys.executable, "-c", "import os; os.abort()"))
    settings = EngineSettings(model=pair.llm, mmproj=pair.mmproj, ctx=512)
    with pytest.raises(ModelError, match="ended while it laid this pair out"):
        reserve([settings])
    estimate = estimate_room(pair.llm, pair.mmproj, settings)
    assert "laid this pair out" in (estimate.note or "")
    assert estimate.by_device[HOST].weights == weights_by_device([read_header(pair.llm)], [], None)[HOST]


def test_a_child_that_hangs_becomes_a_sentence(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(memory, "_SECONDS", 0.2)
    with pytest.raises(ModelError, match="without an end"):
        reserve([EngineSettings(model=pair.llm, ctx=512)])


def test_the_child_takes_no_module_of_the_working_folder(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not the one of the standard library')")
    monkeypatch.chdir(tmp_path)
    (told,) = reserve([EngineSettings(model=pair.llm, ctx=512)])
    assert told.error is None


def test_words_in_another_encoding_are_told(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code = r"import sys; sys.stderr.buffer.write(b'caf\xe9 is no path'); sys.exit(1)"
    monkeypatch.setattr(memory, "_COMMAND", (sys.executable, "-c", code))
    with pytest.raises(ModelError, match=r"caf.* is no path"):
        reserve([EngineSettings(model=pair.llm, ctx=512)])
