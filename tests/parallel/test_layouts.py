"""The same global batch gives the same loss and gradient norm in every layout, and however it is accumulated."""

import importlib.util
import inspect
import json
import re

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch.distributed._symmetric_memory import is_symm_mem_enabled_for_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from flame.config.parser import parse
from flame.errors import UserError
from flame.models.hf import build_on_meta
from flame.models.table import BY_MODEL_TYPE
from flame.parallel.apply import enable_async_tp
from flame.parallel.layout import ASYNC_TP_FLAG, CP_FLAG, PP_FLAG, TP_FLAG, compiles, stages
from flame.parallel.pipeline_schedule import SCHEDULE_FLAG, SCHEDULES
from tests.launch import REPO
from tests.layouts import JOBS, LAYOUTS, MODELS, STEPS, differences, error_of, layout_error, run
from tests.models.small import OTHERS, SHIPPED, small

HEADS = {  # models whose heads or columns, and whose blocks, cannot be divided, and the words that say why
    "retnet": "depends on the head's number",
    "gsa": "spans all heads",
    "hgrn2": "spans all heads",
    "mamba2": "spans all heads",
}
STAGES = dict.fromkeys(("tied", "falcon", "falcon_groups"), "tied") | {
    "granite": "has no row",
    "gemma2": "has no row",
    "hgrn2": "bounds of its decays",
    "rwkv7": "values of the first",
}
# Too few key-value heads for four ranks.
FOUR = ("falcon_groups", "llama", "tied", "mistral", "qwen3", "mixtral", "granite", "gemma2")
PLANNED = (  # model types without a row, which transformers has a plan for
    *("apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma3_text", "helium"),
    *("hyperclovax", "internlm3", "iquestcoder", "jais2", "ministral", "ministral3", "nanochat", "nemotron"),
    *("olmo", "phi", "seed_oss", "smollm3", "starcoder2", "vaultgemma"),
)


def expected(name, layout):
    """The setting and words of the error that a model gets in a layout; None if it trains."""
    if name in HEADS and ("tp2" in layout or "cp2" in layout):
        return (TP_FLAG if "tp2" in layout else CP_FLAG), HEADS[name]
    if layout == "tp2_cp2" and name in FOUR:
        return TP_FLAG, "_heads, 2"
    return (PP_FLAG, STAGES[name]) if "pp2" in layout and name in STAGES else None


def pairs(names, layouts):
    return [
        (name, layout) for name in names for layout in layouts if layout != "one" and expected(name, layout) is None
    ]


LAYERS = "--parallelism.pipeline_parallel_layers_per_stage"
COMPILED = "--parallelism.tensor_parallel_degree=2 --compile.enable"
_SHARDED = ["accumulated", "fsdp2", "fsdp2_accumulated", "ddp2", "fsdp4", "hsdp2x2"]
_DIVIDED = ["tp2", "cp2", "pp2", "fsdp2_tp2"]
QUICK = [
    *pairs(["llama", "gla"], _SHARDED + _DIVIDED),
    *pairs(["gpt_neox"], [*_SHARDED, "tp2_compiled"]),
    *pairs(["llama"], ["tp2_compiled"]),
    *pairs(["tied"], ["fsdp2", "tp2", "tp2_gathered"]),
]
SLOW = [pair for pair in pairs(MODELS, LAYOUTS) if pair not in QUICK]
_BF16 = [layout for layout, (ranks, _) in LAYOUTS.items() if ranks <= 4 and "compiled" not in layout]
BF16 = [*pairs(["llama"], ["fsdp2", "ddp2", "tp2", "pp2"]), *pairs(["mixtral"], ["ddp2"])]
BF16_SLOW = [pair for pair in pairs(["llama", "tied", "gla", "mixtral", "gpt_neox"], _BF16) if pair not in BF16]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run(tmp_path_factory.mktemp("layouts"), QUICK, {1: 8, 2: 17, 4: 8})  # a launch each: not yet too slow


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return run(tmp_path_factory.mktemp("every_layout"), pairs(MODELS, LAYOUTS))


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    return run_bf16(tmp_path_factory.mktemp("bf16"), BF16)


@pytest.fixture(scope="module")
def every_bf16(tmp_path_factory):
    return run_bf16(tmp_path_factory.mktemp("every_bf16"), BF16_SLOW)


