"""The shipped model configs have their published sizes, and no field that is the default."""

import json
from pathlib import Path

import pytest

from flame.models.hf import read_config
from flame.models.listing import measure
from tests.models.small import SHIPPED

# Parameters, and without embedding and head: flame 0.x's models counted with fla 0.6; Pythia, Llama, Mistral, Falcon,
# Qwen and Mixtral as published.
SIZES = {
    "transformer_340M": (373_867_520, 308_331_520),
    "transformer_1B": (1_364_297_728, 1_233_225_728),
    "transformer_7B": (7_241_732_096, 6_979_588_096),
    "gla_340M": (374_475_776, 308_939_776),
    "gla_7B": (6_741_635_072, 6_479_491_072),
    "delta_net_340M": (374_362_112, 308_826_112),
    "delta_net_1B": (1_365_677_056, 1_234_605_056),
    "gated_deltanet_340M": (512_272_124, 446_736_124),
    "gated_deltanet_1B": (1_387_348_732, 1_256_276_732),
    "gsa_340M": (380_158_976, 314_622_976),
    "gsa_1B": (1_376_880_640, 1_245_808_640),
    "hgrn2_340M": (373_916_672, 308_380_672),
    "mamba_340M": (385_565_696, 320_029_696),
    "mamba_1B": (1_400_276_992, 1_269_204_992),
    "mamba2_340M": (382_387_712, 316_851_712),
    "mamba2_1B": (1_371_839_488, 1_240_767_488),
    "samba_1B": (1_403_935_488, 1_256_479_488),
    "pythia_160M": (162_322_944, 85_056_000),
    "pythia_410M": (405_334_016, 302_311_424),
    "pythia_1B": (1_011_781_632, 805_736_448),
    "pythia_1.4B": (1_414_647_808, 1_208_602_624),
    "pythia_2.8B": (2_775_208_960, 2_517_652_480),
    "pythia_6.9B": (6_857_302_016, 6_444_163_072),
    "open_llama_3B": (3_426_473_600, 3_221_673_600),
    "llama_7B": (6_738_415_616, 6_476_271_616),
    "llama_13B": (13_015_864_320, 12_688_184_320),
    "llama_30B": (32_528_943_616, 32_102_959_616),
    "llama_65B": (65_285_660_672, 64_761_372_672),
    "llama2_7B": (6_738_415_616, 6_476_271_616),
    "llama2_13B": (13_015_864_320, 12_688_184_320),
    "llama2_70B": (68_976_648_192, 68_452_360_192),
    "llama3.1_8B": (8_030_261_248, 6_979_588_096),
    "codellama_34B": (33_743_970_304, 33_219_682_304),
    "mistral_7B": (7_241_732_096, 6_979_588_096),
    "falcon_7B": (6_921_720_704, 6_626_251_648),
    "falcon_40B": (41_303_293_952, 40_770_617_344),
    "qwen3_0.6B": (596_049_920, 440_467_456),
    "mixtral_8x7B": (46_702_792_704, 46_440_648_704),
    "qwen3_30B_A3B": (30_532_122_624, 29_909_792_768),
}
OURS = {  # sized by flame: what the name says, within a sixth
    *("gla_debug", "retnet_340M", "retnet_1B", "rwkv7_340M", "rwkv7_1B", "kda_340M", "kda_1B"),
    *("gated_deltaproduct_340M", "gated_deltaproduct_1B", "gla_hybrid_340M", "gated_deltanet_hybrid_340M"),
}
# Written out even if they are the default: what a reader wants to know of a model first.
ALWAYS = {
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"),
    *("num_heads", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters"),
    *("sliding_window", "num_slots", "multi_query", "parallel_attn", "bias", "alibi"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "router_aux_loss_coef"),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_model_has_its_published_number_of_parameters(name):
    assert measure(SHIPPED[name])[1:3] == SIZES[name]


def test_every_shipped_config_is_counted_here():
    assert SHIPPED.keys() == SIZES.keys() | OURS


@pytest.mark.parametrize("name", sorted(OURS - {"gla_debug"}))
def test_a_model_is_about_as_large_as_its_name_says(name):
    wanted = {"340M": 370e6, "1B": 1.35e9}[name.rsplit("_", 1)[1]]  # as transformer_340M and transformer_1B are
    assert measure(SHIPPED[name]).parameters == pytest.approx(wanted, rel=1 / 6)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_config_is_sorted_has_a_vocabulary_and_no_needless_fields(name):
    text = Path(SHIPPED[name]).read_text()
    fields = json.loads(text)
    assert text == json.dumps(fields, indent=2, sort_keys=True) + "\n"
    assert "vocab_size" in fields
    defaults = type(read_config(fields, name)[1])().to_dict()
    needless = {key for key, value in fields.items() if key in defaults and defaults[key] == value} - ALWAYS
    assert not needless


def test_hybrids_have_attention_among_their_recurrent_layers():
    for name in ("gla_hybrid_340M", "gated_deltanet_hybrid_340M"):
        layers = [type(block.attn).__name__ for block in measure(SHIPPED[name]).model.layers]
        assert 1 < layers.count("Attention") < len(layers) / 4


def test_falcons_differ_as_in_their_papers():
    small, large = (read_config(json.loads(SHIPPED[name].read_text()), name)[1] for name in ("falcon_7B", "falcon_40B"))
    assert small.multi_query and not small.new_decoder_architecture and not small.alibi
    assert large.new_decoder_architecture and large.num_kv_heads == 8
