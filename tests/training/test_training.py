"""What a run does besides its losses: saves, rotation, logs, refusals of bad numbers, switches that must not matter."""

import json
import math
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flame.checkpoint.commit import complete_steps
from flame.convert.dcp_file import read_tensors
from flame.training.trainer import step_seed
from tests.launch import SMALL, metrics, train, train_each, trajectory
from tests.models.small import OTHERS, fields_of
from tests.tiny import write_config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    for family in ("llama", "gla", "transformer"):
        write_config(root, family)
    return root


@pytest.fixture(scope="module")
def job(root):
    def flags(name, *more, family="llama", steps=4):
        folder, config = root / name, root / f"{family}.json"
        return [
            *(*SMALL, f"--job.dump_folder={folder}", f"--model.config={config}", f"--training.steps={steps}"),
            *("--checkpoint.no_export", *more),
        ]

    return flags


SWITCHES = {  # name: (family, flags)
    "full_ac": ("llama", ["--activation_checkpoint.mode=full"]),
    "selective_ac": ("gla", ["--activation_checkpoint.mode=selective"]),
    "compiled": ("llama", ["--compile.enable", "--compile.backend=aot_eager"]),
    "compiled_gla": ("gla", ["--compile.enable", "--compile.backend=aot_eager"]),
    "bf16": ("gla", ["--training.mixed_precision_param=bfloat16"]),
    "threads": ("gla", ["--training.dataloader.num_workers=3"]),
}


@pytest.fixture(scope="module")
def switched(root, job):
    plain = [job(f"plain_{family}", "--checkpoint.no_enable", family=family) for family in ("llama", "gla")]
    train_each(
        plain + [job(name, "--checkpoint.no_enable", *more, family=family) for name, (family, more) in SWITCHES.items()]
    )


@pytest.mark.parametrize("name", SWITCHES)
def test_recomputation_compilation_precision_and_threads_leave_losses_alone(name, root, switched):
    expected, seen = metrics(root / f"plain_{SWITCHES[name][0]}"), metrics(root / name)
    tolerance = 1e-2 if name == "bf16" else 1e-5  # bf16 keeps 8 bits of mantissa
    assert [r["loss"] for r in seen] == pytest.approx([r["loss"] for r in expected], rel=tolerance)
    assert [r["grad_norm"] for r in seen] == pytest.approx([r["grad_norm"] for r in expected], rel=10 * tolerance)
    assert [r["data_digest"] for r in seen] == [r["data_digest"] for r in expected]


# Inductor sums in another order, and in bf16 rounds less often than one operator after another does. A rounding is up
# to 2^-9 = 2e-3 of an activation, most of which cancels in a mean over 1,024 tokens. Llama, seen: 9e-8 of the loss and
# 1.4e-7 of the norm in fp32, 5e-6 and 3e-4 in bf16.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "hgrn2", "rwkv6"])
@pytest.mark.parametrize("precision, loss_bound, norm_bound", [("float32", 1e-6, 1e-5), ("bfloat16", 1e-4, 3e-3)])
def test_blocks_that_inductor_compiles_train_as_eager_ones_do(precision, loss_bound, norm_bound, family, root, job):
    if not (root / f"{family}.json").exists():
        name = family if family in OTHERS else f"{family}_340M"
        (root / f"{family}.json").write_text(json.dumps(fields_of(name)))
    shared = ("--checkpoint.no_enable", f"--training.mixed_precision_param={precision}")
    folders = {name: f"{family}_{name}_{precision}" for name in ("compiled", "eager")}
    flags = {"compiled": "--compile.enable", "eager": "--compile.enable=false"}
    said = train_each([job(folders[name], *shared, flags[name], family=family) for name in flags])
    assert said.count("compiling kernels") == said.count("torch.compile took") == 1
    compiled, eager = (metrics(root / folders[name]) for name in flags)
    assert [r["loss"] for r in compiled] == pytest.approx([r["loss"] for r in eager], rel=loss_bound)
    assert [r["grad_norm"] for r in compiled] == pytest.approx([r["grad_norm"] for r in eager], rel=norm_bound)


