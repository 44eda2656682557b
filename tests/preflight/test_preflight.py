import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flame.config.parser import help_text
from flame.errors import REFUSED
from flame.preflight.__main__ import ANSWERED
from flame.train import main as train

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def a_model(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"model_type": "gla", "vocab_size": 512}))


def python(tmp_path, *words, **environment):
    keep = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "NNODE", "NGPU", "RANK")}
    keep |= {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "PYTHONDONTWRITEBYTECODE": "1"} | environment
    return subprocess.run([sys.executable, *words], cwd=tmp_path, env=keep, capture_output=True, text=True, timeout=60)


def preflight(tmp_path, *flags, **environment):
    return python(tmp_path, "-m", "flame.preflight", *flags, **environment)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_made_without_torch_is_the_one_made_with_it(tmp_path, monkeypatch, flag):
    monkeypatch.setenv("COLUMNS", "100")
    done = preflight(tmp_path, "--training.steps", "5", flag)
    assert (done.returncode, done.stderr) == (ANSWERED, "")
    assert done.stdout == help_text()


def test_a_rank_prints_the_help_too(capsys):
    assert train(["--training.steps", "5", "-h"]) == 0
    assert capsys.readouterr().out.startswith("usage: train.sh")


def test_help_cut_short_by_a_pipe_is_no_error(tmp_path):
    command = f"{shlex.quote(sys.executable)} -m flame.preflight -h | head -1"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.startswith("usage: train.sh") and done.stderr == ""


def test_a_job_that_can_train_passes_in_silence_and_leaves_nothing(tmp_path):
    done = preflight(tmp_path, "--model.config", "model.json", "--job.use_for_integration_test", NGPU="8")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--training.stps", "5"], "flame: --training.stps: not a setting, did you mean --training.steps?\n"),
        (["--model.config", "gone.json"], "flame: --model.config: found no file or folder gone.json\n"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, flags, line):
    done = preflight(tmp_path, *flags)
    assert (done.returncode, done.stdout, done.stderr) == (REFUSED, "", line)
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]


def test_a_job_for_wandb_without_a_key_is_rejected_unless_it_is_offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    flags = ["--model.config", "model.json", "--metrics.enable_wandb"]
    done = preflight(tmp_path, *flags, WANDB_MODE="online", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (REFUSED, "", 1)
    assert "--metrics.enable_wandb: found no API key" in done.stderr
    assert preflight(tmp_path, *flags, WANDB_MODE="offline").returncode == 0


def test_the_ranks_are_those_of_the_launcher(tmp_path):
    done = preflight(tmp_path, "--model.config", "model.json", NNODE="3", NGPU="1")
    assert done.returncode == REFUSED and "3 data-parallel ranks" in done.stderr


@pytest.mark.parametrize("flags", [["-h"], ["--model.config", "model.json"], ["--oops"]])
def test_neither_torch_nor_the_package_torchtitan_is_loaded_and_no_stand_in_is_left(tmp_path, flags):
    code = (
        "import sys; from flame.preflight.__main__ import main; main(sys.argv[1:]);"
        "print([m for m in ('torch', 'torchtitan', 'torchtitan.config', 'torchtitan.components') if m in sys.modules])"
    )
    assert python(tmp_path, "-c", code, *flags).stdout.splitlines()[-1] == "[]"


def test_a_module_of_the_user_may_import_torchtitan(tmp_path):
    (tmp_path / "my_settings.py").write_text(
        "from dataclasses import dataclass, field\n"
        "from torchtitan.config import ConfigManager\n"
        "assert ConfigManager.parse_args\n"
        "@dataclass\nclass Extra:\n    noise: float = 0.5\n"
        "@dataclass\nclass JobConfig:\n    extra: Extra = field(default_factory=Extra)\n"
    )
    flags = ["--model.config", "model.json", "--job.custom_config_module", "my_settings", "--extra.noise"]
    good, bad = preflight(tmp_path, *flags, "1"), preflight(tmp_path, *flags, "much")
    assert (good.returncode, good.stderr) == (0, "")
    assert (bad.returncode, bad.stderr) == (
        REFUSED,
        "flame: --extra.noise: found 'much', must be a number\n",
    )
