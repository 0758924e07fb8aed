"""From what a user typed to two files; and the list of what is here."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from opsin.core.errors import BadParameter, ModelNotFound, ModelUnreadable, OpsinError, PairMismatch
from opsin.models import Pair, locate, resolve
from opsin.models.resolve import (
    cached_repos,
    demo_pair,
    hub_cache,
    list_models,
    read_default,
    state_file,
    write_default,
)


def put(cache: Path, repo: str, files: dict[str, Path], commit: str = "c" * 40) -> Path:
    """A repository in the cache, as a download leaves it."""
    folder = cache / ("models--" + repo.replace("/", "--"))
    for name, source in files.items():
        path = folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def demo(tiny: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a demo model of its own."""
    folder = tmp_path / "package"
    (folder / "demo").mkdir(parents=True)
    shutil.copy(tiny.llm, folder / "demo" / "opsin-demo.gguf")
    shutil.copy(tiny.mmproj, folder / "demo" / "mmproj-opsin-demo.gguf")
    monkeypatch.setattr("importlib.resources.files", lambda package: folder)
    return folder / "demo"


def test_a_file_is_taken_with_the_projector_beside_it(tiny: Pair):
    assert resolve(str(tiny.llm)) == Pair(tiny.llm, tiny.mmproj, "tiny-q8_0")


def test_a_file_without_a_projector_reads_text_only(tiny: Pair, tmp_path: Path):
    llm = shutil.copy(tiny.llm, tmp_path)
    assert resolve(str(llm)).mmproj is None


def test_a_projector_given_by_path_wins(tiny: Pair, tmp_path: Path):
    other = Path(shutil.copy(tiny.mmproj, tmp_path / "eyes.gguf"))
    assert resolve(str(tiny.llm), str(other)).mmproj == other


def test_a_folder_is_taken_for_the_pair_it_holds(tiny: Pair):
    pair = resolve(str(tiny.llm.parent))
    assert (pair.llm, pair.mmproj) == (tiny.llm, tiny.mmproj)


def test_a_folder_with_one_model_in_several_quantisations_gives_llama_cpp_s_choice(tiny: Pair, tmp_path: Path):
    for name in ("m-F16.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf"):
        shutil.copy(tiny.llm, tmp_path / name)
    assert resolve(str(tmp_path)).llm.name == "m-Q4_K_M.gguf"


def test_a_folder_with_several_models_or_none_is_refused(tiny: Pair, tmp_path: Path):
    with pytest.raises(ModelNotFound, match="holds no language model"):
        resolve(str(tmp_path))
    for name in ("a-Q8_0.gguf", "b-Q8_0.gguf"):
        shutil.copy(tiny.llm, tmp_path / name)
    with pytest.raises(ModelNotFound, match=r"several models: give one of them, a-Q8_0\.gguf or b-Q8_0\.gguf"):
        resolve(str(tmp_path))


def test_an_empty_folder_does_not_hide_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "llava").mkdir()
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="opsin pull llava"):
        resolve("llava")
    with pytest.raises(ModelNotFound, match="images holds no language model"):
        resolve("images")


def test_misfits_are_refused_before_anything_is_loaded(tiny: Pair, wide: Pair, tmp_path: Path):
    with pytest.raises(PairMismatch, match="do not belong together"):
        resolve(str(tiny.llm), str(wide.mmproj))
    with pytest.raises(PairMismatch, match="swap"):
        resolve(str(tiny.mmproj), str(tiny.llm))
    (tmp_path / "x.gguf").write_bytes(b"no")
    with pytest.raises(ModelUnreadable):
        resolve(str(tiny.llm), str(tmp_path / "x.gguf"))


def test_missing_files_name_the_option(tiny: Pair):
    with pytest.raises(ModelNotFound, match=r"there is no file /none/m\.gguf"):
        resolve("/none/m.gguf")
    with pytest.raises(ModelNotFound, match="check the path given to --mmproj"):
        resolve(str(tiny.llm), "/none/mmproj.gguf")
    with pytest.raises(BadParameter, match="--mmproj was given without --model"):
        resolve(None, str(tiny.mmproj))


