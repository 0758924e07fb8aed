"""`from_pretrained`: the one file a pattern fits, from a hub that answers on loopback."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from opsin.compat import MoondreamChatHandler
from opsin.compat.handlers import download
from opsin.core.errors import BadParameter, ModelNotFound
from opsin.models import hub as hub_module
from opsin.models.hub import HubFile

FILES = ("moondream2-text-model-f16.gguf", "moondream2-mmproj-f16.gguf", "part-00002-of-00002.gguf")


@dataclass(frozen=True)
class Hub:
    """A hub that has three files."""

    cache: Path
    asked: list[Any] = field(default_factory=list)

    def list_files(self, repo: str) -> list[HubFile]:
        self.asked.append(repo)
        return [HubFile(repo, "0" * 40, name, 4, None) for name in FILES]

    def fetch(self, files: list[HubFile]) -> list[Path]:
        self.asked.append([file.path for file in files])
        self.cache.mkdir(exist_ok=True)
        for file in files:
            (self.cache / file.path).write_bytes(b"GGUF")
        return [self.cache / file.path for file in files]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub_module.Hub, "from_environment", lambda: hub)
    return hub


def test_the_readmes_handler_finds_its_projector(hub: Hub) -> None:
    handler = MoondreamChatHandler.from_pretrained(repo_id="vikhyatk/moondream2", filename="*mmproj*")
    assert handler.clip_model_path.endswith("moondream2-mmproj-f16.gguf")
    assert hub.asked[0] == "vikhyatk/moondream2"


def test_additional_files_come_along_and_the_cache_can_be_moved(hub: Hub, tmp_path: Path) -> None:
    path = download("a/b", "*text-model*", {"cache_dir": tmp_path / "else", "additional_files": ["part-*"]})
    assert path == tmp_path / "else" / FILES[0]
    assert hub.asked[-1] == [FILES[0], FILES[2]]


@pytest.mark.parametrize(("pattern", "words"), [("*nothing*", "No file of a/b"), ("*.gguf", "3 files of a/b")])
def test_a_pattern_that_does_not_fit_one_file_names_what_is_there(hub: Hub, pattern: str, words: str) -> None:
    with pytest.raises(ModelNotFound, match=words) as caught:
        download("a/b", pattern, {})
    assert FILES[0] in str(caught.value)
    assert len(hub.asked) == 1, "nothing was downloaded"


def test_what_is_not_supported_is_refused_by_name(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="local_dir"):
        download("a/b", "*text*", {"local_dir": tmp_path})
    with pytest.raises(BadParameter, match="filename"):
        download("a/b", None, {})
