"""The rooms of flame/ and what each may import; imports inside functions count too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FLAME = Path(__file__).parents[1] / "flame"
ROOMS = {  # lowest first; a room imports itself, `errors`, and the rooms named here
    "errors": "",
    "config": "",
    "runtime": "config",
    "checkpoint": "config runtime",
    "data": "config runtime checkpoint",
    "models": "config runtime",
    "parallel": "config models",
    "titan": "config checkpoint models parallel",
    "convert": "config runtime checkpoint data models titan",
    "preflight": "config runtime checkpoint data models parallel convert",
    "training": "config runtime checkpoint data models parallel titan convert",
    "dry_run": "config runtime preflight data models parallel titan training",
    "train": "config runtime preflight training",
    "drills": "config checkpoint training train",
}
FILES = sorted(path.relative_to(FLAME).as_posix() for path in FLAME.rglob("*.py"))


def room_of(module: str) -> str:
    """The room of "data.lane" or "data/lane.py"."""
    return module.replace("/", ".").removesuffix(".py").split(".")[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """What a module imports of flame, without "flame." before it; "" is flame itself, whose version is read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [f"flame.{alias.name}" for alias in node.names] if node.module == "flame" else [str(node.module)]
        else:
            continue
        yield from (name.removeprefix("flame.") for name in names if name.startswith("flame."))


def forbidden(room: str, tree: ast.AST) -> list[str]:
    allowed = {room, "errors", "__version__", *ROOMS[room].split()}
    return [name for name in imported(tree) if room_of(name) not in allowed]


def compared_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from (getattr(side, "attr", getattr(side, "id", "")) for side in (node.left, *node.comparators))


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_a_room_imports_only_the_rooms_that_the_table_allows(file):
    tree = ast.parse((FLAME / file).read_text())
    assert forbidden(room_of(file), tree) == []
    if file.endswith("__init__.py") and "reference" not in file:
        assert [type(node) for node in tree.body] == [ast.Expr], "a room's __init__ is its docstring alone"
    assert file.startswith("models/") or "model_type" not in compared_names(tree), "families differ by their rows"
    assert not any(
        keyword.arg == "trust_remote_code" and getattr(keyword.value, "value", None) is True
        for keyword in ast.walk(tree)
        if isinstance(keyword, ast.keyword)
    )


def test_the_table_goes_one_way_and_an_import_upward_is_found():
    order = list(ROOMS)
    assert all(order.index(below) < order.index(room) for room, rooms in ROOMS.items() for below in rooms.split())
    assert forbidden("data", ast.parse("def f():\n    from flame.training.trainer import Batch")) == [
        "training.trainer"
    ]
