"""What people type wrongly, and the setting and the rule that the one line for it names."""

import json
import os
from pathlib import Path

import pytest

from flame.config.parser import parse, world_size
from flame.errors import UserError
from flame.preflight.validate import check
from flame.training.train_spec import register
from tests.checkpoint.empty import write_empty

LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def a_folder_with_a_model_and_data(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "NNODE", "NGPU"):
        monkeypatch.delenv(name, raising=False)
    Path("model.json").write_text(json.dumps(LLAMA))
    Path("data.jsonl").write_text('{"text": "hello"}\n')


def rejected(argv: list[str]) -> UserError:
    """The error of a command line, which is one line and comes before anything is written."""
    before = sorted(os.listdir())
    with pytest.raises(UserError) as caught:
        config = parse(argv if {"--model.config", "--model.name"} & {*argv} else [*argv, "--model.config=model.json"])
        check(config, world_size())
        register(config)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2100 and sorted(os.listdir()) == before
    return caught.value


def holds(error: UserError, setting: str, rule: str) -> bool:
    return error.setting == setting and rule in f"{error.found}, {error.allowed}; {error.hint}"


FLAGS = [  # what was typed, the setting that the line names, the rule
    ("--training.stesp 10", "--training.stesp", "did you mean --training.steps?"),
    ("--lr 3e-4", "--lr", "did you mean --optimizer.lr?"),
    ("--steps 10", "--steps", "did you mean --training.steps?"),
    ("training.steps 10", "'training.steps'", "flags start with --"),
    ("-training.steps 10", "'-training.steps'", "flags start with --"),
    ("--training.seed 1 training.steps 5", "--training.seed", "did you mean --training.steps?"),
    ("--training.seed 1 \u2014training.steps 5", "--training.seed", "did you mean --training.steps?"),
    ("--training.seed 1 -x", "--training.seed", "-x is no flag"),
    ("--training", "--training", "a section"),
    ("--TRAINING.STEPS 5", "--TRAINING.STEPS", "did you mean --training.steps?"),
    ("jobs/mine.toml", "'jobs/mine.toml'", "--job.config_file jobs/mine.toml"),
    ("llama.json", "'llama.json'", "--model.config llama.json"),
    ("--learning_rate 1e-4", "--learning_rate", "did you mean --optimizer.lr?"),
    ("--max_steps 100", "--max_steps", "did you mean --training.steps?"),
    ("--per_device_train_batch_size 4", "--per_device_train_batch_size", "did you mean --training.local_batch_size?"),
    ("--model_name_or_path gpt2", "--model_name_or_path", "did you mean --model.config?"),
    ("--output_dir out", "--output_dir", "did you mean --job.dump_folder?"),
    ("--training.steps", "--training.steps", "no value, an integer"),
    ("--training.steps 10k", "--training.steps", "'10k', an integer"),
    ("--training.steps 0", "--training.steps", "1 or more"),
    ("--training.steps 1e30", "--training.steps", "beyond 64 bits"),
    ("--training.steps " + "9" * 5000, "--training.steps", "an integer"),
    ("--training.streaming yep", "--training.streaming", "true or false"),
    ("--training.seq_len 1e12", "--training.seq_len", "at most 268435456"),
    ("--training.local_batch_size 1e12", "--training.local_batch_size", "at most 131072 at seq_len 2048"),
    ("--training.global_batch_size 8e12", "--training.global_batch_size", "at most 131072 at seq_len 2048"),
    ("--training.global_batch_size 12", "--training.global_batch_size", "8 or 16 would work"),
    ("--training.max_wall_time tomorrow", "--training.max_wall_time", "a time such as 3h30m"),
    ("--training.max_wall_time " + "1" * 400 + "d", "--training.max_wall_time", "at most 9 digits"),
    ("--training.max_wall_time " + "1" * 5000, "--training.max_wall_time", "at most 9 digits"),
    ("--training.num_workers 1e9", "--training.dataloader.num_workers", "at most 1024"),
    ("--training.prefetch_factor 1e9", "--training.dataloader.prefetch_factor", "at most 1024"),
    ("--optimizer.lr 0", "--optimizer.lr", "more than 0"),
    ("--optimizer.lr 1e-4,", "--optimizer.lr", "a number"),
    ("--optimizer.eps 1e-300", "--optimizer.eps", "1e-38 or more"),
    ("--optimizer.name adamw", "--optimizer.name", "Adam or AdamW"),
    ("--optimizer.name SGD", "--optimizer.name", "Adam or AdamW"),
    ("--lr_scheduler.decay_type exponential", "--lr_scheduler.decay_type", "linear, sqrt, cosine"),
    ("--training.mixed_precision_param fp16", "--training.mixed_precision_param", "bfloat16, float32"),
    ("--debug.seed -1", "--debug.seed", "0 or more"),
    ("--comm.init_timeout_seconds 4611686018427387903", "--comm.init_timeout_seconds", "at most 10^9"),
    ("--comm.train_timeout_seconds 1e15", "--comm.train_timeout_seconds", "at most 10^9"),
    ("--comm.trace_buf_size 4611686018427387903", "--comm.trace_buf_size", "below 2^31"),
    ("--profiling.enable_profiling --profiling.profiler_active 0", "--profiling.profiler_active", "1 or more"),
    ("--profiling.enable_profiling --profiling.profiler_active -5", "--profiling.profiler_active", "1 or more"),
    ("--profiling.profiler_warmup -1", "--profiling.profiler_warmup", "0 or more"),
    ("--data.lanes 1e8", "--data.lanes", "at most 131072"),
    ("--data.skip " + "9" * 5000, "--data.skip", "below 10^18"),
    ("--data.skip 1-4611686018427387904", "--data.skip", "below 10^18"),
    ("--data.skip 30-20", "--data.skip", "steps such as 120-135"),
    ("--job.config_file ~nosuch/x.toml", "--job.config_file", "no file ~nosuch/x.toml"),
    ("--job.config_file=", "--job.config_file", "'', a TOML file"),
    ("--job.dump_folder caf\udce9", "--job.dump_folder", "text in UTF-8"),
    ("--job.description caf\udce9", "--job.description", "text in UTF-8"),
    ("--model.add_tokens <caf\udce9>", "--model.add_tokens", "text in UTF-8"),
    ("--validation.enable", "--validation.dataset", "nothing"),
    ("--validation.enable --validation.dataset data.jsonl --validation.steps -5", "--validation.steps", "-1 (all"),
    ("--validation.steps 0", "--validation.steps", "-1 (all"),
    (
        "--training.dataset data.jsonl --training.data_files x.txt",
        "--training.data_files",
        "none; data.jsonl is a file",
    ),
    (
        "--validation.enable --validation.dataset data.jsonl --validation.num_workers -1",
        "--validation.num_workers",
        "did you mean --validation.dataloader.num_workers?",
    ),
    (
        "--validation.enable --validation.dataset data.jsonl --validation.dataloader.num_workers -1",
        "--validation.dataloader.num_workers",
        "0 or more",
    ),
]


