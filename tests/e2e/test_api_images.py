"""Images through the Python API: read once, asked about more than once."""

import asyncio
import io
import sys

import pytest

from opsin import Opsin
from opsin.cli.app import main
from opsin.testing import image as drawn

pytestmark = pytest.mark.native


def test_an_image_that_was_read_can_be_asked_about() -> None:
    with Opsin(config=False) as model:
        shot = drawn(1, 120, 90)
        read = model.image(shot)
        assert read is shot
        again = model.image(model.image(_bmp(shot)))
        assert again.sha256 == shot.sha256
        first = model.ask(again, "what is this?", temperature=0, max_tokens=4)
        both = model.ask([again, shot], "what is this?", temperature=0, max_tokens=4)
        later = asyncio.run(model.ask_async(shot, "what is this?", temperature=0, max_tokens=4))
        assert first.text == later.text
        assert both.usage.prompt_tokens > first.usage.prompt_tokens


def test_endless_standard_input_is_refused_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
            Endless.taken += len(buffer)
            assert Endless.taken < 2**28, "nobody reads this for ever"
            return len(buffer)

    class Input:
        buffer = io.BufferedReader(Endless())

    monkeypatch.setattr(sys, "stdin", Input())
    monkeypatch.setattr(sys, "argv", ["opsin", "ask", "-", "what is this?"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2


def _bmp(shot: object) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.frombytes("RGB", (shot.width, shot.height), shot.rgb).save(out, "BMP")  # type: ignore[attr-defined]
    return out.getvalue()
