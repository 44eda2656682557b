"""What is rejected when the model is registered, before a process group or a folder exists."""

import importlib.util

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from flame.checkpoint.start import StartPlan
from flame.config.parser import parse
from flame.errors import UserError
from flame.models.hf import choose_attention, load_hf_config
from flame.training.context import RunContext
from flame.training.train_spec import register
from tests.convert.models import save_run


def rejected(*flags):
    with pytest.raises(UserError) as error:
        register(parse(flags))
    return error.value


def test_a_compile_backend_that_torch_does_not_have_is_rejected():
    error = rejected("--model.config=configs/gla_debug.json", "--compile.enable", "--compile.backend=nonsense")
    assert (error.setting, error.found) == ("--compile.backend", "'nonsense'")
    assert error.allowed.startswith("one of eager, ") and "inductor" in error.allowed


def test_what_needs_a_gpu_is_rejected_on_a_cpu(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    flag = "--parallelism.enable_async_tensor_parallel"
    error = rejected(flag, "--parallelism.tensor_parallel_degree=2", "--compile.enable")
    assert (error.setting, error.hint) == (flag, "needs a GPU, and none is visible")


@pytest.mark.parametrize("name", ["mamba_340M", "samba_1B"])
def test_a_scan_whose_kernels_are_not_installed_is_rejected_on_a_gpu(name, monkeypatch):
    monkeypatch.setattr("torchtitan.protocols.train_spec._extra_train_specs", {})
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    error = rejected(f"--model.config=configs/{name}.json")
    assert error.setting == "--model.config" and "pip install" in error.hint and "mamba-ssm" in error.hint
    for package in ("is_fast_path_available", "causal_conv1d_fn"):
        monkeypatch.setattr(f"fla.layers.mamba.{package}", True)
    register(parse([f"--model.config=configs/{name}.json"]))


def test_mamba2_needs_no_package_on_a_gpu(monkeypatch):
    monkeypatch.setattr("torchtitan.protocols.train_spec._extra_train_specs", {})
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    register(parse(["--model.config=configs/mamba2_340M.json"]))


def test_a_backend_that_is_not_used_is_not_validated():
    register(parse(["--model.config=configs/gla_debug.json", "--compile.backend=nonsense"]))


def test_text_that_the_tokenizer_cannot_encode_is_rejected(tmp_path):
    Tokenizer(WordLevel({"a": 0, "</s>": 1})).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    data, tokenizer = f"--training.dataset={tmp_path}/data.jsonl", f"--model.tokenizer_path={tmp_path}"
    error = rejected("--model.config=configs/gla_debug.json", data, tokenizer)
    assert error.setting == "--model.tokenizer_path" and "'b'" in error.found


def test_many_epochs_to_skip_are_rejected_at_the_first_start_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("torchtitan.protocols.train_spec._extra_train_specs", {})
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n' * 20)
    data, skip = f"--training.dataset={tmp_path}/data.jsonl", f"--data.skip=3-{10**15}"
    flags = ["--model.config=configs/gla_debug.json", data, skip, f"--job.dump_folder={tmp_path}/run"]
    assert rejected(*flags).setting == "--data.skip"
    context = RunContext(parse(flags))
    context.plan = StartPlan("resume", (2,))
    register(parse(flags), context)


BROKEN = [(name, content) for name in ("config.json", "tokenizer.json") for content in ("{", "\0\0", "[1]")]
BROKEN += [("tokenizer.json", f'{{"added_tokens": {tokens}}}') for tokens in ("null", "5", "[5]", '[{"id": 3}]')]


@pytest.mark.parametrize(("name", "content"), BROKEN)
def test_a_damaged_record_of_the_runs_model_is_named(name, content, tmp_path):
    save_run(tmp_path, "llama")
    (tmp_path / "model" / name).write_text(content)
    error = rejected(f"--job.dump_folder={tmp_path}", f"--model.config={tmp_path}/llama.json")
    assert error.setting == f"{tmp_path}/model/{name}" and error.hint.startswith("move it away")


@pytest.mark.parametrize(("dtype", "chosen"), [("bfloat16", "flash_attention_2"), ("float32", None)])
def test_flash_attn_is_chosen_where_it_is_installed_for_the_types_that_it_has(dtype, chosen, monkeypatch):
    family, config = load_hf_config("configs/llama2_7B.json")
    choose_attention(config, family, dtype)
    assert config._attn_implementation in (None, "sdpa")  # no GPU, or no flash-attn
    monkeypatch.setattr("flame.models.hf.device_type", "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    choose_attention(config, family, dtype)
    assert config._attn_implementation == chosen