def test_a_known_name_is_found_in_the_cache(tiny: Pair, cache: Path):
    files = {"SmolVLM2-Q4_K_M.gguf": tiny.llm, "SmolVLM2-Q8_0.gguf": tiny.llm, "mmproj-SmolVLM2-Q8_0.gguf": tiny.mmproj}
    snapshot = put(cache, "ggml-org/SmolVLM2-2.2B-Instruct-GGUF", files)
    pair = resolve("smolvlm2")
    assert (pair.llm, pair.mmproj) == (snapshot / "SmolVLM2-Q4_K_M.gguf", snapshot / "mmproj-SmolVLM2-Q8_0.gguf")
    assert pair.name == "smolvlm2-2.2b"
    assert resolve("SmolVLM2:Q8_0").llm == snapshot / "SmolVLM2-Q8_0.gguf"
    assert resolve("hf:ggml-org/SmolVLM2-2.2B-Instruct-GGUF").llm == pair.llm
    with pytest.raises(ModelNotFound, match=r"opsin pull smolvlm2-2\.2b:F16"):
        resolve("smolvlm2:F16")


def test_a_known_name_that_is_not_here_says_how_to_get_it():
    with pytest.raises(ModelNotFound, match=r"llava-1\.5-7b is not here yet: get it with `opsin pull llava-1\.5-7b`"):
        resolve("llava")


def test_a_row_with_named_files_is_found_in_the_cache(tiny: Pair, cache: Path):
    files = {"vicuna-7b-q5_k.gguf": tiny.llm, "mmproj-vicuna7b-f16.gguf": tiny.mmproj, "a-Q4_K_M.gguf": tiny.llm}
    put(cache, "cmp-nct/llava-1.6-gguf", files)
    assert resolve("llava-1.6-vicuna-7b").llm.name == "vicuna-7b-q5_k.gguf"
    with pytest.raises(ModelNotFound, match="is not here yet"):
        resolve("llava-1.6-vicuna-13b")


def test_llama_cpp_s_own_cache_comes_first(tiny: Pair, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {"m-Q4_K_M.gguf": tiny.llm, "mmproj-m.gguf": tiny.mmproj}
    put(cache, "a/b", files)
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "llama"))
    snapshot = put(tmp_path / "llama", "a/b", files)
    assert resolve("hf:a/b").llm == snapshot / "m-Q4_K_M.gguf"


def test_removed_blobs_leave_links_that_do_not_count(tiny: Pair, cache: Path):
    snapshot = put(cache, "a/b", {"mmproj-m.gguf": tiny.mmproj})
    (snapshot / "m-Q4_K_M.gguf").symlink_to("../../blobs/gone")
    assert [files for _, files in cached_repos().values()] == [["mmproj-m.gguf"]]


def test_without_refs_the_newest_snapshot_counts(tiny: Pair, cache: Path):
    old = put(cache, "a/b", {"old-Q4_K_M.gguf": tiny.llm}, "a" * 40)
    new = put(cache, "a/b", {"new-Q4_K_M.gguf": tiny.llm}, "b" * 40)
    os.utime(old, (1, 1))
    (cache / "models--a--b" / "refs" / "main").unlink()
    assert cached_repos()["a/b"][0] == new


@pytest.mark.parametrize(
    "variables",
    [
        {"HF_HUB_CACHE": "/x/one"},
        {"HF_HOME": "/x/two"},
        {"XDG_CACHE_HOME": "/x/three"},
        {"HF_HUB_CACHE": "/x/one", "HF_HOME": "/x/two"},
        {},
    ],
)
def test_the_cache_is_where_huggingface_hub_says(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("huggingface_hub")
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert str(hub_cache()) == theirs


def test_without_a_choice_the_demo_model_answers(demo: Path):
    pair = resolve()
    assert pair.is_demo
    assert pair.llm == demo / "opsin-demo.gguf"
    assert resolve("demo") == pair


def test_an_installation_without_the_demo_says_so(demo: Path):
    shutil.rmtree(demo)
    with pytest.raises(ModelNotFound, match="has no demo model"):
        demo_pair()


def test_a_chosen_default_answers_until_it_is_gone(demo: Path, tiny: Pair, tmp_path: Path):
    llm = Path(shutil.copy(tiny.llm, tmp_path))
    pair = Pair(llm, tiny.mmproj, "mine")
    write_default(pair)
    assert read_default() == resolve() == pair
    llm.unlink()
    with pytest.raises(ModelNotFound, match="the default model mine is gone from"):
        resolve()
    write_default(None)
    assert resolve().is_demo


def test_a_default_may_have_no_projector(tiny: Pair):
    write_default(Pair(tiny.llm, None, "text"))
    assert read_default() == Pair(tiny.llm, None, "text")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"default": 3}', '{"default": {"llm": "x"}}', "{}"])
