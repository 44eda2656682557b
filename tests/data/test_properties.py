"""What holds for any way of reading: the sequence of rows, each row once, and the shares."""

import json
import tempfile
from functools import cache
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame.data.source import Source
from tests.data.fakes import COMPRESS, Tape, Texts, build, documents, loader, three

STEPS = 60  # of 8 rows: past three epochs of the first source and twenty of the last


def uneven(kind):
    """Two in five documents of the first source have no tokens."""
    a, b = documents("a", 100, 20), documents("b", 60, 20)
    a = ["\u200b" if i % 5 < 2 else text for i, text in enumerate(a)]
    return [Source("a", 0.5, kind(a)), Source("b", 0.5, kind(b))]


def ranks(sources, world, state, workers, epochs):
    """The loaders of all ranks at a state, and their iterators."""
    loaders = [loader(sources, rank, world, batch=8 // world, workers=workers, epochs=epochs) for rank in range(world)]
    for each in loaders:
        each.load_state_dict(state)
    return loaders, [iter(each) for each in loaders]


def step(iterators):
    """The step's rows in their global order; None at the end of the data of any rank."""
    batches = [next(iterator, None) for iterator in iterators]
    if any(batch is None for batch in batches):
        return None
    return [row for same in zip(*(fed["input"].tolist() for fed, _ in batches), strict=True) for row in same]


@cache
def uninterrupted(sources, kind, epochs):
    _, (iterator,) = ranks(sources(kind), 1, {}, 0, epochs)
    return [rows for _ in range(STEPS) if (rows := step([iterator])) is not None]


PARTS = st.lists(  # steps done and saved, steps done and lost, ranks, workers
    st.tuples(st.integers(0, 25), st.integers(0, 3), st.sampled_from((1, 2, 4, 8)), st.sampled_from((0, 1, 3))),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("kind", [Texts, Tape])
@pytest.mark.parametrize("sources", [three, uneven])
@settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=PARTS)
def test_any_way_of_saving_restoring_and_changing_ranks_and_workers_gives_the_same_rows(sources, kind, epochs, parts):
    expected = uninterrupted(sources, kind, epochs)
    state, done = {}, 0
    for kept, lost, world, workers in parts:
        loaders, iterators = ranks(sources(kind), world, state, workers, epochs)
        begin = done
        for i in range(kept + lost + 1):
            if i == kept:
                state = json.loads(json.dumps({k: v for each in loaders for k, v in each.state_dict().items()}))
                done = begin + i
            if i == kept + lost or begin + i == STEPS:
                break
            rows = step(iterators)
            assert rows == (expected[begin + i] if begin + i < len(expected) else None)
            if rows is None:
                break
        for iterator in iterators:
            iterator.close()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("files", [1, 3, 8])
def test_every_row_of_any_number_of_files_is_read_once_by_any_ranks_and_workers(files, world, tmp_path):
    texts = [f"row {i:03d}".ljust(24, ".") for i in range(96)]  # with its EOS, just what a row takes
    for file in range(files):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[file::files]]
        (tmp_path / f"{file}.jsonl").write_text("".join(lines))
    for workers in (0, 1, 2, 4):
        read = []
        for rank in range(world):
            sources = build(tmp_path)
            run = loader(sources, rank, world, batch=12 // world, lanes=12, window=24, workers=workers, epochs=1)
            read += [bytes(row).decode() for fed, _ in run for row in fed["input"].tolist()]
        assert sorted(read) == texts, "each once, in another order"
        assert read != texts


def as_lines(texts, end, last_end):
    return end.join(json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) for text in texts) + last_end * end


def as_table(texts, ending):
    table, out = pyarrow.table({"text": texts, "other": range(len(texts))}), pyarrow.BufferOutputStream()
    if ending == ".parquet":
        pyarrow.parquet.write_table(table, out, row_group_size=2)
    else:
        with pyarrow.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return out.getvalue().to_pybytes()


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff"), min_size=1, max_size=30)
FILES = st.lists(  # documents of each file, and how they are written
    st.tuples(
        st.lists(TEXT, min_size=1, max_size=7),
        st.sampled_from((".jsonl", ".json", "array.json", "indented.json", ".txt", ".parquet", ".arrow")),
        st.sampled_from(("", *COMPRESS)),
        st.sampled_from(("utf-8", "utf-8-sig")),
        st.sampled_from(("\n", "\r\n")),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(files=FILES, streaming=st.booleans())
def test_documents_that_are_written_in_any_way_are_read_each_once_and_none_else(files, streaming):
    with tempfile.TemporaryDirectory() as folder:
        expected = []
        for number, (texts, ending, compression, encoding, end, last_end) in enumerate(files):
            if ending == ".txt":
                texts = texts[:1]
                content = texts[0].encode(encoding)
            elif ending in (".parquet", ".arrow"):
                content = as_table(texts, ending)
            elif ending in (".jsonl", ".json"):
                content = as_lines(texts, end, last_end).encode(encoding)
            else:
                indent = 1 if ending == "indented.json" else None
                content = json.dumps([{"text": text} for text in texts], indent=indent).encode(encoding)
            path = Path(folder, f"{number}{ending}{compression}")
            path.write_bytes(COMPRESS[compression](content) if compression else content)
            expected += texts
        (source,) = build(folder, streaming=streaming)
        assert sorted(row for rows in source.blocks(5) for row in rows) == sorted(expected)


def test_shares_of_tokens_hold_to_half_a_point_after_2000_sequences():
    lengths, weights = {"s": 50, "m": 500, "l": 5000}, {"s": 0.5, "m": 0.3, "l": 0.2}
    sources = [Source(n, weights[n], Texts(documents(n, 400, length))) for n, length in lengths.items()]
    run = loader(sources, batch=80, seq_len=2048, lanes=64, window=128)
    running = iter(run)
    for sequences, points in ((160, 5), (480, 2), (2000, 0.5)):
        while run.state_dict()["sequence"] < sequences:
            next(running)
        counts = {name: tokens for name, (tokens, _) in run.counts().items()}
        for name, tokens in counts.items():
            assert abs(100 * tokens / sum(counts.values()) - 100 * weights[name]) < points, (sequences, counts)