@pytest.mark.parametrize("typed, setting, rule", FLAGS)
def test_a_mistake_in_a_flag(typed, setting, rule):
    assert holds(error := rejected(typed.split()), setting, rule), error


def test_a_value_with_line_breaks_is_still_one_line():
    assert "'a\\nb'" in str(rejected(["--training.steps", "a\nb"]))
    assert holds(rejected(["--training.steps", "\n", "["]), "--training.steps", "one value")
    assert holds(rejected(["--x\ny", "1"]), "--x\ny", "not a setting")


def test_a_working_folder_whose_name_is_not_utf8(tmp_path, monkeypatch):
    os.mkdir(folder := os.fsencode(tmp_path) + b"/caf\xe9")
    monkeypatch.chdir(os.fsdecode(folder))
    flags = ["--model.config", str(tmp_path / "model.json"), "--job.dump_folder", "out"]
    assert holds(rejected(flags), "--job.dump_folder", "a path in UTF-8")


TOMLS = [
    ("[training]\nstesp = 10", "job.toml: training.stesp", "did you mean training.steps?"),
    ("[training\nsteps = 10", "job.toml", "not valid TOML"),
    ("[training]\nsteps = 10\nsteps = 20", "job.toml", "not valid TOML"),
    ("[training]\nseq-len = 8\nseq_len = 9", "job.toml: training.seq_len", "seq-len is the same setting"),
    ("training:\n  steps: 10", "job.toml", "not valid TOML"),
    ('{"training": {"steps": 10}}', "job.toml", "not valid TOML"),
    ('[training]\nsteps = "10"', "job.toml: training.steps", "an integer"),
    ("[training]\nsteps = 0x" + "f" * 5000, "job.toml", "not valid TOML"),
    ("[training]\nsteps = " + "9" * 5000, "job.toml", "not valid TOML"),
    ("[training]\nsteps = 99999999999999999999", "job.toml: training.steps", "beyond 64 bits"),
    ("x = " + "[" * 50_000, "job.toml", "not valid TOML"),
    ("[optimizer]\nlr = 0xffff" + "f" * 1000, "job.toml: optimizer.lr", "beyond 64 bits"),
    ('[checkpoint]\nfolder = "a\\u0000b"', "job.toml: checkpoint.folder", "without null characters"),
    ('[job]\ndump_folder = "a\\u0000b"', "job.toml: job.dump_folder", "without null characters"),
    ('[model]\nadd_tokens = ["a\\u0000b"]', "job.toml: model.add_tokens", "without null characters"),
    ('[[data.sources]]\npath = "a\\u0000b"', "job.toml: data.sources[0].path", "without null characters"),
    ("[[data.sources]]\nweight = 1", "job.toml: data.sources[0].path", "no value"),
    ('[[data.sources]]\npath = "data.jsonl"\nwieght = 1', "job.toml: data.sources[0].wieght", "did you mean weight?"),
    ('[[data.sources]]\npath = "data.jsonl"\nweight = 0', "data.sources[0].weight", "above 0"),
    ("[training]\nlearning_rate = 1", "job.toml: training.learning_rate", "did you mean optimizer.lr?"),
]


