"""Saving and resuming with the manager: rotation, failed saves, corruption, what a resume restores."""

import logging
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torchtitan.components.checkpoint import AsyncMode

from flame.checkpoint.commit import (
    DELETING,
    MARKER,
    complete_steps,
    inspect_checkpoint,
    read_marker,
    scan_checkpoints,
    verify_hashes,
)
from flame.checkpoint.metadata import METADATA
from flame.errors import SaveError, UserError
from tests.checkpoint.managed import Job
from tests.checkpoint.test_commit import DATA, delete, flip, truncate

ASYNC = ["disabled", "async"]


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def rejected(job, steps):
    """The UserError of a job's start."""
    with pytest.raises(UserError) as error:
        job.run(steps)
    return error.value


def steps(folder):
    return complete_steps(folder / "checkpoint")


@pytest.mark.parametrize("mode", ASYNC)
def test_a_resumed_job_has_everything_that_was_saved_and_logs_it(mode, tmp_path, log):
    Job(tmp_path, async_mode=mode).run(4)
    assert steps(tmp_path) == [2, 4]
    again = Job(tmp_path, async_mode=mode)
    assert again.manager.load(-1)
    assert (again.trainer.step, again.trainer.tokens, again.data.count) == (4, 400, 4)
    assert (again.model.weight == 4).all()
    folder = tmp_path / "checkpoint" / "step-4"
    assert again.manager.origin == {
        **{"mode": "resume", "source": str(folder), "step": 4, "tokens": 400},
        "restored": ["train_state", "model", "optimizer", "dataloader", "lr_scheduler"],
    }
    lines = [line for line in log.messages if line.startswith("start: ")]
    assert lines[1] == f"start: resume from {folder}, step 4, 400 tokens; restored: " + ", ".join(
        again.manager.origin["restored"]
    )
    again.manager.close()


def test_the_marker_holds_the_state_and_settings_of_the_run(tmp_path):
    Job(tmp_path).run(2)
    marker = read_marker(tmp_path / "checkpoint" / "step-2")
    assert (marker["step"], marker["tokens"], marker["ranks"], marker["resumable"]) == (2, 200, 1, True)
    assert marker["config"]["checkpoint"]["interval"] == 2 and "data_digest" in marker


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({"keep_latest_k": 0}, [2, 4, 6, 8, 10]),
        ({"keep_latest_k": 2}, [8, 10]),
        ({"keep_latest_k": 2, "keep_every": 4}, [4, 8, 10]),
        ({"keep_latest_k": 2, "last_save_model_only": True}, [8, 10]),
    ],
)
def test_the_newest_checkpoints_and_every_nth_are_kept(settings, kept, tmp_path):
    Job(tmp_path, **{**settings, "last_save_model_only": False}).run(2)
    others = [tmp_path / name for name in ("hf/step-2", "checkpoint/step-3", "checkpoint/step-2-hf")]
    for folder in others:  # exports, and a save that was cut short: neither counted nor deleted
        folder.mkdir(parents=True)
    Job(tmp_path, **settings).run(10)
    assert steps(tmp_path) == kept
    assert all(folder.exists() for folder in others)


@pytest.mark.parametrize("settings", [{"enable": False}, {"load_only": True}])
def test_a_job_that_saves_nothing_ends_like_any_other(settings, tmp_path):
    Job(tmp_path, **settings).run(3)
    assert not (tmp_path / "checkpoint").exists()


def test_the_first_step_is_saved_with_an_interval_in_seconds_too(tmp_path):
    Job(tmp_path, interval_type="seconds", enable_first_step_checkpoint=True).run(3)
    assert steps(tmp_path) == [1, 3]


def test_a_seed_checkpoint_is_neither_counted_nor_deleted(tmp_path):
    Job(tmp_path).run(2)
    shutil.copytree(tmp_path / "checkpoint" / "step-2", tmp_path / "checkpoint" / "step-0")
    Job(tmp_path, keep_latest_k=2).run(10)
    assert steps(tmp_path) == [0, 8, 10]


def test_rotation_keeps_a_checkpoint_that_a_user_has_put_files_into(tmp_path, caplog):
    Job(tmp_path).run(4)
    notes = tmp_path / "checkpoint" / "step-2" / "notes" / "why.txt"
    notes.parent.mkdir()
    notes.write_text("the best one")
    Job(tmp_path, keep_latest_k=2).run(12)
    assert steps(tmp_path) == [2, 10, 12] and notes.read_text() == "the best one"
    assert caplog.text.count("step-2 is kept: it holds a file that is not the checkpoint's, notes/why.txt") == 1


