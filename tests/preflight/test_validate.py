import json
from pathlib import Path

import pytest

from flame.checkpoint.commit import write_marker
from flame.config.parser import parse
from flame.errors import UserError
from flame.preflight.inputs import vocab_of_tokenizer
from flame.preflight.validate import check

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


def refusal(flags, ranks=1, model=MODEL):
    config = parse([*model, *flags.split()])
    with pytest.raises(UserError) as caught:
        check(config, ranks)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "flags, ranks",
    [
        ("", 1),
        ("", 64),
        ("--parallelism.data_parallel_shard_degree 2 --parallelism.data_parallel_replicate_degree 4", 8),
        ("--parallelism.data_parallel_replicate_degree 4 --parallelism.data_parallel_shard_degree 1", 4),
        ("--parallelism.data_parallel_replicate_degree 2", 8),
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
    "flags, words",
    [
        ("--training.steps 0", ["--training.steps", "found 0", "1 or more"]),
        ("--checkpoint.exclude_from_loading foo", ["exclude_from_loading", "found foo", "optimizer, lr_scheduler"]),
        ("--checkpoint.create_seed_checkpoint --checkpoint.initial_load_path .", ["must not be set beside it"]),
        ("--training.local_batch_size 0", ["--training.local_batch_size", "found 0"]),
        ("--training.seq_len -4", ["--training.seq_len", "found -4"]),
        ("--optimizer.lr 0", ["--optimizer.lr", "more than 0"]),
        ("--optimizer.lr -1e-3", ["--optimizer.lr", "-0.001"]),
        ("--optimizer.name Lion", ["--optimizer.name", "'Lion'", "Adam or AdamW"]),
        ("--lr_scheduler.decay_ratio 1.5", ["--lr_scheduler.decay_ratio", "from 0 to 1"]),
        ("--lr_scheduler.warmup_steps -1", ["--lr_scheduler.warmup_steps", "0 or more"]),
        ("--checkpoint.interval 0", ["--checkpoint.interval", "1 or more"]),
        ("--metrics.log_freq 0", ["--metrics.log_freq", "1 or more"]),
        ("--data.lanes 0", ["--data.lanes", "1 or more"]),
        ("--data.window 0", ["--data.window", "1 or more"]),
        ("--training.num_workers -1", ["num_workers", "0 or more"]),
        ("--training.prefetch_factor 0", ["prefetch_factor", "1 or more"]),
        ("--checkpoint.keep_latest_k 1", ["--checkpoint.keep_latest_k", "0 (keep all) or 2"]),
        ("--job.mfu 40", ["--job.mfu", "found 40", "more than 0 and at most 1"]),
        ("--checkpoint.load_step -2", ["--checkpoint.load_step", "found -2"]),
        ("--training.context_len 65 --training.seq_len 64", ["--training.context_len", "65", "64"]),
        ("--profiling.enable_profiling --profiling.profile_freq 2", ["--profiling.profile_freq", "4 or more"]),
        ("--model.name lama3", ["--model.name", "'lama3'", "auto", "llama3"]),
        ("--model.tokenizer_path none", ["--model.tokenizer_path", "not set", "byte"]),
        ("--model.tokenizer_path /" + 300 * "x", ["--model.tokenizer_path", "no file or folder"]),
        ("--model.tokenizer_path ./tok", ["--model.tokenizer_path", "./tok"]),
        ("--training.dataset gone.jsonl", ["--training.dataset", "gone.jsonl"]),
        ("--training.dataset /gone", ["--training.dataset", "/gone"]),
        ("--training.dataset gone/*.jsonl", ["--training.dataset", "gone/*.jsonl"]),
        ("--training.dataset a.jsonl,,b.jsonl", ["--training.dataset", "every item"]),
        ("--training.dataset folder --training.data_dir gone", ["--training.data_dir", "gone", "folder"]),
        ("--training.dataset folder --training.data_files gone.jsonl", ["--training.data_files", "gone.jsonl"]),
        ("--training.dataset json --training.data_files gone.jsonl", ["--training.data_files", "gone.jsonl"]),
        ("--training.dataset a.jsonl,b.jsonl --training.dataset_name x", ["dataset_name", "1 items", "2 datasets"]),
        ("--training.dataset a.jsonl,b.jsonl --training.data_probs 0.5,0.4", ["data_probs", "0.9", "sum to 1"]),
        ("--training.dataset a.jsonl,b.jsonl --training.data_probs 1.5,-0.5", ["data_probs", "above 0"]),
        ("--training.dataset a.jsonl,b.jsonl --training.data_probs 0.5,half", ["data_probs", "half", "a number"]),
        ("--training.dataset a.jsonl --training.data_probs 0.5,0.5", ["data_probs", "2 items", "1 datasets"]),
        ("--job.dump_folder a.jsonl", ["--job.dump_folder", "a.jsonl is a file"]),
        ("--job.dump_folder a.jsonl/run", ["--job.dump_folder", "a.jsonl is a file"]),
        ("--checkpoint.folder ../elsewhere", ["--checkpoint.folder", "'../elsewhere'", "inside job.dump_folder"]),
        ("--checkpoint.folder a/../..", ["--checkpoint.folder", "inside job.dump_folder"]),
        ("--checkpoint.folder /elsewhere", ["--checkpoint.folder", "inside job.dump_folder"]),
        ("--checkpoint.initial_load_path gone", ["--checkpoint.initial_load_path", "gone"]),
        ("--checkpoint.create_seed_checkpoint --checkpoint.no_enable", ["create_seed_checkpoint", "enable"]),
        ("--job.dump_folder s3://bucket/run", ["--job.dump_folder", "s3://bucket/run", "file system"]),
        ("--checkpoint.folder gs://bucket", ["--checkpoint.folder", "gs://bucket", "file system"]),
        ("--checkpoint.initial_load_path s3://bucket/step-5", ["--checkpoint.initial_load_path", "s3://bucket"]),
        ("--checkpoint.keep_every -1", ["--checkpoint.keep_every", "0 or more"]),
        ("--checkpoint.keep_every 750", ["--checkpoint.keep_every", "multiple of checkpoint.interval", "(500 steps)"]),
        ("--checkpoint.keep_every 500 --checkpoint.interval_type seconds", ["--checkpoint.keep_every", "500 seconds"]),
        ("--checkpoint.folder hf/", ["--checkpoint.folder: found hf/", "where a run has its exports"]),
    ],
)
def test_what_could_not_train_is_refused_in_one_line(flags, words):
    message = refusal(flags)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("kind", ["expert", "expert_tensor"])
