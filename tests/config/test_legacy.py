import json
import logging
from operator import attrgetter
from pathlib import Path

import pytest

from flame.config import legacy
from flame.config.parser import parse, setting_types, to_toml
from flame.errors import UserError

ROOT = Path(__file__).parents[2]

# Every flag that the documents of flame 0.x and LLMonade list (but job.config_file, below), a value that is not the
# default, the setting it gives today and that setting's value. None: accepted, and nothing changes.
SPELLINGS = [
    ("job.description", "my job", "job.description", "my job"),
    ("job.dump_folder", "exp/a b", "job.dump_folder", "exp/a b"),
    ("job.print_args", True, "job.print_config", True),
    ("job.use_for_integration_test", True, None, None),
    ("model.config", "fla-hub/gla-1.3B-100B", "model.config", "fla-hub/gla-1.3B-100B"),
    ("model.norm_type", "fused_rmsnorm", None, None),
    ("model.tokenizer_path", "fla-hub/gla-1.3B-100B", "model.hf_assets_path", "fla-hub/gla-1.3B-100B"),
    ("profiling.enable_memory_snapshot", True, "profiling.enable_memory_snapshot", True),
    ("profiling.enable_profiling", True, "profiling.enable_profiling", True),
    ("profiling.profile_freq", 512, "profiling.profile_freq", 512),
    ("profiling.save_memory_snapshot_folder", "snap", "profiling.save_memory_snapshot_folder", "snap"),
    ("profiling.save_traces_folder", "profile_trace", "profiling.save_traces_folder", "profile_trace"),
    ("optimizer.early_step_in_backward", True, "optimizer.early_step_in_backward", True),
    ("optimizer.eps", 1e-15, "optimizer.eps", 1e-15),
    ("optimizer.fused", False, "optimizer.implementation", "foreach"),
    ("optimizer.lr", 3e-4, "optimizer.lr", 3e-4),
    ("optimizer.min_lr_ratio", 0.25, "lr_scheduler.min_lr_factor", 0.25),
    ("optimizer.name", "Adam", "optimizer.name", "Adam"),
    ("optimizer.scheduler", "cosine", "lr_scheduler.decay_type", "cosine"),
    ("lr_scheduler.decay_ratio", 0.2, "lr_scheduler.decay_ratio", 0.2),
    ("lr_scheduler.decay_type", "cosine", "lr_scheduler.decay_type", "cosine"),
    ("lr_scheduler.lr_min", 0.1, "lr_scheduler.min_lr_factor", 0.1),
    ("lr_scheduler.warmup_steps", 1024, "lr_scheduler.warmup_steps", 1024),
    ("training.batch_size", 32, "training.local_batch_size", 32),
    ("training.compile", True, "compile.enable", True),
    ("training.context_len", 1024, "training.context_len", 1024),
    ("training.data_dir", "a,,b", "training.data_dir", "a,,b"),
    ("training.data_files", "x.jsonl", "training.data_files", "x.jsonl"),
    ("training.data_parallel_replicate_degree", 2, "parallelism.data_parallel_replicate_degree", 2),
    ("training.data_parallel_shard_degree", 4, "parallelism.data_parallel_shard_degree", 4),
    ("training.data_probs", "0.6,0.4", "training.data_probs", "0.6,0.4"),
    ("training.dataset", "HuggingFaceFW/fineweb-edu", "training.dataset", "HuggingFaceFW/fineweb-edu"),
    ("training.dataset_name", "default", "training.dataset_name", "default"),
    ("training.dataset_split", "en", "training.dataset_split", "en"),
    ("training.deterministic", True, "debug.deterministic", True),
    ("training.disable_loss_parallel", True, "parallelism.disable_loss_parallel", True),
    ("training.enable_cpu_offload", True, "training.enable_cpu_offload", True),
    ("training.gc_freq", 7, "training.gc_freq", 7),
    ("training.gradient_accumulation_steps", 3, "training.global_batch_size", 8 * 3 * 4),
    ("training.max_norm", 0.5, "training.max_norm", 0.5),
    ("training.mixed_precision_param", "float32", "training.mixed_precision_param", "float32"),
    ("training.mixed_precision_reduce", "float32", "training.mixed_precision_reduce", "float32"),
    ("training.num_workers", 32, "training.dataloader.num_workers", 32),
    ("training.prefetch_factor", 5, "training.dataloader.prefetch_factor", 5),
    ("training.seed", 7, "debug.seed", 7),
    ("training.seq_len", 4096, "training.seq_len", 4096),
    ("training.skip_nan_inf", True, "training.skip_nan_inf", True),
    ("training.steps", 20480, "training.steps", 20480),
    ("training.streaming", True, "training.streaming", True),
    ("training.tensor_parallel_degree", 2, "parallelism.tensor_parallel_degree", 2),
    ("training.varlen", True, "training.context_len", 2048),
    ("training.warmup_steps", 1024, "lr_scheduler.warmup_steps", 1024),
    ("metrics.disable_color_printing", True, "metrics.disable_color_printing", True),
    ("metrics.enable_tensorboard", True, "metrics.enable_tensorboard", True),
    ("metrics.enable_wandb", True, "metrics.enable_wandb", True),
    ("metrics.log_freq", 4, "metrics.log_freq", 4),
    ("metrics.rank_0_only", False, "metrics.save_for_all_ranks", True),
    ("metrics.save_tb_folder", "board", "metrics.save_tb_folder", "board"),
    ("experimental.context_parallel_degree", 2, "parallelism.context_parallel_degree", 2),
    (
        "experimental.context_parallel_rotate_method",
        "alltoall",
        "parallelism.context_parallel_rotate_method",
        "alltoall",
    ),
    ("experimental.enable_async_tensor_parallel", True, "parallelism.enable_async_tensor_parallel", True),
    ("experimental.enable_compiled_autograd", True, None, None),
    ("experimental.pipeline_parallel_degree", 2, "parallelism.pipeline_parallel_degree", 2),
    ("experimental.pipeline_parallel_microbatches", 4, "parallelism.pipeline_parallel_microbatch_size", 2),
    ("experimental.pipeline_parallel_schedule", "GPipe", "parallelism.pipeline_parallel_schedule", "GPipe"),
    ("experimental.pipeline_parallel_schedule_csv", "s.csv", "parallelism.pipeline_parallel_schedule_csv", "s.csv"),
    (
        "experimental.pipeline_parallel_split_points",
        ["layers.1", "norm"],
        "parallelism.module_fqns_per_model_part",
        [["tok_embeddings", "layers.0"], ["layers.1", "layers.2"], ["norm", "output"]],
    ),
    ("checkpoint.async_mode", "async", "checkpoint.async_mode", "async"),
    ("checkpoint.create_seed_checkpoint", True, "checkpoint.create_seed_checkpoint", True),
    ("checkpoint.enable_checkpoint", False, "checkpoint.enable", False),
    ("checkpoint.export_dtype", "bfloat16", "checkpoint.export_dtype", "bfloat16"),
    ("checkpoint.folder", "ckpt", "checkpoint.folder", "ckpt"),
    ("checkpoint.interval", 2048, "checkpoint.interval", 2048),
    ("checkpoint.interval_type", "seconds", "checkpoint.interval_type", "seconds"),
    ("checkpoint.keep_latest_k", 2, "checkpoint.keep_latest_k", 2),
    ("checkpoint.load_step", 50, "checkpoint.load_step", 50),
    ("checkpoint.model_weights_only", True, "checkpoint.last_save_model_only", True),
    ("float8.enable_float8_linear", True, "model.converters", ["quantize.linear.float8"]),
    ("float8.enable_fsdp_float8_all_gather", True, "quantize.linear.float8.enable_fsdp_float8_all_gather", True),
    (
        "float8.precompute_float8_dynamic_scale_for_fsdp",
        True,
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp",
        True,
    ),
    ("float8.scaling_type_grad_output", "dynamic", None, None),
    ("float8.scaling_type_input", "dynamic", None, None),
    ("float8.scaling_type_weight", "dynamic", None, None),
    ("comm.init_timeout_seconds", 60, "comm.init_timeout_seconds", 60),
    ("comm.trace_buf_size", 0, "comm.trace_buf_size", 0),
    ("comm.train_timeout_seconds", 100, "comm.train_timeout_seconds", 100),
    ("memory_estimation.disable_fake_mode", True, "memory_estimation.disable_fake_mode", True),
    ("memory_estimation.enabled", True, "job.dry_run", True),
    # spellings of later flame versions, and values that got another name
    ("model.name", "fla", "model.name", "auto"),
    ("model.converters", ["float8"], "model.converters", ["quantize.linear.float8"]),
    ("model.converters", ["mine", "mx"], "model.converters", ["mine", "quantize.linear.mx"]),
    ("training.fsdp_reshard_after_forward", "always", "parallelism.fsdp_reshard_after_forward", "always"),
    ("training.pin_memory", True, "training.dataloader.pin_memory", True),
    ("training.persistent_workers", True, "training.dataloader.persistent_workers", True),
    ("experimental.custom_model_path", "my.models", "experimental.custom_import", "my.models"),
    ("checkpoint.initial_load_model_weights_only", False, "checkpoint.initial_load_model_only", False),
    ("checkpoint.last_save_model_weights_only", True, "checkpoint.last_save_model_only", True),
    ("checkpoint.interval_type", "step", "checkpoint.interval_type", "steps"),
    ("activation_offload.mode", "none", None, None),
    ("activation_checkpoint.mode", "selective", "activation_checkpoint.mode", "selective"),
    ("float8.recipe_name", "rowwise", "quantize.linear.float8.recipe_name", "rowwise"),
    ("float8.force_recompute_fp8_weight_in_bwd", True, None, None),
    ("fault_tolerance.group_size", 2, "fault_tolerance.group_size", 2),
    # second spellings of today
    ("model.hf_assets_path", "some/folder", "model.tokenizer_path", "some/folder"),
    ("model.import", "my.models", "experimental.custom_import", "my.models"),
    ("memory_estimation.enable", True, "job.dry_run", True),
]

