"""Model configs: registered, listed, audited and dry-run."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st
from torchtitan.protocols import train_spec

from flame.config.parser import parse, world_size
from flame.dry_run import __main__ as dry_run
from flame.errors import REFUSED, UserError
from flame.models import __main__ as models
from flame.preflight.validate import check as validate
from flame.training.context import RunContext
from flame.training.train_spec import register
from tests.fuzz.mutation import BYTES, ODD, dump, spoil_bytes
from tests.fuzz.oracle import Area, check
from tests.layouts import MODELS

FIELDS = sorted({name for model in MODELS.values() for name in model})
OTHERS = (
    *("rope_scaling", "rope_parameters", "rope_theta", "rotary_pct", "partial_rotary_factor", "layer_types", "attn"),
    *("quantization_config", "auto_map", "architectures", "torch_dtype", "dtype", "pad_token_id", "eos_token_id"),
    *("hidden_act", "rms_norm_eps", "initializer_range", "attention_dropout", "tie_word_embeddings", "use_cache"),
    *("alibi", "norm_eps", "expand_k", "expand_v", "conv_size", "num_v_heads", "num_slots", "use_short_conv"),
    *("id2label", "pruned_heads", "output_attentions", "n_positions", "hidden_ratio", "feature_map", "gate_fn", "x"),
)
TYPES = ("gpt2", "opt", "bloom", "gptj", "rwkv", "mamba", "phi", "t5", "bert", "clip", "qwen2_moe", "deepseek_v3", "x")
SOME = (*ODD, 8, 16, 64, 128, 320, "silu", "swish", "float16", {"type": "linear", "factor": 2.0}, {"layers": [1]})
FIELD = st.one_of(
    st.tuples(st.sampled_from((*FIELDS, *OTHERS)), st.sampled_from(SOME)),
    st.tuples(st.just("model_type"), st.sampled_from((*TYPES, *MODELS))),
)
COMMANDS = (*["register"] * 4, "grow", "varlen", "list", "list", "audit", "dry_run")
# command, model, fields to set (without a value: to delete), how the text is spoiled
CASES = st.tuples(
    st.sampled_from(COMMANDS),
    st.sampled_from(sorted(MODELS)),
    st.lists(FIELD | FIELD.map(lambda field: field[:1]), max_size=3),
    st.one_of(st.just([]), st.just([]), st.just([]), st.lists(BYTES, max_size=2)),
)


def write(case):
    _, name, fields, steps = case
    model = dict(MODELS[name])
    for field, *value in fields:
        model.pop(field, None)
        model |= dict.fromkeys([field], *value) if value else {}
    Path("model.json").write_bytes(spoil_bytes(dump(model), steps))


def run(case):
    os.environ["NGPU"] = "1"
    train_spec._extra_train_specs.clear()
    command, *_ = case
    if command == "list":
        return models.main(["list", "model.json"])
    if command == "audit":
        return models.main(["audit", "model.json", "--seq_len=16"])
    flags = ["--model.config=model.json", "--job.dump_folder=out/run", "--training.seq_len=64"]
    if command == "dry_run":
        return dry_run.main(["--dry_run", *flags])
    try:
        config = parse([*flags, *{"grow": ["--model.grow_vocab"], "varlen": ["--training.varlen"]}.get(command, [])])
        validate(config, world_size())
        register(config, RunContext(config))
    except UserError as error:
        print(f"flame: {error}", file=sys.stderr)
        return REFUSED
    return 0


AREA = Area("models", CASES, write, run)


@pytest.mark.parametrize("count", [20, pytest.param(2_000, marks=pytest.mark.slow)])
def test_a_model_config_is_taken_or_rejected_with_a_line(count, tmp_path, capsys):
    check(AREA, count, tmp_path, capsys)