def run_bf16(root, pairs):
    """The records of `run`, and {(model, layout): the products of matrices on all ranks}."""
    runs = run(root, pairs, JOBS, "--training.mixed_precision_param=bfloat16", trainer="tests.typed:TypedTrainer")
    types = {
        pair: {each for path in (root / "/".join(pair)).glob("types-*.json") for each in json.loads(path.read_text())}
        for pair in runs
    }
    return runs, types


def compare(name, layout, runs, loss_bound=1e-5, norm_bound=1e-4):
    one, many = runs[name, "one"], runs[name, layout]
    assert [r["step"] for r in many] == list(range(1, STEPS + 1))
    for key in ("data_digest", "tokens", "data/stdlib/tokens"):
        assert [r[key] for r in many] == [r[key] for r in one]
    loss, norm = differences(one, many)
    assert loss < loss_bound and norm < norm_bound


def test_every_family_has_one_table_for_both_embeddings_if_asked():
    seen = set()
    for name in [*SHIPPED, *OTHERS]:
        _, config = small(name, tie_word_embeddings=True)
        if config.model_type not in seen:
            model = build_on_meta(config, name)
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight, name
        seen.add(config.model_type)
    assert seen == set(BY_MODEL_TYPE)


@pytest.mark.parametrize("name", MODELS)
def test_only_models_that_cannot_be_divided_are_rejected_and_the_reason_is_given(name):
    for layout in LAYOUTS:
        error = layout_error(name, layout)
        if (wanted := expected(name, layout)) is None:
            assert error is None, (layout, error)
        else:
            assert error and error.setting == wanted[0] and wanted[1] in error.hint + error.allowed, (layout, error)


def test_a_mixture_whose_balance_loss_is_trained_is_not_divided(monkeypatch):
    monkeypatch.setitem(MODELS, "balanced", {**MODELS["mixtral"], "output_router_logits": True})
    for layout in ("tp2", "cp2", "pp2"):
        assert "output_router_logits" in layout_error("balanced", layout).hint
    assert layout_error("balanced", "fsdp2") is None


@pytest.mark.parametrize("name, layout", QUICK)
def test_loss_and_gradient_norm_equal_those_of_one_rank(name, layout, quick):
    compare(name, layout, quick)


@pytest.mark.slow
@pytest.mark.parametrize("name, layout", SLOW)
def test_loss_and_gradient_norm_equal_those_of_one_rank_for_every_family(name, layout, every):
    compare(name, layout, every)


def compare_bf16(name, layout, runs, types):
    assert types[name, layout] == types[name, "one"] != set()
    assert {each.split()[1] for each in types[name, layout]} == {"torch.bfloat16"}
    # Sums in another order, each rounded to 8 bits: up to 2^-8 = 4e-3 of a gradient. In a mean over 1,024 tokens most
    # of it cancels. Seen: 1.3e-4 of the loss, 4.7e-3 of the norm; autocast on one rank would give 5.4e-4 and 1.5e-3.
    compare(name, layout, runs, loss_bound=5e-4, norm_bound=1e-2)


@pytest.mark.parametrize("name, layout", BF16)
def test_every_layout_multiplies_in_bf16_and_has_the_numbers_of_one_rank(name, layout, bf16):
    compare_bf16(name, layout, *bf16)


@pytest.mark.slow
@pytest.mark.parametrize("name, layout", BF16_SLOW)
def test_every_layout_multiplies_in_bf16_and_has_the_numbers_of_one_rank_for_more_families(name, layout, every_bf16):
    compare_bf16(name, layout, *every_bf16)