THE_DEFAULT = [
    ("training.mixed_precision_reduce", "float32"),
    ("model.name", "fla"),
    ("checkpoint.interval_type", "step"),
]


@pytest.fixture(autouse=True)
def a_job_of_four_ranks(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({"model_type": "gla", "num_hidden_layers": 3}))


def as_flag(path, value):
    if isinstance(value, bool):
        return [f"--{path}"] if value else [f"--{path.replace('.', '.no_')}"]
    return [f"--{path}", *value] if isinstance(value, list) else [f"--{path}", str(value)]


def as_toml(path, value):
    section, _, key = path.rpartition(".")
    Path("job.toml").write_text(f"[{section}]\n{key} = {json.dumps(value)}\n")
    return ["--job.config_file", "job.toml"]


@pytest.mark.parametrize("write", [as_flag, as_toml])
@pytest.mark.parametrize("spelling, value, path, expected", SPELLINGS)
def test_every_older_spelling_is_understood_as_a_flag_and_as_a_toml_key(write, spelling, value, path, expected, caplog):
    model = [] if spelling == "model.config" else ["--model.config", "model.json"]
    plain, config = parse(model), parse(model + write(spelling, value))
    config.job.config_file = None
    if path is None:
        assert config == plain
        assert sum("ignored" in line for line in caplog.messages) == 1
        return
    assert attrgetter(path)(config) == expected
    # The value is not the default, but where torchtitan leaves no other: a spelling that is dropped cannot pass.
    assert (attrgetter(path)(plain) == expected) == ((spelling, value) in THE_DEFAULT)
    assert not caplog.messages


