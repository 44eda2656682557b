"""What is refused when the model is registered, before a process group or a folder exists."""

import importlib.util

import pytest
import torch
from torchtitan.protocols.train_spec import _extra_train_specs

from flame.config.parser import parse
from flame.errors import UserError
from flame.models.hf import choose_attention, load_hf_config
from flame.training.train_spec import register
from tests.convert.models import save_run


def test_a_compile_backend_that_torch_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"--compile\.backend: found 'nonsense', must be one of eager, .*inductor"):
        register(parse(["--compile.enable", "--compile.backend=nonsense"]))


def test_what_only_a_gpu_has_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr("flame.training.train_spec.device_type", "cpu")
    flag = "--parallelism.enable_async_tensor_parallel"
    with pytest.raises(UserError, match=f"^{flag}: needs a GPU, and none is visible$"):
        register(parse([flag, "--parallelism.tensor_parallel_degree=2", "--compile.enable"]))


def test_a_backend_that_nothing_uses_is_no_mistake():
    register(parse(["--model.config=configs/gla_debug.json", "--compile.backend=nonsense"]))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["{", "\0\0", "[1]"])
def test_a_record_of_the_runs_model_that_is_damaged_is_named(name, content, tmp_path):
    save_run(tmp_path, "llama")
    (tmp_path / "model" / name).write_text(content)
    with pytest.raises(UserError, match=rf"^--job\.dump_folder: .*/model/{name} cannot be read \(.*\); move it away"):
        register(parse([f"--job.dump_folder={tmp_path}", f"--model.config={tmp_path}/llama.json"]))


@pytest.mark.parametrize(("dtype", "chosen"), [("bfloat16", "flash_attention_2"), ("float32", None)])
def test_flash_attn_is_chosen_where_it_is_installed_for_the_types_that_it_has(dtype, chosen, monkeypatch):
    family, config = load_hf_config("configs/llama2_7B.json")
    choose_attention(config, family, dtype)
    assert config._attn_implementation in (None, "sdpa")  # no GPU, or no flash-attn
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    choose_attention(config, family, dtype)
    assert config._attn_implementation == chosen


@pytest.mark.parametrize(
    ("flags", "ranks", "dtype"),
    [
        ("", 1, "bfloat16"),
        ("--parallelism.tensor_parallel_degree=2", 2, "float32"),
        ("--parallelism.pipeline_parallel_degree=2 --training.dtype=bfloat16", 2, "bfloat16"),
        ("--parallelism.tensor_parallel_degree=2", 4, "bfloat16"),
        ("--parallelism.tensor_parallel_degree=2 --parallelism.data_parallel_replicate_degree=2", 8, "bfloat16"),
    ],
)
def test_attention_is_chosen_for_the_type_that_blocks_compute_in(flags, ranks, dtype, monkeypatch):
    _extra_train_specs.clear()
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    asked = []
    monkeypatch.setattr("flame.training.train_spec.choose_attention", lambda config, family, dtype: asked.append(dtype))
    monkeypatch.setattr("flame.training.train_spec.layout.validate", lambda *_: None)
    register(
        parse(["--model.config=configs/llama2_7B.json", "--training.mixed_precision_param=bfloat16", *flags.split()])
    )
    _extra_train_specs.clear()
    assert asked == [dtype]