def test_packed_documents_train_in_families_of_both_kinds(root, job):
    packed = ("--training.varlen", "--training.context_len=64", "--checkpoint.no_enable")
    families = ("llama", "gla", "transformer")
    train_each([job(f"packed_{family}", *packed, family=family, steps=6) for family in families])
    for family in families:
        losses = [r["loss"] for r in metrics(root / f"packed_{family}")]
        assert losses[0] == pytest.approx(math.log(320), abs=0.3)
        assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_the_newest_k_complete_checkpoints_are_kept_and_a_half_written_one_is_neither_used_nor_counted(mode, root, job):
    name = f"rotation_{mode}"
    saves = ("--checkpoint.interval=1", "--checkpoint.keep_latest_k=2", f"--checkpoint.async_mode={mode}")
    half_written = root / name / "checkpoint" / "step-99"
    train_each([job(name, *saves)])
    half_written.mkdir()
    (half_written / "__0_0.distcp").write_bytes(b"torn")
    said = train_each([job(name, *saves, steps=6)])
    assert "step-99 is not complete and is not used" in said
    assert metrics(root / name)[-1]["step"] == 6
    kept = sorted(path.name for path in (root / name / "checkpoint").iterdir())
    assert kept == ["step-5", "step-6", "step-99"]


def test_a_run_killed_in_its_first_save_starts_anew_and_keeps_what_was_written(root, job):
    first = root / "first" / "checkpoint" / "step-2"
    first.mkdir(parents=True)
    (first / "__0_0.distcp").write_bytes(b"torn")
    train_each([job("first", "--checkpoint.interval=2")])
    assert metrics(root / "first")[-1]["step"] == 4
    assert (first.parent / "replaced" / "step-2" / "__0_0.distcp").read_bytes() == b"torn"


def test_a_run_whose_checkpoints_are_all_broken_stops_instead_of_starting_anew(root, job):
    for step in (2, 4):
        (root / "torn" / "checkpoint" / f"step-{step}").mkdir(parents=True)
    done = train(*job("torn"))
    assert "flame: --checkpoint.folder: found no complete checkpoint" in done.stderr
    assert done.returncode != 0
    assert not (root / "torn" / "metrics.jsonl").exists()


def test_a_seed_checkpoint_gives_its_weights_to_any_layout(root, job):
    config = write_config(root, "llama", stem="wide", initializer_range=0.3)
    seed = train(*job("seeded", "--checkpoint.create_seed_checkpoint"), f"--model.config={config}")
    assert seed.returncode == 0, seed.stderr
    train_each([job("seeded", steps=1)[:-1]], ranks=2)  # built with a tenth of that range: only the seed can differ
    assert metrics(root / "seeded")[0]["loss"] > math.log(320) + 1


def test_an_initial_checkpoint_is_loaded_although_the_runs_own_folder_exists_and_is_empty(root, job):
    config = write_config(root, "llama", stem="wide", initializer_range=0.3)
    train_each([[*job("donor", steps=1), f"--model.config={config}"]])
    (root / "heir" / "checkpoint").mkdir(parents=True)
    train_each([job("heir", f"--checkpoint.initial_load_path={root}/donor/checkpoint/step-1", steps=1)])
    assert metrics(root / "heir")[0]["loss"] > math.log(320) + 1


def test_saves_can_be_counted_in_seconds(root, job):
    train_each([job("seconds", "--checkpoint.interval_type=seconds", "--checkpoint.interval=1", steps=60)])
    saved = sorted(int(path.name[5:]) for path in (root / "seconds" / "checkpoint").iterdir())
    assert saved[-1] == 60
    assert 2 <= len(saved) < 30


def test_a_third_of_the_labels_masked_counts_alike_in_one_batch_and_in_four(root, job):
    batches = {"at_once": (4, 1), "in_four": (1, 4)}
    train_each(
        [
            [
                *job(name, "--checkpoint.no_enable"),
                *(f"--training.local_batch_size={size}", f"--training.gradient_accumulation_steps={steps}"),
            ]
            for name, (size, steps) in batches.items()
        ],
        trainer="tests.faults:MaskedLabels",
    )
    one, four = metrics(root / "at_once"), metrics(root / "in_four")
    assert [r["data_digest"] for r in four] == [r["data_digest"] for r in one]
    assert [r["loss"] for r in four] == pytest.approx([r["loss"] for r in one], abs=1e-6)
    assert [r["grad_norm"] for r in four] == pytest.approx([r["grad_norm"] for r in one], abs=1e-6)


IMPLEMENTATIONS = ("fused", "for-loop")


def weights(folder):
    return {name: each.read() for name, each in read_tensors(folder / "checkpoint" / "step-2").items()}


