import dataclasses
import importlib.util
import json
import math
import sys
from operator import attrgetter
from pathlib import Path

import pytest

from flame.config.parser import help_text, parse, recorded, setting_types, to_toml, world_size
from flame.config.schema import JobConfig
from flame.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def an_empty_folder_and_one_rank(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "NNODE", "NGPU", "RANK"):
        monkeypatch.delenv(name, raising=False)


def rejection(argv):
    """The setting that an error names, and the rest of the error."""
    with pytest.raises(UserError) as caught:
        parse(argv)
    error = caught.value
    assert "\n" not in str(error)
    return error.setting, f"{error.found}, {error.allowed}; {error.hint}"


def toml(text):
    Path("job.toml").write_text(text)
    return ["--job.config_file", "job.toml"]


def test_the_defaults_are_those_that_other_rooms_rely_on():
    config = parse([])
    expected = {
        "model.name": "auto",
        "model.config": None,
        "model.tokenizer_path": "byte",
        "model.hf_assets_path": "byte",
        "training.dataset": "stdlib",
        "training.varlen": False,
        "training.context_len": None,
        "training.dataloader.num_workers": 2,
        "training.dataloader.prefetch_factor": 2,
        "data.lanes": 64,
        "data.window": 1024,
        "checkpoint.enable": True,
        "checkpoint.last_save_model_only": False,
        "checkpoint.interval_type": "steps",
        "checkpoint.export": True,
        "activation_checkpoint.mode": "none",
        "debug.seed": 42,
        "comm.train_timeout_seconds": 1800,
    }
    assert {path: attrgetter(path)(config) for path in expected} == expected
    assert config == JobConfig()


def test_flags_override_the_toml_and_the_toml_the_defaults():
    config = parse([*toml("[training]\nsteps = 3\nseq_len = 64\n"), "--training.steps", "5"])
    assert (config.training.steps, config.training.seq_len, config.training.local_batch_size) == (5, 64, 8)
    assert config.job.config_file == "job.toml"


def test_nested_sections_and_empty_ones_of_a_toml_are_read():
    config = parse(toml("[training.dataloader]\nnum-workers = 7\n[quantize.linear]\n[experimental]\n[float8]\n"))
    assert config.training.dataloader.num_workers == 7