@pytest.mark.slow
def test_types_with_a_tp_plan_in_transformers_have_the_numbers_of_one_rank(tmp_path, monkeypatch):
    same = {"pad_token_id": 0, "attention_dropout": 0.0, "residual_dropout": 0.0}  # Seed-OSS drops out by default
    for model_type in PLANNED:
        monkeypatch.setitem(MODELS, model_type, {**MODELS["gemma2"], "model_type": model_type, **same})
    runs = run(tmp_path, [(model_type, layout) for model_type in PLANNED for layout in ("tp2", "cp2")])
    for model_type in PLANNED:
        for layout in ("tp2", "cp2"):
            # Apertus has a part of its parameters in bfloat16, wherever it is: two of each activation.
            compare(model_type, layout, runs, norm_bound=1e-3 if model_type == "apertus" else 1e-4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "olmo3"}, "transformers' plan for it (base_model_tp_plan) has colwise_gather_output"),
        (
            {"model_type": "youtu", "q_lora_rank": 32, "head_dim": 64, "num_key_value_heads": 4},
            "leaves out self_attn.q_a_proj.weight",
        ),
        ({"model_type": "cohere", "use_qk_norm": True}, "leaves out self_attn.q_norm.weight"),
        ({"model_type": "gpt2", "n_head": 4, "n_embd": 64}, "transformers has no plan for it"),
    ],
)
def test_a_type_whose_plan_divides_more_than_heads_and_columns_is_rejected(fields, words, monkeypatch):
    monkeypatch.setitem(MODELS, fields["model_type"], {**MODELS["gemma2"], **fields})
    for layout in ("tp2", "cp2"):
        assert words in layout_error(fields["model_type"], layout).hint
    assert layout_error(fields["model_type"], "fsdp2") is None


LOOPED = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
ORDER = """0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1
1F0,1F1,3F0,3F1,3B0,3B1,1B0,1B1
"""  # of rank 0 and rank 1: all forwards, then all backwards, of two microbatches


@pytest.mark.slow
def test_every_schedule_of_a_pipeline_has_the_numbers_of_one_rank(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "deep", {**MODELS["llama"], "num_hidden_layers": 6})
    (tmp_path / "order.csv").write_text(ORDER)
    ranks, flags = LAYOUTS["pp2"]
    halves = "--parallelism.pipeline_parallel_microbatch_size=4"
    for name in LOOPED:
        monkeypatch.setitem(LAYOUTS, name, (ranks, [*flags, f"{SCHEDULE_FLAG}={name}"]))
    by_file = [f"{SCHEDULE_FLAG}=Interleaved1F1B", f"{SCHEDULE_FLAG}_csv={tmp_path}/order.csv", halves]
    monkeypatch.setitem(LAYOUTS, "csv", (ranks, [*flags, *by_file]))
    runs = run(tmp_path, [("deep", name) for name in (*LOOPED, "csv")])
    for name in (*LOOPED, "csv"):
        compare("deep", name, runs)


@pytest.mark.slow
def test_ranks_that_share_a_sequence_drop_the_same_embeddings(tmp_path, monkeypatch):
    fields = {**MODELS["gemma2"], "model_type": "phi", "tie_word_embeddings": False, "embd_pdrop": 0.5}
    monkeypatch.setitem(MODELS, "phi", fields)
    monkeypatch.setitem(MODELS, "whole", {**fields, "embd_pdrop": 0.0})
    runs = run(tmp_path, [("phi", "tp2"), ("phi", "cp2"), ("whole", "tp2")])
    for layout in ("tp2", "cp2"):
        compare("phi", layout, runs)
    assert differences(runs["phi", "one"], runs["whole", "one"])[0] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gla"])
def test_what_inductor_compiles_has_the_numbers_of_one_rank(name, tmp_path, monkeypatch):
    # Of all its passes: it once gave the biases that GPT-NeoX adds up one memory for both gradients.
    layouts = {f"inductor_{kind}2": LAYOUTS[f"{kind}2"] for kind in ("tp", "cp")}
    for layout, (ranks, flags) in layouts.items():
        monkeypatch.setitem(LAYOUTS, layout, (ranks, [*flags, "--compile.enable"]))
    runs = run(tmp_path, [(name, layout) for layout in layouts])
    for layout in layouts:
        compare(name, layout, runs)


@pytest.mark.parametrize(
    "flags, compiled",
    [
        ("", True),
        ("--compile.enable=false", False),
        ("--compile.components=loss", False),
        ("--activation_checkpoint.mode=full", True),
        (f"{TP_FLAG}=2", True),
        (f"{TP_FLAG}=2 --activation_checkpoint.mode=full", False),
        (f"{PP_FLAG}=2", False),
        ("--quantize.linear.float8.emulate", False),
    ],
)
def test_blocks_are_compiled_on_a_gpu_unless_the_job_says_no_or_has_what_excludes_it(flags, compiled, monkeypatch):
    monkeypatch.setattr("flame.parallel.layout.device_type", "cuda")
    assert compiles(BY_MODEL_TYPE["llama"], parse(flags.split())) == compiled


