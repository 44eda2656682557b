import json
from pathlib import Path

import pytest

from flame.config.parser import parse
from flame.errors import UserError
from flame.preflight.inputs import vocab_of_tokenizer
from flame.preflight.validate import check
from tests.checkpoint.empty import write_empty

ROOT = Path(__file__).parents[2]
MODEL = ["--model.config", "model.json"]


@pytest.fixture(autouse=True)
def a_folder_with_a_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "NNODE", "NGPU"):
        monkeypatch.delenv(name, raising=False)
    Path("model.json").write_text(json.dumps({"model_type": "gla", "vocab_size": 512}))
    for path in ("a.jsonl", "b.jsonl", "folder/part/c.jsonl"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text('{"text": "hello"}\n')
    for path in ("run/file", "mine/config.toml"):
        Path(path).parent.mkdir()
        Path(path).touch()
    Path("mine/config.toml").write_text("a = 1")


def rejection(flags, ranks=1, model=MODEL):
    """The setting that the error names, and the rest of the error."""
    with pytest.raises(UserError) as caught:
        check(parse([*model, *flags.split()]), ranks)
    error = caught.value
    assert "\n" not in str(error)
    return error.setting, f"{error.found}, {error.allowed}; {error.hint}"


@pytest.mark.parametrize(
    "flags, ranks",
    [
        ("", 1),
        ("", 64),
        ("--parallelism.data_parallel_shard_degree 2 --parallelism.data_parallel_replicate_degree 4", 8),
        ("--parallelism.data_parallel_replicate_degree 4 --parallelism.data_parallel_shard_degree 1", 4),
        ("--parallelism.data_parallel_replicate_degree 2", 8),
        ("--parallelism.tensor_parallel_degree 2 --parallelism.data_parallel_replicate_degree 2", 4),
        ("--training.dataset a.jsonl", 1),
        ("--training.dataset *.jsonl", 1),
        ("--training.dataset a.jsonl,stdlib,some/hub-id --training.data_probs 0.5,0.25,0.25", 1),
        ("--training.dataset a.jsonl,b.jsonl --training.dataset_split train, --training.data_dir ,", 1),
        ("--training.dataset folder --training.data_dir part --training.data_files c.jsonl", 1),
        ("--training.dataset folder --training.data_files part/*.jsonl,a.jsonl", 1),
        ("--training.dataset json --training.data_files a.jsonl,b.jsonl", 1),
        ("--training.dataset some/hub-id --training.data_files data/train-*.parquet", 1),
        ("--training.dataset hf://datasets/x/y.parquet", 1),
        ("--training.global_batch_size 64", 4),
        ("--data.lanes 6", 3),
        ("--checkpoint.create_seed_checkpoint", 1),
        ("--training.context_len 64 --training.seq_len 64", 1),
        ("--job.dump_folder not/there/yet", 1),
    ],
)
def test_a_job_that_can_train_passes(flags, ranks):
    check(parse([*MODEL, *flags.split()]), ranks)


@pytest.mark.parametrize(
    "flags, setting, rule",
    [
        ("--training.steps 0", "--training.steps", "0, 1 or more"),
        ("--training.local_batch_size 0", "--training.local_batch_size", "0, 1 or more"),
        ("--training.seq_len -4", "--training.seq_len", "-4, 1 or more"),
        ("--optimizer.lr 0", "--optimizer.lr", "more than 0"),
        ("--optimizer.lr -1e-3", "--optimizer.lr", "-0.001"),
        ("--optimizer.name Lion", "--optimizer.name", "'Lion', Adam or AdamW"),
        ("--lr_scheduler.decay_ratio 1.5", "--lr_scheduler.decay_ratio", "from 0 to 1"),
        ("--lr_scheduler.warmup_steps -1", "--lr_scheduler.warmup_steps", "0 or more"),
        (
            "--lr_scheduler.total_steps 9 --training.steps 10",
            "--lr_scheduler.total_steps",
            "at least training.steps 10",
        ),
        ("--checkpoint.interval 0", "--checkpoint.interval", "1 or more"),
        ("--metrics.log_freq 0", "--metrics.log_freq", "1 or more"),
        ("--data.lanes 0", "--data.lanes", "1 or more"),
        ("--data.window 0", "--data.window", "1 or more"),
        ("--training.num_workers -1", "--training.dataloader.num_workers", "0 or more"),
        ("--training.prefetch_factor 0", "--training.dataloader.prefetch_factor", "1 or more"),
        ("--checkpoint.keep_latest_k 1", "--checkpoint.keep_latest_k", "0 (keep all) or 2"),
        ("--job.mfu 40", "--job.mfu", "40.0, more than 0 and at most 1"),
        ("--checkpoint.load_step -2", "--checkpoint.load_step", "-2"),
        (
            "--training.context_len 65 --training.seq_len 64",
            "--training.context_len",
            "at most training.seq_len 64",
        ),
        ("--profiling.enable_profiling --profiling.profile_freq 2", "--profiling.profile_freq", "2, 4 or more"),
        ("--training.max_wall_time soon", "--training.max_wall_time", "'soon', a time such as 3h30m"),
        ("--comm.mode fake_backend", "--comm.mode", "fake_backend, default"),
        ("--fault_tolerance.enable", "--fault_tolerance.enable", "true, false"),
        ("--model.converters mine", "--model.converters", "mine, among quantize"),
        ("--training.skip_nan_inf --optimizer.early_step_in_backward", "--training.skip_nan_inf", "true, false"),
        ("--activation_checkpoint.mode memory_budget", "--activation_checkpoint.mode", "--compile.enable"),
        (
            "--activation_checkpoint.selective_ac_option two",
            "--activation_checkpoint.selective_ac_option",
            "'two', op or a whole number",
        ),
        ("--model.import no_such_module.models", "--model.import", "no module no_such_module.models"),
        ("--model.name lama3", "--model.name", "'lama3', auto"),
        ("--model.name llama3", "--model.config", "model.json, none with model.name llama3"),
        ("--model.tokenizer_path none", "--model.tokenizer_path", "nothing, byte"),
        ("--model.tokenizer_path /" + 300 * "x", "--model.tokenizer_path", "no file or folder"),
        ("--model.tokenizer_path ./tok", "--model.tokenizer_path", "./tok"),
        ("--model.add_tokens <a>,<b>,<a>", "--model.add_tokens", "<a> twice"),
        ("--training.dataset gone.jsonl", "--training.dataset", "gone.jsonl"),
        ("--training.dataset /gone", "--training.dataset", "/gone"),
        ("--training.dataset gone/*.jsonl", "--training.dataset", "gone/*.jsonl"),
        ("--training.dataset a.jsonl,,b.jsonl", "--training.dataset", "every item"),
        ("--training.dataset folder --training.data_dir gone", "--training.data_dir", "no folder gone in folder"),
        ("--training.dataset folder --training.data_files gone.jsonl", "--training.data_files", "gone.jsonl"),
        ("--training.dataset json --training.data_files gone.jsonl", "--training.data_files", "gone.jsonl"),
        ("--training.dataset a.jsonl,b.jsonl --training.dataset_name x", "--training.dataset_name", "1 items"),
        ("--training.dataset a.jsonl,b.jsonl --training.data_probs 0.5,0.4", "--training.data_probs", "0.9"),
        ("--training.dataset a.jsonl,b.jsonl --training.data_probs 1.5,-0.5", "--training.data_probs", "above 0"),
        ("--training.dataset a.jsonl,b.jsonl --training.data_probs 0.5,half", "--training.data_probs", "half"),
        ("--training.dataset a.jsonl --training.data_probs 0.5,0.5", "--training.data_probs", "2 items"),
        ("--validation.enable", "--validation.dataset", "nothing"),
        ("--validation.enable --validation.dataset gone.jsonl", "--validation.dataset", "gone.jsonl"),
        ("--job.dump_folder a.jsonl", "--job.dump_folder", "the file a.jsonl, a folder"),
        ("--job.dump_folder a.jsonl/run", "--job.dump_folder", "the file a.jsonl, a folder"),
        ("--job.dump_folder s3://bucket/run", "--job.dump_folder", "s3://bucket/run, a folder of this machine"),
        ("--checkpoint.folder ../elsewhere", "--checkpoint.folder", "'../elsewhere', a folder inside job.dump_folder"),
        ("--checkpoint.folder a/../..", "--checkpoint.folder", "inside job.dump_folder"),
        ("--checkpoint.folder /elsewhere", "--checkpoint.folder", "inside job.dump_folder"),
        ("--checkpoint.folder gs://bucket", "--checkpoint.folder", "gs://bucket, a folder of this machine"),
        ("--checkpoint.folder hf/", "--checkpoint.folder", "hf, another folder"),
        *(
            (f"--checkpoint.folder {name}", "--checkpoint.folder", f"{name}, another folder")
            for name in ("lock", "config.toml", "metrics.jsonl", "status.json", "environment.json/x", "model/x")
        ),
        ("--checkpoint.folder " + 300 * "x", "--checkpoint.folder", "at most 255 bytes"),
        ("--job.dump_folder " + 300 * "x", "--job.dump_folder", "at most 255 bytes"),
        ("--job.dump_folder run --checkpoint.folder file", "--checkpoint.folder", "the file run/file, a folder"),
        ("--checkpoint.folder file/x --job.dump_folder run", "--checkpoint.folder", "the file run/file, a folder"),
        *(
            (f"--{flag} {name}", f"--{flag}", rule)
            for flag in (
                *("metrics.save_tb_folder", "profiling.save_traces_folder", "comm.save_traces_folder"),
                "profiling.save_memory_snapshot_folder",
            )
            for name, rule in (
                ("../x", "inside job.dump_folder"),
                ("/x", "inside job.dump_folder"),
                ("lock", "another"),
                ("file --job.dump_folder run", "the file run/file, a folder"),
            )
        ),
        ("--metrics.save_tb_folder checkpoint/x", "--metrics.save_tb_folder", "checkpoint.folder is checkpoint"),
        ("--comm.save_traces_file_prefix ../x", "--comm.save_traces_file_prefix", "without /"),
        ("--job.dump_folder mine", "--job.dump_folder", "config.toml is not a run's"),
        ("--checkpoint.initial_load_path gone", "--checkpoint.initial_load_path", "gone"),
        ("--checkpoint.initial_load_path s3://bucket/step-5", "--checkpoint.initial_load_path", "s3://bucket"),
        ("--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path", "nothing, a folder or hub id"),
        ("--checkpoint.last_save_in_hf", "--checkpoint.last_save_in_hf", "true, false; --checkpoint.export"),
        ("--checkpoint.create_seed_checkpoint --checkpoint.no_enable", "--checkpoint.enable", "false, true"),
        (
            "--checkpoint.create_seed_checkpoint --checkpoint.initial_load_path .",
            "--checkpoint.initial_load_path",
            "., none with create_seed_checkpoint",
        ),
        ("--checkpoint.exclude_from_loading foo", "--checkpoint.exclude_from_loading", "foo, among optimizer"),
        ("--checkpoint.keep_every -1", "--checkpoint.keep_every", "0 or more"),
        ("--checkpoint.keep_every 750", "--checkpoint.keep_every", "a multiple of checkpoint.interval in steps"),
        ("--checkpoint.keep_every 500 --checkpoint.interval_type seconds", "--checkpoint.keep_every", "500 seconds"),
    ],
)
def test_a_job_that_cannot_train_is_rejected_in_one_line(flags, setting, rule):
    found, text = rejection(flags)
    assert found == setting and rule in text


@pytest.mark.parametrize("kind", ["expert", "expert_tensor"])
def test_a_layout_this_version_lacks_is_rejected(kind):
    setting, rule = rejection(f"--parallelism.{kind}_parallel_degree 2", ranks=2)
    assert setting == f"--parallelism.{kind}_parallel_degree" and rule.startswith("2, 1 for models of")


@pytest.mark.parametrize(
    "flags, ranks, setting, rule",
    [
        ("--parallelism.data_parallel_shard_degree 2", 4, "data_parallel_shard_degree", "2, 4, the number of ranks"),
        (
            "--parallelism.data_parallel_replicate_degree 3",
            4,
            "data_parallel_replicate_degree",
            "3, a divisor of the 4",
        ),
        ("--parallelism.data_parallel_replicate_degree 0", 1, "data_parallel_replicate_degree", "0, 1 or more"),
        ("--parallelism.tensor_parallel_degree 0", 1, "tensor_parallel_degree", "0, 1 or more"),
        ("--parallelism.tensor_parallel_degree 3", 4, "tensor_parallel_degree", "3, a divisor of the 4 ranks"),
        (
            "--parallelism.pipeline_parallel_degree 2 --parallelism.data_parallel_shard_degree 4",
            4,
            "pipeline_parallel_degree x data_parallel_shard_degree",
            "2 x 4, 4, the number of ranks",
        ),
        (
            "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_microbatch_size 3",
            2,
            "pipeline_parallel_microbatch_size",
            "3, a divisor of training.local_batch_size 8",
        ),
        (
            "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_layers_per_stage 0",
            2,
            "pipeline_parallel_layers_per_stage",
            "0, 1 or more",
        ),
        (
            "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule_csv gone.csv",
            2,
            "pipeline_parallel_schedule_csv",
            "no file gone.csv",
        ),
        ("--parallelism.data_parallel_shard_degree 0", 1, "data_parallel_shard_degree", "0, -1 (all ranks) or 1"),
    ],
)
def test_degrees_that_the_ranks_do_not_fit_are_rejected(flags, ranks, setting, rule):
    found, text = rejection(flags, ranks)
    assert found == f"--parallelism.{setting}" and rule in text


@pytest.mark.parametrize(
    "flags, ranks, setting, rule",
    [
        (
            "--parallelism.pipeline_parallel_degree 2 --validation.enable --validation.dataset stdlib "
            "--validation.seq_len 64",
            2,
            "--validation.seq_len",
            "64, training.seq_len 2048",
        ),
        ("", 3, "--data.lanes", "64, a multiple of the 3 data-parallel ranks: 63 or 66 would work"),
        ("--data.lanes 2", 3, "--data.lanes", "3 would work"),
        ("--training.global_batch_size 50", 4, "--training.global_batch_size", "8 x 4 data-parallel ranks: 32 or 64"),
        ("--training.global_batch_size 0", 4, "--training.global_batch_size", "32 would work"),
        ("--checkpoint.create_seed_checkpoint", 2, "--checkpoint.create_seed_checkpoint", "2 processes, one process"),
    ],
)
def test_settings_that_do_not_fit_the_ranks_are_rejected_with_numbers_that_would(flags, ranks, setting, rule):
    found, text = rejection(flags, ranks)
    assert found == setting and rule in text


@pytest.mark.parametrize(
    "text, rule",
    [
        (None, "no file or folder model.json"),
        ("{", "model.json, a JSON object; Expecting property name enclosed in double quotes: line 1"),
        ("[]", "model.json, a JSON object; a list, not an object"),
        ('{"vocab_size": 3}', "no model_type in model.json"),
    ],
)
def test_a_file_that_is_not_a_model_is_rejected(text, rule):
    Path("model.json").unlink() if text is None else Path("model.json").write_text(text)
    setting, found = rejection("")
    assert setting == "--model.config" and rule in found


def test_a_model_must_be_named_and_a_folder_must_hold_one():
    assert rejection("", model=[])[0] == "--model.config"
    assert "folder/config.json" in rejection("", model=["--model.config", "folder"])[1]
    check(parse(["--model.config", "fla-hub/gla-1.3B-100B"]), 1)  # a hub id: only the hub can tell


def tokenizer(vocab, added=()):
    Path("tok").mkdir(exist_ok=True)
    text = json.dumps({"model": {"vocab": vocab}, "added_tokens": [{"id": i} for i in added]})
    Path("tok/tokenizer.json").write_text(text)


def test_a_tokenizer_larger_than_the_model_is_rejected_with_both_numbers():
    tokenizer({"a": 0, "b": 511})
    check(parse([*MODEL, "--model.tokenizer_path", "tok"]), 1)
    tokenizer({"a": 0, "b": 511}, added=[700])
    message = " ".join(rejection("--model.tokenizer_path tok"))
    assert "701" in message and "512" in message and "--model.grow_vocab" in message
    check(parse([*MODEL, "--model.tokenizer_path", "tok", "--model.grow_vocab"]), 1)
    Path("model.json").write_text(json.dumps({"model_type": "gla", "vocab_size": 256}))
    assert "257" in " ".join(rejection(""))


def test_the_ids_of_a_tokenizer_are_read_without_loading_it():
    tokenizer([["a", -1.0], ["b", -2.0]])
    assert vocab_of_tokenizer("tok") == vocab_of_tokenizer("tok/tokenizer.json") == 2
    assert vocab_of_tokenizer("byte") == 257
    assert vocab_of_tokenizer("some/hub-id") is None and vocab_of_tokenizer("folder") is None
    Path("tok/tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="the JSON of a tokenizer"):
        vocab_of_tokenizer("tok")


def test_a_step_to_resume_from_must_be_a_complete_checkpoint():
    for step, whole in ((10, True), (20, True), (30, False)):
        Path(f"run/checkpoint/step-{step}").mkdir(parents=True)
        if whole:
            write_empty(Path(f"run/checkpoint/step-{step}"))
    check(parse([*MODEL, "--job.dump_folder", "run", "--checkpoint.load_step", "20"]), 1)
    message = " ".join(rejection("--job.dump_folder run --checkpoint.load_step 30"))
    assert "step-30" in message and "10, 20" in message
    for step in (0, 30):
        assert "there is none" in " ".join(rejection(f"--job.dump_folder other --checkpoint.load_step {step}"))


@pytest.mark.parametrize("folder", ["/", "//", "../../../../../../../../..", "link"])
def test_the_root_of_a_file_system_is_no_run_folder(folder):
    Path("link").symlink_to("/")
    setting, rest = rejection(f"--job.dump_folder {folder}")
    assert setting == "--job.dump_folder" and rest.startswith(f"{folder}, a folder of the run's own")


def test_validation_writes_nothing():
    before = sorted(Path().rglob("*"))
    check(parse([*MODEL, "--job.dump_folder", "new"]), 1)
    assert sorted(Path().rglob("*")) == before


def test_the_pretraining_job_passes():
    check(parse(["--job.config_file", str(ROOT / "configs/jobs/pretrain.toml")]), 8)


_PIPELINE = "--parallelism.pipeline_parallel_degree 2"
_SCHEDULE = f"{_PIPELINE} --parallelism.pipeline_parallel_schedule"


@pytest.mark.parametrize(
    "flags, setting, rule",
    [
        (f"{_PIPELINE} --training.local_batch_size 1", "--training.local_batch_size", "1, 2 or more; 1F1B"),
        (
            f"{_PIPELINE} --training.local_batch_size 4 --parallelism.pipeline_parallel_microbatch_size 4",
            "--training.local_batch_size",
            "4, 8 or more; 1F1B has 2 stages",
        ),
        (
            f"{_SCHEDULE} dualpipev --training.local_batch_size 3",
            "--training.local_batch_size",
            "3, 4 or more; DualPipeV",
        ),
        (
            f"{_SCHEDULE} Interleaved1F1B --training.local_batch_size 5",
            "--training.local_batch_size",
            "4 or 6 would work",
        ),
        (
            f"{_SCHEDULE} interleavedzerobubble --training.local_batch_size 7",
            "--training.local_batch_size",
            "6 or 8 would work",
        ),
        *(
            (f"{_SCHEDULE} {name.lower()} --compile.enable", "--compile.enable", f"true, false with {name}")
            for name in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
        ),
        *(
            (f"{_SCHEDULE} {name}", "--parallelism.pipeline_parallel_schedule", f"'{name}', one of 1F1B, GPipe, ")
            for name in ("foo", "PipelineScheduleSingle", "pipelineschedulemulti")
        ),
        (
            f"{_PIPELINE} --optimizer.early_step_in_backward",
            "--optimizer.early_step_in_backward",
            "true, false; torchtitan has none for pipelines",
        ),
    ],
)
@pytest.mark.parametrize("model", [MODEL, ["--model.name", "llama3"]])
def test_a_schedule_and_an_optimizer_that_cannot_run_are_rejected(flags, setting, rule, model):
    found, text = rejection(flags, 2, model)
    assert found == setting and rule in text


@pytest.mark.parametrize(
    "flags, ranks",
    [
        (f"{_SCHEDULE} gpipe --training.local_batch_size 1", 2),
        (f"{_SCHEDULE} Interleaved1F1B --training.local_batch_size 6", 2),
        (f"{_SCHEDULE} LoopedBFS --training.local_batch_size 1 --compile.enable", 2),
        (f"{_PIPELINE} --parallelism.pipeline_parallel_schedule_csv a.jsonl --training.local_batch_size 1", 2),
        ("--optimizer.early_step_in_backward", 2),
        ("--optimizer.early_step_in_backward --parallelism.data_parallel_replicate_degree 2", 2),
        ("--optimizer.early_step_in_backward --parallelism.data_parallel_replicate_degree 2", 4),
        (
            "--optimizer.early_step_in_backward --parallelism.data_parallel_replicate_degree 2 "
            "--parallelism.context_parallel_degree 2",  # whose ranks share the weights
            4,
        ),
        ("--compile.enable --compile.components model", 1),
        ("--compile.components loss", 1),
    ],
)
def test_other_schedules_and_layouts_pass(flags, ranks):
    check(parse([*MODEL, *flags.split()]), ranks)


@pytest.mark.parametrize("components, found", [(["loss"], "loss"), ([], "nothing")])
def test_a_compiler_that_would_compile_nothing_is_rejected(components, found):
    config = parse([*MODEL, "--compile.enable"])
    config.compile.components = components
    with pytest.raises(UserError) as caught:
        check(config, 1)
    assert (caught.value.setting, caught.value.found) == ("--compile.components", found)
