"""The picture of docs/architecture.md is that of the imports, and the files that the page names exist."""

import ast
import re

from tests.launch import REPO
from tests.test_layers import FILES, FLAME, ROOMS, imported, room_of

PAGE = (REPO / "docs/architecture.md").read_text()


def reachable(edges, room):
    return edges[room].union(*(reachable(edges, other) for other in edges[room]))


def test_the_picture_shows_the_imports_without_those_that_follow_from_others():
    edges = {room: set() for room in ROOMS if room != "errors"}
    for file in FILES:
        for name in imported(ast.parse((FLAME / file).read_text())) if file != "__init__.py" else ():
            if room_of(name) in edges.keys() - {room_of(file)}:
                edges[room_of(file)].add(room_of(name))
    implied = {room: set().union(*(reachable(edges, other) for other in edges[room])) for room in edges}
    needed = {(room, other) for room, others in edges.items() for other in others - implied[room]}
    assert set(re.findall(r"^  (\w+) --> (\w+)$", PAGE, flags=re.MULTILINE)) == needed


def test_the_files_that_the_page_names_exist():
    rooms = re.findall(r"^\| `(\w+)/` \|(.*)$", PAGE, flags=re.MULTILINE)
    assert {room for room, _ in rooms} == ROOMS.keys() - {"errors", "train"}
    named = [f"{room}/{file}" for room, row in rooms for file in re.findall(r"`(\w+\.py)`", row)]
    named += re.findall(r"`(\w+/\w+\.py)`", PAGE)
    assert len(named) > 40
    for file in named:
        assert any((root / file).is_file() for root in (FLAME, REPO)), file
