"""What the pages on Python promise: the ways to ask, and the handlers that there are."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("python", "from-llama-cpp-python")}


def test_all_that_is_promised_is_shown() -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", "\n".join(PAGES.values()), re.DOTALL | re.MULTILINE))
    for word in ("opsin.ask(", "Opsin(", "Engine(", "async for", "ask_async(", "opsin.compat", ".submit("):
        assert word in code, word


def test_the_handlers_named_are_those_there_are() -> None:
    from opsin import compat

    named = set(re.findall(r"`(\w+ChatHandler)`", PAGES["from-llama-cpp-python"]))
    assert named == {name for name in compat.__all__ if name.endswith("ChatHandler")}
