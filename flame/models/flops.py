"""FLOPs a token of training costs, for MFU."""

from typing import Any

import torch.nn as nn

from flame.models.family import Family

TOP_K_FIELDS = ("num_experts_per_tok", "moe_topk", "top_k_experts")  # transformers' names for it in configs of mixtures


def flops_per_token(family: Family, config: Any, weights: int, seq_len: int) -> int:
    """Training FLOPs a token: 6 for each weight that is multiplied, and three times the mixers' forward.

    `weights` counts the parameters a token meets; see `active_params`. Source: appendix B of PaLM (https://arxiv.org/abs/2204.02311).
    """
    return round(6 * weights + 3 * family.mixer_flops(config, seq_len))


def top_k(config: Any) -> int:
    """The experts a token is sent to, 0 if its config does not say."""
    return next((found for name in TOP_K_FIELDS if (found := getattr(config, name, None))), 0)


def active_params(model: nn.Module, config: Any, table: nn.Embedding | None) -> int:
    """The parameters of a model that a token is multiplied with.

    Without embeddings, as a lookup costs nothing, except `table`, the one a tied head multiplies with; of transformers'
    experts, which are the first dimension of one parameter, only as many as a token is sent to.
    """
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m is not table}
    convolved = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv1d)}
    sent_to = top_k(config)
    met = 0.0
    for parameter in model.parameters():
        share = 1.0
        if sent_to and parameter.ndim == 3 and id(parameter) not in convolved:
            share = min(share, sent_to / len(parameter))  # experts that every token meets may be such a parameter too
        met += 0 if id(parameter) in looked_up else share * parameter.numel()
    return round(met)
