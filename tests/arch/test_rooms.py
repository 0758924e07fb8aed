"""The rules of the house: who imports whom, where native code may be touched, and how large things get."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "opsin"
FILES = sorted(SOURCE.rglob("*.py"))

ARROWS = {
    "core": set(),
    "native": {"core"},
    "images": {"core"},
    "prompt": {"core"},
    "cache": {"core"},
    "models": {"core"},
    "testing": {"core"},
    "boxes": {"core"},
    "engine": {"boxes", "cache", "core"},
    "doctor": {"bench", "compose", "engine", "native", "models", "images", "prompt", "core"},
    "tune": {"bench", "compose", "engine", "prompt", "images", "models", "core"},
    "bench": {"engine", "prompt", "images", "models", "core"},
    "jobs": {"worker", "engine", "prompt", "images", "models", "core"},
    "worker": {"engine", "compose", "images", "prompt", "core"},
    "server": {"worker", "jobs", "boxes", "engine", "prompt", "images", "models", "core"},
    "compose": {"native", "engine", "prompt", "images", "models", "cache", "core"},
    "compat": {"api", "worker", "compose", "engine", "prompt", "images", "models", "core"},
    "api": {"worker", "compose", "engine", "prompt", "images", "models", "core"},
    "cli": {
        "api",
        "compose",
        "server",
        "worker",
        "jobs",
        "tune",
        "bench",
        "boxes",
        "doctor",
        "engine",
        "prompt",
        "images",
        "models",
        "core",
    },
    "__main__": {"cli"},
    "__init__": {"api", "engine", "prompt"},
}
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
MAX_FILE, MAX_FUNCTION, MAX_PACKAGE = 450, 80, 29_933


def room_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def statements(path: Path) -> Iterator[ast.stmt]:
    """Every statement of a file. Expressions hold none and are most of its tree, so they are not looked into."""
    left: list[ast.AST] = [ast.parse(path.read_text())]
    while left:
        node = left.pop()
        if isinstance(node, ast.stmt):
            yield node
        inner = [child for block in _BLOCKS for child in getattr(node, block, ())]
        left += (child for child in inner if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)))


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Every module name a file imports, also inside functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in statements(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "opsin"}
    return frozenset(names)


def rooms_imported(path: Path) -> set[str]:
    return {
        name.split(".")[1] for name in imported(path) if name.startswith("opsin.") and not name.endswith("__version__")
    }


def test_imports_go_one_way() -> None:
    assert {room_of(path) for path in FILES} <= set(ARROWS), "a room that is not in the design"
    wrong = {path.name: rooms_imported(path) - {room_of(path)} - ARROWS[room_of(path)] for path in FILES}
    assert {name: rooms for name, rooms in wrong.items() if rooms} == {}


def test_only_native_touches_native_code() -> None:
    banned = {"ctypes", "llama_cpp", "cffi"}
    users = [path for path in FILES if banned & {name.split(".")[0] for name in imported(path)}]
    assert [path for path in users if room_of(path) != "native"] == []
    assert users, "this test sees nothing"


def test_files_and_functions_stay_small() -> None:
    assert [path for path in FILES if len(path.read_text().splitlines()) > MAX_FILE] == []
    functions = (
        (path.name, node.name, (node.end_lineno or 0) - node.lineno + 1)
        for path in FILES
        for node in statements(path)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    assert [found for found in functions if found[2] > MAX_FUNCTION] == []


def test_the_package_stays_small() -> None:
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= MAX_PACKAGE


def test_rooms_have_no_cycle() -> None:
    def reach(room: str, seen: tuple[str, ...]) -> None:
        assert room not in seen, " → ".join((*seen, room))
        for target in ARROWS[room]:
            reach(target, (*seen, room))

    for room in ARROWS:
        reach(room, ())


def test_files_have_no_import_circle() -> None:
    """Also inside rooms, inside functions and for types alone."""
    names = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in FILES}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    edges = {name: (imported(path) & names.keys()) - {name} for name, path in names.items()}
    # A package's own file imports what it exports, and what it exports may import the package's other files.
    edges = {name: set() if names[name].name == "__init__.py" else targets for name, targets in edges.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(names):
        visit(name, ())


@pytest.mark.parametrize("room", sorted({room_of(p) for p in FILES if p.parent != SOURCE}))
def test_every_room_says_what_it_is_for_and_what_it_refuses(room: str) -> None:
    docstring = ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text()))
    assert docstring is not None
    assert "Refuses" in docstring or "refuses" in docstring or "knows no" in docstring