def test_every_row_gives_a_setting_that_exists_and_is_not_one_itself():
    types = setting_types()
    defaults = [path for come in legacy.UNLESS_GIVEN.values() for path in come]
    assert {*legacy.RENAMED.values(), *defaults} <= types.keys()
    assert not {*legacy.RENAMED, *legacy.CHANGED} & types.keys()
    assert legacy.UNLESS_GIVEN.keys() <= {*legacy.RENAMED, *legacy.CHANGED}
    assert all(old.ignored or old.change.__doc__ for old in legacy.CHANGED.values())


def test_wsd_decays_over_the_last_tenth_less_the_warm_up_with_the_older_floor():
    config = parse(["--optimizer.scheduler", "wsd", "--training.warmup_steps", "50", "--training.steps", "1000"])
    assert config.lr_scheduler.decay_type == "sqrt"
    assert config.lr_scheduler.decay_ratio == pytest.approx(0.05)
    assert config.lr_scheduler.min_lr_factor == 0.1
    long_warmup = parse(["--optimizer.scheduler", "wsd", "--training.warmup_steps", "200", "--training.steps", "1000"])
    assert long_warmup.lr_scheduler.decay_ratio == 0


def test_wsd_of_a_toml_follows_the_steps_of_a_flag():
    argv = [*as_toml("optimizer.scheduler", "wsd"), "--lr_scheduler.warmup_steps=100"]
    assert parse([*argv, "--training.steps=2000"]).lr_scheduler.decay_ratio == pytest.approx(0.05)


