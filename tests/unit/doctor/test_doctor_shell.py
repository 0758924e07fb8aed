"""Command lines as the shell of a system reads them."""

import shlex

import pytest

from opsin.doctor.check import shell_line


@pytest.mark.parametrize("system", ["Linux", "Darwin"])
def test_a_posix_shell_gets_the_words_back(system: str) -> None:
    words = ["opsin", "serve", "--model", "/a folder's/$x;y.gguf", ""]
    assert shlex.split(shell_line(words, system)) == words


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (r"C:\models\a.gguf", r"C:\models\a.gguf"),
        (r"C:\my models\a.gguf", r'"C:\my models\a.gguf"'),
        ("C:\\my models\\", '"C:\\my models\\\\"'),
        ("a&b", '"a&b"'),
        ("C:\\a&b\\", '"C:\\a&b\\\\"'),
        ("cmake.args=-DA=on;-DB=on", '"cmake.args=-DA=on;-DB=on"'),
        ("", '""'),
    ],
)
def test_windows_gets_double_quotes_where_its_shells_need_them(word: str, line: str) -> None:
    assert shell_line(["opsin", word], "Windows") == f"opsin {line}"


def test_without_a_system_it_is_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Windows")
    assert shell_line(["opsin", r"C:\a b"]) == r'opsin "C:\a b"'
