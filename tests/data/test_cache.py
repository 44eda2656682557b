"""Copies and indices of files: made once for all processes, again when the file changes, nothing of a kill left."""

import errno
import fcntl
import gzip
import lzma
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flame.data import cache
from flame.data.cache import decompress, make
from flame.errors import UserError
from tests.data.fakes import COMPRESS, build

MAKER = """
import logging, sys, time
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from flame.data import cache

cache.SECONDS = 1

def write(out):
    out.write(b"one " + bytes(3 << 20))
    out.flush()
    print("writing", flush=True)
    time.sleep(float(sys.argv[2]))
    out.write(b"two")
    yield 7

print(cache.make(sys.argv[1], ".made", "making", write))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache, empty."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flame"


def start(file, seconds):
    words = [sys.executable, "-c", MAKER, str(file), str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_one_process_makes_a_copy_and_the_others_say_that_they_wait_and_how_far_it_is(tmp_path, folder):
    (tmp_path / "a").write_bytes(b"content")
    first = start(tmp_path / "a", 5)
    assert first.stdout.readline() == "writing\n"
    others = [start(tmp_path / "a", 0) for _ in range(2)]
    made = first.communicate()[0].splitlines()[-1]
    assert Path(made).read_bytes() == b"one " + bytes(3 << 20) + b"two"
    for other in others:
        said = other.communicate()[0]
        assert "writing" not in said and said.endswith(f"{made}\n")
        assert said.count(f"{tmp_path}/a: waiting for another process that is at work in {folder}, 3 MiB so far\n") > 1


def test_what_a_killed_process_left_is_removed_and_its_work_is_done(tmp_path, folder):
    (tmp_path / "a").write_bytes(b"content")
    killed = start(tmp_path / "a", 600)
    assert killed.stdout.readline() == "writing\n"
    killed.kill()
    killed.communicate()
    assert list(folder.glob("*.tmp"))
    assert start(tmp_path / "a", 0).communicate()[0].startswith("writing\n")
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".made"]


def test_a_copy_is_made_anew_when_the_file_changes_and_not_otherwise(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"a"))
    copy = decompress(str(path))
    assert Path(copy).read_bytes() == b"a" and decompress(str(path)) == copy
    path.write_bytes(gzip.compress(b"b"))
    os.utime(path, (0, time.time() + 5))
    assert Path(decompress(str(path))).read_bytes() == b"b"


def test_a_failure_leaves_no_copy(tmp_path, folder):
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(os.urandom(9000))[:-5000])
    with pytest.raises(UserError) as error:
        decompress(str(tmp_path / "a.jsonl.xz"))
    assert error.value.setting == str(tmp_path / "a.jsonl.xz")
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_the_log_says_what_is_made_of_a_large_file_and_how_far_it_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "LARGE", 1)
    monkeypatch.setattr(cache, "SECONDS", 0)
    monkeypatch.setattr(cache, "CHUNK", 1 << 20)
    (tmp_path / "a").write_bytes(bytes(3 << 20))
    with caplog.at_level("INFO", "flame"):
        made = make(str(tmp_path / "a"), ".x", "copying", lambda out: iter([1 << 20, 1 << 20]))
    assert [record.getMessage() for record in caplog.records] == [
        f"copying {tmp_path}/a, 3 MiB, once",
        f"copying {tmp_path}/a: 1 MiB so far",
        f"copying {tmp_path}/a: 2 MiB so far",
    ]
    assert os.path.exists(made)


def test_of_another_node_only_what_a_process_left_a_day_ago_is_removed(tmp_path, folder):
    folder.mkdir(parents=True)
    for name, age in (("new", 0), ("old", 2 * cache.DAY)):
        path = folder / f"{name}.made.elsewhere.1.tmp"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    (tmp_path / "a").write_bytes(b"content")
    make(str(tmp_path / "a"), ".made", "making", lambda out: iter([]))
    assert [path.name for path in folder.glob("*.tmp")] == ["new.made.elsewhere.1.tmp"]


def no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize("fault", ["a file", "no locks", "full"])
def test_a_cache_that_cannot_be_used_is_named_with_the_variable_that_names_another(
    fault, tmp_path, folder, monkeypatch
):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9))
    if fault == "a file":
        (tmp_path / "cache").touch()
    elif fault == "no locks":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, resource.RLIM_INFINITY))
    try:
        with pytest.raises(UserError) as error:
            build(tmp_path / "a.jsonl.gz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    reason = {"a file": "Not a directory", "no locks": "No locks available", "full": "File too large"}[fault]
    assert error.value.setting == "HF_DATASETS_CACHE" and error.value.found == f"{folder}: {reason}"


@pytest.mark.parametrize(
    "padding", [bytes(512), bytes(20_000), gzip.compress(b"") + bytes(3)], ids=["one block", "more", "after a member"]
)
def test_zeros_that_pad_a_gzip_file_are_left_out(padding, tmp_path):
    content = b'{"text": "a"}\n{"text": "b"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content[:14]) + gzip.compress(content[14:]) + padding)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"c") + padding)
    assert build(tmp_path / "a.jsonl.gz")[0].rows.texts([0, 1]) == ["a", "b"]
    assert build(tmp_path / "b.txt.gz")[0].rows.texts([0]) == ["c"]


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "other", "tail"])
def test_a_damaged_compressed_file_is_a_bad_row_of_text_and_rejected_as_lines(tmp_path, ending, damage):
    def write(name, content):
        whole = COMPRESS[ending](content)
        damaged = {"cut": whole[:-6], "other": b"not compressed at all", "tail": whole + whole[:9]}[damage]
        (tmp_path / f"{name}{ending}").write_bytes(damaged)

    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    write("text/b.txt", b"a text " * 99)
    (source,) = build(tmp_path / "text")
    good, bad = source.rows.texts([0, 1])
    assert good == "a" and bad.place == f"{tmp_path}/text/b.txt{ending}" and "decompressed" in bad.reason
    for name, content in (
        ("c.jsonl", b'{"text": "a"}\n' * 9),
        ("c.json", b'[{"text": "a"}]'),
        ("c.parquet", b"PAR1" * 9),
    ):
        write(name, content)
        with pytest.raises(UserError) as error:
            build(tmp_path / f"{name}{ending}")
        assert error.value.setting == f"{tmp_path}/{name}{ending}" and "decompressed" in error.value.hint
