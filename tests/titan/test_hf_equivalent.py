"""torchtitan's models and those of transformers that compute the same: exports, and starts from published weights."""

from dataclasses import replace
from importlib import import_module
from math import prod
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex
from torchtitan.protocols import train_spec
from transformers import AutoModelForCausalLM

from flame.checkpoint.structure import ConversionError
from flame.config.parser import parse
from flame.convert.export import export_checkpoint
from flame.convert.hf_structure import model_structure, read_trained_structure
from flame.convert.hf_to_dcp import WeightReader
from flame.convert.hf_weights import read_weights
from flame.convert.initial import IdentityAdapter
from flame.convert.output import read_report
from flame.convert.safetensors_file import find_files
from flame.convert.verify import export_and_verify, verify_export
from flame.data.tokenize import build_tokenizer
from flame.errors import UserError
from flame.models.hf import build_on_meta
from flame.titan import hf_equivalent
from flame.training.train_spec import register
from tests.convert.test_commands import load, rejected
from tests.convert.test_initial import check_first_losses
from tests.launch import SMALL, train_each
from tests.titan.test_titan import MODELS, build, flags, loaded, write_text

NAMES = ("llama3", "llama3_mask", "qwen3", "qwen3_moe")
TOKENS = torch.arange(96).view(2, 48) * 7919 % 320
to_hf = load("convert_dcp_to_hf")


def find(name):
    """transformers' config of one of MODELS."""
    model_name, flavor = MODELS[name]
    import_module("tests.flavors")
    args = import_module(f"torchtitan.models.{model_name}").get_train_spec().model_args[flavor]
    return hf_equivalent.equivalent_config(model_name, args)