def test_a_layout_this_version_lacks_is_refused(kind):
    message = refusal(f"--parallelism.{kind}_parallel_degree 2", ranks=2)
    assert f"{kind}_parallel_degree" in message and "must be 1" in message


@pytest.mark.parametrize(
    "flags, ranks, words",
    [
        ("--parallelism.data_parallel_shard_degree 2", 4, ["shard_degree 2", "ranks, 4"]),
        ("--parallelism.data_parallel_replicate_degree 3", 4, ["replicate_degree 3", "does not divide", "4"]),
        ("--parallelism.data_parallel_replicate_degree 0", 1, ["replicate_degree", "found 0"]),
        ("--parallelism.tensor_parallel_degree 0", 1, ["tensor_parallel_degree", "found 0"]),
        ("--parallelism.tensor_parallel_degree 3", 4, ["tensor_parallel_degree 3", "does not divide", "ranks, 4"]),
        (
            "--parallelism.pipeline_parallel_degree 2 --parallelism.data_parallel_shard_degree 4",
            4,
            ["pipeline_parallel_degree 2", "shard_degree 4", "must equal", "ranks, 4"],
        ),
        (
            "--parallelism.tensor_parallel_degree 2 --parallelism.data_parallel_replicate_degree 2",
            4,
            ["replicate_degree: found 2", "beside tensor or pipeline", "FSDP"],
        ),
        (
            "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_microbatch_size 3",
            2,
            ["pipeline_parallel_microbatch_size: found 3", "local_batch_size 8"],
        ),
        (
            "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_layers_per_stage 0",
            2,
            ["pipeline_parallel_layers_per_stage: found 0", "must be 1 or more"],
        ),
        (
            "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule_csv gone.csv",
            2,
            ["pipeline_parallel_schedule_csv", "gone.csv"],
        ),
        (
            "--parallelism.pipeline_parallel_degree 2 --validation.enable --validation.dataset stdlib "
            "--validation.seq_len 64",
            2,
            ["--validation.seq_len", "must be training.seq_len", "pipeline"],
        ),
        ("--parallelism.data_parallel_shard_degree 0", 1, ["shard_degree", "found 0", "-1"]),
        ("", 3, ["--data.lanes", "64", "3 data-parallel ranks", "63 or 66"]),
        ("--data.lanes 2", 3, ["--data.lanes", "3 would work"]),
        ("--training.global_batch_size 50", 4, ["--training.global_batch_size", "50", "8 x 4", "32 or 64"]),
        ("--training.global_batch_size 0", 4, ["--training.global_batch_size", "found 0", "32 would work"]),
        ("--checkpoint.create_seed_checkpoint", 2, ["--checkpoint.create_seed_checkpoint", "2 processes", "NGPU=1"]),
    ],
)
def test_ranks_that_do_not_fit_are_refused_with_numbers_that_do(flags, ranks, words):
    message = refusal(flags, ranks)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    "text, words",
    [
        (None, ["no file or folder model.json"]),
        ("{", ["model.json is no valid JSON", "line 1"]),
        ("[]", ["holds a list"]),
        ('{"vocab_size": 3}', ["no model_type"]),
    ],
)
def test_a_model_file_that_is_none_is_refused(text, words):
    Path("model.json").unlink() if text is None else Path("model.json").write_text(text)
    message = refusal("")
    assert message.startswith("--model.config") and all(word in message for word in words), message