def test_an_older_scheduler_keeps_a_floor_that_is_given():
    assert parse(["--optimizer.scheduler", "cosine", "--lr_scheduler.lr_min", "0"]).lr_scheduler.min_lr_factor == 0
    assert parse(["--lr_scheduler.decay_type", "cosine"]).lr_scheduler.min_lr_factor == 0


def test_a_flag_with_a_scheduler_overrides_a_decay_in_the_toml():
    argv = [*as_toml("lr_scheduler.decay_ratio", 0.3), "--optimizer.scheduler", "linear"]
    assert parse(argv).lr_scheduler.decay_ratio is None


def test_older_checkpoints_keep_all_steps_unless_told_otherwise():
    assert parse(["--checkpoint.enable_checkpoint"]).checkpoint.keep_latest_k == 0
    assert parse(["--checkpoint.enable_checkpoint", "--checkpoint.keep_latest_k", "3"]).checkpoint.keep_latest_k == 3
    assert parse(["--checkpoint.enable"]).checkpoint.keep_latest_k == 10


def test_fused_means_the_fused_optimizer():
    argv = ["--optimizer.implementation", "fused", "--optimizer.fused"]
    assert parse(argv).optimizer.implementation == "fused"
    with pytest.raises(UserError, match=r"optimizer.fused|optimizer.implementation"):
        parse(["--optimizer.implementation", "for-loop", "--optimizer.fused"])


def test_float8_joins_the_converters_that_are_named_and_only_once():
    both = ["--model.converters", "mine", "--float8.enable_float8_linear"]
    assert parse(both).model.converters == ["mine", "quantize.linear.float8"]
    assert parse([*as_toml("model.converters", ["mine"]), both[-1]]).model.converters == [
        "mine",
        "quantize.linear.float8",
    ]
    assert parse(["--model.converters=float8", both[-1]]).model.converters == ["quantize.linear.float8"]


def test_documents_are_split_at_2048_or_at_the_row_if_that_is_shorter():
    assert parse(["--training.varlen", "--training.seq_len", "512"]).training.context_len == 512
    assert parse(["--training.varlen", "--training.context_len", "64"]).training.context_len == 64
    assert parse([]).training.context_len is None


