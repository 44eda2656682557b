"""The same global batch gives the same loss and gradient norm in every layout, and however it is accumulated."""

import pytest

from tests.launch import SMALL, metrics, train_each
from tests.tiny import write_config

STEPS = 5
FAMILIES = ("llama", "gpt_neox", "gla", "tied")
LAYOUTS = {  # name: (ranks, flags); the global batch is 8 sequences everywhere
    "one": (1, ["--training.local_batch_size=8"]),
    "accumulated": (1, ["--training.local_batch_size=2", "--training.gradient_accumulation_steps=4"]),
    "fsdp2": (2, ["--training.local_batch_size=4"]),
    "fsdp2_accumulated": (2, ["--training.local_batch_size=1", "--training.gradient_accumulation_steps=4"]),
    "ddp2": (2, ["--training.local_batch_size=4", "--parallelism.data_parallel_replicate_degree=2"]),
    "ddp2_accumulated": (
        2,
        [
            "--training.local_batch_size=2",
            "--training.gradient_accumulation_steps=2",
            "--parallelism.data_parallel_replicate_degree=2",
        ],
    ),
    "fsdp4": (4, ["--training.local_batch_size=2"]),
    "hsdp2x2": (4, ["--training.local_batch_size=2", "--parallelism.data_parallel_replicate_degree=2"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every family in every layout: {(family, layout): records}."""
    root = tmp_path_factory.mktemp("layouts")
    for family in ("llama", "gpt_neox", "gla"):
        write_config(root, family)
    write_config(root, "llama", stem="tied", tie_word_embeddings=True)
    for ranks in (1, 2, 4):
        train_each(
            [
                [
                    *SMALL,
                    *flags,
                    f"--model.config={root / family}.json",
                    f"--job.dump_folder={root / family / layout}",
                    f"--training.steps={STEPS}",
                    "--checkpoint.no_enable",
                ]
                for family in FAMILIES
                for layout, (needed, flags) in LAYOUTS.items()
                if needed == ranks
            ],
            ranks=ranks,
        )
    return {(f, layout): metrics(root / f / layout) for f in FAMILIES for layout in LAYOUTS}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_norm_equal_those_of_one_rank(family, layout, runs):
    expected, seen = runs[family, "one"], runs[family, layout]
    assert [r["step"] for r in seen] == list(range(1, STEPS + 1))
    for one, many in zip(expected, seen, strict=True):
        assert many["data_digest"] == one["data_digest"]
        assert many["tokens"] == one["tokens"]
        assert many["data/stdlib/tokens"] == one["data/stdlib/tokens"]
        assert many["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_the_weights(family, runs):
    # The equalities above would also hold between runs that learn nothing.
    assert runs[family, "one"][-1]["loss"] < runs[family, "one"][0]["loss"] - 0.1
