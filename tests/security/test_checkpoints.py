"""No code that a checkpoint names is run, wherever one is read: resume, initial weights, tools and conversions."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from flame.checkpoint.commit import inspect_checkpoint, read_metadata
from flame.checkpoint.metadata import METADATA
from flame.checkpoint.reader import load
from flame.checkpoint.writer import Writer
from flame.convert.dcp_file import CorruptedError, read_tensors
from flame.data.__main__ import main as data
from flame.errors import UserError
from tests.checkpoint.managed import Job
from tests.convert.test_commands import to_hf
from tests.security.forged import codes, forge_metadata, forge_value, sign

NAMES = sorted(codes(Path("ran")))
VALUE = "train_state.step"


def save(checkpoint):
    state = {"weight": torch.arange(8.0), "train_state": {"step": 3}}
    dcp.save(state, storage_writer=Writer(checkpoint, {"resumable": True}), no_dist=True)
    return checkpoint


def as_torch_reads(checkpoint):
    """Load all of a checkpoint with torch's own reader and planner."""
    state = {"weight": torch.zeros(8), "train_state": {"step": 0}}
    dcp.load(state, checkpoint_id=str(checkpoint), no_dist=True)


@pytest.mark.parametrize("name", NAMES)
def test_metadata_that_names_code_is_rejected_and_runs_none(name, tmp_path):
    checkpoint, ran = save(tmp_path / "step-3"), tmp_path / "ran"
    forge_metadata(checkpoint, codes(ran)[name])
    for read in (read_metadata, read_tensors, lambda path: load({"weight": torch.zeros(8)}, path, no_dist=True)):
        with pytest.raises(UserError) as error:
            read(checkpoint)
        assert error.value.setting == str(checkpoint / METADATA)
    (checkpoint / "complete.json").unlink()  # what decides then is .metadata
    assert METADATA in inspect_checkpoint(checkpoint).corruption
    assert not ran.exists()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"a class of torch that is changed"}))
def test_the_forged_metadata_of_these_tests_would_run_with_torchs_reader(name, tmp_path):
    checkpoint, ran = save(tmp_path / "step-3"), tmp_path / "ran"
    forge_metadata(checkpoint, codes(ran)[name])
    as_torch_reads(checkpoint)
    assert ran.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_value_that_names_code_is_rejected_and_runs_none(zipped, tmp_path):
    checkpoint, ran = save(tmp_path / "step-3"), tmp_path / "ran"
    forge_value(checkpoint, VALUE, ran, zipped)
    with pytest.raises(UserError) as error:
        load({"train_state": {"step": 0}}, checkpoint, no_dist=True)
    assert error.value.setting == f"{checkpoint}: {VALUE}" and not ran.exists()
    as_torch_reads(checkpoint)
    assert ran.exists()  # with torch's planner it would


def test_metadata_of_one_rank_is_not_read_in_the_place_of_all(tmp_path):
    checkpoint, ran = save(tmp_path / "step-3"), tmp_path / "ran"
    forge_metadata(checkpoint, codes(ran)["os.mkdir"])
    (checkpoint / METADATA).rename(checkpoint / f"__0{METADATA}")
    with pytest.raises(UserError):
        load({"weight": torch.zeros(8)}, checkpoint, no_dist=True)
    assert not ran.exists()


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "..", "", "sub/__0_0.distcp", "__0_0\0.distcp"])
def test_files_outside_of_a_checkpoint_are_not_read(file, tmp_path):
    checkpoint = save(tmp_path / "step-3")
    metadata = FileSystemReader(checkpoint).read_metadata()
    for place in metadata.storage_data.values():
        place.relative_path = file
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="is not a file of the checkpoint"):
        read_metadata(checkpoint)


def forge(checkpoint, how, ran):
    if how == "value":
        forge_value(checkpoint, VALUE, ran)
    else:
        forge_metadata(checkpoint, codes(ran)[how])


FORGED = ["value", "os.mkdir", "os.system in pathlib", "_load_from_bytes"]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("how", FORGED)
@pytest.mark.parametrize("start", ["resume", "initial", "initial, whole"])
def test_a_job_that_resumes_or_starts_from_a_forged_checkpoint_runs_no_code(start, how, tmp_path):
    Job(tmp_path / "run").run(2)
    checkpoint, ran = tmp_path / "run/checkpoint/step-2", tmp_path / "ran"
    forge(checkpoint, how, ran)
    initial = {"initial_load_path": str(checkpoint), "initial_load_model_only": start == "initial"}
    folder, settings = (tmp_path / "run", {}) if start == "resume" else (tmp_path / "new", initial)
    if (start, how) == ("initial", "value"):  # it is not even read
        Job(folder, **settings).run(4)
    else:
        with pytest.raises(UserError) as error:
            Job(folder, **settings).run(4)
        assert str(checkpoint) in error.value.setting
    assert not ran.exists()


@pytest.mark.parametrize("how", ["unforged", *FORGED])
def test_the_tools_run_no_code_of_a_run(how, run, tmp_path, capsys):
    ran, output = tmp_path / "ran", tmp_path / "out"
    if how != "unforged":
        forge(run / "checkpoint/step-3", how, ran)
    shown = data(["show", str(run), "--step", "4"])
    converted = to_hf.main(["--path", str(run), "--output", str(output)])
    assert not ran.exists()
    # a value is no part of the model, which is all that is converted
    assert (shown, converted) == ({"unforged": 0}.get(how, 2), 0 if how in ("unforged", "value") else 2)
    assert capsys.readouterr().err.count("\n") == (shown > 0) + (converted > 0)


@pytest.mark.parametrize("length, sizes", [(2**62, None), (None, (2**40, 2**20)), (2**62, (2**40, 2**20))])
def test_sizes_that_no_file_can_hold_cost_no_memory(length, sizes, tmp_path):
    checkpoint = save(tmp_path / "step-3")
    metadata = FileSystemReader(checkpoint).read_metadata()
    info = metadata.state_dict_metadata["weight"]
    (index,) = [index for index in metadata.storage_data if index.fqn == "weight"]
    place = metadata.storage_data.pop(index)
    if sizes:
        info.size, info.chunks = torch.Size(sizes), [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size(sizes))]
        index = MetadataIndex("weight", (0, 0))
    place.length = length or place.length
    metadata.storage_data[index] = place
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    sign(checkpoint)
    with pytest.raises(CorruptedError):
        read_tensors(checkpoint)["weight"].read()
    with pytest.raises((UserError, CheckpointException)):
        load({"weight": torch.zeros(8)}, checkpoint, no_dist=True)


def test_a_file_that_the_marker_does_not_list_is_not_read(tmp_path):
    checkpoint = save(tmp_path / "step-3")
    (checkpoint / "__0_0.distcp").rename(tmp_path / "aside")
    sign(checkpoint)
    (tmp_path / "aside").rename(checkpoint / "__0_0.distcp")
    with pytest.raises(UserError) as error:
        load({"weight": torch.zeros(8)}, checkpoint, no_dist=True)
    assert error.value.setting == str(checkpoint / METADATA) and "__0_0.distcp" in error.value.found
