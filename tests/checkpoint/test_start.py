"""How a job starts, for every state of its folder, every mode, and with and without an initial checkpoint."""

import logging
import pickle
import shutil

import pytest
import torch

from flame.checkpoint.commit import MARKER, SavedFile, write_marker
from flame.checkpoint.metadata import METADATA
from flame.checkpoint.start import (
    StartPlan,
    changed_settings,
    check_orphaned_checkpoints,
    check_places,
    plan_start,
)
from flame.config.parser import to_toml
from flame.config.schema import Checkpoint, JobConfig
from flame.errors import UserError
from tests.checkpoint.empty import empty_file, write_empty
from tests.checkpoint.managed import Job
from tests.checkpoint.test_commit import DATA, flip, truncate

REJECTED = "rejected"
MODES = ("auto", "resume", "init", "scratch")
TABLE = {  # state of the folder: what each of MODES does without an initial checkpoint, and with one
    "absent": (["scratch", REJECTED, REJECTED, "scratch"], ["init", REJECTED, "init", REJECTED]),
    "empty": (["scratch", REJECTED, REJECTED, "scratch"], ["init", REJECTED, "init", REJECTED]),
    "first save cut short": (["scratch", REJECTED, REJECTED, "scratch"], ["init", REJECTED, "init", REJECTED]),
    "first save without its marker": (
        ["scratch", REJECTED, REJECTED, "scratch"],
        ["init", REJECTED, "init", REJECTED],
    ),
    "newest cut short": (["resume 2", "resume 2", REJECTED, REJECTED], ["resume 2", "resume 2", REJECTED, REJECTED]),
    "newest corrupted": (["resume 2", "resume 2", REJECTED, REJECTED], ["resume 2", "resume 2", REJECTED, REJECTED]),
    "newest truncated": (["resume 2", "resume 2", REJECTED, REJECTED], ["resume 2", "resume 2", REJECTED, REJECTED]),
    "all corrupted": ([REJECTED] * 4, [REJECTED] * 4),
    "all truncated": ([REJECTED] * 4, [REJECTED] * 4),
    "good": (["resume 4", "resume 4", REJECTED, REJECTED], ["resume 4", "resume 4", REJECTED, REJECTED]),
}


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a job of 4 steps."""
    folder = tmp_path_factory.mktemp("done")
    Job(folder).run(4)
    return folder


def prepare(folder, state, done):
    """Bring the checkpoints of a job into a state of TABLE; done: a job of 4 steps."""
    checkpoints = folder / "checkpoint"
    if state == "absent":
        return
    checkpoints.mkdir(parents=True)
    if state == "empty":
        return
    if state == "first save cut short":
        (checkpoints / "step-2").mkdir()
        (folder / "config.toml").write_text(to_toml(JobConfig()))
        return
    shutil.copytree(done, folder, dirs_exist_ok=True)
    if state == "first save without its marker":
        (folder / "config.toml").write_text(to_toml(JobConfig()))
        shutil.rmtree(checkpoints / "step-4")
        (checkpoints / "step-2" / MARKER).unlink()
        return
    if state == "newest cut short":
        (checkpoints / "step-6").mkdir()
        (checkpoints / "step-4").rename(checkpoints / "gone")
    which, _, what = state.partition(" ")
    for step in {"all": (2, 4), "newest": (4,)}.get(which, ()):
        if damage := {"corrupted": flip, "truncated": truncate}.get(what):
            damage(checkpoints / f"step-{step}" / DATA)


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """A checkpoint of another run, all of whose weights are 1."""
    folder = tmp_path_factory.mktemp("donor")
    Job(folder, interval=1).run(1)
    return folder / "checkpoint" / "step-1"


@pytest.mark.parametrize("with_path", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state", TABLE)
def test_a_job_starts_as_the_table_says_or_not_at_all(state, mode, with_path, done, donor, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    prepare(tmp_path, state, done)
    before, expected = everything(tmp_path), TABLE[state][with_path][MODES.index(mode)]
    check_orphaned_checkpoints(Checkpoint(), tmp_path)
    job = Job(tmp_path, start=mode, **({"initial_load_path": str(donor)} if with_path else {}))
    torch.nn.init.constant_(job.model.weight, -1)  # in place of random weights
    caplog.clear()
    try:
        job.manager.load(-1)
    except UserError as error:
        assert expected == REJECTED
        assert error.setting.startswith("--checkpoint.") and "\n" not in str(error)
        assert everything(tmp_path) == before and (job.model.weight == -1).all()
        return
    finally:
        job.manager.close()
    origin, (mode, _, step) = job.manager.origin, expected.partition(" ")
    assert (origin["mode"], origin["step"]) == (mode, int(step or 0))
    assert (job.model.weight == {"scratch": -1, "init": 1}.get(mode, job.trainer.step)).all()
    assert len([line for line in caplog.messages if line.startswith(f"start: {mode}")]) == 1
    assert sorted(before.values()) == sorted(everything(tmp_path).values())  # moved perhaps, never changed


def configure(folder, **settings):
    config = JobConfig(checkpoint=Checkpoint(**settings, folder=folder.name))
    config.job.dump_folder, config.training.steps = str(folder.parent), 1000
    return config


def planned(folder, **settings):
    return plan_start(configure(folder, **settings))


def rejected(folder, **settings):
    """The UserError of a start with these settings."""
    with pytest.raises(UserError) as error:
        planned(folder, **settings)
    return error.value


def mark(folder, *steps, resumable=True):
    for step in steps:
        write_empty(folder / f"step-{step}", resumable=resumable)


def test_a_plan_has_the_status_of_each_checkpoint_and_can_be_sent_to_other_ranks(tmp_path):
    mark(tmp_path, 2)
    mark(tmp_path, 0, resumable=False)
    (tmp_path / "step-6").mkdir()
    plan = planned(tmp_path)
    found = [(step, status.resumable, status.unfinished) for step, status in plan.checkpoints.items()]
    assert found == [(0, False, False), (2, True, False), (6, False, True)]
    assert METADATA in plan.checkpoints[6].corruption
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize("start", ["init", "scratch"])
def test_a_step_to_resume_goes_with_no_other_start(start, tmp_path):
    mark(tmp_path, 2)
    error = rejected(tmp_path, load_step=2, start=start)
    assert (error.setting, error.found) == ("--checkpoint.load_step", 2) and error.allowed.endswith(start)


def test_a_load_step_that_is_incomplete_is_rejected_with_the_reason(tmp_path):
    mark(tmp_path, 2, 4)
    (tmp_path / "step-4" / "complete.json").write_text("{")
    error = rejected(tmp_path, load_step=4)
    assert error.setting == "--checkpoint.load_step" and error.allowed.endswith(": 2")
    assert "complete.json is corrupted" in error.hint
    assert planned(tmp_path, load_step=2).steps == (2,)


def test_a_run_does_not_start_anew_if_more_than_its_first_save_was_cut_short(tmp_path):
    for step in (2, 4):
        (tmp_path / f"step-{step}").mkdir()
    for interval in (2, 4, 100):
        error = rejected(tmp_path, interval=interval)
        assert error.setting == "--checkpoint.folder" and "step-2: " in error.found and "step-4: " in error.found


def test_a_run_does_not_start_anew_if_a_later_save_was_cut_short(tmp_path):
    (tmp_path / "step-8").mkdir()
    assert planned(tmp_path, interval=8).mode == "scratch"
    assert planned(tmp_path, interval=4, interval_type="seconds").mode == "scratch"
    assert "no complete checkpoint" in rejected(tmp_path, interval=4).found


def test_the_first_save_is_known_by_the_interval_that_the_run_had_and_by_the_step_it_began_at(tmp_path):
    (tmp_path / "checkpoint" / "step-8").mkdir(parents=True)
    folder = tmp_path / "checkpoint"
    assert "no complete checkpoint" in rejected(folder, interval=4).found
    config = JobConfig(checkpoint=Checkpoint(interval=8))
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert planned(folder, interval=4).mode == "scratch"
    (tmp_path / "config.toml").unlink()
    donor = tmp_path / "donor" / "step-7"
    write_empty(donor, step=7)
    assert planned(folder, interval=4, initial_load_path=str(donor), initial_load_model_only=False).mode == "init"
    assert "no complete checkpoint" in rejected(folder, interval=4, initial_load_path=str(donor)).found


@pytest.mark.parametrize("content", ["checkpoint = 5", "[checkpoint]\nfolder = 5", "a = " + "[" * 5000, "\udcff"])
def test_a_config_that_no_run_wrote_says_nothing_of_a_start(content, tmp_path):
    (tmp_path / "config.toml").write_text(content, errors="surrogateescape")
    check_orphaned_checkpoints(Checkpoint(), tmp_path)
    assert planned(tmp_path / "checkpoint", interval=4).mode == "scratch"


def test_a_save_cut_short_in_another_folder_or_without_checkpoints_is_not_left_out(tmp_path):
    (tmp_path / "config.toml").write_text(to_toml(JobConfig(checkpoint=Checkpoint(folder="saved"))))
    (tmp_path / "saved" / "step-2").mkdir(parents=True)
    for config in (Checkpoint(folder="./saved/"), Checkpoint(folder="other"), Checkpoint(enable=False)):
        check_orphaned_checkpoints(config, tmp_path)


def test_a_seed_checkpoint_is_started_from_only_while_there_is_no_later_one(tmp_path):
    mark(tmp_path, 0, resumable=False)
    assert planned(tmp_path).steps == (0,)
    mark(tmp_path, 8)
    assert planned(tmp_path).steps == (8,)
    (tmp_path / "step-8" / "complete.json").write_text("{")
    assert "step-8: " in rejected(tmp_path).found


def test_a_checkpoint_whose_marker_lists_no_metadata_is_incomplete_and_the_one_before_is_taken(tmp_path):
    mark(tmp_path, 2)
    for step, files in ((4, []), (6, [SavedFile(DATA, 5, "")])):
        (tmp_path / f"step-{step}").mkdir()
        write_marker(tmp_path / f"step-{step}", files, {"resumable": True})
    plan = planned(tmp_path)
    assert plan.steps == (2,)
    assert all(METADATA in plan.checkpoints[step].corruption for step in (4, 6))


def test_an_incomplete_seed_checkpoint_is_rejected(tmp_path):
    (tmp_path / "step-0").mkdir(parents=True)
    assert "step-0: " in rejected(tmp_path).found
    assert planned(tmp_path, create_seed_checkpoint=True).mode == "scratch"  # the command that was killed


def test_a_model_alone_is_rejected_before_the_launch(tmp_path):
    mark(tmp_path, 2, resumable=False)
    for settings in ({}, {"load_step": 2}, {"start": "resume"}):
        error = rejected(tmp_path, **settings)
        assert error.setting.endswith("step-2") and "last_save_model_only" in error.found


def test_without_checkpoints_nothing_can_be_resumed_or_loaded(tmp_path):
    assert planned(tmp_path, enable=False).mode == "scratch"
    for name, value in (("start", "resume"), ("start", "init"), ("initial_load_path", "somewhere")):
        error = rejected(tmp_path, enable=False, **{name: value})
        assert (error.setting, error.found) == (f"--checkpoint.{name}", value) and "enable is false" in error.hint


@pytest.mark.parametrize("content", [None, b"", b"no pickle"])
def test_an_initial_path_without_a_complete_checkpoint_is_rejected(content, tmp_path):
    path = tmp_path / "elsewhere"
    path.mkdir()
    if content is not None:
        (path / METADATA).write_bytes(content)
    error = rejected(tmp_path / "checkpoint", initial_load_path=str(path))
    assert (error.setting, error.found) == ("--checkpoint.initial_load_path", str(path)) and METADATA in error.hint


@pytest.mark.parametrize("name", ["step-4/complete.json", "step-4/__0_0.distcp", "."])
def test_an_unreadable_file_is_not_taken_for_corrupted(name, tmp_path):
    mark(tmp_path / "run", 2)
    (tmp_path / "run" / "step-4").mkdir()
    write_marker(tmp_path / "run" / "step-4", [SavedFile(DATA, 5, ""), empty_file(METADATA)], {"resumable": True})
    path = tmp_path / "run" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(path.name)  # a round trip, which even root cannot read
    error = rejected(tmp_path / "run")
    assert error.setting == str(path) and "Too many levels" in error.hint and "may be intact" in error.hint


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint/step-4"])
def test_a_link_to_a_disk_that_is_not_mounted_is_not_taken_for_a_new_run(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "away")
    error = rejected(tmp_path / "checkpoint")
    assert error.setting == str(tmp_path / name) and "No such file or directory" in error.hint


@pytest.mark.parametrize(
    "name, settings, is_in_the_way",
    [
        ("step-5", {}, True),
        ("step-1000", {}, True),
        ("step-1001", {}, False),  # after the last step
        ("step-3", {}, False),  # before the one that is resumed
        ("step-3", {"load_step": 2}, True),
        ("step-5.txt", {}, False),
        ("step-005", {}, False),
        ("step-5", {"load_only": True}, False),
    ],
)
def test_a_file_in_the_place_of_a_checkpoint_is_named_before_steps_are_lost(name, settings, is_in_the_way, tmp_path):
    mark(tmp_path, 2, 4)
    (tmp_path / name).write_text("theirs")
    plan = StartPlan("resume", (settings["load_step"],) if "load_step" in settings else (4, 2))
    config = configure(tmp_path, **settings)
    if is_in_the_way:
        with pytest.raises(UserError, match=f"^{tmp_path}/{name}: found a file, must be moved away"):
            check_places(config, plan)
    else:
        check_places(config, plan)
    assert (tmp_path / name).read_text() == "theirs"


def test_a_step_with_leading_zeros_is_not_skipped(tmp_path):
    mark(tmp_path, 2)
    (tmp_path / "step-2").rename(tmp_path / "step-002")
    error = rejected(tmp_path)
    assert error.setting.endswith("step-002") and "step-2," in error.allowed


@pytest.mark.parametrize(
    "settings, setting, found",
    [({"folder": "other"}, "--checkpoint.folder", "other"), ({"enable": False}, "--checkpoint.enable", "false")],
)
def test_a_run_does_not_start_anew_with_another_folder_for_checkpoints(settings, setting, found, tmp_path):
    config = Checkpoint(**settings)
    check_orphaned_checkpoints(config, tmp_path / "new")
    (tmp_path / "config.toml").write_text(to_toml(JobConfig(checkpoint=Checkpoint(folder="saved"))))
    check_orphaned_checkpoints(config, tmp_path)  # nothing was saved
    mark(tmp_path / "saved", 2, 4)
    for content in (None, "damaged"):
        for marker in tmp_path.glob("saved/step-*/complete.json") if content else ():
            marker.write_text(content)
        with pytest.raises(UserError) as error:
            check_orphaned_checkpoints(config, tmp_path)
        assert (error.value.setting, error.value.found) == (setting, found) and "saved/step-4" in error.value.hint


def test_every_changed_setting_is_listed():
    was = {"optimizer": {"lr": 0.1, "eps": 1}, "job": {"dump_folder": "a"}, "checkpoint": {"initial_load_path": "x"}}
    now = {"optimizer": {"lr": 0.2, "eps": 1}, "job": {"dump_folder": "b"}, "training": {"varlen": True}}
    assert list(changed_settings(was, now)) == [
        "checkpoint.initial_load_path x -> none, not used by a run that resumes",
        "optimizer.lr 0.1 -> 0.2, applied",
        "training.varlen none -> True, applied",
    ]


def test_a_checkpoint_under_the_name_of_another_step_is_rejected(tmp_path):
    checkpoint = tmp_path / "saved/step-7"
    write_empty(checkpoint, step=2)
    error = rejected(tmp_path / "saved")
    assert (error.setting, error.found) == (str(checkpoint), "step 2")
    checkpoint.rename(tmp_path / "saved/step-2")
    assert planned(tmp_path / "saved").steps == (2,)
