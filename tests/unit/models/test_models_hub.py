"""Pulling from a hub: which files, resumed how, checked how, and what is said when it goes wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from opsin.core.errors import DownloadFailed, ModelNotFound, PairMismatch
from opsin.models import Pair, resolve
from opsin.models.hub import Hub, HubFile, choose, pull
from opsin.models.registry import Wanted, look_up
from opsin.models.resolve import read_default

pytestmark = pytest.mark.slow  # together they take seconds, so `make check` leaves them out

REPO = "some/model-GGUF"


@pytest.fixture
def served(fake_hub, tiny: Pair):
    fake_hub.add(REPO, {"model-Q4_K_M.gguf": tiny.llm, "mmproj-model-f16.gguf": tiny.mmproj, "README.md": b"hello"})
    return fake_hub


def test_a_pulled_pair_lies_in_the_shared_cache_and_becomes_the_default(served, hub: Hub, tiny: Pair, tmp_path: Path):
    pair = pull("hf:" + REPO, hub=hub)
    snapshot = tmp_path / "hub" / "models--some--model-GGUF" / "snapshots" / served.COMMIT
    assert pair.llm == snapshot / "model-Q4_K_M.gguf"
    assert pair.llm.read_bytes() == tiny.llm.read_bytes()
    assert pair.mmproj is not None
    assert pair.mmproj.read_bytes() == tiny.mmproj.read_bytes()
    assert (snapshot.parent.parent / "refs" / "main").read_text() == served.COMMIT
    assert read_default() == pair
    assert resolve() == pair
    assert resolve("hf:" + REPO).llm == pair.llm
    assert not any("README" in path for path, _ in served.requests)


def test_the_blob_is_named_by_its_checksum_as_huggingface_hub_names_it(served, hub: Hub, tiny: Pair):
    pair = pull("hf:" + REPO, hub=hub)
    digest = hashlib.sha256(tiny.llm.read_bytes()).hexdigest()
    assert pair.llm.is_symlink()
    assert pair.llm.readlink() == Path(f"../../blobs/{digest}")


def test_huggingface_hub_finds_what_was_pulled(served, hub: Hub, tmp_path: Path):
    pytest.importorskip("huggingface_hub")
    pair = pull("hf:" + REPO, hub=hub)
    code = "import sys, huggingface_hub as h; print(h.try_to_load_from_cache(sys.argv[1], 'model-Q4_K_M.gguf'))"
    found = subprocess.run([sys.executable, "-c", code, REPO], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(pair.llm)


def test_a_second_pull_downloads_nothing(served, hub: Hub):
    pull("hf:" + REPO, hub=hub)
    served.requests.clear()
    pull("hf:" + REPO, hub=hub)
    assert [path for path, _ in served.requests if "/resolve/" in path] == []


def test_the_default_can_be_left_alone(served, hub: Hub):
    pull("hf:" + REPO, hub=hub, make_default=False)
    assert read_default() is None


def test_a_broken_transfer_goes_on_where_it_stopped(served, hub: Hub, tiny: Pair):
    served.cut_after = [1000, 50_000]  # the projector is fetched first
    pair = pull("hf:" + REPO, hub=hub)
    assert pair.mmproj is not None
    assert pair.mmproj.read_bytes() == tiny.mmproj.read_bytes()
    assert [ranges for path, ranges in served.requests if "mmproj" in path] == ["", "bytes=1000-", "bytes=51000-"]


def test_a_transfer_that_failed_is_resumed_by_the_next_run(served, hub: Hub, tiny: Pair):
    served.cut_after = [7000]
    with pytest.raises(DownloadFailed, match="run the same command again, it goes on from there"):
        pull("hf:" + REPO, hub=replace(hub, retries=0))
    pair = pull("hf:" + REPO, hub=hub)
    assert tuple(ranges for path, ranges in served.requests if "mmproj" in path) == ("", "bytes=7000-")
    assert pair.mmproj is not None
    assert pair.mmproj.read_bytes() == tiny.mmproj.read_bytes()


def test_a_server_without_ranges_is_read_from_the_beginning(served, hub: Hub, tiny: Pair):
    served.ranges = False
    served.cut_after = [1000]
    pair = pull("hf:" + REPO, hub=hub)
    assert pair.mmproj is not None
    assert pair.mmproj.read_bytes() == tiny.mmproj.read_bytes()


def test_a_line_that_always_breaks_ends_even_when_the_server_cannot_resume(served, hub: Hub):
    """Bytes that arrive reset the retries; without ranges the same bytes arrive for ever, and must not count."""
    served.ranges = False
    served.cut_after = [1000] * 50
    with pytest.raises(DownloadFailed, match="broke off"):
        pull("hf:" + REPO, hub=replace(hub, retries=2))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_tried_again(served, hub: Hub, status: int):
    served.statuses = [status, status]
    assert pull("hf:" + REPO, hub=hub).llm.is_file()


def test_a_wrong_checksum_removes_the_file(served, hub: Hub, tiny: Pair, tmp_path: Path):
    served.lie = {"model-Q4_K_M.gguf": bytes(len(tiny.llm.read_bytes()))}
    with pytest.raises(DownloadFailed, match="checksum is wrong"):
        pull("hf:" + REPO, hub=hub)
    digest = hashlib.sha256(tiny.llm.read_bytes()).hexdigest()
    assert not list((tmp_path / "hub").rglob(digest + "*.incomplete"))
    assert not list((tmp_path / "hub").rglob("model-Q4_K_M.gguf"))
    assert read_default() is None
    served.lie = {}
    assert pull("hf:" + REPO, hub=hub).llm.read_bytes() == tiny.llm.read_bytes()


def test_a_part_longer_than_the_file_is_thrown_away(served, hub: Hub, tiny: Pair, tmp_path: Path):
    digest = hashlib.sha256(tiny.mmproj.read_bytes()).hexdigest()
    part = tmp_path / "hub" / "models--some--model-GGUF" / "blobs" / f"{digest}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(10_000_000))
    assert pull("hf:" + REPO, hub=hub).mmproj is not None


def test_an_unknown_repository_is_one_sentence(served, hub: Hub):
    with pytest.raises(ModelNotFound, match="has no repository some/other, or it is private") as error:
        pull("hf:some/other", hub=hub)
    assert "hf auth login" in str(error.value)


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_gated_repository_says_how_to_get_in(served, hub: Hub, token: str | None):
    served.gated, served.token = {REPO}, "hf_right"
    with pytest.raises(DownloadFailed, match=rf"accept its terms at {served.endpoint}/{REPO}, then log in"):
        pull("hf:" + REPO, hub=replace(hub, token=token))
    assert pull("hf:" + REPO, hub=replace(hub, token="hf_right")).llm.is_file()


def test_the_token_is_not_shown():
    assert "hf_secret" not in repr(Hub("http://x", Path(), "hf_secret"))


def test_no_network_is_one_sentence(tmp_path: Path):
    with pytest.raises(DownloadFailed, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        pull("llava", hub=Hub("http://127.0.0.1:9", tmp_path))


def test_something_that_is_no_hub_is_one_sentence(fake_hub, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    fake_hub.add(REPO, {})
    monkeypatch.setattr(fake_hub, "listing", lambda repo: ["what?"])
    with pytest.raises(DownloadFailed, match="check HF_ENDPOINT"):
        pull("hf:" + REPO, hub=hub)


def test_a_full_disk_is_noticed_before_the_download(served, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DownloadFailed, match="make room, or set HF_HUB_CACHE"):
        pull("hf:" + REPO, hub=hub)
    assert not any("/resolve/" in path for path, _ in served.requests)


def test_a_disk_that_fills_up_is_one_sentence(served, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("opsin.models.hub.Hub._append", full)
    with pytest.raises(DownloadFailed, match="No space left on device"):
        pull("hf:" + REPO, hub=hub)


def test_a_text_only_repository_is_refused_before_the_download(fake_hub, hub: Hub, tiny: Pair):
    fake_hub.add(REPO, {"model-Q4_K_M.gguf": tiny.llm})
    with pytest.raises(ModelNotFound, match="reads text only"):
        pull("hf:" + REPO, hub=hub)
    assert len(fake_hub.requests) == 1


def test_a_repository_without_gguf_is_refused(fake_hub, hub: Hub):
    fake_hub.add(REPO, {"model.safetensors": b"x"})
    with pytest.raises(ModelNotFound, match="holds no GGUF language model"):
        pull("hf:" + REPO, hub=hub)


def test_an_unknown_quantisation_lists_those_there_are(fake_hub, hub: Hub, tiny: Pair):
    fake_hub.add(REPO, {"m-Q4_K_M.gguf": b"", "m-Q8_0.gguf": b"", "mmproj-f16.gguf": b""})
    with pytest.raises(ModelNotFound, match=f"no file for hf:{REPO}:Q3_K: choose one tagged Q4_K_M, Q8_0"):
        pull(f"hf:{REPO}:Q3_K", hub=hub)


def test_a_pair_that_does_not_fit_is_refused_and_is_not_the_default(fake_hub, hub: Hub, tiny: Pair, wide: Pair):
    fake_hub.add(REPO, {"model-Q4_K_M.gguf": tiny.llm, "mmproj-f16.gguf": wide.mmproj})
    with pytest.raises(PairMismatch):
        pull("hf:" + REPO, hub=hub)
    assert read_default() is None


def test_names_that_leave_the_cache_are_ignored(fake_hub, hub: Hub, tiny: Pair, tmp_path: Path):
    files = {"../../evil-Q4_K_M.gguf": tiny.llm, "/abs-Q4_K_M.gguf": tiny.llm, "mmproj-f16.gguf": tiny.mmproj}
    fake_hub.add(REPO, files)
    with pytest.raises(ModelNotFound, match="holds no GGUF language model"):
        pull("hf:" + REPO, hub=hub)


def test_progress_counts_every_byte_of_every_file(served, hub: Hub, tiny: Pair):
    seen: dict[str, tuple[int, int]] = {}
    served.cut_after = [1000]
    pull("hf:" + REPO, hub=hub, progress=lambda name, done, total: seen.update({name: (done, total)}))
    sizes = {"model-Q4_K_M.gguf": tiny.llm.stat().st_size, "mmproj-model-f16.gguf": tiny.mmproj.stat().st_size}
    assert seen == {name: (size, size) for name, size in sizes.items()}


def test_the_environment_decides_where_to_and_from(served, tmp_path: Path, opsin_env: dict[str, str]):
    """HF_ENDPOINT, HF_TOKEN and HF_HUB_CACHE are read as huggingface_hub reads them; the whole command is run."""
    served.gated, served.token = {REPO}, "hf_right"
    environment = {**opsin_env, "HF_ENDPOINT": served.endpoint, "HF_TOKEN": "hf_right"}
    command = [sys.executable, "-m", "opsin", "pull", "hf:" + REPO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is the default model now" in done.stdout
    assert (tmp_path / "hub" / "models--some--model-GGUF").is_dir()
    state = json.loads((tmp_path / "data" / "opsin" / "models.json").read_text())
    assert state["default"]["name"] == "hf:" + REPO
    offline = subprocess.run(
        command, env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert offline.returncode == 3
    assert offline.stderr.startswith("opsin: HF_HUB_OFFLINE is set")


def repo_of(*paths: str) -> list[HubFile]:
    return [HubFile(REPO, "0" * 40, path, 1, None) for path in paths]


def chosen(wanted: Wanted, *paths: str) -> tuple[list[str], str]:
    llm, mmproj = choose(repo_of(*paths), wanted)
    return [file.path for file in llm], mmproj.path


def test_all_parts_of_a_split_model_are_taken_in_order():
    parts = [f"Q4_K_M/m-Q4_K_M-0000{n}-of-00003.gguf" for n in (3, 1, 2)]
    other = "Q8_0/m-Q8_0-00001-of-00003.gguf"
    assert chosen(look_up("hf:a/b"), *parts, other, "mmproj-m-f16.gguf") == (sorted(parts), "mmproj-m-f16.gguf")


def test_a_split_model_with_a_missing_part_is_refused():
    with pytest.raises(ModelNotFound, match=r"does not hold m-Q4_K_M-00002-of-00002\.gguf"):
        choose(repo_of("m-Q4_K_M-00001-of-00002.gguf", "mmproj-f16.gguf"), look_up("hf:a/b"))


def test_a_known_row_may_name_its_files():
    wanted = look_up("llava-1.6-vicuna-13b")
    files = ("vicuna-7b-q5_k.gguf", "vicuna-13b-q5_k.gguf", "mmproj-vicuna7b-f16.gguf", "mmproj-vicuna13b-f16.gguf")
    assert chosen(wanted, *files) == (["vicuna-13b-q5_k.gguf"], "mmproj-vicuna13b-f16.gguf")
    with pytest.raises(ModelNotFound, match=r"no file for llava-1\.6-vicuna-13b"):
        choose(repo_of("other.gguf"), wanted)


def test_a_row_s_own_quantisation_comes_before_llama_cpp_s_order():
    files = ("ggml-model-f16.gguf", "ggml-model-q4_k.gguf", "ggml-model-q5_k.gguf", "mmproj-model-f16.gguf")
    assert chosen(look_up("llava-1.5-13b"), *files)[0] == ["ggml-model-q4_k.gguf"]
    assert chosen(look_up("llava-1.5-13b:q5_k"), *files)[0] == ["ggml-model-q5_k.gguf"]
