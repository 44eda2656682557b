import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM, MixtralForCausalLM

from flame.errors import UserError
from flame.models import audit as module
from flame.models.__main__ import main
from flame.models.audit import audit
from flame.models.hf import read_config
from flame.models.shrink import shrink
from tests.models.small import OTHERS, SHIPPED, WITHOUT_ROW, distinct, fields_of, small

CHECKS = ["initialisation", "distribution", "buffers", "embeddings", "logits", "loss", "gradients", "packing"]


def failing(family, config):
    return [finding.name for finding in audit(family, config) if not finding.ok]


@pytest.mark.parametrize("name", [*distinct(), *OTHERS, *WITHOUT_ROW])
def test_every_model_is_what_its_config_means_to_transformers(name):
    findings = list(audit(*small(name), seq_len=96))
    assert [finding.name for finding in findings] == CHECKS
    assert [finding for finding in findings if not finding.ok] == []


@pytest.mark.parametrize("name", ["llama_7B", "gla_340M", "mixtral_8x7B", "mamba_340M"])
def test_tied_models_are_audited_as_well(name):
    assert failing(*small(name, tie_word_embeddings=True)) == []


def test_every_shipped_config_shrinks_to_a_model_of_its_own_kind():
    for name, path in SHIPPED.items():
        fields, shrunk = json.loads(path.read_text()), fields_of(name)
        assert shrunk["model_type"] == fields["model_type"]
        assert ("attn" in fields) <= ("attn" in shrunk)
        grouped = [key for key in ("num_key_value_heads", "num_kv_heads") if key in fields]
        assert all(shrunk[key] < shrunk.get("num_attention_heads", shrunk.get("num_heads")) for key in grouped)


def test_a_model_cut_in_depth_alone_keeps_its_width_and_an_attention_layer():
    fields = json.loads(SHIPPED["gla_hybrid_340M"].read_text())
    shrunk = shrink(fields, read_config(fields, "")[1], depth=3)
    assert (shrunk["num_hidden_layers"], shrunk["hidden_size"], shrunk["vocab_size"]) == (3, 1024, 32000)
    assert shrunk["attn"]["layers"] == [2]


# Each check fails where it should -------------------------------------------------------------------------------------


def test_what_nothing_initialises_is_found(monkeypatch):
    family, config = small("llama_7B")
    monkeypatch.setattr(LlamaForCausalLM, "_init_weights", lambda self, part: None)
    (finding,) = audit(family, config)
    assert not finding.ok and "model.norm.weight" in finding.figure


def test_a_parameter_that_a_constructor_allocates_and_nothing_fills_is_found(monkeypatch):
    family, config = small("mixtral_8x7B")  # its constructor calls torch.empty for the experts
    own = MixtralForCausalLM._init_weights
    monkeypatch.setattr(
        MixtralForCausalLM,
        "_init_weights",
        lambda self, part: None if type(part).__name__ == "MixtralExperts" else own(self, part),
    )
    (finding,) = audit(family, config)
    assert not finding.ok and "experts.gate_up_proj" in finding.figure


def test_another_distribution_is_found(monkeypatch):
    family, config = small("llama_7B")
    build = module.build_hf

    def build_wider(config):
        wider = AutoConfig.for_model(**config.to_dict() | {"initializer_range": 0.03})
        return build(wider)

    monkeypatch.setattr(module, "build_hf", build_wider)
    assert failing(family, config) == ["distribution"]


def test_another_forward_is_found(monkeypatch):
    family, config = small("llama_7B")
    build = module.build_hf

    def build_other(config):
        changed = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
        return build(AutoConfig.for_model(**config.to_dict() | changed))

    monkeypatch.setattr(module, "build_hf", build_other)
    assert failing(family, config) == ["buffers", "logits", "loss", "gradients"]


def test_documents_that_see_each_other_are_found():
    family, config = small("falcon_7B")  # which takes positions and does not tell documents apart by them
    assert failing(dataclasses.replace(family, packing="positions"), config) == ["packing"]


def test_a_loss_without_the_routers_share_is_found():
    family, config = small("mixtral_8x7B")
    assert failing(dataclasses.replace(family, router_loss=None), config) == ["loss", "gradients"]


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_per_check_and_exits_with_0(capsys):
    assert main(["audit", str(SHIPPED["gla_340M"]), "--depth", "2", "--width", "32", "--seq_len", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in CHECKS]


def test_the_command_exits_with_1_when_a_check_fails(capsys, monkeypatch):
    monkeypatch.setattr(module, "CLOSE", -1.0)
    assert main(["audit", str(SHIPPED["llama_7B"]), "--depth", "2", "--width", "32"]) == 1
    assert "FAIL  logits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["gone.json"], "audit: found no file or folder gone.json"),
        ([str(SHIPPED["gla_340M"]), "--depth", "1"], "--depth: found 1, must be 2 or more"),
        ([str(SHIPPED["gla_340M"]), "--import", "no_such_module"], "no_such_module; cannot be imported"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(["audit", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_a_model_that_memory_cannot_hold_is_one_line_that_says_how_to_make_it_small(tmp_path, capsys):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(fields_of("linear_attn", hidden_ratio=1e9)))
    assert main(["audit", str(path)]) == 2
    message = capsys.readouterr().err
    assert "parameters in" in message and "--depth" in message and message.count("\n") == 1


def test_a_model_of_fla_without_a_reference_is_rejected_on_a_cpu(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("its kernels run here")
    path = tmp_path / "comba.json"
    path.write_text(json.dumps({"model_type": "comba", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2}))
    assert main(["audit", str(path)]) == 2
    assert "comba" in capsys.readouterr().err


def test_a_type_whose_modules_are_elsewhere_is_rejected_with_the_reason():
    with pytest.raises(UserError) as error:
        read_config({"model_type": "opt", "num_hidden_layers": 2}, "opt.json")
    assert "opt" in error.value.found and "its blocks and its embedding are not children" in error.value.hint


def test_the_command_shrinks_fields_with_a_number_per_block(capsys):
    assert main(["audit", str(SHIPPED["rwkv7_340M"]), "--depth", "2", "--width", "64"]) == 0
    assert "FAIL" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model_type": ["llama"]}, "model_type: found ['llama'], must be a name"),
        ({"model_type": "gla", "num_hidden_layers": "two"}, "num_hidden_layers: found 'two', must be an integer"),
        ({"model_type": "gla", "norm_eps": "x"}, "norm_eps: found 'x', must be a number"),
        ({"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads: found 3"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 9}, "num_experts_per_tok: found 9"),
        (
            {"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4},
            "not a multiple of the number of attention",
        ),
    ],
)
def test_an_invalid_config_is_rejected_in_one_line_with_the_reason(fields, words, tmp_path, capsys):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(fields))
    assert main(["audit", str(path)]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
