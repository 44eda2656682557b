"""scripts/gpu_check: what is done is not done again, a part ends with its time, and every bound can be missed."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flame.drills.job import is_alive
from scripts.gpu_check import __main__ as gpu_check
from scripts.gpu_check import kernels, parts, speed
from scripts.gpu_check.bench import Bench, Skip, records
from scripts.gpu_check.parts import PARTS, Part
from tests.launch import REPO, environment

MACHINE = {"device": "a GPU", "memory_gib": 80, "capability": "9.0", "commit": "1", "versions": {"torch": "2"}}


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs the command with parts of the test; returns its exit code and the parts that ran, in turn."""
    state = SimpleNamespace(machine=dict(MACHINE), out=tmp_path / "out", ran=[], results={})
    monkeypatch.setattr(gpu_check, "ask_machine", lambda *_: state.machine)

    def run(given, *flags):
        def counted(name, act, bench):
            state.ran.append(name)
            act(bench)

        made = tuple(Part(name, 30.0, "nothing", partial(counted, name, act)) for name, act in given.items())
        monkeypatch.setattr(gpu_check, "PARTS", made)
        state.ran.clear()
        code = gpu_check.main([f"--out={state.out}", *flags])
        state.results = gpu_check.read_results(state.out, state.machine | {"tiny": False, "rehearsal": False})
        return code, list(state.ran)

    state.run = run
    return state


def says(ok):
    return lambda bench: bench.check("a figure", "1", ok)


def skips(bench):
    raise Skip("not here")


def starts(code):
    return lambda bench: bench.wait(bench.start("python", "-c", code))


def test_what_passed_is_not_done_again_and_what_failed_comes_last(check):
    given = {"bad": says(False), "good": says(True), "figure": says(None), "absent": skips}
    assert check.run(given) == (1, ["bad", "good", "figure", "absent"])
    assert {name: result["status"] for name, result in check.results.items()} == {
        "bad": "failed", "good": "passed", "figure": "passed", "absent": "skipped",
    }  # fmt: skip
    given |= {"bad": says(True), "new": says(True)}
    assert check.run(given) == (0, ["new", "bad"])
    assert check.run(given) == (0, [])
    assert check.run(given, "--again", "--only=good") == (0, ["good"])
    assert "| good | 0 s |  | passed |" in (check.out / "report.md").read_text()


def test_another_commit_or_gpu_is_checked_anew(check):
    assert check.run({"one": says(True)}) == (0, ["one"])
    check.machine["commit"] = "2"
    assert check.run({"one": says(True)}) == (0, ["one"])


def test_a_result_that_was_cut_off_does_not_count(check):
    check.run({"one": says(True), "two": says(True)})
    path = check.out / "results.jsonl"
    path.write_text(path.read_text()[:-20])
    assert check.run({"one": says(True), "two": says(True)}) == (0, ["two"])
    assert check.run({"one": says(True), "two": says(True)}) == (0, [])


def test_parts_without_time_are_left_for_the_next_start(check, capsys):
    assert check.run({"one": says(True)}, "--minutes=0.1") == (75, [])
    assert "not reached: one" in capsys.readouterr().out
    assert check.run({"one": says(True)}) == (0, ["one"])


def test_a_part_ends_with_its_time_and_so_does_all_that_it_started(check, tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    inner = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], start_new_session=True)"

    def hang(bench):
        bench.end = time.monotonic() + 1.0
        starts(outer)(bench)

    code, _ = check.run({"hangs": hang, "next": says(True)})
    assert (code, check.results["hangs"]["status"], check.results["next"]["status"]) == (75, "out of time", "passed")
    assert not is_alive(int(pid.read_text()))


def test_a_process_that_fails_gives_its_last_line(check):
    assert check.run({"broken": starts("raise SystemExit('no such thing')")})[0] == 1
    reason = check.results["broken"]["reason"]
    assert reason.startswith("exit code 1: no such thing (")
    assert Path(reason.split("(")[1].rstrip(")")).exists()


def test_a_part_that_breaks_leaves_the_others_alone(check):
    assert check.run({"broken": lambda bench: 1 / 0, "next": says(True)}) == (1, ["broken", "next"])
    assert check.results["broken"]["reason"] == "ZeroDivisionError: division by zero"


def test_no_value_passes_or_fails_in_a_rehearsal_and_no_speed_of_a_tiny_model(tmp_path):
    def verdicts(**machine):
        bench = Bench(tmp_path, {}, {}, {**MACHINE, "tiny": False, "rehearsal": False, **machine}, 0)
        bench.begin("part", 1.0)
        for about in ("run", "values", "speed"):
            bench.check("", "", False, about)
        return [check["ok"] for check in bench.checks]

    assert verdicts() == [False, False, False]
    assert verdicts(tiny=True) == [False, False, None]
    assert verdicts(rehearsal=True) == [False, None, None]


def test_without_a_gpu_the_command_says_what_can_be_done(check, capsys):
    check.machine["device"] = None
    assert check.run({"one": says(True)}) == (2, [])
    assert capsys.readouterr().err == (
        "gpu_check.sh: found no GPU; --tiny tries it on a CPU, --rehearse on a GPU that is not there\n"
    )


# -- what the parts judge ----------------------------------------------------------------------------------------------
def event(name, start, cpu=0.0, device=0.0, kind="CPU"):
    span = SimpleNamespace(start=start, end=start + 1)
    return SimpleNamespace(
        name=name, time_range=span, cpu_time_total=cpu, device_time_total=device, device_type=f"DeviceType.{kind}",
        is_user_annotation=name == "the step",
    )  # fmt: skip


