"""What flame must know of a model family: one frozen row, and no `if model_type ==` anywhere else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """A row of the model table.

    `blocks`, `embedding`, `norm` are attribute names on the Hugging Face backbone (`model.<base_model_prefix>`).
    `mixer_flops(config, seq_len)` is the forward FLOPs a token spends in all token mixers beyond their weight
    matrices. `packing` says how documents of a packed row are told apart: by "cu_seqlens" (fla's kernels) or by
    restarting "positions" (transformers builds the block-diagonal mask from them).
    """

    model_types: tuple[str, ...]
    blocks: str
    embedding: str
    norm: str
    mixer_flops: Callable[[Any, int], float]
    packing: Literal["cu_seqlens", "positions"]
    from_fla: bool = False


def attention_flops(layers: int, width: int, seq_len: int) -> float:
    """Forward FLOPs a token of causal softmax attention: QK^T and AV over half a row on average, 2 FLOPs a MAC."""
    return layers * 2 * 2 * width * seq_len / 2