def save(folder, name):
    """A run folder of a model of torchtitan, whose weights, those of norms too, are all different; and the model."""
    model_name, flavor = MODELS[name]
    model_cls, args = loaded(*(["--training.varlen"] if "mask" in name else []), name=model_name, flavor=flavor)
    model = build(model_cls, args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    dcp.save(model.state_dict(), checkpoint_id=str(folder / "checkpoint" / "step-1"), no_dist=True)
    model.save_assets(folder / "model", build_tokenizer("byte").hf)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_an_export_has_the_logits_of_torchtitans_model_and_comes_back_bit_for_bit(name, tmp_path):
    trained = save(tmp_path, name)
    assert export_and_verify(tmp_path / "checkpoint" / "step-1", tmp_path / "model", tmp_path / "hf")
    checks = read_report(tmp_path / "hf")["checks"]
    positions = torch.arange(48).expand(2, -1) if "mask" in name else None
    with torch.no_grad():
        expected = trained(TOKENS, positions)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)(TOKENS, use_cache=False)
    # float32; the rotary embedding by complex numbers or by two products, attention by one kernel or another
    assert checks["logits"]["max_abs_difference"] < 1e-6 * checks["logits"]["largest"]
    assert (found.logits - expected).abs().max() < 1e-6 * expected.abs().max()

    weights = read_weights(find_files(tmp_path / "hf"), read_trained_structure(tmp_path / "model"))
    fresh = save(tmp_path / "fresh", name)
    assert not torch.equal(fresh.tok_embeddings.weight, trained.tok_embeddings.weight)
    dcp.load(
        IdentityAdapter(weights.structure, lambda: weights, None, None).to_hf(fresh.state_dict()),
        storage_reader=WeightReader(weights),
        no_dist=True,
    )
    for (key, mine), theirs in zip(fresh.state_dict().items(), trained.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key


def test_rows_of_heads_are_reordered_or_the_logits_differ(tmp_path):
    save(tmp_path, "llama3")
    published_as = read_trained_structure(tmp_path / "model").published_as
    assert {published.heads for published in published_as.values()} == {0, 2, 4}
    wrong = {key: replace(published, heads=0) for key, published in published_as.items()}
    checkpoint = tmp_path / "checkpoint" / "step-1"
    export_checkpoint(checkpoint, tmp_path / "model", tmp_path / "hf", published_as=wrong)
    with pytest.raises(ConversionError, match="its logits differ"):
        verify_export(checkpoint, None, tmp_path / "hf")


@pytest.mark.parametrize(("start", "stop"), [(0, 64), (16, 32), (3, 21), (31, 33)])
def test_any_rows_of_heads_are_read(start, stop, tmp_path):
    trained = save(tmp_path, "llama3")
    export_and_verify(tmp_path / "checkpoint" / "step-1", tmp_path / "model", tmp_path / "hf")
    reader = WeightReader(read_weights(find_files(tmp_path / "hf"), read_trained_structure(tmp_path / "model")))
    reader.set_up_storage_reader(reader.read_metadata(), True)
    shard = torch.zeros(stop - start, 64)
    index = MetadataIndex("layers.1.attention.wq.weight", (0, 0))
    item = SimpleNamespace(storage_index=index, storage_offsets=(start, 0), lengths=shard.shape)
    planner = SimpleNamespace(resolve_tensor=lambda _: shard, commit_tensor=lambda *_: None)
    reader.read_data(SimpleNamespace(items=[item]), planner).wait()
    assert torch.equal(shard, trained.layers["1"].attention.wq.weight[start:stop])


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_every_flavor_has_an_equivalent_with_as_many_parameters(name):
    table = import_module(f"torchtitan.models.{name}").get_train_spec().model_args
    for flavor, args in table.items():
        if args.n_layers * (args.moe_args.num_experts if getattr(args, "moe_enabled", False) else 1) > 300:
            args = replace(args, n_layers=2)
        config = hf_equivalent.equivalent_config(name, args)
        published = model_structure(build_on_meta(config, flavor)).published
        trained = hf_equivalent.titan_structure(published, name, args)
        numbers = {key: prod(shape) for key, (_, shape) in trained.tensors.items() if not key.endswith("expert_bias")}
        for part in trained.published_as.values():
            if part.tensor in numbers:
                numbers[part.tensor] -= prod(part.shape)
        assert not any(numbers.values()), flavor


def test_the_largest_llama_has_the_published_intermediate_size():
    args = import_module("torchtitan.models.llama3").llama3_args["405B"]
    assert hf_equivalent.equivalent_config("llama3", args).intermediate_size == 53248  # of meta-llama/Llama-3.1-405B


@pytest.mark.parametrize(
    ("name", "flavor", "changes", "words"),
    [
        ("llama4", "tiny", {}, "no bias that balances"),
        ("deepseek_v3", "tiny", {}, "epsilon of 1e-6"),
        ("qwen3", "tiny", {"qk_norm": False}, "norms of queries and keys"),
        ("qwen3", "tiny_moe", {"moe_args": {"num_shared_experts": 1}}, "no such experts"),
        ("qwen3", "tiny_moe", {"moe_args": {"score_func": "sigmoid"}}, "no such experts"),
    ],
)
def test_a_model_without_an_equivalent_in_transformers_is_not_exported(
    name, flavor, changes, words, tmp_path, monkeypatch
):
    import_module("tests.flavors")
    table = import_module(f"torchtitan.models.{name}").get_train_spec().model_args
    given = {key: replace(table[flavor].moe_args, **v) if key == "moe_args" else v for key, v in changes.items()}
    monkeypatch.setitem(table, flavor, replace(table[flavor], **given))
    model_cls, args = loaded(name=name, flavor=flavor)
    assert words in model_cls.hf_equivalent
    build(model_cls, args).save_assets(tmp_path / "model", build_tokenizer("byte").hf)
    with pytest.raises(UserError) as error:
        read_trained_structure(tmp_path / "model")
    assert error.value.setting == str(tmp_path / "model" / "config.json") and words in error.value.hint

    monkeypatch.setattr(train_spec, "_extra_train_specs", {})  # one job of a model a process
    config = parse([*SMALL, f"--model.name={name}", f"--model.flavor={flavor}", f"--job.dump_folder={tmp_path}/run"])
    register(config)
    assert not config.checkpoint.export
    config.checkpoint.initial_load_in_hf = True
    with pytest.raises(UserError, match=words) as error:
        register(config)
    assert error.value.setting == "--checkpoint.initial_load_in_hf"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of a step on two ranks, and transformers' models they start from."""
    root = tmp_path_factory.mktemp("runs")
    write_text(root)
    layouts = {"llama3": "tp2", "qwen3": "ddp2", "qwen3_moe": "fsdp2"}
    published, jobs = {}, []
    for name, layout in layouts.items():
        torch.manual_seed(0)
        model = published[f"{name}/{layout}"] = AutoModelForCausalLM.from_config(find(name)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(root / "hf" / name)
        start = ["--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={root / 'hf' / name}"]
        jobs.append(flags(root, name, layout, *start, steps=1))
    train_each(jobs, ranks=2)
    return root, published


def test_a_run_on_two_ranks_starts_from_published_weights_as_transformers_does(runs):
    check_first_losses(*runs)


def test_the_checkpoint_of_two_ranks_is_exported_and_verified(runs):
    root, published = runs
    for name in published:
        assert export_and_verify(root / name / "checkpoint" / "step-1", root / name / "model", root / name / "hf")
        checks = read_report(root / name / "hf")["checks"]["logits"]
        assert checks["max_abs_difference"] < 1e-6 * checks["largest"], name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "qwen3_moe"])
def test_a_run_is_converted_and_verified_by_the_command(name, tmp_path):
    save(tmp_path, name)
    assert to_hf.main([f"--path={tmp_path}"]) == 0
    checks = read_report(tmp_path / "hf" / "step-1")["checks"]["logits"]
    assert checks["max_abs_difference"] < 1e-6 * checks["largest"]


@pytest.mark.slow
def test_the_command_rejects_a_model_without_an_equivalent_in_one_line(tmp_path, capsys):
    save(tmp_path, "deepseek_v3")
    assert "epsilon of 1e-6" in rejected(capsys, to_hf.main, f"--path={tmp_path}")


@pytest.mark.parametrize(
    "record",
    [
        *("[]", "{", "[" * 100_000, '{"model_type": "torchtitan.nothing"}', '{"model_type": "torchtitan.flux.train"}'),
        *('{"model_type": "torchtitan.../x"}', '{"model_type": "torchtitan.llama4", "moe_args": 5}'),
        '{"model_type": "torchtitan.llama4", "moe_args": {"no_such": 1}}',
    ],
)
def test_a_damaged_record_of_torchtitans_model_is_one_line(record, tmp_path):
    (tmp_path / "torchtitan.json").write_text(record)
    with pytest.raises(UserError) as error:
        hf_equivalent.read_recorded_model(tmp_path)
    assert error.value.setting == str(tmp_path / "torchtitan.json")