def test_exclude_from_loading_does_not_apply_to_a_resume(tmp_path):
    Job(tmp_path / "donor").run(2)
    options = {"exclude_from_loading": ["dataloader", "train_state"], "initial_load_model_only": False}
    path = str(tmp_path / "donor" / "checkpoint" / "step-2")
    job = Job(tmp_path / "run", initial_load_path=path, **options)
    job.run(4)
    assert {"dataloader", "train_state"}.isdisjoint(job.manager.origin["restored"])
    again = Job(tmp_path / "run", initial_load_path=path, **options)
    again.manager.load()
    assert {"dataloader", "train_state", "optimizer"} <= set(again.manager.origin["restored"])


def test_a_checkpoint_is_deleted_only_after_the_newer_ones_are_complete(tmp_path, monkeypatch):
    deleted, rename = [], os.rename

    def renaming(old, new):
        if Path(new).name.startswith(DELETING):
            deleted.append((int(Path(old).name.removeprefix("step-")), steps(tmp_path)))
        rename(old, new)

    monkeypatch.setattr(os, "rename", renaming)
    Job(tmp_path, keep_latest_k=2, async_mode="async").run(12)
    assert [step for step, _ in deleted] == [2, 4, 6, 8]
    assert all(len([newer for newer in there if newer > step]) >= 2 for step, there in deleted)
    assert not list((tmp_path / "checkpoint").glob(f"{DELETING}*"))


def test_a_deletion_that_was_cut_short_is_finished_at_the_next_start_without_a_warning(tmp_path, log, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)  # the process dies before it deletes
        Job(tmp_path, keep_latest_k=2).run(6)
    checkpoints = tmp_path / "checkpoint"
    assert (checkpoints / f"{DELETING}step-2" / DATA).exists() and steps(tmp_path) == [4, 6]
    for name in ("step-2-mine", "deleting-step-2"):
        (checkpoints / name).mkdir()
    log.clear()
    Job(tmp_path, keep_latest_k=2).run(6)
    assert not [line for line in log.messages if "not complete" in line]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["deleting-step-2", "step-2-mine", "step-4", "step-6"]


def test_files_left_by_a_deletion_do_not_block_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as where a file of it is still open, on NFS
    left = tmp_path / "checkpoint" / f"{DELETING}step-2"
    left.mkdir(parents=True)
    (left / DATA).touch()
    Job(tmp_path, keep_latest_k=2).run(8)
    assert steps(tmp_path) == [6, 8]
    assert [path.name for path in sorted(left.parent.glob(f"{left.name}*"))] == [left.name, f"{left.name}.2"]


def test_a_step_before_the_last_that_ends_a_job_moves_nothing(tmp_path):
    Job(tmp_path).run(6)
    again = of_steps(Job(tmp_path, load_step=2), 2)
    again.manager.load(2)
    again.manager.close()
    assert again.trainer.step == 2 and steps(tmp_path) == [2, 4, 6]


@pytest.mark.parametrize("name, damage", [(n, d) for n in (DATA, METADATA, MARKER) for d in (truncate, flip, delete)])
def test_a_corrupted_checkpoint_is_logged_and_the_one_before_it_is_resumed(name, damage, tmp_path, log):
    Job(tmp_path).run(4)
    damage(tmp_path / "checkpoint" / "step-4" / name)
    again = Job(tmp_path).run(4)
    assert (again.model.weight == 4).all() and steps(tmp_path) == [2, 4]  # step 3 and 4 were done again
    assert again.manager.origin["step"] == 2
    warnings = [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]
    assert any("step-4" in line and name in line and "is not used" in line for line in warnings), warnings
    assert (tmp_path / "checkpoint" / "replaced" / "step-4").is_dir()


def test_a_corrupted_checkpoint_that_was_asked_for_is_rejected(tmp_path):
    Job(tmp_path).run(4)
    flip(tmp_path / "checkpoint" / "step-4" / DATA)
    error = rejected(Job(tmp_path, load_step=4), 4)
    assert error.setting == "--checkpoint.load_step" and error.hint.startswith(f"{DATA} holds other bytes")


def test_a_job_without_an_intact_checkpoint_stops_and_changes_nothing(tmp_path):
    Job(tmp_path).run(4)
    for step in (2, 4):
        flip(tmp_path / "checkpoint" / f"step-{step}" / DATA)
    error = rejected(Job(tmp_path), 6)
    assert (error.setting, error.found) == ("--checkpoint.folder", tmp_path / "checkpoint" / "step-2")
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["step-2", "step-4"]


