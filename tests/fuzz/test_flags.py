"""Flags and TOML files: parsed, checked, recorded and parsed again."""

import os
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import tomli_w
from hypothesis import strategies as st

from flame import train
from flame.config import legacy
from flame.config.parser import parse, recorded, setting_types, to_toml
from flame.errors import PREEMPTED, UserError
from flame.preflight.__main__ import ANSWERED, DRY_RUN, main
from tests.fuzz.mutation import BYTES, NUMBERS, ODD, spoil_bytes
from tests.fuzz.oracle import Area, check
from tests.tiny import write_config

TYPES = setting_types()
PATHS = sorted({*TYPES, *legacy.RENAMED, *legacy.CHANGED})
WORDS = (
    *("", "true", "false", "none", "auto", "byte", "stdlib", "in/llama.json", "in", "in/text.txt", "a,b", "1,2", "1-2"),
    *(
        "~/x",
        "~nosuch/x",
        "/proc/x",
        "/dev/null",
        "../x",
        "x" * 300,
        "é",
        "\udce9",
        "\n[",
        "[",
        "*",
        "{}",
        "-1",
        "9" * 5000,
    ),
    *("in/text.txt,in/text.txt", "0.5,0.5", "float32", "bfloat16", "full", "selective", "1h", "9" * 400 + "d", "a/b"),
)
VALUES = (*WORDS, *map(str, NUMBERS))
NOT_PATHS = ("", "x", "training", "job.config_file", "help", "dry_run", "data.sources")
KEYS = ("path", "name", "weight", "column", "split", "subset", "data_dir", "data_files", "x")


ANY_VALUE = st.sampled_from(VALUES) | st.text("ab0.,-é[", max_size=5)


def _right(kind):
    """Lists of one value of a type, as far as the type tells."""
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind)).map(lambda value: [value])
    if kind is bool:
        return st.sampled_from(([], ["true"], ["0"]))
    return st.sampled_from(
        (["1"], ["2"], ["8"], ["0"], ["0.5"], ["1e30"]) if kind in (int, float, int | None) else (["byte"], ["a,b"])
    )


@st.composite
def flags(draw):
    """The words of some flags, whose names are mostly right."""
    words = []
    for _ in range(draw(st.integers(0, 4))):
        path = draw(st.sampled_from((*PATHS, *NOT_PATHS)))
        section, _, name = path.rpartition(".")
        spelled = draw(
            st.sampled_from((path, path, path, f"no_{path}", f"{section}.no_{name}", path.replace("_", "-")))
        )
        values = draw(st.one_of(_right(TYPES.get(path)), st.lists(ANY_VALUE, max_size=2)))
        words += [f"--{spelled}={values[0]}"] if len(values) == 1 else [f"--{spelled}", *values]
    return words


SOURCES = st.dictionaries(
    st.sampled_from(KEYS), st.sampled_from((*ODD, "in/text.txt", "in", "stdlib", "train")), max_size=4
)
TABLES = st.one_of(
    st.dictionaries(st.sampled_from(PATHS), st.sampled_from((*ODD, *WORDS)), max_size=4),
    st.lists(SOURCES, max_size=3).map(lambda sources: {"data.sources": sources}),
)
# processes, flags, the settings of a TOML, how that is spoiled
CASES = st.tuples(
    st.sampled_from(("1", "2", "3", "8", "64")), flags(), st.none() | TABLES, st.just([]) | st.lists(BYTES, max_size=2)
)


def write(case):
    _, _, tables, steps = case
    folder = Path("in")
    folder.mkdir()
    write_config(folder, "llama")
    (folder / "text.txt").write_text("some text")
    if tables is not None:
        (folder / "job.toml").write_bytes(spoil_bytes(_to_toml(tables), steps))


def _to_toml(tables):
    """Dotted keys as tables; of what TOML cannot hold, nothing."""
    root = {}
    for path, value in tables.items():
        *sections, name = path.split(".")
        table = root
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
        try:
            tomli_w.dumps(root).encode()
        except (TypeError, UnicodeEncodeError):
            del table[name]
    return tomli_w.dumps(root).encode()


def arguments(case):
    """The command line of a case, which is a whole job without its own flags."""
    _, flags, tables, _ = case
    file = [] if tables is None else ["--job.config_file=in/job.toml"]
    return [
        "--model.config=in/llama.json",
        "--training.dataset=in/text.txt",
        "--job.dump_folder=out/run",
        *file,
        *flags,
    ]


def run(case):
    os.environ["NGPU"] = case[0]
    argv = arguments(case)
    code = main(argv)
    if code not in (0, DRY_RUN):
        return 0 if code == ANSWERED else code
    kept = recorded(parse(argv))
    Path("out/recorded.toml").write_text(to_toml(kept), encoding="utf-8")
    again = parse(["--job.config_file=out/recorded.toml"])
    again.job.config_file = kept.job.config_file
    assert again == kept
    try:
        assert recorded(again) == kept
    except UserError as error:
        raise AssertionError("what was recorded is rejected") from error
    return 0


AREA = Area("flags and TOML", CASES, write, run)


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_flags_and_tomls_are_taken_or_rejected_with_a_line_and_recorded_as_they_are(count, tmp_path, capsys):
    check(AREA, count, tmp_path, capsys)


EXTREMES = ("0", "-1", "1", "3", "1e-300", "0.5", "1e300", *(str(2**n - 1) for n in (8, 16, 31, 32, 48, 62)), "1e5")
LEFT_OUT = ("job.dump_folder", "training.steps", "job.print_config", "experimental.custom_import")
SOME = [path for path in TYPES if path not in LEFT_OUT]


def _value(path):
    kind = TYPES[path]
    numbers = kind in (int, float, int | None, float | None)
    return (
        st.sampled_from(EXTREMES).map(lambda value: [value])
        if numbers
        else _right(kind) | st.lists(ANY_VALUE, max_size=1)
    )


ON_A_RANK = st.lists(
    st.sampled_from(SOME).flatmap(lambda path: st.tuples(st.just(path), _value(path))), min_size=1, max_size=2
)


def write_job(case):
    write(("1", [], None, []))


def train_a_step(case):
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    job = ["--model.config=in/llama.json", "--training.dataset=in/text.txt", "--job.dump_folder=out/run"]
    job += ["--training.seq_len=32", "--training.local_batch_size=2", "--data.lanes=2"]
    flags = [word for path, values in case for word in (f"--{path}", *values)]
    code = main([*job, *flags, "--training.steps=2"]) or train.main([*job, *flags, "--training.steps=2"])
    return 0 if code in (PREEMPTED, DRY_RUN) else code


RANK_AREA = Area("flags on a rank", ON_A_RANK, write_job, train_a_step, rejections=(2, 3), shared=1)


@pytest.mark.parametrize("count", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_flags_that_are_accepted_train(count, tmp_path, capsys):
    check(RANK_AREA, count, tmp_path, capsys)
