"""The table [tuned] of an opsin.toml: for which model it holds, what wins over it, and how it is written."""

import os
from pathlib import Path
from typing import Any

import pytest

from opsin.core.config import Config, read_config, read_file
from opsin.core.errors import BadInput, BadParameter
from opsin.tune.opsin_toml import check_target, read_tuned, tuned_table, write_tuned


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf", "mmproj-a-bf16.gguf"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def write(home: Path, above: str = "") -> Path:
    settings = {"threads": 3, "kv_type": "q8_0", "mmproj": home / "mmproj-a-bf16.gguf"}
    path = home / "opsin.toml"
    path.write_text(above + tuned_table(home / "a.gguf", home / "mmproj-a.gguf", settings, ["why"]))
    return path


def read(home: Path, environ: dict[str, str] | None = None, *, tuned: bool = True, **flags: Any) -> Config:
    def locate(name: str) -> Path | None:
        return home / "a.gguf" if name == "llava" else None

    environ = {"XDG_CONFIG_HOME": str(home / "xdg"), **(environ or {})}
    return read_config(flags, environ, home, locate=locate, tuned=tuned)


def test_without_a_model_the_tuned_pair_is_taken_with_its_settings(home: Path) -> None:
    write(home)
    found = read(home)
    settings = found.settings
    assert (settings.model, settings.mmproj) == (home / "a.gguf", home / "mmproj-a-bf16.gguf")
    assert (settings.threads, settings.kv_type, settings.parallel) == (3, "q8_0", 8)
    assert found.origins["threads"] == f"[tuned] of {home / 'opsin.toml'}"
    # An engine opened from it keeps its own defaults, and knows what was given.
    engine = found.engine(ctx=512)
    assert (engine.parallel, engine.ctx, engine.threads) == (1, 512, 3)
    assert "ubatch" not in engine.model_fields_set


@pytest.mark.parametrize("how", ["flag", "environment", "file"])
def test_another_model_gets_nothing_of_it(home: Path, how: str) -> None:
    other = str(home / "b.gguf")
    write(home, f'model = "{other}"\n' if how == "file" else "")
    found = read(
        home, {"OPSIN_MODEL": other} if how == "environment" else {}, **({"model": other} if how == "flag" else {})
    )
    assert found.settings.model == Path(other)
    assert found.settings.mmproj is None
    assert found.settings.threads is None
    assert found.settings.kv_type == "f16"


@pytest.mark.parametrize("model", ["{home}/../{home.name}/a.gguf", "llava"])
def test_the_same_model_by_another_path_or_its_name_is_tuned(home: Path, model: str) -> None:
    write(home)
    found = read(home, model=model.format(home=home))
    assert found.settings.threads == 3
    assert found.settings.mmproj == home / "mmproj-a-bf16.gguf"
    assert found.settings.model == Path(model.format(home=home))


def test_whatever_else_is_said_wins(home: Path) -> None:
    write(home, "threads = 5\n")
    assert read(home).settings.threads == 5
    assert read(home, {"OPSIN_THREADS": "6"}).settings.threads == 6
    (home / "other.gguf").write_bytes(b"other")
    found = read(home, threads=7, mmproj=str(home / "other.gguf"))
    assert (found.settings.threads, found.settings.mmproj) == (7, home / "other.gguf")
    assert found.settings.kv_type == "q8_0"


@pytest.mark.parametrize("how", ["flag", "environment", "file"])
def test_who_gives_the_projector_that_was_tuned_gets_the_tuned_one(home: Path, how: str) -> None:
    """With both files above the table, as most have them, its own projector was never used."""
    files = {"model": str(home / "a.gguf"), "mmproj": f"{home}/../{home.name}/mmproj-a.gguf"}
    write(home, "".join(f'{name} = "{path}"\n' for name, path in files.items()) if how == "file" else "")
    environ = {f"OPSIN_{name.upper()}": path for name, path in files.items()}
    found = read(home, environ if how == "environment" else {}, **(files if how == "flag" else {}))
    assert found.settings.mmproj == home / "mmproj-a-bf16.gguf"


