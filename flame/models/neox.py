"""GPT-NeoX and Pythia: parallel residual, partly rotary attention, LayerNorm (https://arxiv.org/abs/2204.06745)."""

from flame.models.family import Family, attention_flops

GPT_NEOX = Family(
    model_types=("gpt_neox",),
    blocks="layers",
    embedding="embed_in",
    norm="final_layer_norm",
    mixer_flops=lambda config, seq_len: attention_flops(config.num_hidden_layers, config.hidden_size, seq_len),
    packing="positions",
)
