"""Small models of every kind flame knows: the shipped configs, shrunk, and the model types that none of them has."""

import json
from pathlib import Path
from typing import Any

from flame.models.hf import read_config
from flame.models.shrink import shrink

SHIPPED = {path.stem: path for path in sorted((Path(__file__).parents[2] / "configs").glob("*.json"))}
_BASE = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, **_BASE}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "qk_head_dim": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "output_router_logits": True}
OTHERS: dict[str, dict[str, Any]] = {
    "hgrn": {"model_type": "hgrn", **_BASE},
    "lightnet": {"model_type": "lightnet", "num_heads": 4, "expand_ratio": 16, **_BASE},
    "linear_attn": {"model_type": "linear_attn", "num_heads": 4, **_BASE},
    "mla": {"model_type": "mla", "num_heads": 4, "v_head_dim": 16, **_LATENT, **_BASE},
    "olmo2": {"model_type": "olmo2", **_ATTENTION},
    "olmoe": {"model_type": "olmoe", **_ATTENTION, **_EXPERTS},
    "qwen2": {"model_type": "qwen2", **_ATTENTION},
    "qwen2_moe": {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 64, **_ATTENTION, **_EXPERTS},
    "rwkv6": {"model_type": "rwkv6", "num_heads": 4, **_BASE},
}
# No rows: transformers' own forward serves them. Granite scales its logits, GPT-2 ties and adds learned positions,
# Falcon Mamba ties and asks for the dtype of its head.
WITHOUT_ROW: dict[str, dict[str, Any]] = {
    "falcon_mamba": {"model_type": "falcon_mamba", "state_size": 8, **_BASE},
    "gpt2": {"model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "granite": {"model_type": "granite", "logits_scaling": 8.0, "embedding_multiplier": 12.0, **_ATTENTION},
    "granitemoe": {"model_type": "granitemoe", "num_local_experts": 4, **_ATTENTION, "output_router_logits": True},
}


def fields_of(name: str, width: int = 64, **changes: Any) -> dict[str, Any]:
    """The fields of a small model: a shipped config at two blocks and `width`, or one of the dicts above."""
    if name not in SHIPPED:
        return (OTHERS | WITHOUT_ROW)[name] | changes
    fields = json.loads(SHIPPED[name].read_text())
    return shrink(fields, read_config(fields, name)[1], 2, width) | changes


def small(name: str, width: int = 64, **changes: Any) -> Any:
    """The family and config of a small model."""
    return read_config(fields_of(name, width, **changes), name)


def distinct() -> list[str]:
    """Shipped names of which no two shrink to the same model."""
    kinds = {json.dumps(fields_of(name), sort_keys=True): name for name in reversed(SHIPPED)}
    return sorted(kinds.values())
