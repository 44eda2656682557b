"""FLOPs a token of training costs, for MFU."""

from typing import Any

import torch.nn as nn

from flame.models.family import Family


def flops_per_token(family: Family, config: Any, weights: int, seq_len: int) -> int:
    """Training FLOPs a token: 6 for each weight that is multiplied, and three times the mixers' forward.

    `weights` counts the parameters a token meets; see `weights_met`. Source: appendix B of PaLM (https://arxiv.org/abs/2204.02311).
    """
    return round(6 * weights + 3 * family.mixer_flops(config, seq_len))


def weights_met(model: nn.Module, config: Any, table: nn.Embedding | None) -> int:
    """The parameters of a model that a token is multiplied with.

    Without embeddings, as a lookup costs nothing, except `table`, the one a tied head multiplies with; of transformers'
    experts, whose first dimension numbers them, only as many as a token is sent to.
    """
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m is not table}
    met = 0.0
    for name, parameter in model.named_parameters():
        routed = ".experts." in name and parameter.ndim == 3
        share = config.num_experts_per_tok / len(parameter) if routed else 1.0
        met += 0 if id(parameter) in looked_up else share * parameter.numel()
    return round(met)
