"""Language-model heads that return the loss itself: logits are computed in chunks and never all held."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.checkpoint import checkpoint
from torchtitan.components.loss import IGNORE_INDEX

from flame.models.fused_loss import L2WARP, fused_loss
from flame.models.parameters import local_tensor

CHUNK = 1024  # tokens whose logits are held at a time


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    l2warp: bool = False,
    gather: bool = False,
) -> Tensor:
    """Sum over tokens of the cross entropy of `hidden @ weight.T + bias`, in fp32; labels of -100 do not count.

    hidden: (batch, seq, hidden), weight: (vocab, hidden), labels: (batch, seq) int64; returns a scalar. `l2warp` adds
    to the gradient, not to the value, that of L2WARP / 2 x the square of every token's largest logit (RWKV-LM). Logits
    of a weight sharded along the vocabulary stay sharded, unless `gather`.
    On a GPU and on shards the loss is fused with its gradients; else autograd recomputes chunks of logits.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    group = weight.device_mesh.get_group() if isinstance(weight, DTensor) else None
    if not gather and (group is not None or hidden.is_cuda):
        bias = None if bias is None else local_tensor(bias)
        return fused_loss(hidden, local_tensor(weight), bias, labels, l2warp, group)
    chunks = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    losses = [checkpoint(_chunk_loss, x, weight, bias, y, l2warp, use_reentrant=False) for x, y in chunks]
    return torch.stack(losses).sum()


def _chunk_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, l2warp: bool) -> Tensor:
    logits = _logits(hidden, weight, bias).float()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    if l2warp:
        penalty = L2WARP / 2 * logits.max(-1).values.square().sum()
        loss = loss + penalty - penalty.detach()
    return loss


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, DTensor):
        return F.linear(hidden, weight, bias)
    hidden = DTensor.from_local(hidden, weight.device_mesh, [Replicate()], run_check=False)
    logits = F.linear(hidden, weight, bias)
    assert isinstance(logits, DTensor)
    return logits.full_tensor()


class Head(nn.Linear):
    """The output projection: logits, or the summed loss when labels are given.

    The loss goes through this module's own forward so that FSDP gathers its weight around it.
    """

    l2warp = gather = False  # see linear_cross_entropy

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return _logits(hidden, self.weight, self.bias)
        return linear_cross_entropy(hidden, self.weight, labels, self.bias, self.l2warp, self.gather)


class TiedHead(nn.Module):
    """A head that owns no parameter and multiplies with the embedding table (tie_word_embeddings)."""

    l2warp = gather = False

    def __init__(self, embedding_weight: Callable[[], Tensor]) -> None:
        super().__init__()
        self.embedding_weight = embedding_weight

    @property
    def weight(self) -> Tensor:
        """Named as a linear layer's: transformers' forward of some models asks for its dtype."""
        return self.embedding_weight()

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return _logits(hidden, self.weight)
        return linear_cross_entropy(hidden, self.weight, labels, l2warp=self.l2warp, gather=self.gather)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of the cross entropy of logits (batch, seq, vocab), in fp32; labels of -100 do not count."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
