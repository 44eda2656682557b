"""A checkpoint is complete when its marker says so and its files are what the marker says, and not before."""

import json
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from flame.checkpoint.commit import (
    MARKER,
    Status,
    _hash_json,
    archive,
    complete_steps,
    inspect_checkpoint,
    mark_for_deletion,
    read_marker,
    scan_checkpoints,
    verify_hashes,
)
from flame.checkpoint.metadata import METADATA
from flame.checkpoint.reader import load
from flame.checkpoint.writer import Writer
from flame.convert.hf_to_dcp import convert_hf_to_dcp
from flame.convert.hf_weights import read_weights
from flame.errors import UserError

DATA = "__0_0.distcp"


def save(checkpoint, **facts):
    state = {"weight": torch.arange(4096.0), "train_state": {"step": 3}}
    dcp.save(state, storage_writer=Writer(checkpoint, {"resumable": True, **facts}), no_dist=True)
    return checkpoint


def save_unmarked(checkpoint):
    dcp.save({"weight": torch.arange(4096.0), "train_state": {"step": 3}}, checkpoint_id=str(checkpoint), no_dist=True)
    return checkpoint


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def delete(path):
    path.unlink()


def found(checkpoint):
    """What is wrong, by names and sizes or else by hashes; at most one line."""
    lines = [line for line in [inspect_checkpoint(checkpoint).corruption] if line] or verify_hashes(checkpoint)
    assert len(lines) < 2
    return lines[0] if lines else None


def test_the_marker_lists_every_file_and_holds_the_facts(tmp_path):
    checkpoint = save(tmp_path / "step-3", step=3, tokens=12)
    marker = read_marker(checkpoint)
    assert {path.name for path in checkpoint.iterdir()} == {MARKER, *marker["files"]} == {MARKER, METADATA, DATA}
    assert marker["files"][DATA]["size"] == (checkpoint / DATA).stat().st_size
    assert (marker["step"], marker["tokens"]) == (3, 12) and "torch" in marker["versions"]
    assert found(checkpoint) is None and complete_steps(tmp_path) == [3]
    assert scan_checkpoints(tmp_path) == {3: Status(resumable=True)}


@pytest.mark.parametrize(
    "name, damage, words",
    [
        (DATA, truncate, "bytes, must have"),
        (DATA, flip, "other bytes than were saved"),
        (DATA, delete, "is missing"),
        (METADATA, truncate, "bytes, must have"),
        (METADATA, flip, "other bytes than were saved"),
        (METADATA, delete, "is missing"),
        (MARKER, truncate, "is corrupted"),
        (MARKER, flip, "is corrupted"),
        (MARKER, delete, "is missing"),
    ],
)
def test_corruption_is_found_and_the_file_is_named(name, damage, words, tmp_path):
    checkpoint = save(tmp_path / "step-3")
    damage(checkpoint / name)
    problem = found(checkpoint)
    assert name in problem and words in problem
    assert complete_steps(tmp_path) == ([3] if "other bytes" in words else [])


def test_a_number_changed_in_the_marker_is_found(tmp_path):
    checkpoint = save(tmp_path / "step-3", step=3)
    text = (checkpoint / MARKER).read_text()
    (checkpoint / MARKER).write_text(text.replace('"step": 3', '"step": 4'))
    assert f"{MARKER} is corrupted" in inspect_checkpoint(checkpoint).corruption


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"xxh3_128": 1}', ""])
def test_a_file_that_is_not_a_marker_is_corrupted(content, tmp_path):
    checkpoint = save(tmp_path / "step-3")
    (checkpoint / MARKER).write_text(content)
    assert f"{MARKER} is corrupted" in inspect_checkpoint(checkpoint).corruption


def test_each_rank_hashes_its_share_of_the_files(tmp_path):
    checkpoint = save(tmp_path / "step-3")
    for name in (DATA, METADATA):
        flip(checkpoint / name)
    each = [verify_hashes(checkpoint, rank, 3) for rank in range(3)]
    assert sorted(len(lines) for lines in each) == [0, 1, 1]
    assert sorted(line for lines in each for line in lines) == sorted(verify_hashes(checkpoint))


def test_what_torch_says_of_a_damaged_file_is_kept(tmp_path):
    file = save(tmp_path / "step-3") / DATA
    file.write_bytes(file.read_bytes().replace(b"PK\x01\x02", b"PK\0\0"))
    with pytest.raises(UserError, match=r"a damaged file \(RuntimeError: .*archive is corrupted"):
        load({"weight": torch.zeros(4096)}, tmp_path / "step-3", no_dist=True)


def test_a_file_whose_second_half_was_not_written_is_named(tmp_path):
    file = save_unmarked(tmp_path / "step-3") / DATA
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(UserError, match=r"a damaged file \("):
        load({"weight": torch.zeros(4096)}, tmp_path / "step-3", no_dist=True)


def test_a_marker_that_is_damaged_once_it_was_found_is_a_problem_on_every_rank(tmp_path):
    checkpoint = save(tmp_path / "step-3")
    flip(checkpoint / MARKER)
    assert all(MARKER in verify_hashes(checkpoint, rank, 2)[0] for rank in range(2))


