"""`flame.sh models audit`: checks that flame trains the model that its Hugging Face config means.

Each check is a line with its figure. It compares the model as the trainer runs it with transformers' own.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchtitan.components.loss import IGNORE_INDEX

from flame.models.causal_lm import CausalLM, ModelArgs
from flame.models.family import Family
from flame.models.hf import build_hf

SIGMAS = 6  # standard errors by which the mean and std of a random tensor may differ
CLOSE = 1e-5  # relative difference of one fp32 sum in two orders
LEAK = 1e-3  # relative difference that documents which see each other must show


@dataclass(frozen=True)
class Finding:
    """One line of an audit: a check, whether it passes, and its figure."""

    name: str
    ok: bool
    figure: str


def audit(family: Family, config: Any, seq_len: int = 128, seed: int = 0) -> Iterator[Finding]:
    """Findings on the model of a config, one by one as they are made."""
    model = CausalLM(ModelArgs(seed=seed).bind(family, config))
    try:
        model.init_weights()
    except RuntimeError as error:
        yield Finding("initialisation", False, str(error))
        return
    count = sum(1 for _ in [*model.parameters(), *model.buffers()])
    yield Finding("initialisation", True, f"{count} parameters and buffers, NaN before it, are all set")
    torch.manual_seed(seed)
    hf = build_hf(config)
    yield _check_distribution(model, hf)
    yield _check_buffers(model, hf)
    yield _check_embeddings(model)
    perturb_weights(model, seed)
    batch = torch.randint(0, config.vocab_size, (2, seq_len), generator=torch.Generator().manual_seed(seed))
    yield from _check_forward(model, batch)
    yield _check_packing(model, batch)


@torch.no_grad()
def perturb_weights(model: nn.Module, seed: int) -> None:
    """Add noise to every matrix, so that outputs that start at zero and tiny weights hide no difference."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.7 / parameter.shape[-1] ** 0.5)


def _check_distribution(model: CausalLM, hf: nn.Module) -> Finding:
    theirs = dict(hf.named_parameters())
    worst, name = 0.0, "none"
    for key, parameter in model.named_parameters():
        mine, other = parameter.detach().double().flatten(), theirs[key].detach().double().flatten()
        spread = float(other.std()) if len(other) > 1 else 0.0
        if spread < 1e-12:  # a constant
            off = 0.0 if torch.equal(mine, other) else float("inf")
        else:
            # A normal's mean errs by std / sqrt(n), its std by less; both samples err, and no tail here is heavier.
            error = spread * (2 / len(other)) ** 0.5
            off = max(float((mine.mean() - other.mean()).abs()), float((mine.std() - other.std()).abs())) / error
        worst, name = max((worst, name), (off, key))
    figure = f"mean and std within {worst:.1f} standard errors of transformers' ({name})"
    return Finding("distribution", worst <= SIGMAS, figure)


def _check_buffers(model: CausalLM, hf: nn.Module) -> Finding:
    theirs = dict(hf.named_buffers())
    worst = max((_distance(buffer, theirs[key]) for key, buffer in model.named_buffers()), default=0.0)
    return Finding("buffers", worst <= CLOSE, f"{len(theirs)} buffers differ by {worst:.1e} at most")


def _check_embeddings(model: CausalLM) -> Finding:
    head = [name for name, _ in model.named_parameters() if name.startswith(model.head_name)]
    shared = [p for p in model.parameters() if p is model.embedding.weight]
    ok = len(shared) == 1 and bool(head) != model.tied
    kind = "tied: the head reads the embedding table" if model.tied else f"untied: the head has {', '.join(head)}"
    return Finding("embeddings", ok, kind)


def _check_forward(model: CausalLM, tokens: torch.Tensor) -> Iterator[Finding]:
    reference = _reference_model(model)
    labels = F.pad(tokens[:, 1:], (0, 1), value=IGNORE_INDEX)
    with torch.no_grad():
        difference = _distance(model.eval()(tokens), reference.eval()(tokens, use_cache=False).logits)
    yield Finding("logits", difference <= CLOSE, f"differ from transformers' by {difference:.1e}")
    torch.manual_seed(0)  # any dropout must drop the same in both
    mine = model.train()(tokens, labels=labels) / (labels != IGNORE_INDEX).sum()
    torch.manual_seed(0)
    theirs = reference.train()(tokens, labels=tokens, use_cache=False).loss
    mine.backward()
    theirs.backward()
    difference = _distance(mine.detach(), theirs.detach())
    yield Finding("loss", difference <= CLOSE, f"{mine.item():.5f}, differs from transformers' by {difference:.1e}")
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    scale = max(float(g.norm()) for g in gradients.values() if g is not None)
    worst = max(
        float((p.grad - gradients[name]).norm()) / scale
        for name, p in model.named_parameters()
        if p.grad is not None or gradients[name] is not None
    )
    yield Finding("gradients", worst <= 10 * CLOSE, f"differ from transformers' by {worst:.1e} of the largest")


def _check_packing(model: CausalLM, tokens: torch.Tensor) -> Finding:
    if model.family.packing is None:
        return Finding("packing", True, "documents cannot be kept apart; --training.varlen is rejected")
    rows, length = tokens.shape
    cut = length // 3  # a document of its own in each row, and the rest of the row
    boundaries = [edge for row in range(rows) for edge in (row * length, row * length + cut)] + [tokens.numel()]
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(boundaries)])
    packing = {"positions": positions.view_as(tokens), "cu_seqlens": torch.tensor(boundaries, dtype=torch.int32)}
    with torch.no_grad():
        run: Callable[..., torch.Tensor] = model.eval()
        alone = torch.cat([run(tokens[:, :cut]), run(tokens[:, cut:])], 1)
        packed, leaking = _distance(run(tokens, **packing), alone), _distance(run(tokens), alone)
    figure = f"packed differs from separate by {packed:.1e} (not kept apart: {leaking:.1e})"
    return Finding("packing", packed <= 10 * CLOSE and leaking > LEAK, figure)


def _reference_model(model: CausalLM) -> Any:
    """transformers' own model with the same weights."""
    config = copy.deepcopy(model.hf.config)
    config.fuse_cross_entropy = False  # fla's Triton kernel needs a GPU; the loss is the same
    reference = build_hf(config)
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith(model.head_name) and model.tied for name in missing), missing
    reference.tie_weights()
    return reference


def _distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)) if mine.numel() else 0.0