@pytest.mark.parametrize(
    "argv, path, value",
    [
        (["--training.steps", "7"], "training.steps", 7),
        (["--training.steps=7"], "training.steps", 7),
        (["--training.local-batch-size=7"], "training.local_batch_size", 7),
        (["--training.steps", "1e4"], "training.steps", 10000),
        (["--validation.enable", "--training.seq_len=96"], "validation.seq_len", 96),
        (["--validation.enable", "--training.batch_size=3"], "validation.local_batch_size", 3),
        (["--validation.enable", "--training.seq_len=96", "--validation.seq_len=64"], "validation.seq_len", 64),
        (["--training.steps", "20480.0"], "training.steps", 20480),
        (["--training.steps", "3", "--training.steps", "4"], "training.steps", 4),
        (["--debug.seed", str(2**60 + 1)], "debug.seed", 2**60 + 1),
        (["--debug.seed", "none"], "debug.seed", None),
        (["--checkpoint.load_step", "-1"], "checkpoint.load_step", -1),
        (["--optimizer.lr", "3e-4"], "optimizer.lr", 3e-4),
        (["--training.max_norm", "inf"], "training.max_norm", math.inf),
        (["--training.streaming"], "training.streaming", True),
        (["--training.streaming", "True"], "training.streaming", True),
        (["--training.streaming", "0"], "training.streaming", False),
        (["--training.streaming=false"], "training.streaming", False),
        (["--checkpoint.no_enable"], "checkpoint.enable", False),
        (["--checkpoint.no-enable"], "checkpoint.enable", False),
        (["--no_checkpoint.enable"], "checkpoint.enable", False),
        (["--no-checkpoint.enable"], "checkpoint.enable", False),
        (["--checkpoint.no_enable", "false"], "checkpoint.enable", True),
        (["--checkpoint.no_enable", "--checkpoint.enable"], "checkpoint.enable", True),
        ([], "compile.enable", None),
        (["--compile.enable"], "compile.enable", True),
        (["--compile.enable=false"], "compile.enable", False),
        (["--compile.no_enable"], "compile.enable", False),
        (["--compile.enable", "none"], "compile.enable", None),
        (["--job.description", "two words"], "job.description", "two words"),
        (["--job.description="], "job.description", ""),
        (["--job.description=a=b"], "job.description", "a=b"),
        (["--job.description", "none"], "job.description", "none"),
        (["--model.converters", "a,b"], "model.converters", ["a", "b"]),
        (["--model.converters", "a", "b"], "model.converters", ["a", "b"]),
        (["--model.converters="], "model.converters", []),
        (["--quantize.grouped_mm.float8.fqns", "experts"], "quantize.grouped_mm.float8.fqns", ["experts"]),
        (["--optimizer.implementation", "foreach"], "optimizer.implementation", "foreach"),
        (["--job.dump_folder=~/x"], "job.dump_folder", str(Path("~/x").expanduser())),
    ],
)
def test_a_flag_is_read(argv, path, value):
    found = attrgetter(path)(parse(argv))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "line, path, value",
    [
        ("training.steps = 1e4", "training.steps", 10000),
        ("optimizer.lr = 1", "optimizer.lr", 1.0),
        ("model.converters = ['a', 'b']", "model.converters", ["a", "b"]),
        ("model.converters = 'a,b'", "model.converters", ["a", "b"]),
        ("debug.seed = 'none'", "debug.seed", None),
        (
            "parallelism.module_fqns_per_model_part = [['a'], ['b', 'c']]",
            "parallelism.module_fqns_per_model_part",
            [["a"], ["b", "c"]],
        ),
    ],
)
def test_a_toml_value_is_read(line, path, value):
    found = attrgetter(path)(parse(toml(line)))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "argv, setting, rule",
    [
        (["--training.stps", "3"], "--training.stps", "did you mean --training.steps?"),
        (["--seq_len", "3"], "--seq_len", "did you mean --training.seq_len?"),
        (["--training.learning_rate_of_mine", "3"], "--training.learning_rate_of_mine", "not a setting"),
        (["--training.bach_size", "3"], "--training.bach_size", "did you mean --training.batch_size?"),
        (["--training.no_steps"], "--training.no_steps", "not a setting"),
        (["--training"], "--training", "not a setting"),
        (["--"], "--", "not a setting"),
        (["--training.steps"], "--training.steps", "no value, an integer"),
        (["--training.steps", "--training.seq_len", "4"], "--training.steps", "no value"),
        (["--training.steps", "ten"], "--training.steps", "'ten', an integer"),
        (["--training.steps", "1.5"], "--training.steps", "'1.5', an integer"),
        (["--training.steps="], "--training.steps", "''"),
        (["--debug.seed", "x"], "--debug.seed", "'x', an integer or none"),
        (["--optimizer.lr", "high"], "--optimizer.lr", "'high', a number"),
        (["--optimizer.lr", "nan"], "--optimizer.lr", "'nan'"),
        (["--training.streaming", "maybe"], "--training.streaming", "'maybe', true or false"),
        (["--optimizer.implementation", "fast"], "--optimizer.implementation", "one of for-loop, foreach, fused"),
        (["--training.steps", "4", "5"], "--training.steps", "4 5, one value; quote"),
        (["run", "--training.steps", "4"], "'run'", "not a flag"),
        (["-training.steps", "4"], "'-training.steps'", "not a flag"),
        (["--parallelism.module_fqns_per_model_part", "a"], "--parallelism.module_fqns_per_model_part", "TOML"),
        (["--job.config_file", "gone.toml"], "--job.config_file", "no file gone.toml"),
        (["--job.config_file", "."], "--job.config_file", "cannot read ."),
        (["--job.config_file"], "--job.config_file", "no value"),
        (["--parallelism.context_parallel_load_balancer="], "parallelism", "empty"),
        (["--job.custom_config_module", "no.such.module"], "--job.custom_config_module", "no.such.module"),
    ],
)
def test_a_mistake_in_a_flag_is_one_line_that_says_what_to_do(argv, setting, rule):
    found, text = rejection(argv)
    assert found == setting and rule in text


@pytest.mark.parametrize(
    "text, setting, rule",
    [
        ("[training]\nsteps = = 3", "job.toml", "line 2"),
        ("[training]\nstps = 3", "job.toml: training.stps", "did you mean training.steps?"),
        ("[trainig]\n", "job.toml: trainig", "not a setting"),
        ("training = 3", "job.toml: training", "not a setting"),
        ("[[training]]\nsteps = 3", "job.toml: training", "not a setting"),
        ("[training.steps]\nx = 3", "job.toml: training.steps.x", "not a setting"),
        ("[training]\nsteps = '3'", "job.toml: training.steps", "'3', an integer"),
        ("[training]\nsteps = true", "job.toml: training.steps", "True, an integer"),
        ("[training]\nsteps = 3.5", "job.toml: training.steps", "3.5, an integer"),
        ("[training]\nstreaming = 'true'", "job.toml: training.streaming", "'true', true or false"),
        ("[training]\nstreaming = 1", "job.toml: training.streaming", "true or false"),
        ("[training]\ndataset = 3", "job.toml: training.dataset", "text"),
        ("[optimizer]\nlr = '3e-4'", "job.toml: optimizer.lr", "a number"),
        ("[optimizer]\nlr = nan", "job.toml: optimizer.lr", "a number"),
        ("[model]\nconverters = [1]", "job.toml: model.converters", "a list"),
    ],
)
def test_a_mistake_in_a_toml_is_one_line_that_names_the_file(text, setting, rule):
    found, answer = rejection(toml(text))
    assert found == setting and rule in answer


