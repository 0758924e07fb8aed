"""The count of a prompt's tokens on real llama.cpp: exactly what the answer costs, without an encode."""

from pathlib import Path

import pytest

from opsin import Opsin
from opsin.testing import image
from synth import write_pair

pytestmark = pytest.mark.slow

FAMILIES = ["tiny", "llava-1.6-tiny", "qwen2.5vl-tiny", "gemma3-tiny", "smolvlm-tiny", "internvl-tiny", "pixtral-tiny"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_count_is_what_the_answer_costs_in_every_family(family: str, tmp_path: Path) -> None:
    pair = write_pair(family, tmp_path)
    with Opsin(pair.llm, pair.mmproj, config=False, ctx=4096, parallel=1, threads=1) as model:
        for images in ([], [image(1, 640, 211)], [image(2, 97, 330), image(3, 400, 400)]):
            encodes = model.engine.stats.encodes
            counted = model.count_tokens(images, "What is this?", system="Be brief.")
            assert model.engine.stats.encodes == encodes, "nothing is encoded for a count"
            answer = model.ask(images, "What is this?", system="Be brief.", max_tokens=1)
            assert counted == answer.usage.prompt_tokens