@pytest.mark.parametrize("text, setting, rule", TOMLS)
def test_a_mistake_in_a_toml(text, setting, rule):
    Path("job.toml").write_text(text)
    assert holds(error := rejected(["--job.config_file", "job.toml"]), setting, rule), error


LAYOUTS = [
    ("NGPU=two", "", "NGPU", "an integer of 1 or more"),
    ("NNODE=0", "", "NNODE", "an integer of 1 or more"),
    ("WORLD_SIZE=-1", "", "WORLD_SIZE", "an integer of 1 or more"),
    ("NGPU=3", "", "--data.lanes", "63 or 66 would work"),
    ("NGPU=4", "--training.global_batch_size 50", "--training.global_batch_size", "32 or 64 would work"),
    (
        "NGPU=4",
        "--parallelism.tensor_parallel_degree 3",
        "--parallelism.tensor_parallel_degree",
        "a divisor of the 4 ranks",
    ),
    (
        "NGPU=4",
        "--parallelism.data_parallel_shard_degree 2",
        "--parallelism.data_parallel_shard_degree",
        "the number of ranks",
    ),
    (
        "NGPU=2",
        "--parallelism.expert_parallel_degree 2",
        "--parallelism.expert_parallel_degree",
        "1 for models of transformers",
    ),
    (
        "NGPU=8",
        "--parallelism.tensor_parallel_degree 8",
        "--parallelism.tensor_parallel_degree",
        "a divisor of the model's num_attention_heads, 4",
    ),
    (
        "NGPU=4",
        "--parallelism.pipeline_parallel_degree 4",
        "--parallelism.pipeline_parallel_degree",
        "none of the model's 2 blocks",
    ),
    ("NGPU=1", "--training.enable_cpu_offload", "--training.enable_cpu_offload", "needs a GPU"),
    ("NGPU=1", "--compile.enable --compile.backend inductr", "--compile.backend", "one of"),
    ("NGPU=1", "--model.converters float8,fp4", "--model.converters", "among quantize"),
]


@pytest.mark.parametrize("environment, typed, setting, rule", LAYOUTS)
def test_a_mistake_in_the_environment_or_the_layout(environment, typed, setting, rule, monkeypatch):
    monkeypatch.setenv(*environment.split("="))
    assert holds(error := rejected(typed.split()), setting, rule), error


MODELS = [  # the file, what is in it, the setting and the rule
    ("model.json", "{", "--model.config", "a JSON object"),
    ("model.json", "model_type: llama", "--model.config", "a JSON object"),
    ("model.json", "[]", "--model.config", "a JSON object"),
    ("model.json", "{}", "--model.config", "no model_type"),
    ("model.json", "[" * 50_000, "--model.config", "a JSON object"),
    ("model.json", {"model_type": "lama"}, "model.json: model_type", "one of"),
    ("model.json", {"model_type": "bert"}, "--model.config", "not children of its backbone"),
    ("model.json", {"vocab_size": None}, "--model.config", "'vocab_size' expected int"),
    ("model.json", {"vocab_size": 256}, "--model.tokenizer_path", "--model.grow_vocab"),
    ("model.json", {"hidden_size": "64"}, "--model.config", "'hidden_size' expected int"),
    ("model.json", {"model_type": "gla", "vocab_size": "512"}, "model.json: vocab_size", "'512', an integer"),
    ("model.json", {"num_hidden_layers": 0}, "model.json: num_hidden_layers", "from 1 to 4096"),
    (
        "model.json",
        {"num_key_value_heads": 3},
        "model.json: num_key_value_heads",
        "a divisor of num_attention_heads, 4",
    ),
    ("model.json", {"head_dim": 15}, "--model.config", "even rotary dimension"),
    (
        "model.json",
        {"auto_map": {"AutoConfig": "mine.C"}, "model_type": "mine"},
        "model.json: model_type",
        "trust_remote",
    ),
    (
        "model.json",
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "--training.seq_len",
        "n_positions in the model's config",
    ),
    ("model.json", {"model_type": "gla", "num_heads": 7}, "--model.config", "cannot be built"),
    ("data.jsonl", "", "--training.dataset", "no rows"),
]


