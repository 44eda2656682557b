from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flame.models.causal_lm import CausalLM, ModelArgs, load_hf_config
from tests.tiny import write_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("transformer_340M", 373_867_520),
        ("gla_340M", 374_475_776),
        ("pythia_160M", 162_322_944),  # as published
    ],
)
def test_shipped_configs_have_their_known_number_of_parameters(name, parameters):
    family, config = load_hf_config(str(CONFIGS / f"{name}.json"))
    args = ModelArgs().bind(family, config)
    with torch.device("meta"):
        model = CausalLM(args)
    assert args.get_nparams_and_flops(model, 2048)[0] == parameters


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_flops_agree_with_torchs_counter_on_a_forward_and_backward(name, tmp_path):
    family, config = load_hf_config(str(write_config(tmp_path, name)))
    config._attn_implementation = "eager"
    args = ModelArgs().bind(family, config)
    model = CausalLM(args)
    tokens = torch.randint(0, 320, (1, 256))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    # Eager attention computes the full square; the formula counts the causal half of it.
    extra = 3 * family.mixer_flops(config, 256)
    assert args.get_nparams_and_flops(model, 256)[1] + extra == pytest.approx(counter.get_total_flops() / 256, rel=0.05)
