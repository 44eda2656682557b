"""GPT-NeoX and Pythia: parallel residual, partly rotary attention, LayerNorm (https://arxiv.org/abs/2204.06745)."""

from flame.models.family import Family
from flame.models.llama import rotary_attention_flops

GPT_NEOX = Family(
    model_types=("gpt_neox",),
    blocks="layers",
    embedding="embed_in",
    norm="final_layer_norm",
    mixer_flops=rotary_attention_flops,
    packing="positions",
)
