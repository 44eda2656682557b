"""The loss of a language-model head together with its gradients: no logits are kept, and none are computed twice.

Logits are made for a chunk of tokens, give its losses, and become their own gradient (https://arxiv.org/abs/2410.10989).
What is left to the backward is a factor. With a process group, each rank has a shard of the vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX

L2WARP = 1e-4  # weight of RWKV's penalty
GPU_CHUNK = 8192  # tokens whose logits a GPU holds at a time


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    l2warp: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The sum of `flame.models.loss.linear_cross_entropy`.

    hidden: (tokens, hidden), weight: (vocab, hidden), labels: (tokens,) int64; returns a scalar in fp32. In a `group`
    weight and bias are the rank's shard of the vocabulary, contiguous and of one size, and so are their gradients;
    hidden, its gradient, labels and the loss are those of all. Gradients are summed in fp32 and rounded once.
    """
    return _FusedLoss.apply(hidden, weight, bias, labels, l2warp, group, torch.is_grad_enabled())


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        l2warp: bool,
        group: dist.ProcessGroup | None,
        train: bool,
    ) -> Tensor:
        # A chunk costs a GPU its logits once, a CPU several times in fp32, and both a pass over the weight's gradient.
        size = GPU_CHUNK if hidden.is_cuda else 1024
        rank = 0 if group is None else dist.get_rank(group)
        parts = [hidden, weight, *([] if bias is None else [bias])]
        sums = [torch.zeros_like(part, dtype=torch.float32) for part in parts if train]
        losses = []
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            totals = [sums[0][rows], *sums[1:]] if train else []
            losses.append(_add_chunk(totals, hidden[rows], weight, bias, labels[rows], l2warp, rank, group))
        if train and group is not None:
            dist.all_reduce(sums[0], group=group)
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*sums)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        grads = [torch.mul(x, factor, out=torch.empty_like(x, dtype=ctx.dtype)) for x in ctx.saved_tensors]
        return *grads, *[None] * (7 - len(grads))


def _add_chunk(
    totals: list[Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    l2warp: bool,
    rank: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The losses of a chunk's tokens; adds its gradients to their totals, if there are any. Frees the logits."""
    logits = F.linear(hidden, weight, bias)
    losses, lse = _token_losses(logits, labels, rank, group)
    for gradient in _gradients(logits, labels, lse, l2warp, rank, group) if totals else ():
        _add_product(totals[0], gradient, weight)
        _add_product(totals[1], gradient.t(), hidden)
        if bias is not None:
            totals[2] += gradient.sum(0, dtype=torch.float32)
    return losses


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to a total in fp32, in which the product of two bf16 numbers is exact."""
    if a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # has no GEMM from bf16 to fp32
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _gradients(
    logits: Tensor, labels: Tensor, lse: Tensor, l2warp: bool, rank: int, group: dist.ProcessGroup | None
) -> Iterator[Tensor]:
    """The gradients of the loss and of RWKV's penalty by a chunk's logits, each in the place of the former.

    Apart, as the rounding of the first to bf16 is coarser than the second.
    """
    if l2warp:
        largest, column = logits.max(-1, keepdim=True)
        if group is not None:
            owner = _gather(largest, group).argmax(0)
            largest = largest.where(owner == rank, 0)
    _become_gradient(logits, labels, lse, rank)
    yield logits
    if l2warp:
        yield logits.zero_().scatter_(-1, column, L2WARP * largest)


def _token_losses(logits: Tensor, labels: Tensor, rank: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The cross entropy of each token, 0 for those that do not count, and the logarithm of the sum of exp(logits)."""
    if logits.is_cuda:
        from fla.modules.fused_cross_entropy.ops import cross_entropy_fwd

        losses, _, lse, *_ = cross_entropy_fwd(logits, labels, ignore_index=IGNORE_INDEX, process_group=group)
        return losses, lse
    scores = logits.float()
    lse, (column, own) = scores.logsumexp(-1), _own_columns(logits, labels, rank)
    score = scores.gather(-1, column).where(own, 0).squeeze(-1)
    if group is not None:
        lse = _gather(lse, group).logsumexp(0)
        dist.all_reduce(score, group=group)
    return (lse - score).where(labels != IGNORE_INDEX, 0), lse


def _become_gradient(logits: Tensor, labels: Tensor, lse: Tensor, rank: int) -> None:
    if logits.is_cuda:
        from fla.modules.fused_cross_entropy.ops import cross_entropy_bwd

        shard = {"class_start_idx": rank * logits.shape[-1], "inplace_backward": True}
        cross_entropy_bwd(logits, labels, lse, torch.ones_like(lse), ignore_index=IGNORE_INDEX, **shard)
        return
    column, own = _own_columns(logits, labels, rank)
    gradient = (logits.float() - lse[:, None]).exp_().scatter_add_(-1, column, -own.float())
    logits.copy_(gradient.where(labels[:, None] != IGNORE_INDEX, 0))


def _own_columns(logits: Tensor, labels: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(tokens, 1): the columns of the labels in this rank's shard, and whether they are in it."""
    column = labels[:, None] - rank * logits.shape[-1]
    own = (column >= 0) & (column < logits.shape[-1])
    return column.where(own, 0), own


def _gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The values of all ranks, along a new first dimension."""
    everyone = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(everyone), values, group=group)
    return everyone