def test_a_damaged_state_file_is_one_sentence(damage: str):
    write_default(None)
    state_file().write_text(damage)
    with pytest.raises(ModelNotFound, match="is damaged: delete it"):
        resolve()


def test_the_state_is_written_whole_or_not_at_all(tiny: Pair, monkeypatch: pytest.MonkeyPatch):
    write_default(tiny)
    before = state_file().read_bytes()

    def break_off(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", break_off)
    with pytest.raises(ModelNotFound, match="cannot be saved"):
        write_default(None)
    assert state_file().read_bytes() == before
    assert list(state_file().parent.iterdir()) == [state_file()]


def test_the_list_shows_downloads_folders_and_the_demo_each_once(
    demo: Path, tiny: Pair, wide: Pair, cache: Path, tmp_path: Path
):
    put(cache, "ggml-org/gemma-3-4b-it-GGUF", {"g-Q4_K_M.gguf": tiny.llm, "mmproj-g.gguf": tiny.mmproj})
    put(cache, "a/text", {"t-Q4_K_M.gguf": tiny.llm})
    put(cache, "a/odd", {"o-Q8_0.gguf": tiny.llm, "mmproj-o.gguf": wide.mmproj})
    found = {model.name: model for model in list_models([tiny.llm.parent, tiny.llm.parent])}
    assert list(found) == [str(tiny.llm), "gemma-3-4b:Q4_K_M", "hf:a/odd:Q8_0", "demo"]
    assert [name for name, model in found.items() if model.is_default] == ["demo"]
    assert "do not belong together" in found["hf:a/odd:Q8_0"].problem
    gemma = found["gemma-3-4b:Q4_K_M"]
    assert (gemma.architecture, gemma.projector, gemma.quantisation) == ("llama", "mlp", "Q8_0")
    assert gemma.size == tiny.llm.stat().st_size + tiny.mmproj.stat().st_size
    for name, model in found.items():
        if model.problem is None:
            assert resolve(name).llm == Path(model.llm_file)


def test_the_list_marks_the_default_also_when_it_lies_elsewhere(demo: Path, tiny: Pair):
    write_default(tiny)
    assert [model.name for model in list_models() if model.is_default] == [tiny.name]


def test_a_default_that_is_gone_is_listed_with_its_problem(demo: Path, tmp_path: Path):
    write_default(Pair(tmp_path / "gone.gguf", tmp_path / "mmproj.gguf", "gone"))
    assert "there is no file" in {model.name: model for model in list_models()}["gone"].problem


@pytest.mark.parametrize("model", ["a" * 300, "x/" * 3000, "~nosuchuser/m.gguf", "nul\0byte.gguf", "bad\udcff.gguf"])
def test_names_that_no_file_can_have_are_one_sentence(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpsinError) as caught:
        resolve(model)
    assert "\n" not in str(caught.value)
    assert locate(model) is None


def test_a_file_whose_name_is_no_text_is_refused(tiny: Pair, tmp_path: Path):
    llm = shutil.copy(tiny.llm, tmp_path / "m\udcff.gguf")
    with pytest.raises(ModelNotFound, match="not valid UTF-8"):
        resolve(str(llm))


@pytest.mark.parametrize("text", ["[" * 100_000, "\xff", "{}", '{"default": 1}'])
def test_a_damaged_state_is_one_sentence(text: str):
    state_file().parent.mkdir(parents=True, exist_ok=True)
    state_file().write_text(text, encoding="latin-1")
    with pytest.raises(ModelNotFound, match="is damaged: delete it"):
        resolve()


def test_one_bad_file_does_not_empty_the_list(tiny: Pair, tmp_path: Path):
    folder = tmp_path / "many"
    folder.mkdir()
    shutil.copy(tiny.llm, folder / "good.gguf")
    shutil.copy(tiny.mmproj, folder / "mmproj-good.gguf")
    (folder / "bad.gguf").write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 63) + bytes(64))
    problems = {Path(model.name).name: model.problem for model in list_models([folder])}
    assert problems["good.gguf"] is None
    assert "ends in the middle of its header" in (problems["bad.gguf"] or "")
