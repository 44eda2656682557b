import json
import resource

import pytest

from flame.config.parser import to_toml
from flame.config.schema import JobConfig
from flame.errors import UserError
from flame.runtime.environment import describe_environment
from flame.runtime.run_folder import Run, check_own


@pytest.mark.parametrize(
    "bad", ['{"step": 4, "lo', '\0\0\0{"step": 1}', '{"loss": 1.0}', '{"step": null}', "[]", "\udcff{}"], ids=repr
)
def test_records_after_the_resumed_step_and_broken_lines_are_moved_to_another_file(bad, tmp_path):
    run = Run(tmp_path, writes=True)
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a", errors="surrogateescape") as file:
        file.write(bad)
    for _ in range(2):  # a kill can come after the first of the two files is replaced
        with run.begin(dict(list(run.rewound(1).items())[:1])):
            pass
    with run.begin(run.rewound(1)):
        pass
    run.log({"step": 2, "loss": 2.0})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    *replaced, last = (tmp_path / "metrics.replaced.jsonl").read_text(errors="surrogateescape").splitlines()
    assert [json.loads(line)["step"] for line in replaced] == [2, 3] and last == bad


def test_a_folder_that_is_moved_or_deleted_while_its_run_goes_on_is_noticed(tmp_path):
    run, other = Run(tmp_path / "run", writes=True), Run(tmp_path / "run", writes=False)
    run.folder.mkdir()
    with run.begin({}):
        pass
    run.check_place()

    def make_logs():
        (run.folder / "logs").mkdir(parents=True)

    run.folder.rename(tmp_path / "moved")
    for change in (lambda: None, make_logs, lambda: run.set_status("running", step=1)):
        change()
        other.check_place()
        with pytest.raises(UserError, match=f"no records of this run in {tmp_path}/run; it was moved"):
            run.check_place()
    run.folder.rename(tmp_path / "made")
    (tmp_path / "moved").rename(run.folder)
    run.check_place()


def test_a_file_in_the_place_of_the_folder_where_the_model_is_written_is_named(tmp_path):
    (tmp_path / ".model.tmp").write_text("mine")
    with pytest.raises(FileExistsError, match=r"\.model\.tmp"):
        Run(tmp_path, writes=True).capture(lambda folder: None)
    assert (tmp_path / ".model.tmp").read_text() == "mine"


def test_status_keeps_step_and_tokens_and_forgets_an_old_reason(tmp_path):
    run = Run(tmp_path, writes=True)
    run.set_status("failed", step=7, tokens=70, reason="out of memory")
    with run.begin({}):
        assert run.read_status()["status"] == "failed"
    assert run.read_status() == {"status": "running", "step": 7, "tokens": 70, "reason": None}


@pytest.mark.parametrize("content", ["", "{", '{"step": 7'])
def test_a_status_that_a_power_cut_left_empty_or_torn_is_ignored(content, tmp_path):
    (tmp_path / "status.json").write_text(content)
    run = Run(tmp_path, writes=True)
    assert run.read_status() == {}
    run.set_status("running")
    assert run.read_status() == {"status": "running", "step": 0, "tokens": 0, "reason": None}


