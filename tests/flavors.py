"""Tiny flavors of torchtitan's models, added as a user would: `--model.import tests.flavors --model.flavor tiny`."""

from dataclasses import replace

from torchtitan.models.deepseek_v3 import deepseekv3_args
from torchtitan.models.llama3 import llama3_args
from torchtitan.models.llama4 import llama4_args
from torchtitan.models.qwen3 import qwen3_args

_SIZES = {"dim": 64, "n_layers": 4, "n_heads": 4, "vocab_size": 320}
_EXPERTS = {"num_experts": 4, "top_k": 2}
_LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
_GROUPS = {"n_kv_heads": 2, "head_dim": 16, "hidden_dim": 128, "moe_inter_dim": 32}


def _add(table: dict, base: str, name: str, **changes: object) -> None:
    flavor = table[base]
    if hasattr(flavor, "moe_args"):
        changes["moe_args"] = replace(flavor.moe_args, **_EXPERTS)
    table[name] = replace(flavor, **_SIZES, **changes)


_add(llama3_args, "debugmodel", "tiny", n_kv_heads=2)
_add(llama3_args, "debugmodel_flex_attn", "tiny_mask", n_kv_heads=2)
_add(llama4_args, "debugmodel", "tiny")
_add(qwen3_args, "debugmodel", "tiny", **_GROUPS)
_add(qwen3_args, "debugmodel_moe", "tiny_moe", **_GROUPS)
_add(deepseekv3_args, "debugmodel", "tiny", inter_dim=128, moe_inter_dim=32, **_LATENT)
_add(deepseekv3_args, "debugmodel_flex_attn", "tiny_mask", inter_dim=128, moe_inter_dim=32, **_LATENT)
