"""Names that were given up stay away: in code, in help, in the API document and in the docs."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
RETIRED = re.compile(
    r"(?i)pictur|\bmicro-?batch|\bkv memor|\babsorb|\bcellbooks\b|\bstretch(es)?\b|\bhollow\b|\bsetup_word\b|\bmends?\b"
    r"|\bopsin\.media\b|\bdearest\b|\bline_up\b|\bpixelroom\b|\bpicturegate\b|\bloadedmodel\b|\bimagerun\b|\btextrun\b|\blayouts?\b"
)
ALLOWED = (
    "in this picture?",  # what the demo model was trained on
    "Describe the picture.",
    '"picture_cache_bytes": "image_cache_bytes"',  # old names that keep working for one version
    '"max_pictures": "max_images"',
    '"max_picture_bytes": "max_image_bytes"',
    '"picture_cache_queries", "Old name of',
    '"picture_cache_hits", "Old name of',
    "opsin:picture_cache_queries_total` | Old name of",
    "opsin:picture_cache_hits_total` | Old name of",
)
FILES = [
    *ROOT.glob("src/opsin/**/*.py"),
    *ROOT.glob("src/opsin/**/*.toml"),
    *ROOT.glob("src/opsin/server/page/*"),
    *(path for path in ROOT.glob("docs/*.md") if path.name != "log.md"),
    ROOT / "README.md",
    ROOT / "pyproject.toml",
]


def retired(text: str) -> list[str]:
    for allowed in ALLOWED:
        text = text.replace(allowed, "")
    return [line.strip() for line in text.splitlines() if RETIRED.search(line)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_code_and_docs_use_the_fields_names(path: Path) -> None:
    if path.suffix not in {".png", ".ico"}:
        assert retired(path.read_text()) == []


def test_help_and_the_api_document_use_them_too() -> None:
    from opsin.cli.app import app
    from opsin.core.settings import ServerSettings
    from opsin.server.app import create_app
    from opsin.server.handler import ModelManager

    commands = ("ask", "serve", "chat", "doctor", "explain", "tune", "predict", "bench", "models", "pull")
    for arguments in ([], *([name] for name in commands)):
        assert retired(CliRunner().invoke(app, [*arguments, "--help"]).output) == []
    document = create_app(ModelManager(ServerSettings(), None), None).openapi()  # type: ignore[arg-type]
    assert "/v1/chat/completions" in document["paths"]
    assert retired(json.dumps(document, indent=0)) == []
