import json
import resource

import pytest

from flame.runtime.run_folder import Run


@pytest.mark.parametrize(
    "bad", ['{"step": 4, "lo', '\0\0\0{"step": 1}', '{"loss": 1.0}', '{"step": null}', "[]", "\udcff{}"], ids=repr
)
def test_records_after_the_resumed_step_and_broken_lines_are_moved_to_another_file(bad, tmp_path):
    run = Run(tmp_path, writes=True)
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a", errors="surrogateescape") as file:
        file.write(bad)
    run.rewind(1)
    run.log({"step": 2, "loss": 2.0})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    *replaced, last = (tmp_path / "metrics.replaced.jsonl").read_text(errors="surrogateescape").splitlines()
    assert [json.loads(line)["step"] for line in replaced] == [2, 3] and last == bad


def test_status_keeps_step_and_tokens_and_forgets_an_old_reason(tmp_path):
    run = Run(tmp_path, writes=True)
    run.set_status("failed", step=7, tokens=70, reason="out of memory")
    run.start("", {})
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
    run.start("", {})
    run.log({"step": 1})
    run.rewind(0)
    run.set_status("completed", step=1)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_record_holds_no_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run = Run(tmp_path, writes=True)
    run.start("", {"name": "CPU"})
    recorded = (tmp_path / "environment.json").read_text()
    assert "hf_secret" not in recorded
    assert json.loads(recorded)["packages"]["torchtitan"] == "0.2.2"