@pytest.mark.parametrize("how", ["gone", "older"])
def test_a_conversion_that_is_gone_or_stale_is_not_taken(
    home: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(home)
    made = home / "mmproj-a-bf16.gguf"
    if how == "gone":
        made.unlink()
    else:
        os.utime(made, (1, 1))
    assert read(home).settings.mmproj == home / "mmproj-a.gguf"
    assert "is taken instead" in caplog.text


def test_a_table_whose_model_is_gone_is_passed_over(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(home, "port = 1\n")
    (home / "a.gguf").unlink()
    settings = read(home).settings
    assert (settings.model, settings.mmproj, settings.threads, settings.port) == (None, None, None, 1)
    assert "a.gguf is gone" in caplog.text


@pytest.mark.parametrize("how", ["flag", "environment", "file", "default"])
def test_with_another_number_of_answers_the_layout_is_not_the_tuned_one(home: Path, how: str) -> None:
    """Rows that were best for eight answers with memories of their own made a single one slower."""
    layout = {"parallel": 8, "ctx": 4096, "ubatch": 256, "flash_attention": True}
    path = home / "opsin.toml"

    def read_for(parallel: int) -> Any:
        above = f"parallel = {parallel}\n" if how == "file" else ""
        path.write_text(above + tuned_table(home / "a.gguf", None, {**layout, "threads": 3}, []))
        environ = {"XDG_CONFIG_HOME": os.devnull, **({"OPSIN_PARALLEL": f"{parallel}"} if how == "environment" else {})}
        flags = {"parallel": parallel} if how == "flag" else {}
        return read_config(flags, environ, home, parallel=parallel if how == "default" else None).engine()

    same, other = read_for(8), read_for(1)
    assert same.model_dump(include=set(layout)) == layout
    assert same.threads == other.threads == 3
    assert other.parallel == 1
    assert other.model_fields_set & layout.keys() <= {"parallel"}


def test_it_can_be_passed_over(home: Path) -> None:
    write(home, "parallel = 2\n")
    settings = read(home, tuned=False).settings
    assert (settings.threads, settings.model, settings.parallel) == (None, None, 2)


def test_a_projector_of_the_file_does_not_follow_another_model(home: Path) -> None:
    (home / "opsin.toml").write_text(f'model = "{home}/a.gguf"\nmmproj = "{home}/mmproj-a.gguf"\nctx = 64\n')
    assert read(home, model=str(home / "b.gguf")).settings.mmproj is None
    assert read(home, model=str(home / "b.gguf")).settings.ctx == 64
    assert read(home, model="llava").settings.mmproj == home / "mmproj-a.gguf"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[tuned]\nthreads = 2\n", "names no model"),
        ('[tuned]\nmodel = "a"\nthreds = 2\n', "no setting 'threds' that could be tuned"),
        ('[tuned]\nmodel = "a"\nport = 2\n', "no setting 'port' that could be tuned"),
        ("tuned = 1\n", "names no model"),
    ],
)
def test_a_table_that_cannot_be_is_refused(home: Path, text: str, sentence: str) -> None:
    (home / "opsin.toml").write_text(text)
    with pytest.raises(BadParameter, match=sentence):
        read(home)


def test_a_file_that_is_named_must_be_there(home: Path) -> None:
    with pytest.raises(BadParameter, match=r"none\.toml cannot be read"):
        read_config({}, {}, home, file=home / "none.toml")


def test_the_file_keeps_all_else_to_the_letter_and_has_one_table(home: Path) -> None:
    path = home / "opsin.toml"
    own = "# mine\nport    = 9 # so\n"
    path.write_text(own)
    path.chmod(0o600)
    for threads in (2, 4):
        write_tuned(path, tuned_table(home / "a.gguf", None, {"threads": threads}, ["two\nlines"]))
    text = path.read_text()
    assert text.startswith(own)
    assert text.count("[tuned]") == 1
    assert "# two lines\n" in text
    assert read_file(path) == ({"port": 9}, {"model": str(home / "a.gguf"), "threads": 4})
    assert path.stat().st_mode & 0o777 == 0o600
    write_tuned(path, "")
    assert path.read_text() == own
    assert read_tuned(path) == {}
    assert [entry.name for entry in home.iterdir() if entry.name.startswith(".opsin")] == []


def test_a_foreign_file_and_another_models_are_not_written_over(home: Path) -> None:
    path = write(home)
    check_target(path, home / "a.gguf", force=False)
    check_target(home / "new.toml", home / "a.gguf", force=False)
    (home / "link.gguf").symlink_to(home / "a.gguf")
    check_target(path, home / "link.gguf", force=False)
    with pytest.raises(BadParameter, match="was tuned for"):
        check_target(path, home / "b.gguf", force=False)
    check_target(path, home / "b.gguf", force=True)
    foreign = home / "pyproject.toml"
    foreign.write_text("[project]\nname = 'x'\n")
    with pytest.raises(BadParameter, match="--force"):
        check_target(foreign, home / "a.gguf", force=False)
    write_tuned(foreign, tuned_table(home / "a.gguf", None, {"threads": 1}, []))
    assert read_file(foreign)[0] == {}


def test_a_file_that_is_a_link_stays_one(home: Path) -> None:
    real, link = home / "real.toml", home / "link.toml"
    real.write_text("port = 9\n")
    link.symlink_to(real)
    write_tuned(link, tuned_table(home / "a.gguf", None, {"threads": 1}, []))
    assert link.is_symlink()
    assert read_file(real)[1]["threads"] == 1


def test_a_folder_that_cannot_be_written_to_is_one_sentence(home: Path) -> None:
    with pytest.raises(BadInput, match="could not be written"):
        write_tuned(home / "a.gguf" / "opsin.toml", "[tuned]\n")


def test_the_given_projector_is_told_where_another_was_made_of_it(home: Path) -> None:
    tuned = read_file(write(home))[1]
    assert tuned["tuned_from"] == str(home / "mmproj-a.gguf")
    assert tuned["mmproj"] == str(home / "mmproj-a-bf16.gguf")
