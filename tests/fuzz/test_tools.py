"""Hugging Face folders in the converter, and the command lines of all tools."""

import os
import shutil
import struct
from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st

from flame.data import __main__ as data
from flame.models import __main__ as models
from scripts import convert_dcp_to_hf, convert_hf_to_dcp
from tests.convert.models import publish
from tests.fuzz.mutation import BYTES, JSON, spoil_bytes, spoil_text
from tests.fuzz.oracle import Area, check
from tests.tiny import write_config

INDEX, CONFIG, FIRST = "model.safetensors.index.json", "config.json", "model-00001-of-00003.safetensors"
SECOND = FIRST.replace("00001", "00002")
DAMAGE = st.one_of(
    st.tuples(
        st.sampled_from((INDEX, CONFIG, FIRST, SECOND)), st.just("bytes"), st.lists(BYTES, min_size=1, max_size=2)
    ),
    st.tuples(st.sampled_from((INDEX, CONFIG)), st.just("json"), st.lists(JSON, min_size=1, max_size=2)),
    st.tuples(st.sampled_from((FIRST, SECOND)), st.just("header"), st.lists(JSON, min_size=1, max_size=2)),
    st.tuples(
        st.sampled_from((INDEX, CONFIG, FIRST)), st.sampled_from(("gone", "folder", "pipe", "loop", "empty", "twice"))
    ),
)
FLAGS = {  # of each tool, and its commands
    "import": ("--model", "--checkpoint", "--no_verify"),
    "export": ("--path", "--step", "--config", "--tokenizer", "--dtype", "--output", "--no_verify"),
    "data": (
        *("show", "verify", "pack", "bench", "--step", "--rank", "--ranks", "--full", "--dataset", "--tokenizer"),
        *(
            "--dataset-name",
            "--dataset-split",
            "--data-dir",
            "--data-files",
            "--column",
            "--streaming",
            "--max-bad-rows",
        ),
    ),
    "models": ("list", "audit", "--seq_len", "--depth", "--width", "--seed", "--import", "--trust_remote_code"),
}
VALUES = (
    "hf",
    "hf/config.json",
    "in/text.txt",
    "out/x",
    "byte",
    "llama.json",
    "nothing",
    ".",
    "",
    "0",
    "-1",
    "1",
    "2",
    "16",
    "x",
)
VALUES += (
    "9" * 30,
    "1e400",
    "nan",
    "\udce9",
    "é\n[",
    "/dev/null",
    "/proc/x/y",
    "~nosuch/x",
    "x" * 300,
    "*",
    "in/*",
    "evil",
    "a,b",
)
COMMAND = st.sampled_from(sorted(FLAGS)).flatmap(
    lambda tool: st.tuples(
        st.just(tool), st.lists(st.sampled_from((*FLAGS[tool], *FLAGS[tool], *VALUES)), min_size=1, max_size=6)
    )
)
GOOD = (
    *(
        ("import", ["--model", "hf", "--checkpoint", "out/c"]),
        ("import", ["--model", "hf", "--checkpoint", "out/c", "--no_verify"]),
    ),
    *(
        ("data", ["pack", "out/p", "--dataset", "in/text.txt", "--tokenizer", "byte"]),
        ("models", ["list", "llama.json"]),
    ),
    *(
        ("models", ["audit", "hf", "--depth", "2", "--seq_len", "16"]),
        ("export", ["--path", "hf", "--output", "out/e"]),
    ),
)
# the tool and its words, more words, how the folder hf is spoiled
CASES = st.one_of(
    st.tuples(st.sampled_from(GOOD), st.just([]), st.lists(DAMAGE, min_size=1, max_size=2)),
    st.tuples(st.sampled_from(GOOD), st.lists(st.sampled_from(VALUES), max_size=2), st.just([])),
    st.tuples(COMMAND, st.just([]), st.just([])),
)


@cache
def _published():
    """{name: content} of a folder as it is on the hub."""
    publish(Path("out/hf"), "llama", shard="200KB")
    files = {path.name: path.read_bytes() for path in Path("out/hf").iterdir()}
    shutil.rmtree("out")
    Path("out").mkdir()
    assert {INDEX, CONFIG, FIRST, SECOND} <= files.keys(), files.keys()
    return files


def write(case):
    for folder in ("hf", "in"):
        Path(folder).mkdir()
    for name, content in _published().items():
        Path("hf", name).write_bytes(content)
    Path("evil.py").write_text("open('CODE_RAN', 'w')\n")
    Path("in/text.txt").write_text("some text")
    write_config(Path(), "llama")
    for name, kind, *steps in case[2]:
        path = Path("hf", name)
        content = path.read_bytes() if path.is_file() else b""
        if kind == "bytes":
            path.write_bytes(spoil_bytes(content, *steps))
        elif kind == "json" and content:
            path.write_bytes(spoil_text(content, *steps))
        elif kind == "header" and content:
            size = struct.unpack("<Q", content[:8])[0]
            header = spoil_text(content[8 : 8 + size], *steps)
            path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
        elif kind == "twice":
            shutil.copyfile(path, "hf/model-00009-of-00003.safetensors")
        elif content:
            path.unlink()
            made = {
                "folder": Path.mkdir,
                "pipe": os.mkfifo,
                "empty": Path.touch,
                "loop": lambda at: at.symlink_to(at.name),
            }
            made.get(kind, bool)(path)


def run(case):
    (tool, words), more, _ = case
    tools = {"import": convert_hf_to_dcp, "export": convert_dcp_to_hf, "data": data, "models": models}
    return tools[tool].main([*words, *more])


AREA = Area("tools", CASES, write, run, rejections=(1, 2))


@pytest.mark.parametrize("count", [60, pytest.param(800, marks=pytest.mark.slow)])
def test_a_tool_does_its_work_or_rejects_it_with_a_line(count, tmp_path, capsys):
    check(AREA, count, tmp_path, capsys)
