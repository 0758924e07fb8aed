"""The buffers of an encoder grow with its images: on a GPU the largest one is encoded before anybody asks."""

from pathlib import Path

import pytest

from opsin.compose import open_runtime
from opsin.core.settings import EngineSettings
from opsin.worker.process import encode_largest
from synth import write_pair


@pytest.mark.parametrize(
    ("kind", "most", "tokens"),
    [("qwen2vl-tiny", 64, 64), ("lfm2vl-tiny", 100, 100), ("pixtral-tiny", 100, 109), ("tiny", None, 16)],
)
def test_an_image_of_the_most_tokens_is_encoded_and_kept_nowhere(
    tmp_path: Path, kind: str, most: int | None, tokens: int
) -> None:
    """Where all images have one size, that one: mtmd computes nothing as it loads. Pixtral ends rows."""
    pair = write_pair(kind, tmp_path)
    settings = EngineSettings(ctx=1024, ubatch=256, threads=1, image_max_tokens=most, disk_cache=False)
    runtime = open_runtime(pair.llm, pair.mmproj, settings, trial=False)
    assert runtime.backend is not None
    encoded, encode = [], runtime.backend.encode
    runtime.backend.encode = lambda chunk: encoded.append(chunk.n_tokens) or encode(chunk)  # type: ignore[method-assign]
    encode_largest(runtime.engine)
    assert sum(encoded) == tokens
    assert runtime.engine.stats.cells_used == 0
    runtime.close()