def test_accumulation_and_a_global_batch_must_agree_within_one_place_and_flags_win_between_two():
    accumulate = ["--training.gradient_accumulation_steps", "2", "--training.batch_size", "4"]
    assert parse([*accumulate, "--training.global_batch_size", "32"]).training.global_batch_size == 32
    with pytest.raises(UserError) as caught:
        parse([*accumulate, "--training.global_batch_size", "64"])
    assert caught.value.setting == "--training.global_batch_size and --training.gradient_accumulation_steps"
    assert caught.value.found == "64 and 32"
    toml = as_toml("training.global_batch_size", 64)
    assert parse([*toml, *accumulate]).training.global_batch_size == 32
    toml = as_toml("training.gradient_accumulation_steps", 5)
    assert parse([*toml, "--training.global_batch_size", "64"]).training.global_batch_size == 64


def test_a_written_config_keeps_the_global_batch_on_another_number_of_ranks(monkeypatch):
    Path("run.toml").write_text(to_toml(parse(["--training.gradient_accumulation_steps", "2"])))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse(["--job.config_file", "run.toml"]).training.global_batch_size == 8 * 2 * 4


def test_a_config_that_an_earlier_version_recorded_is_read_in_silence(caplog):
    Path("run.toml").write_text(
        "[job]\ndry_run = false\n[model]\ntokenizer_path = 'byte'\nhf_assets_path = 'byte'\n"
        "[checkpoint]\ninitial_load_in_hf_quantized = false\n[memory_estimation]\nenable = false\n"
    )
    config = parse(["--job.config_file", "run.toml"])
    config.job.config_file = None
    assert config == parse([]) and not caplog.messages


@pytest.mark.parametrize(
    "argv, rule",
    [
        (["--float8.scaling_type_input", "delayed"], "delayed, dynamic"),
        (["--activation_offload.mode", "tmp"], "tmp, none"),
        (["--optimizer.scheduler", "wds"], "'wds', one of wsd, cosine, linear"),
        (["--training.gradient_accumulation_steps", "0"], "0, 1 or more"),
        (["--training.dataset_path", "x"], "x, none; give the path to training.dataset"),
        (["--validation.dataset_path", "x"], "x, none; give the path to validation.dataset"),
        (["--checkpoint.initial_load_in_hf_quantized"], "true, false"),
        (["--experimental.pipeline_parallel_microbatches", "3"], "3, a divisor of training.local_batch_size 8"),
        (["--experimental.pipeline_parallel_split_points", "layers.1"], "model.config"),
        (
            ["--experimental.pipeline_parallel_split_points", "layers.9", "--model.config", "model.json"],
            "'layers.9', among layers.0 ... layers.2",
        ),
    ],
)
def test_values_that_are_no_longer_supported_are_rejected_under_the_spelling_that_was_used(argv, rule):
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert caught.value.setting == argv[0] and "\n" not in str(caught.value)
    assert rule in f"{caught.value.found}, {caught.value.allowed}; {caught.value.hint}"


def test_a_flag_spares_what_it_overrides_in_the_toml_from_being_computed():
    toml = as_toml("experimental.pipeline_parallel_microbatches", 3)
    assert parse([*toml, "--parallelism.pipeline_parallel_microbatch_size=4"])
    config = parse([*toml, "--experimental.pipeline_parallel_microbatches=4"])
    assert config.parallelism.pipeline_parallel_microbatch_size == 2


