"""Two hundred questions in one process: memory stays where it was."""

import gc
from pathlib import Path

import psutil
import pytest

from opsin import Opsin
from opsin.testing import image

DEMO = Path(__file__).parents[2] / "src" / "opsin" / "models" / "demo"


QUESTIONS = ("what is at the top?", "what is this?", "how many objects are there?", "is there a red star?")


@pytest.mark.slow
def test_resident_memory_after_200_asks_is_that_after_20() -> None:
    process = psutil.Process()
    sizes: dict[int, int] = {}
    with Opsin() as model:
        for count in range(1, 201):
            # Ten images: what is remembered of an image is bounded, and it is there after ten questions.
            shot = image(count % 10, 300 + count % 10, 200)
            model.ask(str(DEMO / "shapes.png"), QUESTIONS[count % 3], temperature=0)
            model.ask(_array(shot), QUESTIONS[count % 4], temperature=0, max_tokens=8)
            if count in {20, 200}:
                gc.collect()
                sizes[count] = process.memory_info().rss
    growth = sizes[200] / sizes[20] - 1
    print(
        f"resident memory: {sizes[20] / 2**20:.1f} MiB after 20, {sizes[200] / 2**20:.1f} MiB after 200 ({growth:+.2%})"
    )
    assert growth <= 0.02


def _array(shot: object) -> object:
    import numpy as np

    return np.frombuffer(shot.rgb, np.uint8).reshape(shot.height, shot.width, 3)  # type: ignore[attr-defined]