@pytest.mark.parametrize("name, content, setting, rule", MODELS)
def test_a_mistake_in_a_model(name, content, setting, rule):
    Path(name).write_text(content if isinstance(content, str) else json.dumps(LLAMA | content))
    assert holds(error := rejected(["--training.dataset=data.jsonl"]), setting, rule), error


PATHS = [
    ("--model.config modle.json", "--model.config", "no file or folder modle.json"),
    ("--model.config ./folder", "--model.config", "config.json"),
    ("--model.config model.json --model.name llama3", "--model.config", "none with model.name llama3"),
    ("--model.name lama3", "--model.name", "auto"),
    ("--model.name llama3 --model.flavor 8b", "--model.flavor", "8B"),
    ("--model.import my_modle", "--model.import", "no module my_modle"),
    ("--model.tokenizer_path ./tok", "--model.tokenizer_path", "no file or folder ./tok"),
    ("--model.tokenizer_path none", "--model.tokenizer_path", "byte, a folder"),
    ("--model.tokenizer_path model.json", "--model.tokenizer_path", "the JSON of a tokenizer"),
    ("--model.tokenizer_path data.jsonl", "--model.tokenizer_path", "not loadable as a tokenizer"),
    ("--model.tokenizer_path folder", "--model.tokenizer_path", "no tokenizer.json in folder"),
    ("--model.add_tokens <a>,<a>", "--model.add_tokens", "different tokens"),
    ("--training.dataset dta.jsonl", "--training.dataset", "dta.jsonl"),
    ("--training.dataset 'data.jsonl'", "--training.dataset", "'data.jsonl'"),
    ("--training.dataset data.jsonl,", "--training.dataset", "every item"),
    ("--training.dataset data.jsonl,data.jsonl --training.data_probs 0.5,0.6", "--training.data_probs", "sum to 1"),
    ("--training.dataset data.jsonl,data.jsonl --training.data_probs 1", "--training.data_probs", "1 items"),
    ("--training.dataset folder", "--training.dataset", "no files to read"),
    ("--training.dataset model.json --data.column text", "--data.column", "one of model_type"),
    ("--training.dataset data.jsonl --data.column txt", "--data.column", "text"),
    ("--training.dataset data.jsonl --training.dataset_split test", "--training.dataset_split", "one of train"),
    ("--training.varlen --training.context_len 4096", "--training.context_len", "at most training.seq_len 2048"),
    ("--validation.enable --validation.dataset held.jsonl", "--validation.dataset", "held.jsonl"),
    ("--job.dump_folder data.jsonl", "--job.dump_folder", "a folder"),
    ("--job.dump_folder s3://bucket/run", "--job.dump_folder", "this machine's file system"),
    ("--checkpoint.folder ../else", "--checkpoint.folder", "inside job.dump_folder"),
    ("--checkpoint.keep_latest_k 1", "--checkpoint.keep_latest_k", "0 (keep all) or 2 or more"),
    ("--checkpoint.interval 0", "--checkpoint.interval", "1 or more"),
    ("--checkpoint.load_step 5", "--checkpoint.load_step", "there is none"),
    ("--checkpoint.start resume", "--checkpoint.start", "no complete checkpoint"),
    ("--checkpoint.start init", "--checkpoint.start", "initial_load_path is not set"),
    ("--checkpoint.start restart", "--checkpoint.start", "auto, resume, init, scratch"),
    ("--checkpoint.initial_load_path gone/step-5", "--checkpoint.initial_load_path", "gone/step-5"),
    ("--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path", "a folder or hub id"),
    ("--checkpoint.initial_load_in_hf --checkpoint.initial_load_path folder", "folder", "model.safetensors"),
    ("--checkpoint.initial_load_path pickled --checkpoint.initial_load_in_hf", "pickled", "model.safetensors"),
    (
        "--job.dump_folder run --checkpoint.load_step 7",
        "--checkpoint.load_step",
        "a complete checkpoint in run/checkpoint: 10",
    ),
    ("--job.dump_folder exported", "--job.dump_folder", "the file exported/hf, a folder"),
    ("--job.dump_folder run --checkpoint.start scratch", "--checkpoint.start", "auto or resume"),
]


@pytest.mark.parametrize("typed, setting, rule", PATHS)
def test_a_mistake_in_a_path_or_a_choice(typed, setting, rule):
    for folder in ("folder", "pickled"):
        Path(folder).mkdir(parents=True)
    Path("folder/notes.md").write_text("x")
    Path("exported").mkdir()
    Path("exported/hf").write_text("x")
    Path("pickled/pytorch_model.bin").write_bytes(b"")
    write_empty(Path("run/checkpoint/step-10"))
    assert holds(error := rejected(typed.split()), setting, rule), error