def test_two_spellings_of_one_setting_that_disagree_are_rejected_with_both_names():
    text = "[training]\nbatch_size = 4\nlocal_batch_size = 8"
    setting, rule = rejection(toml(text))
    assert setting == "job.toml: training.batch_size and job.toml: training.local_batch_size"
    assert rule.startswith("4 and 8, equal")
    assert parse([*toml(text), "--training.local_batch_size=2"]).training.local_batch_size == 2
    same = ["--training.batch_size=3", "--training.local_batch_size=4", "--training.batch_size=4"]
    assert rejection(same)[1].startswith("3 and 4, equal")


def test_a_toml_may_begin_with_a_byte_order_mark_and_have_the_line_ends_of_windows():
    Path("job.toml").write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = 3\r\n")
    assert parse(["--job.config_file", "job.toml"]).training.steps == 3


def test_a_toml_that_is_not_text_is_rejected():
    Path("job.toml").write_bytes(b"\xff\xfe")
    assert "cannot read job.toml" in rejection(["--job.config_file", "job.toml"])[1]


def test_the_written_toml_gives_the_config_again():
    argv = ["--training.varlen", "--debug.seed=none", "--optimizer.scheduler=wsd", "--model.converters=float8"]
    argv += ["--job.description", 'quote " and \\ and é', "--optimizer.eps=1e-15", "--training.max_norm=inf"]
    argv += ["--parallelism.pipeline_parallel_schedule_csv", "none", "--training.dataloader.prefetch_factor=none"]
    config = parse(argv)
    Path("written.toml").write_text(to_toml(config), encoding="utf-8")
    again = parse(["--job.config_file", "written.toml"])
    again.job.config_file = None
    assert again == config != JobConfig()


def test_a_module_of_the_user_adds_settings(monkeypatch):
    Path("my_settings.py").write_text(
        "from dataclasses import dataclass, field\n"
        "@dataclass\nclass Training:\n    noise: float = 0.5\n"
        "@dataclass\nclass JobConfig:\n    training: Training = field(default_factory=Training)\n"
    )
    monkeypatch.syspath_prepend(".")
    config = parse(["--job.custom_config_module", "my_settings", "--training.noise", "0.25", "--training.steps=3"])
    assert (config.training.noise, config.training.steps, config.data.lanes) == (0.25, 3, 64)
    assert isinstance(config, JobConfig) and "noise = 0.25" in to_toml(config)
    assert rejection(["--training.noise", "0.25"])[0] == "--training.noise"
    sys.modules.pop("my_settings")


def test_two_configs_share_nothing():
    parse(["--float8.enable_float8_linear"]).model.converters.append("more")
    assert parse([]).model.converters == []


@pytest.mark.parametrize(
    "environment, ranks",
    [({}, 1), ({"NGPU": "4"}, 4), ({"NNODE": "2", "NGPU": "4"}, 8), ({"WORLD_SIZE": "3", "NGPU": "8"}, 3)],
)
def test_the_world_size_is_that_of_torchrun_or_of_the_launcher(monkeypatch, environment, ranks):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert world_size() == ranks


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_world_size_that_is_not_a_number_is_rejected(monkeypatch, value):
    monkeypatch.setenv("NGPU", value)
    with pytest.raises(UserError) as caught:
        world_size()
    assert (caught.value.setting, caught.value.found) == ("NGPU", repr(value))


def test_the_help_page_has_every_setting_with_its_text():
    page = help_text()
    for path in setting_types():
        assert f"--{path} " in page or f"--{path}," in page
    assert "\x1b" not in page and "Independent streams" in page and "flame 0.x" in page


def test_every_setting_of_ours_has_a_docstring_and_the_flags_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("flags_page", ROOT / "scripts" / "flags_page.py")
    flags_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flags_page)
    for section in dataclasses.fields(JobConfig):
        if section.type.__module__ == "flame.config.schema":
            for name in setting_types(section.type).keys() & section.type.__annotations__:
                assert flags_page.field_help(section.type, name), f"{section.name}.{name} has no docstring"
    assert flags_page.PAGE.read_text(encoding="utf-8") == flags_page.page(), "run python scripts/flags_page.py"


def test_the_json_form_of_torchtitan_still_works():
    assert json.loads(json.dumps(parse([]).to_dict()))["data"]["lanes"] == 64


def test_local_paths_in_the_config_that_a_run_records_hold_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}")
    (tmp_path / "model.json").write_text("{}")
    flags = ["--training.dataset=data.jsonl,stdlib,org/name", "--model.config=model.json", "--job.dump_folder=out"]
    kept = recorded(parse(flags))
    assert kept.training.dataset == f"{tmp_path}/data.jsonl,stdlib,org/name"
    assert kept.model.config == f"{tmp_path}/model.json"
    assert kept.model.tokenizer_path == "byte"
    assert kept.job.dump_folder == f"{tmp_path}/out"
