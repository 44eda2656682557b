"""NaN and infinity are found on whichever rank they are, named, and reach neither the weights nor a checkpoint."""

import json
import math

import pytest
import torch
from torchtitan.models.moe.moe import MoE, MoEArgs

from flame.config.schema import Training
from flame.data.inspect import show
from flame.errors import NonFiniteError
from flame.training.nonfinite import SkippedSteps, find
from tests.launch import REPO, SMALL, metrics, train_each
from tests.tiny import write_config

BAD = "model.layers.0.self_attn.k_proj.weight"  # the parameter that tests.faults.Poisoned spoils
STOPS = {  # name: (what is bad when, flags, what the report must say)
    "gradient": ("gradient 3", [], f"step 3: not finite: 1 gradient ({BAD}; on rank 1); stopped before the update"),
    "loss": ("loss 3", [], "step 3: not finite: the loss; stopped before the update"),
    "in_a_row": (
        "gradient 2-9",
        ["--training.skip_nan_inf", "--training.max_skipped_steps=2"],
        f"step 4: not finite: 1 gradient ({BAD}; on rank 1); stopped before the update, and nothing was saved (as were "
        "the 2 steps before, --training.max_skipped_steps allows no more)",
    ),
    "weight": ("weight 3", [], f"step 3: not finite after it: 1 tensor ({BAD}; on rank 1); it is not saved"),
    "moment": ("moment 3", [], f"step 3: not finite after it: 1 tensor (exp_avg of {BAD}; on rank 1); it is not saved"),
    "stage": (
        "gradient 3",
        ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_microbatch_size=4"],
        "step 3: not finite: 1 gradient (model.layers.1.",
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where the jobs of one launch on two ranks have left their folders."""
    root = tmp_path_factory.mktemp("finite")
    config = write_config(root, "llama")
    (root / "text.txt").write_text("a little text for a few steps, again and again. " * 200)

    def flags(name, what, *more):
        return [
            *(*SMALL, f"--job.dump_folder={root}/{name}", f"--job.description={what}", f"--model.config={config}"),
            *(f"--training.dataset={root}/text.txt", "--data.lanes=2", "--training.dataloader.num_workers=0"),
            *("--training.steps=5", "--checkpoint.interval=1", "--checkpoint.no_export", *more),
        ]

    jobs = [flags("skipped", "gradient 3", "--training.skip_nan_inf", "--training.max_skipped_steps=1")]
    jobs += [flags(name, what, *more) for name, (what, more, _) in STOPS.items()]
    train_each(jobs, trainer="tests.faults:Poisoned", ranks=2)
    return root


def test_a_step_with_a_nan_gradient_is_skipped_while_the_schedule_goes_on(root):
    records = metrics(root / "skipped")
    assert [r["optimizer/skipped_step"] for r in records] == [0, 0, 1, 1, 1]
    assert [r["grad_norm"] is None for r in records] == [False, False, True, False, False]
    assert [r["lr"] / 8e-4 for r in records] == pytest.approx([1 / 2, 1, 1, 2 / 3, 1 / 3])  # warm-up 2, then linear


@pytest.mark.parametrize("name", STOPS)
def test_the_report_names_the_step_and_what_is_bad_and_the_last_good_checkpoint_stays(name, root):
    *_, report = STOPS[name]
    status = json.loads((root / name / "status.json").read_text())
    assert report in status["reason"]
    assert "\n" not in status["reason"]
    bad_step = int(status["reason"].split()[1].rstrip(":"))
    saved = sorted(path.name for path in (root / name / "checkpoint").iterdir())
    assert saved == [f"step-{step}" for step in range(1, bad_step)]
    assert all((root / name / "checkpoint" / step / ".metadata").exists() for step in saved)


@pytest.mark.parametrize("name", ["gradient", "weight"])
def test_the_data_of_the_bad_step_can_be_shown_and_are_those_of_its_digest(name, root, capsys):
    status, last = json.loads((root / name / "status.json").read_text()), metrics(root / name)[-1]
    assert last["step"] == 3
    shown = f"bash {REPO}/scripts/flame.sh data show {root}/{name} --step 3"
    assert f"of digest {last['data_digest']}: {shown}" in status["reason"]
    assert show(root / name, 3, rank=None, ranks=None, full=False, trusted=True)
    assert f"digest {last['data_digest']}: as logged at step 3" in capsys.readouterr().out


def test_a_skipped_step_resets_the_token_counts_of_the_experts():
    moe = MoE(MoEArgs(num_experts=4, use_grouped_mm=False), dim=8, hidden_dim=8)
    moe.tokens_per_expert = torch.full((4,), 5.0)
    steps = SkippedSteps(Training(skip_nan_inf=True, max_skipped_steps=1), updates_in_backward=False)
    steps.skip(3, "the loss", [torch.nn.Sequential(moe)], "")
    assert steps.total == 1 and not moe.tokens_per_expert.any()
    with pytest.raises(NonFiniteError, match=r"^step 4: .*1 steps before"):
        steps.skip(4, "the loss", [moe], "")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_element_is_found_in_any_type_and_large_ones_are_not_taken_for_it(bad):
    tensors = {
        "float32": torch.full((70, 3), 3e38),
        "bfloat16": torch.full((5,), -3e38, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }
    assert find(tensors.items()) == []
    for name in ("float32", "bfloat16"):
        spoiled = {n: tensor.clone() for n, tensor in tensors.items()}
        spoiled[name].view(-1)[-1] = bad
        assert find(spoiled.items()) == [name]
        assert find([(name, spoiled[name])]) == [name]