@pytest.fixture(scope="module")
def two_ranks(root, job):
    """Jobs whose data ends in step 3 and the same of two steps, and jobs of two steps that update in the backward."""
    jobs = [
        job(f"{name}_{kind}", f"--optimizer.implementation={kind}", "--lr_scheduler.total_steps=9", steps=steps)
        for kind in IMPLEMENTATIONS
        for name, steps in (("ended", 9), ("whole", 2))
    ]
    # A large eps, else an update divides gradients close to zero by themselves, whose sums differ in their order.
    in_backward = ("--optimizer.early_step_in_backward", "--optimizer.eps=1e-3", "--optimizer.lr=1e-2")
    halves = ("--training.local_batch_size=4", *in_backward)
    jobs += [
        job("fsdp2", *halves, steps=2),
        job("ddp2", *halves, "--parallelism.data_parallel_replicate_degree=2", steps=2),
    ]
    train_each(jobs, trainer="tests.faults:EndingData", ranks=2)
    train_each([job("alone", *in_backward, steps=2)])


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_all_ranks_stop_before_the_step_in_which_one_runs_out_of_data_and_save_as_if_it_had_not_begun(
    kind, root, two_ranks
):
    status = json.loads((root / f"ended_{kind}" / "status.json").read_text())
    assert (status["status"], status["step"]) == ("data_exhausted", 2)
    ended, whole = weights(root / f"ended_{kind}"), weights(root / f"whole_{kind}")
    assert ended.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(ended[name], whole[name])] == []


@pytest.mark.parametrize("layout", ["fsdp2", "ddp2"])
def test_updates_in_the_backward_are_those_of_one_rank(layout, root, two_ranks):
    one, many = metrics(root / "alone"), metrics(root / layout)
    assert [r["loss"] for r in many] == pytest.approx([r["loss"] for r in one], abs=1e-6)
    expected, found = weights(root / "alone"), weights(root / layout)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)


def test_a_chosen_step_is_resumed_and_what_was_logged_after_it_is_moved_aside(root, job):
    train_each([job("chosen", "--checkpoint.interval=1")])
    before = trajectory(root / "chosen")
    assert (root / "chosen" / "checkpoint" / "step-4").exists()
    train_each([job("chosen", "--checkpoint.load_step=2", "--lr_scheduler.total_steps=4", steps=3)])
    assert trajectory(root / "chosen") == before[:3]
    assert '"step": 4' in (root / "chosen" / "metrics.replaced.jsonl").read_text()
    assert not (root / "chosen" / "checkpoint" / "step-4").exists()
    assert (root / "chosen" / "checkpoint" / "replaced" / "step-4" / ".metadata").exists()


def test_the_same_command_goes_on_from_where_it_went_back_to_and_another_goes_back_again(root, job):
    back = ("--checkpoint.load_step=2", "--checkpoint.interval=1", "--lr_scheduler.total_steps=5")
    train_each([job("back", "--checkpoint.interval=1")])
    said = train_each([job("back", *back, steps=5), job("back", *back, steps=5)])
    assert "This job is complete: step 5 of 5" in said and "load_step 2: the job went back to it earlier" in said
    replaced = root / "back" / "checkpoint" / "replaced"
    assert sorted(path.name for path in replaced.iterdir()) == ["step-3", "step-4"]
    assert json.loads((root / "back" / "status.json").read_text())["start"]["load_step"] == 2
    train_each([job("back", *back, "--optimizer.lr=1e-5", steps=5)])
    assert (replaced / "step-5").exists() and metrics(root / "back")[-1]["lr"] < 1e-5


def test_a_refused_resume_leaves_the_records_of_the_run_as_they_were(root, job):
    train_each([job("whole", steps=2)])
    files = ("config.toml", "status.json", "metrics.jsonl", "model/config.json")
    before = [(root / "whole" / name).read_text() for name in files]
    biased = write_config(root, "llama", "biased", attention_bias=True)
    for refused in (["--data.lanes=32"], [f"--model.config={root}/gla.json"], [f"--model.config={biased}"]):
        done = train(*job("whole", *refused, steps=3))
        assert done.stderr.count("flame: --") == 1
        assert [(root / "whole" / name).read_text() for name in files] == before