def test_only_families_that_gain_from_it_are_compiled_unasked_and_none_on_a_cpu(monkeypatch):
    llama, mixtral, unasked, asked = (
        BY_MODEL_TYPE["llama"],
        BY_MODEL_TYPE["mixtral"],
        parse([]),
        parse(["--compile.enable"]),
    )
    monkeypatch.setattr("flame.parallel.layout.device_type", "cpu")
    assert not compiles(llama, unasked) and compiles(llama, asked)
    monkeypatch.setattr("flame.parallel.layout.device_type", "cuda")
    assert not compiles(mixtral, unasked) and compiles(mixtral, asked)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gla", "tied"])
def test_training_moves_the_weights(name, quick):
    # The equalities above would also hold between runs that learn nothing.
    assert quick[name, "one"][-1]["loss"] < quick[name, "one"][0]["loss"] - 0.1


@pytest.mark.parametrize(
    "flags, setting, words",
    [
        (f"{COMPILED} --activation_checkpoint.mode=full", "--activation_checkpoint.mode", "none with --compile.enable"),
        (f"{ASYNC_TP_FLAG} --compile.enable", ASYNC_TP_FLAG, f"{TP_FLAG} of 2 or more"),
        (f"{ASYNC_TP_FLAG} {TP_FLAG}=2", ASYNC_TP_FLAG, "--compile.enable"),
        (f"{ASYNC_TP_FLAG} {COMPILED} --compile.backend=eager", ASYNC_TP_FLAG, "--compile.backend inductor"),
        (f"{TP_FLAG}=3", TP_FLAG, "a divisor of the model's num_attention_heads, 4"),
        (f"{TP_FLAG}=2 --training.seq_len=129", "--training.seq_len", "a multiple of 2"),
        (f"{PP_FLAG}=4", PP_FLAG, "stage 1 would have none of the model's 2 blocks"),
        (f"{PP_FLAG}=2 {LAYERS}=1", PP_FLAG, "makes 4 stages, 1F1B needs one per rank"),
        (
            f"{PP_FLAG}=2 {LAYERS}=1 {SCHEDULE_FLAG}=loopedbfs "
            "--parallelism.pipeline_parallel_last_stage_less_layers=0",
            PP_FLAG,
            "makes 3 stages, LoopedBFS needs two or more per rank",
        ),
        *(
            (
                f"{PP_FLAG}=2 {LAYERS}=2 --parallelism.pipeline_parallel_first_stage_less_layers=10 "
                f"{SCHEDULE_FLAG}={name.lower()}",
                PP_FLAG,
                f"makes 7 stages, {name} needs two per rank",
            )
            for name in ("ZBVZeroBubble", "DualPipeV")
        ),
    ],
)
def test_a_layout_that_is_impossible_is_rejected(flags, setting, words):
    error = error_of("llama", flags.split())
    assert error.setting == setting and words in error.allowed + error.hint


@pytest.mark.parametrize(
    "text, words",
    [
        (ORDER, None),
        (ORDER.replace("2B0,2B1", "2I0,2I1,2W0,,2W1"), None),
        (ORDER.replace("2B0,0B1", "(2B0;0B1)OVERLAP_F_B"), None),
        ("hello,world\n", "cannot be read: Invalid action string: hello"),
        ("", "found 0 rows, must be 2"),
        (ORDER + ORDER, "found 4 rows, must be 2"),
        (ORDER.replace("1B1", "1SEND_B1"), "found 1SEND_B1, must be of the actions F, B, I and W"),
        (ORDER.replace("0B1", "1B1"), "found 1B1 in row 1, must be of the rank's own stages, 0, 2"),
        (ORDER.replace("3F1", "5F1"), "found 5F1 in row 2, must be of the rank's own stages, 1, 3"),
        (ORDER.replace("0F1", "0F2"), "found 0F2, must be of the job's microbatches, 0 to 1"),
        (ORDER.replace("0F1", "0F"), "found 0F, must be of the job's microbatches, 0 to 1"),
        (ORDER.replace("0F1", "0F0"), "found 0F0 twice"),
        (ORDER.replace("1F1,", ""), "found no 1F1; every stage has 2 microbatches"),
        (ORDER.replace(",0B1", ""), "Invalid backward microbatches for stage 0"),
        ("0B0," + ORDER.replace(",0B0", ""), "Running Full Backward for stage 0, microbatch 0 without first running"),
        (ORDER.replace("0F0,0F1,2F0", "2F0,0F0,0F1"), "can't schedule sends/recvs"),
    ],
)
def test_actions_that_are_not_those_of_the_job_are_rejected(text, words, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "deep", {**MODELS["llama"], "num_hidden_layers": 6})
    (tmp_path / "order.csv").write_text(text)
    flags = [*LAYOUTS["pp2"][1], f"{SCHEDULE_FLAG}=Interleaved1F1B", f"{SCHEDULE_FLAG}_csv={tmp_path}/order.csv"]
    error = error_of("deep", [*flags, "--parallelism.pipeline_parallel_microbatch_size=4"])
    if words is None:
        assert error is None
    else:
        assert error.setting.startswith(f"{SCHEDULE_FLAG}_csv ") and words in str(error) and "\n" not in str(error)


