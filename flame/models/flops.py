"""FLOPs a token of training costs, for MFU."""

from typing import Any

from flame.models.family import Family


def flops_per_token(family: Family, config: Any, weights: int, seq_len: int) -> int:
    """Training FLOPs a token: 6 for each weight that is multiplied, and three times the mixers' forward.

    `weights` counts parameters without the embedding table (a lookup costs nothing) but with the head, which
    multiplies even when it is tied. Source: appendix B of PaLM (https://arxiv.org/abs/2204.02311).
    """
    return round(6 * weights + 3 * family.mixer_flops(config, seq_len))
