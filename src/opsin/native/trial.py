"""A doubtful pair encodes one picture in a child process first: if that crashes, only the child ends.

Some llama.cpp builds end the process on a LLaVA projector whose matrices are all f32 when it runs on the CPU; others
widen and go on. Which one this is can be told by trying only.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from opsin.core.errors import ModelUnreadable

_SECONDS = 120
_COMMAND = (sys.executable, "-m", "opsin.native.trial")


def try_apart(llm: Path, mmproj: Path) -> None:
    """Raises ModelUnreadable when a child that encodes one picture with this pair dies of a signal, or hangs.

    An error it reports in an orderly way is left for the caller to meet, in its own words.
    """
    try:
        child = subprocess.run(  # noqa: S603 - our own module, with two paths
            [*_COMMAND, str(llm), str(mmproj)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
        crashed = child.returncode < 0
    except subprocess.TimeoutExpired:
        crashed = True
    if crashed:
        raise ModelUnreadable(
            f"{mmproj.name} is all f32, which crashes this build of llama.cpp on the CPU: "
            "use its f16 file, or convert it to f16."
        )


def _main(llm: str, mmproj: str) -> None:
    import hashlib

    from opsin.core.parts import PicturePart
    from opsin.core.picture import Picture
    from opsin.core.settings import EngineSettings
    from opsin.native.layout import Stretches, lay_out
    from opsin.native.model import Model
    from opsin.native.vision import Encoder

    settings = EngineSettings(model=Path(llm), mmproj=Path(mmproj), mmproj_device="none", device="none")
    model = Model(Path(llm), settings)
    encoder = Encoder(model, Path(mmproj), settings, trusted=True)
    rgb = bytes(64 * 64 * 3)
    picture = Picture(rgb, 64, 64, hashlib.sha256(rgb).hexdigest(), "PNG", 64, 64)
    layout = lay_out(model, encoder, Stretches(model), [PicturePart(picture)], add_bos=False)
    encoder.encode(layout.runs[0])  # type: ignore[arg-type]  # a picture alone is one image run
    layout.close()
    model.close()


if __name__ == "__main__":
    _main(*sys.argv[1:])