def test_a_split_backward_is_not_compiled(tmp_path):
    (tmp_path / "order.csv").write_text("0F0,0F1,0B0,0I1,0W1\n1F0,1F1,1B0,1B1\n")
    flags = [*LAYOUTS["pp2"][1], f"{SCHEDULE_FLAG}_csv={tmp_path}/order.csv", "--compile.enable"]
    error = error_of("llama", [*flags, "--parallelism.pipeline_parallel_microbatch_size=4"])
    assert error.setting == "--compile.enable" and "0I1" in error.hint


def test_the_schedules_and_their_constraints_are_torchs():
    with pytest.raises(ValueError, match="'foo'") as unknown:
        get_schedule_class("foo")
    known = set(re.findall(r"'(\w+)'", str(unknown.value))) - {"foo", "PipelineScheduleSingle", "PipelineScheduleMulti"}
    assert known == {schedule.name for schedule in SCHEDULES}
    for schedule in SCHEDULES:
        torchs = get_schedule_class(schedule.name)
        code = inspect.getsource(torchs.__init__)
        assert (schedule.stages_per_rank == 1) == issubclass(torchs, PipelineScheduleSingle)
        assert (schedule.stages_per_rank == 2) == ("self.n_local_stages != 2" in code)
        assert schedule.fills_stages == ("n_microbatches < self._num_stages" in code)
        assert schedule.equal_rounds == ("n_microbatches % self.number_of_rounds" in code)
        assert schedule.split_backward == ("_check_torch_compile_compatibility" in code)


def test_asynchronous_tensor_parallelism_reaches_the_compiler(tmp_path, monkeypatch):
    flags = [ASYNC_TP_FLAG, *COMPILED.split()]
    assert error_of("llama", flags) is None
    monkeypatch.setattr(torch._inductor.config, "_micro_pipeline_tp", False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        enable_async_tp(mesh, parse(flags))
        assert torch._inductor.config._micro_pipeline_tp
        assert is_symm_mem_enabled_for_group(mesh.get_group().group_name)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([["tok_embeddings", "layers.0"], ["layers.7", "norm", "output"]], "see layers.1"),
        ([["tok_embeddings", "layers.0"], ["layers.0", "layers.1", "norm", "output"]], "see layers.0"),
        ([["tok_embeddings", "layers.0"], ["layers.1", "output"]], "see norm"),
        ([["tok_embeddings", "layers.1"], ["layers.0", "norm", "output"]], "in this order"),
        ([["tok_embeddings"], ["layers.0", "layers.1", "norm", "output"]], "stage 1 would have none"),
        ([["tok_embeddings", "layers.0", "layers.1", "norm", "output"]], "makes 1 stages, 1F1B needs one"),
    ],
)
def test_stages_that_are_not_the_model_are_rejected(parts, words):
    layout = parse([f"{PP_FLAG}=2"]).parallelism
    layout.module_fqns_per_model_part = parts
    with pytest.raises(UserError) as error:
        stages(2, layout)
    assert error.value.setting == PP_FLAG and words in error.value.hint


def test_the_page_holds_the_table_of_the_rows():
    spec = importlib.util.spec_from_file_location("parallelism_page", REPO / "scripts" / "parallelism_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.page(text) == text, "run scripts/parallelism_page.py"
