"""float8 reaches torchtitan's own converter, emulated on a CPU; what cannot work is rejected."""

import json
import re
from importlib.util import find_spec

import pytest

from flame.config.parser import parse
from flame.errors import UserError
from flame.training.train_spec import register
from tests.launch import SMALL, metrics, train_each
from tests.models.small import OTHERS, distinct, fields_of, small
from tests.tiny import write_config

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="pip install 'flame[float8]'")
FLOAT8 = ("--float8.enable_float8_linear", "--quantize.linear.float8.emulate")
GATHER = "--quantize.linear.float8.enable_fsdp_float8_all_gather"


CONVERTERS = "--model.converters"


def rejected(*flags):
    with pytest.raises(UserError) as error:
        register(parse(flags))
    return error.value


@pytest.mark.parametrize(
    ("converters", "more", "setting", "rule"),
    [
        ("quantize.linear.float8", [], CONVERTERS, r"compute capability 8\.9 .*, or .*emulate"),
        ("quantize.linear.float8", [FLOAT8[1], "--compile.enable"], CONVERTERS, r"emulate without --compile\.enable"),
        ("quantize.linear.float8,quantize.linear.mx", [FLOAT8[1]], CONVERTERS, "all float8 or all mx"),
        ("quantize.linear.mx", [], CONVERTERS, r"compute capability 10\.0"),
        ("quantize.grouped_mm.float8", [], CONVERTERS, r"without quantize\.grouped_mm\.float8"),
        pytest.param(
            "quantize.linear.float8", [FLOAT8[1], GATHER], GATHER, "false for fla's models", marks=needs_torchao
        ),
        (
            "quantize.linear.float8",
            [FLOAT8[1], GATHER, "--quantize.linear.float8.recipe_name=rowwise"],
            GATHER,
            r"false with --quantize\.linear\.float8\.recipe_name rowwise",
        ),
    ],
)
def test_converters_that_cannot_work_are_rejected(converters, more, setting, rule):
    error = rejected("--model.config=configs/gla_debug.json", f"--model.converters={converters}", *more)
    assert error.setting == setting
    assert re.search(rule, f"{error.allowed} {error.hint}")


@needs_torchao
def test_a_family_that_cannot_be_converted_is_rejected():
    error = rejected("--model.config=configs/falcon_7B.json", *FLOAT8)
    assert (error.setting, error.allowed) == (CONVERTERS, "none for falcon")
    assert "its blocks add in place" in error.hint


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
def test_a_missing_torchao_is_named():
    assert "pip install 'flame[float8]'" in rejected("--model.config=configs/gla_debug.json", *FLOAT8).hint


@needs_torchao
def test_linear_layers_but_the_head_are_trained_in_float8_and_saved_under_their_names(tmp_path):
    jobs = {}
    for name in ("llama", "gla"):
        common = [*SMALL, f"--model.config={write_config(tmp_path, name)}", "--training.steps=2"]
        jobs[name] = [*common, "--checkpoint.no_enable"]
        jobs[f"{name} float8"] = [*common, *FLOAT8]
    folders = {name: tmp_path / name.replace(" ", "_") for name in jobs}
    log = train_each([[*flags, f"--job.dump_folder={folders[name]}"] for name, flags in jobs.items()])
    assert "Swapped to Float8Linear layers" in log
    for name in ("llama", "gla"):
        plain, float8 = metrics(folders[name]), metrics(folders[f"{name} float8"])
        for a, b in zip(plain, float8, strict=True):
            assert a["loss"] != b["loss"]
            assert b["loss"] == pytest.approx(a["loss"], rel=0.01)  # what 3 bits of mantissa leave of it


@needs_torchao
@pytest.mark.slow
def test_every_family_trains_in_float8_as_the_table_of_layouts_says(tmp_path):
    jobs = {}
    for name in [*distinct(), *OTHERS]:
        if small(name)[0].float8 is True:
            config = tmp_path / f"{name}.json"
            config.write_text(json.dumps(fields_of(name)))
            for kind, flags in (("plain", ()), ("float8", FLOAT8)):
                folder = tmp_path / name / kind
                common = [*SMALL, f"--model.config={config}", "--training.steps=2", "--checkpoint.no_enable"]
                jobs[name, kind] = [*common, f"--job.dump_folder={folder}", *flags]
    commands = list(jobs.values())
    for i in range(0, len(commands), 8):
        train_each(commands[i : i + 8])
    for name, _ in jobs:
        plain, float8 = (metrics(tmp_path / name / kind)[-1]["loss"] for kind in ("plain", "float8"))
        assert plain != float8, name  # in the first step RWKV-7's layers add nothing as yet
        assert float8 == pytest.approx(plain, rel=0.01), name


@needs_torchao
@pytest.mark.slow
def test_fsdp_gathers_float8_weights(tmp_path):
    config = write_config(tmp_path, "llama")
    flags = [*SMALL, f"--model.config={config}", "--training.steps=2", "--checkpoint.no_enable", *FLOAT8]
    log = train_each([[*flags, GATHER, f"--job.dump_folder={tmp_path / 'run'}"]], ranks=2)
    assert "Swapped to Float8Linear layers with enable_fsdp_float8_all_gather=True" in log
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2]
