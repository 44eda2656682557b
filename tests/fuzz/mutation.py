"""Ways to spoil what was good, as small plain values that a report can show."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

DEEP = "@deep"  # stands for lists nested far deeper than a parser's stack
DEPTH = 100_000
NUMBERS = (0, 1, -1, 2, 3, 7, 0.5, -0.0, 7.0, 1e9, 1e300, 10**9, 2**31, 2**32, 2**62, 2**63, 10**30, 10**400)
WORDS = ("", "4", "none", "\0", "é\n[", "../x", "x" * 300, "\ud800", DEEP)
NESTED = ([], [[]], {}, [0], ["x"], {"x": 1}, [None], {"": []}, [1e9, -1])
ODD = (None, True, False, float("inf"), float("nan"), *NUMBERS, *WORDS, *NESTED)

Step = tuple[Any, ...]
PLACE = st.integers(0, 1000)  # thousandths of a file's length
BYTES = st.one_of(
    st.tuples(st.just("cut"), PLACE),
    st.tuples(st.just("flip"), PLACE, st.integers(1, 255)),
    st.tuples(st.just("put"), PLACE, st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("put"), PLACE, st.sampled_from((b"\xef\xbb\xbf", b"\n", b"\0" * 8, b"\xff" * 8, b"[" * DEPTH))),
    st.tuples(st.just("drop"), PLACE, st.integers(1, 64)),
    st.tuples(st.just("repeat"), PLACE, st.integers(1, 64)),
    st.tuples(st.just("overwrite"), PLACE, st.sampled_from((b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f"))),
)
JSON = st.one_of(
    st.tuples(st.just("set"), st.lists(st.integers(0, 500), min_size=1, max_size=4).map(tuple), st.sampled_from(ODD)),
    st.tuples(st.just("delete"), st.lists(st.integers(0, 500), min_size=1, max_size=4).map(tuple)),
)


def spoil_bytes(data: bytes, steps: list[Step]) -> bytes:
    """Apply steps of BYTES."""
    for kind, place, *rest in steps:
        at = place * len(data) // 1000
        head, tail = data[:at], data[at:]
        match kind:
            case "cut":
                data = head
            case "flip":
                data = head + bytes(byte ^ rest[0] for byte in tail[:1]) + tail[1:]
            case "put":
                data = head + rest[0] + tail
            case "drop":
                data = head + tail[rest[0] :]
            case "repeat":
                data = head + tail[: rest[0]] + tail
            case "overwrite":
                data = head + rest[0] + tail[len(rest[0]) :]
    return data


def spoil_json(tree: Any, steps: list[Step]) -> Any:
    """Apply steps of JSON: each walks down by the numbers of children, counted around, and sets or deletes one."""
    tree = json.loads(json.dumps(tree))
    for kind, path, *value in steps if isinstance(tree, dict | list) else ():
        node = tree
        for depth, number in enumerate(path):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = keys[number % len(keys)]
            if depth < len(path) - 1 and isinstance(node[key], dict | list):
                node = node[key]
                continue
            if kind == "delete":
                del node[key]
            else:
                node[key] = copy.deepcopy(value[0])
            break
    return tree


def spoil_text(data: bytes, steps: list[Step]) -> bytes:
    """Apply steps of JSON to a text, if it is JSON."""
    try:
        return dump(spoil_json(json.loads(data), steps))
    except (ValueError, RecursionError):
        return data


def dump(tree: Any) -> bytes:
    """JSON text, in which DEEP is what it stands for."""
    text = json.dumps(tree).replace(json.dumps(DEEP), "[" * DEPTH + "]" * DEPTH)
    return text.encode()
