"""The reference pages are those that the code makes, and the site builds without a warning."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reference

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.mark.parametrize(("path", "text"), [pytest.param(*page, id=page[0].name) for page in reference.pages()])
def test_a_reference_page_is_current(path: Path, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, "write it anew: python tools/reference.py"


def test_every_page_is_in_the_site_and_every_link_of_the_readme_leads_somewhere() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f": {page.name}" in config, page.name
    for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "opsin ask photo.jpg" in re.sub(r"<[^>]+>", "", page)
    assert not re.search(r"""(src|href)=["']https?://(?!squidfunk)""", page), "the site loads nothing from elsewhere"