def test_a_steps_waits_and_kernels_are_counted_without_the_profilers_own():
    step = event("the step", 10)
    step.time_range.end = 100
    events = [
        event("the step", 30, device=7, kind="CUDA"), event("cudaDeviceSynchronize", 5, cpu=9), step,
        event("cudaLaunchKernel", 20, cpu=3), event("gemm", 30, device=2000, kind="CUDA"),
        event("cudaEventSynchronize", 60, cpu=1500), event("cudaMemcpyAsync", 70, cpu=1),
        event("copy", 71, device=500, kind="CUDA"), event("cudaDeviceSynchronize", 101, cpu=9),
    ]  # fmt: skip
    assert speed.count_events(events) == {"waits": {"count": 1, "ms": 1.5}, "kernels": {"count": 2, "ms": 2.5}}


@pytest.mark.parametrize("factor, ok", [(1.001, [True, True]), (1.02, [False, False]), (float("nan"), [False, False])])
def test_losses_that_are_not_the_cpus_are_seen(tmp_path, factor, ok):
    for name, scale in (("run", factor), ("cpu", 1.0)):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "loss": 5.0 * scale, "grad_norm": 2.0 * scale} for step in range(1, 21)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench = Bench(tmp_path, {}, {}, {**MACHINE, "tiny": False, "rehearsal": False}, 0)
    bench.begin("part", 1.0)
    parts.compare_losses(bench, tmp_path / "run", tmp_path / "cpu")
    assert [check["ok"] for check in bench.checks] == ok


@pytest.mark.parametrize("share, within", [(0.0, True), (0.05, False)])
def test_a_kernel_that_is_off_is_seen_in_its_output_and_gradient(share, within, monkeypatch):
    def norm(x, weight):
        return (x / x.square().mean(-1, keepdim=True).sqrt() * weight.float()).to(x.dtype)

    def kernel(x, weight):
        return norm(x, weight) * (1 + share)

    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "WHERE", "meta")  # any but "cpu"
    monkeypatch.setattr(kernels, "run", partial(on_cpu, kernels.run))
    x, weight = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((4, 64), (64,)))
    found = kernels.compare_call(kernels.Call(kernel, norm, (x,), {"weight": weight}))
    for what, floor in parts.KERNEL_FLOOR.items():
        assert 0 < found[f"cpu_{what}"] < 0.01
        assert (found[what] <= max(floor, parts.WORSE * found[f"cpu_{what}"])) is within


def on_cpu(run, function, call, where, dtype=None):
    return run(function, call, "cpu", dtype)


def test_a_kernel_that_raises_is_named_with_its_error():
    def broken(x):
        raise RuntimeError("out of resources")

    found = kernels.compare_call(kernels.Call(broken, broken, (torch.ones(2),), {}))
    assert found == {"kernel": "broken", "error": "RuntimeError: out of resources"}


@pytest.mark.slow
def test_the_peak_of_this_job_is_found_on_the_page_of_a_dry_run(tmp_path):
    def page(*flags):
        command = ["bash", str(REPO / "train.sh"), "--dry_run", "--training.seq_len=256", *flags]
        run = environment(FLAME_PYTHON=sys.executable)
        return subprocess.run(command, env=run, cwd=tmp_path, capture_output=True, text=True, timeout=400).stdout

    model = f"--model.config={REPO / 'configs/gla_debug.json'}"
    plain, full = (parts.peak(page(model, *flags)) for flags in ([], ["--activation_checkpoint.mode=full"]))
    assert 0 < full < plain < 1


# -- the command itself ------------------------------------------------------------------------------------------------
def start(out, *flags):
    command = ["bash", str(REPO / "scripts/gpu_check.sh"), f"--out={out}", "--minutes=60", *flags]
    run = environment(FLAME_PYTHON=sys.executable)
    return subprocess.Popen(command, env=run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_every_part_runs_small_on_a_cpu(tmp_path):
    done = start(tmp_path, "--tiny")
    said, _ = done.communicate(timeout=3000)
    assert done.returncode == 0, said
    results = {result["part"]: result for result in records(tmp_path / "results.jsonl")}
    assert results.keys() == {part.name for part in PARTS}
    assert {name for name, result in results.items() if result["status"] == "skipped"} <= {
        "Trainer",
        "float8",
        "memory",
    }
    assert not (tmp_path / "work").exists()
    assert "| flame |" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_a_check_that_is_killed_goes_on_with_the_part_that_it_was_at(tmp_path):
    flags = ("--tiny", "--only=packed,bare")
    killed = start(tmp_path, *flags)
    for line in killed.stdout:
        if line.startswith("bare:"):
            break
    time.sleep(2)
    killed.send_signal(signal.SIGKILL)  # bash has become the command: its part is left alone
    killed.wait()
    assert [result["part"] for result in records(tmp_path / "results.jsonl")] == ["packed"]
    said, _ = (again := start(tmp_path, *flags)).communicate(timeout=600)
    assert again.returncode == 0, said
    assert "packed:" not in said
    assert [(r["part"], r["status"]) for r in records(tmp_path / "results.jsonl")] == [
        ("packed", "passed"), ("bare", "passed"),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif("FLAME_REHEARSAL" not in os.environ, reason="FLAME_REHEARSAL names no rehearsal environment")
def test_every_part_runs_small_on_a_gpu_that_is_not_there_and_no_value_passes(tmp_path):
    done = start(tmp_path, "--tiny", "--rehearse")
    said, _ = done.communicate(timeout=3000)
    assert done.returncode == 0, said
    results = {result["part"]: result for result in records(tmp_path / "results.jsonl")}
    assert results.keys() == {part.name for part in PARTS}
    assert results["flame"]["status"] == "rehearsed"