def test_a_job_asked_for_fewer_steps_than_it_has_done_is_complete(root, job):
    train_each([job("longer", steps=3)])
    recorded = (root / "longer" / "model" / "config.json").read_bytes()
    other = write_config(root, "llama", "other", rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    said = train_each([job("longer", f"--model.config={other}", steps=2)])
    assert "This job is complete: step 3 of 2" in said
    assert (root / "longer" / "model" / "config.json").read_bytes() == recorded  # what was trained


def test_a_job_that_cannot_be_exported_says_so_in_one_line_and_the_same_command_exports_it(root, job):
    folder = root / "unexported"
    folder.mkdir()
    (folder / "hf").symlink_to("/proc")  # where nobody can make a folder
    flags = job("unexported", "--checkpoint.export", steps=2)
    done = train(*flags)
    status = json.loads((folder / "status.json").read_text())
    assert (done.returncode, status["status"]) == (1, "failed")
    assert status["reason"].startswith("step 2 is saved, but was not exported: ")
    assert done.stderr.count("flame: step 2 is saved, but was not exported: ") == 1
    (folder / "hf").unlink()
    assert train(*flags).returncode == 0
    assert (folder / "hf" / "step-2" / "conversion_report.json").exists()


def test_the_profiler_runs_without_an_accelerator(root, job):
    profile = ("--profiling.enable_profiling", "--profiling.profile_freq=4", "--checkpoint.no_enable")
    train_each([job("profiled", *profile)])
    assert list((root / "profiled" / "profile_traces").rglob("*.json"))


def test_a_new_learning_rate_takes_effect_on_resume(root, job):
    constant = ("--lr_scheduler.warmup_steps=0", "--lr_scheduler.decay_ratio=0")
    train_each([job("rate", *constant, steps=2), job("rate", *constant, "--optimizer.lr=1e-5", steps=3)])
    assert [r["lr"] for r in metrics(root / "rate")] == pytest.approx([8e-4, 8e-4, 1e-5])


def test_tensorboard_and_wandb_are_written_and_a_resumed_run_goes_on_in_the_same_wandb_run(root, job):
    logs = ("--metrics.enable_wandb", "--metrics.enable_tensorboard", "--parallelism.pipeline_parallel_degree=2")
    for more in (("--training.steps=3",), ("--training.steps=5", "--checkpoint.load_step=2"), ("--training.steps=5",)):
        train_each([job("logged", *logs, "--checkpoint.interval=2", *more)], ranks=2, WANDB_MODE="offline")
    folder = root / "logged"
    run_id = (folder / "wandb_run_id").read_text().splitlines()[0]
    runs = list(folder.glob("tb/wandb/offline-run-*"))
    assert len(runs) == 2  # the third start trained nothing
    assert all(run.name.endswith(run_id) for run in runs)
    assert {path.name.split(".")[0] for path in (folder / "tb").iterdir()} == {"wandb", "events"}
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_the_run_folder_says_what_happened_and_its_config_runs_again_as_it_is(root, job):
    train_each([job("first run", steps=3)])
    folder = root / "first run"
    assert json.loads((folder / "status.json").read_text()) == {
        "step": 3,
        "tokens": 3 * 8 * 128,
        "reason": None,
        "status": "completed",
        "start": {"mode": "scratch", "source": None, "step": 0, "tokens": 0, "restored": []},
    }
    needed = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu", "data_digest"}
    record = metrics(folder)[0]
    assert needed | {"data/stdlib/tokens", "data/stdlib/epoch"} <= record.keys()
    assert record["mfu"] is None  # a CPU's peak is not known
    shutil.copy(folder / "config.toml", root / "again.toml")
    shutil.copytree(folder, root / "copied run")
    extended = [f"--job.config_file={root}/copied run/config.toml", "--training.steps=4"]
    log = train_each([[f"--job.config_file={root}/again.toml", f"--job.dump_folder={root}/again"], extended])
    assert trajectory(root / "again") == trajectory(folder)
    assert [record["step"] for record in metrics(root / "copied run")] == [1, 2, 3, 4]
    assert len(metrics(folder)) == 3 and complete_steps(folder / "checkpoint") == [3]  # a copy is a run of its own
    today = metrics(root / "copied run")[3]["lr"]
    assert f"learning rate at step 4: 0.00e+00 by the settings of its checkpoint, {today:.2e} by today's" in log


def test_torch_takes_the_seed_of_every_step_and_the_seeds_of_shorter_runs_stay():
    assert step_seed(42, 3, 1) == (42 * 1_000_003 + 3) * 65_537 + 1
    for seed in (281_469_838, 2**32 - 1, 2**62 - 1):
        assert torch.manual_seed(step_seed(seed, 10**9, 10**5)).initial_seed() == step_seed(seed, 10**9, 10**5)
    assert len({step_seed(2**62 - 1, step, rank) for step in range(50) for rank in range(50)}) == 2500