@pytest.mark.parametrize(
    "name, damage, words",
    [
        (None, None, None),
        (DATA, truncate, f"{DATA} has"),
        (DATA, delete, f"{DATA} is missing"),
        (METADATA, truncate, f"{METADATA} is corrupted"),
        (METADATA, delete, f"{METADATA} is missing"),
    ],
)
def test_a_checkpoint_without_a_marker_is_checked_against_its_metadata(name, damage, words, tmp_path):
    checkpoint = save_unmarked(tmp_path / "step-3")
    if name:
        damage(checkpoint / name)
        assert words in inspect_checkpoint(checkpoint).corruption and complete_steps(tmp_path) == []
    else:
        assert inspect_checkpoint(checkpoint) == Status(resumable=True) and complete_steps(tmp_path) == [3]


def test_overwriting_a_checkpoint_leaves_no_old_file(tmp_path):
    checkpoint = save(tmp_path / "step-3", step=3)
    (checkpoint / "__7_0.distcp").write_bytes(b"of a rank that there is no longer")
    (checkpoint / f"{MARKER}.4242.tmp").write_bytes(b"of a save that was killed")
    save(checkpoint, step=4)
    assert {path.name for path in checkpoint.iterdir()} == {MARKER, METADATA, DATA}
    assert read_marker(checkpoint)["step"] == 4 and found(checkpoint) is None


def test_only_folders_of_steps_count(tmp_path):
    for name in ("step-2", "step-10", "step-10-hf", "replaced"):
        save(tmp_path / name)
    (tmp_path / "step-4").write_text("a file")
    (tmp_path / "step-6").mkdir()
    assert complete_steps(tmp_path) == [2, 10]
    found = scan_checkpoints(tmp_path)
    assert list(found) == [2, 6, 10] and METADATA in found[6].corruption


def test_an_archived_checkpoint_overwrites_no_other(tmp_path):
    names = [archive(save(tmp_path / "step-3", step=step)).name for step in (1, 2, 3)]
    assert names == ["step-3", "step-3.2", "step-3.3"]
    assert [json.loads((tmp_path / "replaced" / name / MARKER).read_text())["step"] for name in names] == [1, 2, 3]


def test_a_checkpoint_made_of_safetensors_is_complete_and_cannot_be_resumed(tmp_path):
    save_file({"weight": torch.arange(64.0)}, tmp_path / "model.safetensors")
    convert_hf_to_dcp(read_weights([tmp_path / "model.safetensors"]), tmp_path / "step-0", piece_bytes=64)
    checkpoint = tmp_path / "step-0"
    assert found(checkpoint) is None and not inspect_checkpoint(checkpoint).resumable
    assert len(read_marker(checkpoint)["files"]) == 5  # four pieces and .metadata


def sign_marker(checkpoint, fields):
    """Sign a marker again with other fields; None takes one out."""
    marker = json.loads((checkpoint / MARKER).read_text()) | fields
    content = {name: value for name, value in marker.items() if value is not None and name != "xxh3_128"}
    (checkpoint / MARKER).write_text(json.dumps({**content, "xxh3_128": _hash_json(content)}))


@pytest.mark.parametrize(
    "fields",
    [
        {"files": None},
        {"files": []},
        {"files": {DATA: 7}},
        {"files": {DATA: {"size": [1], "xxh3_128": "a"}}},
        {"files": {DATA: {"size": 1}}},
        {"files": {"../step-2/.metadata": {"size": 1, "xxh3_128": "a"}}},
        {"files": {"/dev/zero": {"size": 0, "xxh3_128": "a"}}},
        {"resumable": None},
        {"resumable": "yes"},
        {"tokens": [1]},
        {"config": 5},
    ],
)
def test_a_whole_marker_with_other_fields_may_be_of_another_version_and_is_not_called_corrupted(fields, tmp_path):
    checkpoint = save(tmp_path / "step-3")
    sign_marker(checkpoint, fields)
    for look in (inspect_checkpoint, verify_hashes, read_marker):
        with pytest.raises(UserError) as error:
            look(checkpoint)
        assert error.value.setting == str(checkpoint / MARKER) and "move it away" in error.value.hint


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, '{"xxh3_128": "", "a": ' + "[" * 900 + "]" * 900 + "}"]
)
def test_a_marker_that_is_nested_too_deep_is_corrupted(content, tmp_path):
    checkpoint = save(tmp_path / "step-3")
    (checkpoint / MARKER).write_text(content)
    assert f"{MARKER} is corrupted" in inspect_checkpoint(checkpoint).corruption


@pytest.mark.parametrize("name", [MARKER, METADATA, DATA])
@pytest.mark.parametrize("marked", [True, False])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name, marked, tmp_path):
    checkpoint = (save if marked else save_unmarked)(tmp_path / "step-3")
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    try:
        assert f"{name} is not a file" in inspect_checkpoint(checkpoint).corruption
    except UserError as error:
        assert error.setting == str(checkpoint / name)


@pytest.mark.parametrize("name", [DATA, METADATA, MARKER, f"{METADATA}.tmp"])
def test_a_save_writes_through_no_link_in_the_place_of_its_files(name, tmp_path):
    (tmp_path / "theirs").write_text("kept")
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3" / name).symlink_to(tmp_path / "theirs")
    checkpoint = save(tmp_path / "step-3")
    assert (tmp_path / "theirs").read_text() == "kept" and found(checkpoint) is None


def test_of_a_checkpoint_that_is_a_link_the_link_alone_is_deleted(tmp_path):
    elsewhere = save(tmp_path / "elsewhere")
    (tmp_path / "step-3").symlink_to(elsewhere)
    mark_for_deletion(tmp_path / "step-3")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"] and found(elsewhere) is None