def test_records_that_do_not_fit_on_the_disk_are_written_later_and_that_is_logged_once(tmp_path, caplog):
    run = Run(tmp_path, writes=True)
    for step, limit in enumerate((-1, 30, 30, -1, 60), 1):  # bytes a file; the second record would be cut in its middle
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            run.log({"step": step, "loss": 1.0})
            run.set_status("running", step=step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        found = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert found == {2: [1], 3: [1], 4: [1, 2, 3, 4], 5: [1, 2, 3, 4]}.get(step, [1])
    for name in ("metrics.jsonl", "status.json"):
        assert sum(f"{name} could not be written: " in line for line in caplog.messages) == 2  # once each time


def test_records_that_wait_for_room_on_the_disk_are_written_when_the_run_ends(tmp_path):
    run = Run(tmp_path, writes=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        run.log({"step": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    for status in ("preempted", "completed"):
        run.set_status(status, step=1)
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_rank_that_does_not_write_leaves_no_file(tmp_path):
    run = Run(tmp_path / "run", writes=False)
    run.log({"step": 1})
    run.set_status("completed", step=1)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_record_holds_no_environment_variable(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    recorded = describe_environment({"name": "CPU"})
    assert "hf_secret" not in str(recorded)
    assert recorded["packages"]["torchtitan"] == "0.2.2"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_run(folder, config="[a]\nb = 1\n"):
    """A run that was started, and has logged four steps."""
    run = Run(folder, writes=True)
    with run.begin({"config.toml": config, "environment.json": "{}"} | captured(run)):
        pass
    for step in range(1, 5):
        run.log({"step": step})
    return run


def captured(run):
    def write(folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("x" * 5000)

    return run.capture(write)


@pytest.mark.parametrize("room", [0, 100, 4000])
def test_a_start_that_does_not_fit_on_the_disk_changes_nothing(room, tmp_path):
    run = a_run(tmp_path)
    before = contents(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        with pytest.raises(OSError, match="File too large"):
            run.begin(run.rewound(2) | {"config.toml": "new"} | captured(run)).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["status.json", "config.toml", "environment.json", "model/config.json"])
def test_a_start_that_finds_a_folder_in_the_place_of_a_record_changes_nothing(name, tmp_path):
    run = a_run(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    before = contents(tmp_path)
    with pytest.raises(IsADirectoryError, match=name):
        run.begin(run.rewound(2) | {"config.toml": "new", "environment.json": "new"} | captured(run)).__enter__()
    assert contents(tmp_path) == before


def test_a_start_leaves_nothing_of_those_that_were_killed(tmp_path):
    run = a_run(tmp_path)
    for name in ("config.toml.7.tmp", "status.json.8.tmp", "model/config.json.9.tmp", ".model.tmp/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with run.begin({"config.toml": "new"} | captured(run)):
        pass
    kept = {"config.toml", "environment.json", "status.json", "metrics.jsonl"}
    assert set(contents(tmp_path)) == kept | {"model/config.json", "model/tokenizer.json"}


def test_a_config_with_comments_of_the_users_is_kept(tmp_path):
    for number, text in enumerate(("[a]\nb = 1  # mine\n", "# mine\nno TOML", '[a]\nb = "exp#1"\n'), 1):
        (tmp_path / "config.toml").write_text(text)
        with Run(tmp_path, writes=True).begin({"config.toml": "new"}):
            pass
        kept = tmp_path / f"config.old-{number}.toml"
        assert (kept.read_text() == text) if number < 3 else not kept.exists()  # the last one a run may have written
        assert (tmp_path / "config.toml").read_text() == "new"


@pytest.mark.parametrize("name", ["config.toml", "environment.json", "status.json", "model/config.json"])
@pytest.mark.parametrize("content", ["mine", "{}", "[]", '{"status": "mine"}', "[job]\ndump_folder = 'x'  # mine"])
def test_a_folder_with_a_file_that_a_run_would_overwrite_must_be_a_runs(name, content, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    check_own(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        check_own(tmp_path)
    assert error.value.setting == "--job.dump_folder" and str(tmp_path / name.split("/")[0]) in error.value.hint


def test_a_folder_that_a_start_has_only_begun_is_a_runs(tmp_path):
    check_own(tmp_path / "new")
    for name in (
        "lock",
        "comm_traces/rank_0",
        "model/config.json.7.tmp",
        ".model.tmp/config.json",
        "metrics.jsonl",
        "checkpoint/step-0/.metadata",
        "mine.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    check_own(tmp_path)
    (tmp_path / "status.json").touch()  # a power cut can leave it empty
    check_own(tmp_path)
    (tmp_path / "config.toml").write_text(to_toml(JobConfig()))
    (tmp_path / "model" / "config.json").write_text("{}")
    check_own(tmp_path)
    (tmp_path / "config.toml").write_text("mine")
    (tmp_path / "status.json").write_text('{"status": "running"}')
    check_own(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json"])
def test_records_are_not_written_through_a_link(name, tmp_path):
    (tmp_path / "theirs").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "theirs")
    run = Run(tmp_path / "run", writes=True)
    run.log({"step": 1})
    run.set_status("running", step=1)
    assert (tmp_path / "theirs").read_text() == "kept"


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"status": ' * 100_000])
def test_a_damaged_status_is_none(content, tmp_path):
    (tmp_path / "status.json").write_bytes(content)
    assert Run(tmp_path, writes=True).read_status() == {}
