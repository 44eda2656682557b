"""What flame must know of a model family: one frozen row, and no `if model_type ==` anywhere else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """A row of the model table.

    `blocks`, `embedding`, `norm` are attribute names on the Hugging Face backbone (`model.<base_model_prefix>`);
    `constants` are parameters the backbone itself holds, with the value each begins with.
    `mixer_flops(config, seq_len)` is the forward FLOPs a token spends in all token mixers beyond their weight
    matrices.
    `packing` says how documents of a packed row are told apart: by "cu_seqlens" (fla's kernels), by restarting
    "positions" (transformers builds the block-diagonal mask from them), by that "mask" itself, or not at all (None).
    `router_loss(config, logits)` is the load-balancing loss of the routers' logits, one (tokens, experts) a layer.
    `fused_loss` is False where only transformers' own forward knows how hidden states become logits.
    `layouts` are the ways its ranks may share the work; `fullgraph` says whether a block compiles as one graph.
    """

    model_types: tuple[str, ...]
    blocks: str
    embedding: str
    norm: str
    mixer_flops: Callable[[Any, int], float]
    packing: Literal["cu_seqlens", "positions", "mask"] | None
    from_fla: bool = False
    constants: Mapping[str, float] = field(default_factory=dict)
    router_loss: Callable[[Any, Any], Any] | None = None
    fused_loss: bool = True
    layouts: tuple[str, ...] = ("FSDP2", "HSDP", "DDP")
    fullgraph: bool = True


def attention_flops(width: int, seq_len: int, window: int | None = None, value_width: int | None = None) -> float:
    """Forward FLOPs a token of one layer of causal softmax attention: QK^T and AV, 2 FLOPs a MAC.

    `width` is heads x head_dim of the queries (`value_width` of the values, where it differs); a token sees half the
    row on average, or the `window` tokens before it.
    """
    seen = seq_len / 2
    if window is not None and window < seq_len:
        seen = window - window**2 / (2 * seq_len)
    return 2 * (width + (width if value_width is None else value_width)) * seen


def state_flops(heads: float, d_k: float, d_v: float, passes: int = 2) -> float:
    """Forward FLOPs a token of one layer whose state is `heads` matrices (d_k, d_v): 2 a MAC, one an entry and pass.

    The recurrence is what counts, however a kernel computes it: a write k v^T and a read q S are two passes. Gates
    and decays are elementwise and count nothing.
    """
    return passes * 2 * heads * d_k * d_v