def test_a_model_must_be_named_and_a_folder_must_hold_one():
    assert "--model.config: not set" in refusal("", model=[])
    assert "folder/config.json" in refusal("", model=["--model.config", "folder"])
    check(parse(["--model.config", "fla-hub/gla-1.3B-100B"]), 1)  # a hub id: only the hub can tell


def tokenizer(vocab, added=()):
    Path("tok").mkdir(exist_ok=True)
    text = json.dumps({"model": {"vocab": vocab}, "added_tokens": [{"id": i} for i in added]})
    Path("tok/tokenizer.json").write_text(text)


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_numbers():
    tokenizer({"a": 0, "b": 511})
    check(parse([*MODEL, "--model.tokenizer_path", "tok"]), 1)
    tokenizer({"a": 0, "b": 511}, added=[700])
    message = refusal("--model.tokenizer_path tok")
    assert "701" in message and "512" in message and "--model.grow_vocab" in message
    check(parse([*MODEL, "--model.tokenizer_path", "tok", "--model.grow_vocab"]), 1)
    Path("model.json").write_text(json.dumps({"model_type": "gla", "vocab_size": 256}))
    assert "257" in refusal("")


def test_the_ids_of_a_tokenizer_are_read_without_loading_it():
    tokenizer([["a", -1.0], ["b", -2.0]])
    assert vocab_of_tokenizer("tok") == vocab_of_tokenizer("tok/tokenizer.json") == 2
    assert vocab_of_tokenizer("byte") == 257
    assert vocab_of_tokenizer("some/hub-id") is None and vocab_of_tokenizer("folder") is None
    Path("tok/tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="is no tokenizer"):
        vocab_of_tokenizer("tok")


def test_a_step_to_resume_from_must_be_there_whole():
    for step, whole in ((10, True), (20, True), (30, False)):
        Path(f"run/checkpoint/step-{step}").mkdir(parents=True)
        if whole:
            write_marker(Path(f"run/checkpoint/step-{step}"), [], {"resumable": True})
    check(parse([*MODEL, "--job.dump_folder", "run", "--checkpoint.load_step", "20"]), 1)
    message = refusal("--job.dump_folder run --checkpoint.load_step 30")
    assert "step-30" in message and "10, 20" in message
    for step in (0, 30):
        assert "there is none" in refusal(f"--job.dump_folder other --checkpoint.load_step {step}")


def test_nothing_is_written():
    before = sorted(Path().rglob("*"))
    check(parse([*MODEL, "--job.dump_folder", "new"]), 1)
    assert sorted(Path().rglob("*")) == before


def test_the_pretraining_job_passes():
    check(parse(["--job.config_file", str(ROOT / "configs/jobs/pretrain.toml")]), 8)


_PIPELINE = "--parallelism.pipeline_parallel_degree 2"
_SCHEDULE = f"{_PIPELINE} --parallelism.pipeline_parallel_schedule"


@pytest.mark.parametrize(
    "flags, words",
    [
        (f"{_PIPELINE} --training.local_batch_size 1", ["local_batch_size: found 1", "2 or more", "1F1B", "2 stages"]),
        (
            f"{_PIPELINE} --training.local_batch_size 4 --parallelism.pipeline_parallel_microbatch_size 4",
            ["local_batch_size: found 4", "8 or more", "pipeline_parallel_microbatch_size 4"],
        ),
        (f"{_SCHEDULE} dualpipev --training.local_batch_size 3", ["found 3", "4 or more", "DualPipeV", "4 stages"]),
        (f"{_SCHEDULE} Interleaved1F1B --training.local_batch_size 5", ["found 5", "2 ranks", "4 or 6 would work"]),
        (f"{_SCHEDULE} interleavedzerobubble --training.local_batch_size 7", ["found 7", "6 or 8 would work"]),
        *(
            (f"{_SCHEDULE} {name.lower()} --compile.enable", ["--compile.enable: found true", "must be false", name])
            for name in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
        ),
        *(
            (f"{_SCHEDULE} {name}", [f"pipeline_parallel_schedule: found '{name}'", "must be one of 1F1B, GPipe, "])
            for name in ("foo", "PipelineScheduleSingle", "pipelineschedulemulti")
        ),
        (f"{_PIPELINE} --optimizer.early_step_in_backward", ["early_step_in_backward: found true", "pipelines"]),
        (
            "--parallelism.data_parallel_replicate_degree 2 --optimizer.early_step_in_backward",
            ["early_step_in_backward: found true", "DDP"],
        ),
    ],
)
@pytest.mark.parametrize("model", [MODEL, ["--model.name", "llama3"]])
def test_a_schedule_and_an_optimizer_that_cannot_run_are_refused(flags, words, model):
    message = refusal(flags, 2, model)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    "flags, ranks",
    [
        (f"{_SCHEDULE} gpipe --training.local_batch_size 1", 2),
        (f"{_SCHEDULE} Interleaved1F1B --training.local_batch_size 6", 2),
        (f"{_SCHEDULE} LoopedBFS --training.local_batch_size 1 --compile.enable", 2),
        (f"{_PIPELINE} --parallelism.pipeline_parallel_schedule_csv a.jsonl --training.local_batch_size 1", 2),
        ("--optimizer.early_step_in_backward", 2),
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
def test_what_other_schedules_and_layouts_can_do_passes(flags, ranks):
    check(parse([*MODEL, *flags.split()]), ranks)


@pytest.mark.parametrize("components, found", [(["loss"], "loss"), ([], "nothing")])
def test_a_compiler_that_would_compile_nothing_is_refused(components, found):
    config = parse([*MODEL, "--compile.enable"])
    config.compile.components = components
    with pytest.raises(UserError, match=f"--compile.components: found {found}, must have model"):
        check(config, 1)
