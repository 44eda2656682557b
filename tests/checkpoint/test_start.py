"""How a job starts, for every state of its folder, every mode, and with and without an initial checkpoint."""

import logging
import shutil

import pytest
import torch

from flame.checkpoint.commit import METADATA, SavedFile, write_marker
from flame.checkpoint.start import changed_settings, check_orphaned_checkpoints, plan_start
from flame.config.schema import Checkpoint, JobConfig
from flame.errors import UserError
from tests.checkpoint.managed import Job
from tests.checkpoint.test_commit import DATA, flip, truncate

REFUSED = "refused"
MODES = ("auto", "resume", "init", "scratch")
TABLE = {  # state of the folder: what each of MODES does without an initial checkpoint, and with one
    "absent": (["scratch", REFUSED, REFUSED, "scratch"], ["init", REFUSED, "init", REFUSED]),
    "empty": (["scratch", REFUSED, REFUSED, "scratch"], ["init", REFUSED, "init", REFUSED]),
    "first save cut short": (["scratch", REFUSED, REFUSED, "scratch"], ["init", REFUSED, "init", REFUSED]),
    "newest cut short": (["resume 2", "resume 2", REFUSED, REFUSED], ["resume 2", "resume 2", REFUSED, REFUSED]),
    "newest damaged": (["resume 2", "resume 2", REFUSED, REFUSED], ["resume 2", "resume 2", REFUSED, REFUSED]),
    "newest truncated": (["resume 2", "resume 2", REFUSED, REFUSED], ["resume 2", "resume 2", REFUSED, REFUSED]),
    "all damaged": ([REFUSED] * 4, [REFUSED] * 4),
    "all truncated": ([REFUSED] * 4, [REFUSED] * 4),
    "good": (["resume 4", "resume 4", REFUSED, REFUSED], ["resume 4", "resume 4", REFUSED, REFUSED]),
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
        return
    shutil.copytree(done, folder, dirs_exist_ok=True)
    if state == "newest cut short":
        (checkpoints / "step-6").mkdir()
        (checkpoints / "step-4").rename(checkpoints / "gone")
    which, _, what = state.partition(" ")
    for step in {"all": (2, 4), "newest": (4,)}.get(which, ()):
        if damage := {"damaged": flip, "truncated": truncate}.get(what):
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
    job = Job(tmp_path, start=mode, **({"initial_load_path": str(donor)} if with_path else {}))
    torch.nn.init.constant_(job.model.weight, -1)  # in place of random weights
    caplog.clear()
    try:
        job.manager.load(-1)
    except UserError as error:
        assert expected == REFUSED
        assert str(error).startswith("--checkpoint.") and "\n" not in str(error)
        assert everything(tmp_path) == before and (job.model.weight == -1).all()
        return
    finally:
        job.manager.close()
    origin, (mode, _, step) = job.manager.origin, expected.partition(" ")
    assert (origin["mode"], origin["step"]) == (mode, int(step or 0))
    assert (job.model.weight == {"scratch": -1, "init": 1}.get(mode, job.trainer.step)).all()
    assert len([line for line in caplog.messages if line.startswith(f"start: {mode}")]) == 1
    assert sorted(before.values()) == sorted(everything(tmp_path).values())  # moved perhaps, never changed


def chosen(folder, **settings):
    config = JobConfig(checkpoint=Checkpoint(**settings, folder=folder.name))
    config.job.dump_folder, config.training.steps = str(folder.parent), 1000
    return plan_start(config)


def mark(folder, *steps, resumable=True):
    for step in steps:
        (folder / f"step-{step}").mkdir(parents=True)
        write_marker(folder / f"step-{step}", [], {"resumable": resumable})


@pytest.mark.parametrize("start", ["init", "scratch"])
def test_a_step_to_resume_goes_with_no_other_start(start, tmp_path):
    mark(tmp_path, 2)
    with pytest.raises(UserError, match=f"--checkpoint.load_step: found 2, must be -1 with --checkpoint.start {start}"):
        chosen(tmp_path, load_step=2, start=start)


def test_a_step_that_is_not_whole_is_refused_with_the_reason(tmp_path):
    mark(tmp_path, 2, 4)
    (tmp_path / "step-4" / "complete.json").write_text("{")
    with pytest.raises(UserError, match=r"no whole step-4 in .*complete.json is damaged.*steps there: 2"):
        chosen(tmp_path, load_step=4)
    assert chosen(tmp_path, load_step=2).steps == (2,)


def test_more_than_the_first_save_cut_short_is_no_new_start(tmp_path):
    for step in (2, 4):
        (tmp_path / f"step-{step}").mkdir()
    for interval in (2, 4, 100):
        with pytest.raises(UserError, match=r"--checkpoint.folder: no complete checkpoint .*step-2: .*step-4: "):
            chosen(tmp_path, interval=interval)


def test_a_save_that_was_not_the_first_is_no_new_start(tmp_path):
    (tmp_path / "step-8").mkdir()
    assert chosen(tmp_path, interval=8).mode == "scratch"
    assert chosen(tmp_path, interval=4, interval_type="seconds").mode == "scratch"
    with pytest.raises(UserError, match="no complete checkpoint"):
        chosen(tmp_path, interval=4)


def test_a_seed_is_started_from_and_never_a_way_back_to_the_beginning(tmp_path):
    mark(tmp_path, 0, resumable=False)
    assert chosen(tmp_path).steps == (0,)
    mark(tmp_path, 8)
    assert chosen(tmp_path).steps == (8,)
    (tmp_path / "step-8" / "complete.json").write_text("{")
    with pytest.raises(UserError, match="step-8"):
        chosen(tmp_path)


def test_a_broken_seed_is_refused(tmp_path):
    (tmp_path / "step-0").mkdir(parents=True)
    with pytest.raises(UserError, match="step-0"):
        chosen(tmp_path)


def test_a_model_alone_is_refused_before_the_launch(tmp_path):
    mark(tmp_path, 2, resumable=False)
    for settings in ({}, {"load_step": 2}, {"start": "resume"}):
        with pytest.raises(UserError, match="last_save_model_only"):
            chosen(tmp_path, **settings)


def test_without_checkpoints_nothing_can_be_resumed_or_loaded(tmp_path):
    assert chosen(tmp_path, enable=False).mode == "scratch"
    for settings in ({"start": "resume"}, {"start": "init"}, {"initial_load_path": "somewhere"}):
        with pytest.raises(UserError, match=r"checkpoint.enable is false"):
            chosen(tmp_path, enable=False, **settings)


@pytest.mark.parametrize("content", [None, b"", b"no pickle"])
def test_an_initial_path_that_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "elsewhere"
    path.mkdir()
    if content is not None:
        (path / METADATA).write_bytes(content)
    with pytest.raises(UserError, match=r"--checkpoint.initial_load_path: found .*elsewhere.*\.metadata"):
        chosen(tmp_path / "checkpoint", initial_load_path=str(path))


@pytest.mark.parametrize("name", ["step-4/complete.json", "step-4/__0_0.distcp", "."])
def test_what_cannot_be_read_today_is_not_taken_for_damaged(name, tmp_path):
    mark(tmp_path / "run", 2)
    (tmp_path / "run" / "step-4").mkdir()
    write_marker(tmp_path / "run" / "step-4", [SavedFile(DATA, 5, "")], {"resumable": True})
    path = tmp_path / "run" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(path.name)  # a round trip, which even root cannot read
    with pytest.raises(UserError, match=rf"{path} cannot be read \(Too many levels .*may be whole"):
        chosen(tmp_path / "run")


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint/step-4"])
def test_a_link_to_a_disk_that_is_away_is_no_way_back_to_the_beginning(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "away")
    with pytest.raises(UserError, match=rf"{name} cannot be read \(No such file or directory\), and may be whole"):
        chosen(tmp_path / "checkpoint")


def test_a_step_by_another_name_is_not_passed_over(tmp_path):
    mark(tmp_path, 2)
    (tmp_path / "step-2").rename(tmp_path / "step-002")
    with pytest.raises(UserError, match="step-002 must be called step-2, or be moved away"):
        chosen(tmp_path)


@pytest.mark.parametrize(
    "settings, said",
    [({"folder": "other"}, "folder: found other"), ({"enable": False}, "enable: found false")],
)
def test_another_folder_for_checkpoints_is_no_way_to_begin_a_run_anew(settings, said, tmp_path):
    config = Checkpoint(**settings)
    check_orphaned_checkpoints(config, tmp_path / "new")
    (tmp_path / "config.toml").write_text('[checkpoint]\nfolder = "saved"\n')
    check_orphaned_checkpoints(config, tmp_path)  # nothing was saved
    mark(tmp_path / "saved", 2, 4)
    with pytest.raises(UserError, match=f"^--checkpoint.{said}, but the run in .* has checkpoints, .*saved/step-4"):
        check_orphaned_checkpoints(config, tmp_path)
    for marker in tmp_path.glob("saved/step-*/complete.json"):
        marker.write_text("damaged")
    with pytest.raises(UserError, match="has checkpoints"):
        check_orphaned_checkpoints(config, tmp_path)


def test_every_change_of_a_setting_is_listed():
    was = {"optimizer": {"lr": 0.1, "eps": 1}, "job": {"dump_folder": "a"}, "checkpoint": {"initial_load_path": "x"}}
    now = {"optimizer": {"lr": 0.2, "eps": 1}, "job": {"dump_folder": "b"}, "training": {"varlen": True}}
    assert list(changed_settings(was, now)) == [
        "checkpoint.initial_load_path x -> none, not used by a run that resumes",
        "optimizer.lr 0.1 -> 0.2, applied",
        "training.varlen none -> True, applied",
    ]
