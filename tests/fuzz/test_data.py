"""Data files of every format: packed, and read by a job's loader."""

import bz2
import gzip
import io
import lzma
import os
import sys
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from flame.config.parser import parse
from flame.data import __main__ as data
from flame.data.loader import build_dataloader
from flame.data.megatron import write as write_megatron
from flame.data.source import build_sources
from flame.data.tokenize import load_tokenizer
from flame.errors import REFUSED, UserError
from flame.preflight import __main__ as preflight
from tests.fuzz.mutation import BYTES, JSON, ODD, dump, spoil_bytes, spoil_text
from tests.fuzz.oracle import Area, check
from tests.tiny import write_config

TEXTS = [f"document {i}: " + "lorem ipsum é日本 " * (1 + i % 4) for i in range(40)]
IDS = [[i, 2, 3] for i in range(40)]
ROWS = (*ODD, [1, 2], [2**40], [2**70], [-1], "\u200b", "\ufeffx", ["a", 1], [[1]], {"text": "x"})
COLUMNS = {  # what a column of an Arrow table may be
    "text": pa.array(TEXTS),
    "large": pa.array(TEXTS, pa.large_string()),
    "view": pa.array(TEXTS, pa.string_view()),
    "binary": pa.array([text.encode() for text in TEXTS]),
    "latin": pa.array([text.encode("latin-1", "ignore") for text in TEXTS], pa.binary()).view(pa.string()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "nulls": pa.nulls(40),
    "some nulls": pa.array([text if i % 3 else None for i, text in enumerate(TEXTS)]),
    "none": pa.array([], pa.string()),
    "struct": pa.array([{"values": text} for text in TEXTS]),
    "map": pa.array([[("a", 1)]] * 40, pa.map_(pa.string(), pa.int64())),
    "ids": pa.array(IDS),
    "small ids": pa.array(IDS, pa.list_(pa.int8())),
    "fixed ids": pa.array(IDS, pa.list_(pa.uint64(), 3)),
    "large ids": pa.array(IDS, pa.large_list(pa.int32())),
    "null ids": pa.array([row if i % 3 else [None, 1] for i, row in enumerate(IDS)]),
    "floats": pa.array([[0.5]] * 40),
    "nested": pa.array([[[1]]] * 40),
    "texts": pa.array([["a", "b"]] * 40),
    "numbers": pa.array(range(40)),
    "dates": pa.array(range(40), pa.timestamp("ns", "Europe/Berlin")),
    "decimals": pa.array([None] * 40, pa.decimal128(9, 2)),
    "truths": pa.array([True] * 40),
}
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}
FORMATS = ("jsonl", "json", "txt", "parquet", "arrow", "saved", "splits", "megatron")
# format, compression, column, odd rows, what is spoiled of which file, layout, options
CASES = st.tuples(
    st.sampled_from(FORMATS),
    st.sampled_from(("", "", "", *COMPRESS)),
    st.sampled_from(("text", *COLUMNS)),
    st.lists(st.tuples(st.integers(0, 39), st.sampled_from(ROWS)), max_size=3),
    st.one_of(
        st.just((0, [])),
        st.tuples(st.integers(0, 5), st.lists(BYTES, max_size=3)),
        st.tuples(st.integers(0, 5), st.lists(JSON, min_size=1, max_size=2)),
    ),
    st.sampled_from(("folder", "file", "pattern", "two", "mixed", "hidden", "linked", "files", "split")),
    st.sets(st.sampled_from(("streaming", "column", "all bad")), max_size=3).map(sorted),
)


def write(case):
    kind, compression, column, odd, (number, steps), layout, _ = case
    files = {name: COMPRESS[compression](content) for name, content in _files(kind, column, repr(odd), odd).items()}
    spoiled = sorted(files)[number % len(files)]
    if steps and steps[0][0] in ("set", "delete"):
        if spoiled.endswith(".json") and not compression:
            files[spoiled] = spoil_text(files[spoiled], steps)
    else:
        files[spoiled] = spoil_bytes(files[spoiled], steps)
    names = {name: name + compression for name in files}
    if layout == "two":
        files |= {f"more/{name}": content for name, content in files.items()}
    for name, content in files.items():
        path = Path("in", names.get(name, name + compression))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if layout == "mixed":
        Path("in/other.txt" if kind != "txt" else "in/other.jsonl").write_text('{"text": "other"}')
    if layout == "hidden":
        Path("in/.note.csv").write_text("x")
    if layout == "linked":
        Path("in/loop").symlink_to(".")
    write_config(Path(), "llama")