def test_a_job_does_not_begin_anew_if_its_only_checkpoint_is_corrupted(tmp_path):
    Job(tmp_path).run(2)
    flip(tmp_path / "checkpoint" / "step-2" / DATA)
    error = rejected(Job(tmp_path), 4)
    assert (error.setting, error.found) == ("--checkpoint.folder", tmp_path / "checkpoint" / "step-2")


def test_a_job_that_saves_nothing_cannot_resume_a_run_in_its_folder(tmp_path):
    Job(tmp_path).run(4)
    for step in (2, -1):
        error = rejected(Job(tmp_path, load_step=step, load_only=True), 6)
        assert error.setting == "--checkpoint.load_only" and "--checkpoint.initial_load_path" in error.hint
    assert steps(tmp_path) == [2, 4]


def test_a_corrupted_initial_checkpoint_is_rejected(tmp_path):
    Job(tmp_path / "donor").run(2)
    path = tmp_path / "donor" / "checkpoint" / "step-2"
    flip(path / DATA)
    error = rejected(Job(tmp_path / "heir", initial_load_path=str(path)), 2)
    assert (error.setting, error.found) == ("--checkpoint.initial_load_path", path)
    assert not (tmp_path / "heir").exists()


def test_a_checkpoint_without_a_marker_is_used_with_a_warning(tmp_path, log):
    job = Job(tmp_path)
    job.trainer.step = 2
    dcp.save(job.manager._flattened_model_states_sd(), checkpoint_id=str(tmp_path / "checkpoint" / "step-2"))
    job.manager.close()
    assert Job(tmp_path).run(4).manager.origin["step"] == 2
    assert any(f"step-2 has no {MARKER}" in line for line in log.messages)
    assert steps(tmp_path) == [2, 4]


@pytest.mark.parametrize("step", [0, 2])
def test_a_damaged_checkpoint_without_a_marker_is_rejected_without_advice_to_run_what_it_holds(step, tmp_path):
    job = Job(tmp_path)
    job.trainer.step = step
    path = tmp_path / "checkpoint" / f"step-{step}"
    dcp.save(job.manager._flattened_model_states_sd(), checkpoint_id=str(path))
    job.manager.close()
    size = (path / DATA).stat().st_size
    (path / DATA).write_bytes(bytes(size))
    error = rejected(Job(tmp_path), 4)
    assert error.setting.startswith(str(path)) and "weights_only" not in str(error)


