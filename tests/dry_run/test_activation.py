"""What a block keeps and needs at its peak, traced with fake tensors."""

import math

import pytest
import torch

from flame.dry_run.activation import LiveBytes, measure
from flame.dry_run.memory import measure_modes
from tests.dry_run.jobs import EXPERT, TENSOR, build_job


def test_full_checkpointing_keeps_a_block_input_and_selective_2_does_so_in_every_second_block(tmp_path):
    ac = "--activation_checkpoint."
    config, spec = build_job(tmp_path, "llama", f"{ac}mode=selective", f"{ac}selective_ac_option=2")
    modes = measure_modes(spec, config)
    assert list(modes) == ["none", "selective", "full"]
    none, half, full = ([block.saved for block in parts.blocks] for parts in modes.values())
    hidden = 8 * 128 * 64 * 4  # batch, seq, hidden, float32
    assert full[0] == pytest.approx(hidden, rel=0.1)
    assert half == [none[0], full[1]] and none[0] > 5 * full[0]


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("tokens", [1024, 16_384])
def test_the_loss_takes_what_the_fused_loss_takes_on_a_gpu(tmp_path, tokens, degree):
    flags = [f"--training.local_batch_size={tokens // 128}", f"{TENSOR}={degree}"]
    config, spec = build_job(tmp_path, "llama", *flags, vocab_size=32_000)
    head = measure(spec, config, "none").head
    vocab, hidden, size = 32_000 // degree, 64, 4  # of float32
    gradients, logits = size * hidden * (tokens + vocab), size * min(8192, tokens) * vocab
    assert head.forward == pytest.approx(gradients + logits, rel=0.05)
    norm = 2 * size * hidden * tokens  # at least what the last norm keeps
    assert gradients <= head.saved <= gradients + 2 * norm
    assert gradients <= head.backward <= gradients + 2 * norm  # once more, rounded


@pytest.mark.parametrize("model", ["llama", "llama3 debugmodel"])
def test_tensor_parallel_ranks_share_activations_and_logits(tmp_path, model):
    parts = {}
    for degree in (1, 2):
        config, spec = build_job(tmp_path, model, f"{TENSOR}={degree}")
        parts[degree] = measure(spec, config, "none")
    one, two = parts[1], parts[2]
    assert 0.45 < two.blocks[0].saved / one.blocks[0].saved < 0.7
    assert 0.3 < two.head.saved / one.head.saved < 0.6
    assert 0.4 < two.blocks[0].backward / one.blocks[0].backward < 0.7
    assert measure(spec, config, "none") == two  # whatever this process ran before


def test_only_blocks_whose_tokens_choose_their_experts_are_estimated_by_a_formula(tmp_path):
    dense, whole, divided = (
        measure(*reversed(build_job(tmp_path, f"{model} debugmodel", f"{EXPERT}={degree}")), "none")
        for model, degree in (("llama3", 1), ("deepseek_v3", 1), ("deepseek_v3", 2))
    )
    assert whole.untraceable and divided.untraceable and not dense.untraceable
    # torchtitan makes all logits at once: the same memory for the same vocabulary and width.
    assert whole.head.forward == pytest.approx(dense.head.forward, rel=0.1)
    assert whole.head == divided.head
    experts = sum(math.prod(shape) for shape in whole.blocks[-1].shapes if len(shape) == 3)
    assert whole.blocks[-1].gradients - divided.blocks[-1].gradients == 4 * experts // 2


def test_torchtitans_llama_takes_what_transformers_takes(tmp_path):
    """Blocks of the same sizes keep as much for the backward in both, but for fused or copied tensors."""
    config, spec = build_job(tmp_path, "llama3 debugmodel")
    args = spec.model_args["debugmodel"]
    theirs = measure(spec, config, "none")
    config, spec = build_job(
        *(tmp_path, "llama"), hidden_size=args.dim, intermediate_size=768, num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_heads, num_hidden_layers=args.n_layers, vocab_size=args.vocab_size,
    )  # fmt: skip
    ours = measure(spec, config, "none")
    assert [sorted(part.shapes) for part in theirs.blocks] == [sorted(part.shapes) for part in ours.blocks]
    assert theirs.blocks[0].saved == pytest.approx(ours.blocks[0].saved, rel=0.2)


def test_bytes_are_counted_once_per_storage_while_it_is_alive():
    with LiveBytes() as live:
        kept = torch.zeros(100)
        view = kept[:10]
        temporary = torch.ones(1000)
        del temporary
        assert live.lap() == (4400, 400)  # peak, alive
        del kept
        assert live.lap() == (0, 0)  # the view keeps the storage
        del view
        assert live.lap() == (0, -400)
