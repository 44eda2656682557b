"""GPT-NeoX and Pythia: parallel residual, partly rotary attention, LayerNorm (https://arxiv.org/abs/2204.06745)."""

from flame.models.family import Family, TPPlan
from flame.models.llama import rotary_attention_flops

GPT_NEOX = Family(
    model_types=("gpt_neox",),
    blocks="layers",
    embedding="embed_in",
    norm="final_layer_norm",
    mixer_flops=rotary_attention_flops,
    packing="positions",
    tp_plan=TPPlan(
        token_mixers=("attention",),
        mlps=("mlp",),
        shard_dims={
            "attention.query_key_value.*": 0,  # rows are ordered by head
            "attention.dense.weight": 1,
            "mlp.dense_h_to_4h.*": 0,
            "mlp.dense_4h_to_h.weight": 1,
        },
        must_divide=("num_attention_heads", "intermediate_size"),
    ),
)