def _files(kind, column, _, odd):
    """{name: content} of a data set in a format."""
    if kind in ("jsonl", "json"):
        rows = [{"text": text} for text in (IDS if column == "ids" else TEXTS)]
        for place, value in odd:
            rows[place] = {"text": value} if place % 2 else value
        if kind == "jsonl":
            return {"a.jsonl": b"\n".join(map(dump, rows)), "b.jsonl": b'{"text": "b"}\n' * 9}
        return {"a.json": dump(rows)}
    if kind == "txt":
        return {f"{i}.txt": text.encode() for i, text in enumerate(TEXTS[:5])}
    if kind == "megatron":
        return _megatron()
    return _arrow(kind, column)


@cache
def _megatron():
    prefix = Path("out/good")
    write_megatron(prefix, (np.array(row) for row in IDS), 257)
    return {f"a{end}": Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx")}


@cache
def _arrow(kind, column):
    table = pa.table({"text": COLUMNS[column], "n": pa.array(range(len(COLUMNS[column])))})
    if kind == "parquet":
        pq.write_table(table, buffer := io.BytesIO(), row_group_size=16)
        return {"a.parquet": buffer.getvalue()}
    with pa.ipc.new_stream(buffer := io.BytesIO(), table.schema) as writer:
        writer.write_table(table, 16)
    if kind == "arrow":
        return {"a.arrow": buffer.getvalue()}
    saved = {"data-00000-of-00001.arrow": buffer.getvalue()}
    state = {"_data_files": [{"filename": next(iter(saved))}], "_fingerprint": "0", "_format_columns": None}
    state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": "train"}
    saved |= {"state.json": dump(state), "dataset_info.json": b"{}"}
    if kind == "saved":
        return saved
    return {"dataset_dict.json": b'{"splits": ["train"]}'} | {f"train/{name}": saved[name] for name in saved}


def run(case):
    kind, compression, _, _, _, layout, options = case
    first = {"jsonl": "a.jsonl", "txt": "0.txt", "megatron": "a.bin"}.get(kind, f"a.{kind}") + compression
    pattern = {"jsonl": "*.jsonl", "megatron": "*.idx"}.get(kind, f"*.{kind}") + compression
    path = {"file": f"in/{first}", "pattern": f"in/{pattern}", "two": "in,in/more"}.get(layout, "in")
    data_files = {"files": pattern, "split": "a.*,a.*"}.get(layout) if kind not in ("saved", "splits") else None
    split = "train[:50%]" if layout == "split" else None
    bad = "1e9" if "all bad" in options else "0.01"
    flags = ["--model.config=llama.json", f"--training.dataset={path}", f"--data.max_bad_rows={bad}", "--data.lanes=2"]
    words = ["pack", "out/packed", "--dataset", path, "--tokenizer", "byte", "--max-bad-rows", bad]
    for name, value in (("data_files", data_files), ("dataset_split", split)):
        if value and layout != "two":
            flags.append(f"--training.{name}={value}")
            words += [f"--{name.replace('_', '-')}", value]
    if "streaming" in options:
        flags.append("--training.streaming")
        words.append("--streaming")
    if "column" in options:
        flags.append("--data.column=text")
        words += ["--column", "text"]
    flags += ["--training.seq_len=64", "--job.dump_folder=out/run", "--data.epochs=1"]
    os.environ["NGPU"] = "1"
    return preflight.main(flags) or data.main(words) or _load(flags)


def _load(flags):
    """Read some batches as a job does."""
    try:
        config = parse(flags)
        sources = build_sources(config.training, config.data)
        loader = build_dataloader(
            sources=sources, dp_world_size=1, dp_rank=0, tokenizer=load_tokenizer(config), job_config=config
        )
        batches = iter(loader)
        for _ in islice(batches, 4):
            loader.state_dict()
        batches.close()
    except UserError as error:
        print(f"flame: {error}", file=sys.stderr)
        return REFUSED
    return 0


AREA = Area("data files", CASES, write, run)


@pytest.mark.parametrize("count", [150, pytest.param(4_000, marks=pytest.mark.slow)])
def test_data_files_are_read_or_rejected_with_a_line(count, tmp_path, capsys):
    check(AREA, count, tmp_path, capsys)
