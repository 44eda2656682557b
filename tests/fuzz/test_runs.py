"""Run folders, with their checkpoints and exports: shown, converted, resumed, and begun from."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import tomli
import tomli_w
from hypothesis import strategies as st

from flame import train
from flame.checkpoint.commit import MARKER, METADATA, SavedFile, hash_file, write_marker
from flame.data import __main__ as data
from flame.preflight import __main__ as preflight
from scripts import convert_dcp_to_hf, convert_hf_to_dcp
from tests.fuzz.mutation import BYTES, DEEP, JSON, ODD, dump, spoil_bytes, spoil_text
from tests.fuzz.oracle import Area, check, fork, snapshot
from tests.tiny import write_config

RUN = Path("out/run")
STEP_2, STEP_4 = RUN / "checkpoint/step-2", RUN / "checkpoint/step-4"
JSONS = ("status.json", "environment.json", "model/config.json", "model/tokenizer.json", "model/tokenizer_config.json")
MARKERS = tuple(f"checkpoint/step-{step}/{MARKER}" for step in (2, 4))
STORED = tuple(f"checkpoint/step-{step}/{name}" for step in (2, 4) for name in (METADATA, "__0_0.distcp"))
EXPORTED = ("hf/step-4/config.json", "hf/step-4/model.safetensors", "hf/step-4/conversion_report.json")
FILES = ("config.toml", "metrics.jsonl", *JSONS, *MARKERS, *STORED, *EXPORTED)
FOLDERS = ("checkpoint", "checkpoint/step-2", "checkpoint/step-4", "model", "hf")
NAMES = (
    "lock",
    "comm_traces",
    "logs",
    "metrics.replaced.jsonl",
    "config.toml.tmp",
    "checkpoint/step-6",
    "checkpoint/step--1",
)
NAMES += (
    "checkpoint/step-٣",
    "checkpoint/step-002",
    "checkpoint/step-1e9",
    "checkpoint/replaced",
    "checkpoint/.deleting-step-2",
)
KEYS = (
    "checkpoint.folder",
    "job.dump_folder",
    "training.dataset",
    "model.config",
    "model.tokenizer_path",
    "data.lanes",
    "checkpoint",
)
KEYS += (
    "training.seq_len",
    "training.steps",
    "debug.seed",
    "data.skip",
    "model",
    "experimental.custom_import",
    "data.epochs",
)
EVIL = (
    ("posix", "system"),
    ("torch.serialization", "os.system"),
    ("pathlib", "os.system"),
    ("torch.storage", "_load_from_bytes"),
)
DAMAGE = st.one_of(
    st.tuples(st.sampled_from(FILES), st.just("bytes"), st.lists(BYTES, min_size=1, max_size=2)),
    st.tuples(
        st.sampled_from((*JSONS, *MARKERS, *EXPORTED[:1])), st.just("json"), st.lists(JSON, min_size=1, max_size=2)
    ),
    st.tuples(st.sampled_from(JSONS + MARKERS), st.just("text"), st.sampled_from((DEEP, *ODD))),
    st.tuples(st.sampled_from((*FILES, *FOLDERS)), st.just("gone")),
    st.tuples(st.sampled_from((*FILES, *NAMES)), st.sampled_from(("folder", "pipe", "loop", "empty"))),
    st.tuples(
        st.just("config.toml"), st.just("key"), st.sampled_from(KEYS), st.sampled_from((*ODD, "evil", "out/x", "in"))
    ),
    st.tuples(st.sampled_from(STORED[::2]), st.just("pickle"), st.sampled_from(EVIL), st.sampled_from((0, 2, 4))),
)
COMMANDS = ("preflight", "show", "verify", "convert", "import", "resume", "again", "rewind", "begin", "begin_hf")
# command, damages, whether the markers then hold the hashes of what is there
CASES = st.tuples(st.sampled_from(COMMANDS), st.lists(DAMAGE, max_size=2), st.booleans())


def _train(folder):
    """A finished run of four steps in folder/base, which was trained where each case has its copy."""
    Path(folder, "case").mkdir()
    os.chdir(folder / "case")
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_RDWR | os.O_CREAT), descriptor)
    _write_inputs()
    _become_rank()
    steps = ["--training.steps=4", "--checkpoint.interval=2", "--lr_scheduler.warmup_steps=1"]
    if train.main([*_flags(), *steps]) == 0:
        os.rename(RUN, folder / "base")


def _become_rank():
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def _write_inputs():
    Path("in").mkdir()
    write_config(Path("in"), "llama")
    Path("in/text.jsonl").write_text("".join(json.dumps({"text": f"document {i} is a text"}) + "\n" for i in range(60)))


def _flags(run=RUN):
    model = ["--model.config=in/llama.json", "--training.dataset=in/text.jsonl", f"--job.dump_folder={run}"]
    return [*model, "--training.seq_len=32", "--training.local_batch_size=2", "--data.lanes=2", "--metrics.log_freq=1"]


def write(case):
    _, damages, sign = case
    _write_inputs()
    Path("evil.py").write_text("open('CODE_RAN', 'w')\n")
    shutil.copytree("../base", RUN)
    for folder in (RUN, RUN / "checkpoint", RUN / "model"):
        (folder / "notes.txt").write_text(f"the user's own, in {folder}")
    for name, kind, *how in damages:
        _damage(RUN / name, kind, *how)
    for step in (STEP_2, STEP_4):
        if sign and not any(MARKER in name for name, *_ in damages):
            _sign(step)


def _damage(path, kind, *how):
    content = path.read_bytes() if path.is_file() else b""
    if kind == "bytes" and path.is_file():
        path.write_bytes(spoil_bytes(content, how[0]))
    elif kind == "json" and content:
        path.write_bytes(spoil_text(content, how[0]))
    elif kind == "text" and path.is_file():
        path.write_bytes(dump(how[0]))
    elif kind == "key" and content:
        path.write_bytes(_set_key(content, *how))
    elif kind == "pickle" and path.is_file():
        path.write_bytes(_pickle(*how))
    else:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if kind == "gone" or not path.parent.is_dir():
            return
        {"folder": Path.mkdir, "pipe": os.mkfifo, "loop": lambda at: at.symlink_to(at.name)}.get(kind, Path.touch)(path)


def _set_key(content, key, value):
    tables = tomli.loads(content.decode())
    *sections, name = key.split(".")
    table = tables
    for section in sections:
        table = table[section]
    table[name] = value
    try:
        return tomli_w.dumps(tables).encode()
    except (TypeError, UnicodeEncodeError):  # TOML has none of these
        return content


def _pickle(name, protocol):
    """A pickle that calls a function, which makes a file where the command runs."""
    module, function = name
    argument = pickle.dumps("touch CODE_RAN", protocol)[:-1]
    call = f"c{module}\n{function}\n".encode()
    if protocol == 4:  # in which names may have dots
        words = (pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() for word in name)
        call = b"".join(words) + pickle.STACK_GLOBAL
    head = pickle.PROTO + bytes([protocol]) if protocol else b""
    return head + call + argument.removeprefix(head) + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP


def _sign(checkpoint):
    """Write a marker that fits what is there."""
    marker = checkpoint / MARKER
    if not marker.is_file():
        return
    facts = json.loads(marker.read_bytes())
    paths = [checkpoint / name for name in facts["files"] if (checkpoint / name).is_file()]
    files = [SavedFile(path.name, path.stat().st_size, hash_file(path)) for path in paths]
    write_marker(checkpoint, files, {key: facts[key] for key in facts if key not in ("files", "versions", "xxh3_128")})


def run(case):
    command, damages, _ = case
    damaged = {name for name, *_ in damages}
    before = snapshot(str(RUN))
    code = _run(command)
    after = snapshot(str(RUN))
    if command not in ("resume", "again", "rewind"):
        changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        assert not changed, changed
        return code
    lost = [
        name
        for name in before
        if name.endswith(("notes.txt", METADATA, ".distcp"))
        and not any(name.startswith(str(RUN / other)) for other in damaged)
        and before[name] not in after.values()
    ]
    assert not lost, lost
    return code


def _run(command):
    os.environ["NGPU"] = "1"
    resume = [*_flags(), "--training.steps=5"]
    match command:
        case "preflight":
            return preflight.main(["--job.config_file=out/run/config.toml"])
        case "show":
            return data.main(["show", str(RUN), "--step=3"])
        case "verify":
            return data.main(["verify", str(RUN), "../base"])
        case "convert":
            return convert_dcp_to_hf.main(["--path", str(RUN), "--output=out/export"])
        case "import":
            return convert_hf_to_dcp.main(["--model", str(RUN / "hf/step-4"), "--checkpoint=out/imported"])
    _become_rank()
    match command:
        case "again":
            return train.main(["--job.config_file=out/run/config.toml"])
        case "rewind":
            return train.main([*resume, "--checkpoint.load_step=2"])
        case "begin" | "begin_hf":
            path = STEP_4 if command == "begin" else RUN / "hf/step-4"
            other = [*_flags("out/other"), f"--checkpoint.initial_load_path={path}", "--training.steps=1"]
            return train.main([*other, "--checkpoint.initial_load_in_hf"] if command == "begin_hf" else other)
    return train.main(resume)


AREA = Area("run folders", CASES, write, run, rejections=(1, 2, 3), shared=1)


@pytest.mark.parametrize("count", [8, pytest.param(400, marks=pytest.mark.slow)])
def test_a_run_folder_is_used_or_rejected_with_a_line_and_nothing_is_lost(count, tmp_path, capsys):
    training = fork.Process(target=_train, args=(tmp_path,))
    training.start()
    training.join()
    assert (tmp_path / "base").is_dir(), (tmp_path / "stderr").read_text()
    check(AREA, count, tmp_path, capsys)
