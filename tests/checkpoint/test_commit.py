"""A checkpoint is complete when its marker says so and its files are what the marker says, and not before."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from flame.checkpoint.commit import (
    MARKER,
    METADATA,
    Status,
    archive,
    complete_steps,
    inspect_checkpoint,
    read_marker,
    scan_checkpoints,
    verify_hashes,
)
from flame.checkpoint.writer import Writer
from flame.convert.hf_to_dcp import convert_hf_to_dcp
from flame.convert.hf_weights import read_weights

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