def test_what_is_ignored_is_logged_by_one_rank(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    parse(["--job.use_for_integration_test"])
    assert len(caplog.messages) == 1 and "--job.use_for_integration_test" in caplog.text
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    parse(["--job.use_for_integration_test"])
    assert not caplog.messages


@pytest.mark.parametrize("name", ["train.toml", "flame/models/fla.toml", "llmonade/models/llmon.toml"])
def test_the_job_files_of_the_older_systems_mean_the_pretraining_job(name, caplog):
    config = parse(["--job.config_file", name])
    assert config.job.config_file == str(ROOT / "configs/jobs/pretrain.toml")
    assert config.model.config == str(ROOT / "configs/transformer_340M.json")
    assert name in caplog.text and "training.streaming True" in caplog.text and "optimizer.lr 0.0003" in caplog.text
    caplog.clear()
    parse(["--job.config_file", name, "--training.streaming=false"])  # what a flag sets is not of the file
    assert "training.steps 20480" in caplog.text and "training.streaming" not in caplog.text


def test_a_file_that_is_there_is_never_replaced():
    Path("train.toml").write_text("[training]\nsteps = 3\n")
    assert parse(["--job.config_file", "train.toml"]).training.steps == 3
    Path("configs").mkdir()
    Path("configs/transformer_340M.json").write_text("{}")
    assert parse(["--model.config", "configs/transformer_340M.json"]).model.config == "configs/transformer_340M.json"


FLAME = """--job.config_file train.toml
--job.dump_folder exp/transformer-340M-10B/batch32.seqlen2048.warmup1024.update1.steps20480.lr3e-4
--model.config configs/transformer_340M.json --model.tokenizer_path fla-hub/transformer-1.3B-100B
--optimizer.name AdamW --optimizer.lr 3e-4 --optimizer.min_lr_ratio 0.1 --optimizer.scheduler cosine
--training.batch_size 32 --training.seq_len 2048 --training.warmup_steps 1024
--training.gradient_accumulation_steps 1 --training.steps 20480 --training.max_norm 1.0 --training.skip_nan_inf
--training.dataset HuggingFaceFW/fineweb-edu --training.dataset_name default --training.dataset_split train
--training.streaming --training.num_workers 32 --training.prefetch_factor 2 --training.seed 42
--checkpoint.interval 2048 --checkpoint.load_step -1 --metrics.log_freq 4"""

LLMONADE = """--job.config_file llmonade/models/llmon.toml
--job.dump_folder exp/transformer-340M-4K-10B/batch1.seqlen65536.context4096.warmup1024.update1.steps20480.lr1e-3.cosine
--model.config llmonade/configs/transformer_340M.json --model.tokenizer_path fla-hub/transformer-1.3B-100B
--optimizer.name AdamW --optimizer.eps 1e-15 --optimizer.lr 1e-3 --lr_scheduler.warmup_steps 1024
--lr_scheduler.lr_min 0.1 --lr_scheduler.decay_type cosine --training.batch_size 1 --training.seq_len 65536
--training.context_len 4096 --training.varlen --training.gradient_accumulation_steps 1 --training.steps 20480
--training.max_norm 1.0 --training.skip_nan_inf --training.dataset /cache/ufw/Ultra-FineWeb
--training.dataset_name sample-100BT --training.dataset_split en --training.num_workers 32
--training.prefetch_factor 2 --training.seed 42 --training.compile --checkpoint.interval 2048
--checkpoint.load_step -1 --checkpoint.keep_latest_k 2 --metrics.log_freq 1"""


def test_the_long_command_of_flame_0_means_what_it_meant():
    config = parse(FLAME.split())
    assert config.model.config == str(ROOT / "configs/transformer_340M.json")
    assert (config.lr_scheduler.decay_type, config.lr_scheduler.min_lr_factor) == ("cosine", 0.1)
    assert (config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio) == (1024, None)
    assert (config.training.local_batch_size, config.training.global_batch_size) == (32, 128)
    assert (config.training.dataset, config.training.dataset_name) == ("HuggingFaceFW/fineweb-edu", "default")
    assert (config.training.dataloader.num_workers, config.checkpoint.load_step) == (32, -1)
    assert config.training.streaming and config.training.skip_nan_inf and config.metrics.log_freq == 4


def test_the_long_command_of_llmonade_means_what_it_meant():
    config = parse(LLMONADE.split())
    assert config.model.config == str(ROOT / "configs/transformer_340M.json")
    assert (config.training.seq_len, config.training.context_len, config.training.varlen) == (65536, 4096, True)
    assert (config.lr_scheduler.min_lr_factor, config.lr_scheduler.decay_type) == (0.1, "cosine")
    assert config.compile.enable and config.checkpoint.keep_latest_k == 2
    assert (config.training.dataset, config.training.dataset_split) == ("/cache/ufw/Ultra-FineWeb", "en")
