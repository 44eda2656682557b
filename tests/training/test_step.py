"""How often a step waits for its device and asks the other ranks; a CPU shows the calls, a GPU waits in them."""

import json

import pytest

from tests.launch import SMALL, train_each
from tests.tiny import write_config


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_reads_once_when_its_update_is_launched_and_asks_the_ranks_three_times(ranks, tmp_path):
    (tmp_path / "text.txt").write_text("a little text for a few steps, again and again. " * 300)
    flags = [
        *(*SMALL, f"--job.dump_folder={tmp_path}/run", f"--model.config={write_config(tmp_path, 'llama')}"),
        *(f"--training.dataset={tmp_path}/text.txt", "--data.lanes=2", "--training.dataloader.num_workers=0"),
        *("--training.local_batch_size=2", "--training.gradient_accumulation_steps=3", "--training.steps=3"),
        *("--metrics.log_freq=100", "--checkpoint.no_enable"),
    ]
    train_each([flags], ranks=ranks, trainer="tests.faults:Recorded")
    asked = [] if ranks == 1 else ["allreduce_", "all_reduce", "allreduce_"]  # of the data, of the norm, of the outcome
    for rank in range(ranks):
        _, *steps = json.loads((tmp_path / "run" / f"reads-{rank}.json").read_text())  # the first is logged
        assert steps == [[*asked, "_fused_adamw_", "tolist"]] * 2
