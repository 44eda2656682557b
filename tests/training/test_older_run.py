"""A run folder and a checkpoint that flame 0.1.0 wrote before its code was divided into rooms still resume.

run-0.1.0.tar.xz: `run`, three steps of a tiny Llama on two ranks; its model and text; `whole_metrics.jsonl`, what six
steps at once logged.
"""

import json
import tarfile
from pathlib import Path

import pytest

from tests.launch import metrics, train_each


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_of_0_1_0_resumes_with_the_losses_and_the_data_of_the_whole_run(ranks, tmp_path):
    with tarfile.open(Path(__file__).with_name("run-0.1.0.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    flags = [
        f"--job.config_file={tmp_path}/run/config.toml",
        f"--job.dump_folder={tmp_path}/run",
        f"--model.config={tmp_path}/model.json",
        f"--training.dataset={tmp_path}/text.jsonl",
        "--training.global_batch_size=4",
        "--training.steps=6",
    ]
    train_each([flags], ranks=ranks, trainer="tests.faults:Watched")
    # rank 0 alone looks for checkpoints, and tells the others
    scans = [int((tmp_path / f"run/scans-{rank}").read_text()) for rank in range(ranks)]
    assert scans[0] > 0 and not any(scans[1:])
    whole = [json.loads(line) for line in (tmp_path / "whole_metrics.jsonl").read_text().splitlines()]
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    for record, expected in zip(records, whole, strict=True):
        assert [record[name] for name in ("lr", "tokens", "data_digest")] == [
            expected[name] for name in ("lr", "tokens", "data_digest")
        ]
        # another CPU may add in another order
        assert record["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