def disk_full(limit):
    """Let no file of this process grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


@pytest.fixture
def disk():
    yield disk_full
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class FullDisk(Job):
    """The disk is full from step 3 to step 4."""

    def fill(self, disk):
        save = self.manager.save

        def saving(step, last_step=False):
            self.manager._async_wait()  # for a save that belongs to the time before
            disk(1000 if step in (3, 4) else resource.RLIM_INFINITY)
            save(step, last_step)

        self.manager.save = saving
        return self


@pytest.mark.parametrize("mode", ASYNC)
def test_a_save_that_fails_stops_the_job_and_leaves_the_last_good_one(mode, tmp_path, disk):
    with pytest.raises(SaveError, match=r"step-4 could not be saved: .*File too large"):
        FullDisk(tmp_path, async_mode=mode).fill(disk).run(8)
    disk(resource.RLIM_INFINITY)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["step-2"]
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("mode", ASYNC)
def test_training_can_go_on_after_a_failed_save(mode, tmp_path, disk, log):
    FullDisk(tmp_path, async_mode=mode, on_save_failure="continue").fill(disk).run(8)
    assert steps(tmp_path) == [2, 6, 8] and list(scan_checkpoints(tmp_path / "checkpoint")) == [2, 6, 8]
    assert sum("step-4 could not be saved" in line for line in log.messages) == 1


def test_an_async_save_that_failed_does_not_keep_a_stop_from_saving(tmp_path, disk, log):
    job = Job(tmp_path, async_mode="async")
    job.manager.load(-1)
    job.trainer.step = 2
    disk(1000)
    job.manager.save(2)
    assert job.manager.save_future.exception()
    disk(resource.RLIM_INFINITY)
    job.trainer.step = 3
    job.manager.save_full(3)
    job.manager.close()
    assert steps(tmp_path) == [3] and any("step-2 could not be saved" in line for line in log.messages)


class Pending:
    """An async save that is under way."""

    waited = False

    def result(self):
        self.waited = True


def test_closing_waits_for_an_async_save(tmp_path):
    job, save = Job(tmp_path, async_mode="async"), Pending()
    job.manager.save_future = save
    job.manager.close()
    assert save.waited


def test_a_failed_last_save_stops_the_job_in_any_case(tmp_path, disk):
    with pytest.raises(SaveError, match="step-4"):
        FullDisk(tmp_path, on_save_failure="continue").fill(disk).run(4)
    assert steps(tmp_path) == [2]


def test_a_users_file_in_the_place_of_a_checkpoint_is_not_touched(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "step-2").write_text("mine")
    with pytest.raises(SaveError, match="step-2 could not be saved"):
        Job(tmp_path).run(4)
    assert (tmp_path / "checkpoint" / "step-2").read_text() == "mine"


@pytest.mark.parametrize("mode", ASYNC)
def test_a_full_save_can_be_resumed_and_is_written_once(mode, tmp_path):
    job = Job(tmp_path, async_mode=mode, last_save_model_only=True)
    job.manager.load(-1)
    job.manager.save_full(0)
    job.trainer.step = 3
    job.manager.save_full(3)
    written = (tmp_path / "checkpoint" / "step-3" / MARKER).stat().st_mtime_ns
    job.manager.save_full(3)
    assert (tmp_path / "checkpoint" / "step-3" / MARKER).stat().st_mtime_ns == written
    assert steps(tmp_path) == [3] and read_marker(tmp_path / "checkpoint" / "step-3")["resumable"]
    job.manager.close()


def test_todays_settings_apply_to_the_optimizer_too_and_each_change_is_logged(tmp_path, log):
    Job(tmp_path).run(2)
    again = Job(tmp_path, weight_decay=0.5)
    again.trainer.context.job_config.optimizer.weight_decay = 0.5
    again.manager.load(-1)
    assert [group["weight_decay"] for group in again.optimizers.optimizers[0].param_groups] == [0.5]
    assert "changed since step-2: optimizer.weight_decay 0.1 -> 0.5, applied" in log.messages
    assert sum(line.startswith("changed since") for line in log.messages) == 1
    again.manager.close()


def test_a_checkpoint_of_another_model_is_rejected_in_one_line(tmp_path):
    Job(tmp_path).run(2)
    error = rejected(Job(tmp_path, width=16), 4)
    assert error.setting == str(tmp_path / "checkpoint/step-2") and error.found.startswith("Size mismatch")
    assert "\n" not in str(error)


def test_a_model_alone_is_not_resumed(tmp_path):
    Job(tmp_path, last_save_model_only=True).run(2)
    error = rejected(Job(tmp_path), 4)
    assert "last_save_model_only" in error.found and "--checkpoint.initial_load_path" in error.hint


def of_steps(job, steps):
    job.trainer.context.job_config.training.steps = steps
    return job


def test_a_model_alone_at_the_last_step_is_the_end_of_a_job(tmp_path, log):
    of_steps(Job(tmp_path, last_save_model_only=True), 2).run(2)
    again = of_steps(Job(tmp_path, last_save_model_only=True), 2).run(2)
    assert (again.trainer.step, again.trainer.tokens) == (2, 200) and (again.model.weight == 2).all()
    assert again.manager.origin["restored"] == ["model"]
    error = rejected(of_steps(Job(tmp_path, last_save_model_only=True), 3), 3)
    assert "last_save_model_only" in error.found and "--checkpoint.load_step" in error.hint


def test_a_model_alone_never_replaces_a_full_checkpoint(tmp_path):
    job = Job(tmp_path, last_save_model_only=True)
    job.manager.load(-1)
    job.trainer.step = 2
    job.manager.save(2)
    job.manager.save(2, last_step=True)  # the data have ended
    assert inspect_checkpoint(tmp_path / "checkpoint" / "step-2").resumable
    job.manager.close()


@pytest.mark.slow
def test_the_background_process_makes_the_checkpoint_complete(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    job = Job(tmp_path, async_mode="async")
    path = tmp_path / "checkpoint" / "step-2"
    for step in (1, 2):  # the second overwrites the first
        job.trainer.step = step
        # Pinned memory needs a GPU; one that does not copy in the background serves torch 2.11 once.
        job.manager.stager = DefaultStager(StagingOptions(False, True, False, False))
        response = job.manager.dcp_save(
            job.manager._flattened_model_states_sd(), str(path), AsyncMode.ASYNC_WITH_PINNED_MEM
        )
        getattr(response, "upload_completion", response).result()
        assert read_marker(path)["step"] == step and inspect_checkpoint(path).resumable and not verify_hashes(path)
    job.manager.close()
