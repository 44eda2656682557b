"""FLOPs per token: of token mixers, and of training a model, for MFU."""

from typing import Any

import torch.nn as nn

from flame.models.family import Family

TOP_K_FIELDS = ("num_experts_per_tok", "moe_topk", "top_k_experts")  # in transformers' configs


def attention_flops(width: int, seq_len: int, window: int | None = None, value_width: int | None = None) -> float:
    """Forward FLOPs per token of one layer of causal softmax attention: QK^T and AV, 2 FLOPs per MAC.

    width: heads x head_dim of the queries (value_width: of the values, if it differs). A token attends to half the row
    on average, or to the `window` tokens before it.
    """
    keys = seq_len / 2
    if window is not None and window < seq_len:
        keys = window - window**2 / (2 * seq_len)
    return 2 * (width + (width if value_width is None else value_width)) * keys


def state_flops(heads: float, d_k: float, d_v: float, passes: int = 2) -> float:
    """Forward FLOPs per token of one layer whose state is `heads` matrices (d_k, d_v): one MAC per entry and pass.

    The recurrence counts, however a kernel computes it: a write k v^T and a read q S are two passes. Gates and decays
    are elementwise and not counted.
    """
    return passes * 2 * heads * d_k * d_v


def flops_per_token(family: Family, config: Any, params: int, seq_len: int) -> int:
    """Training FLOPs per token: 6 per active parameter, and three times the mixers' forward.

    params: see `active_params`. Source: appendix B of PaLM (https://arxiv.org/abs/2204.02311).
    """
    return round(6 * params + 3 * family.mixer_flops(config, seq_len))


def top_k(config: Any) -> int:
    """The number of experts per token, 0 if the config has none or does not say."""
    return next((found for name in TOP_K_FIELDS if (found := getattr(config, name, None))), 0)


def active_params(model: nn.Module, config: Any, tied: nn.Embedding | None) -> int:
    """The number of parameters that multiply a token: all but embeddings and experts it is not routed to.

    tied: the embedding that is the head too, and counts. transformers stacks experts in parameters of three dimensions.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m is not tied}
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv1d)}
    routed, total = top_k(config), 0.0
    for parameter in model.parameters():
        if id(parameter) in embeddings:
            continue
        stacked = routed and parameter.ndim == 3 and id(parameter) not in convolutions
        share = min(1.0, routed / len(parameter)) if stacked else 1.0  # shared experts may be stacked too
        total += share * parameter.numel()
    return round(total)
