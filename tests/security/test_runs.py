"""No code that a run's config.toml or its files name is run by a tool, unless the user trusts the run."""

import json
import subprocess
import sys

import pytest

from flame.config.parser import parse, parse_recorded
from flame.data.__main__ import main as data
from flame.errors import UserError
from tests.convert.test_commands import to_hf
from tests.launch import REPO, environment

CODE = ["job.custom_config_module", "experimental.custom_args_module", "experimental.custom_import", "model.import"]
MODULE = "import pathlib; from flame.config.schema import JobConfig; pathlib.Path({!r}).touch()"


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """What is there once the module `evil`, which lies in the working folder, was run."""
    (tmp_path / "evil.py").write_text(MODULE.format(str(tmp_path / "ran")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return tmp_path / "ran"


def add(run, setting, value):
    """Set a setting in the config.toml of a run."""
    section, _, name = setting.rpartition(".")
    config = run / "config.toml"
    same = (f"{name} =", f"custom_{name} =", f"{name.removeprefix('no_')} =", "hf_assets_path =")  # other spellings
    lines = [line for line in config.read_text().splitlines() if not line.startswith(same)]
    lines.insert(lines.index(f"[{section}]") + 1, f"{name} = {json.dumps(value)}")
    config.write_text("\n".join(lines))


def write_tokenizer(folder, ran):
    """A tokenizer that brings its own code."""
    folder.mkdir()
    (folder / "evil.py").write_text(MODULE.format(str(ran)) + "\nclass Evil: pass\n")
    described = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def tools(run, *flags):
    """Exit codes of the tools that look at a run."""
    return [
        data(["show", str(run), "--step", "4", *flags]),
        to_hf.main(["--path", str(run), "--output", str(run / "out"), *flags]),
    ]


@pytest.mark.parametrize("setting", CODE)
def test_a_module_that_a_run_names_is_imported_only_if_the_user_trusts_the_run(setting, run, ran, capsys):
    add(run, setting, "evil")
    assert tools(run) == [2, 2] and not ran.exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("--trust_run" in line and "evil" in line for line in lines)
    assert tools(run, "--trust_run") == [0, 0] and ran.exists()


@pytest.mark.parametrize("name, value", [("trust_remote_code", True), ("no_trust_remote_code", False)])
def test_code_beside_a_tokenizer_is_run_only_if_the_user_trusts_the_run(name, value, run, ran, tmp_path, capsys):
    add(run, "model.tokenizer_path", str(write_tokenizer(tmp_path / "tokenizer", ran)))
    add(run, f"model.{name}", value)
    assert tools(run) == [2, 2] and not ran.exists()
    assert capsys.readouterr().err.count("--trust_run") == 2
    data(["show", str(run), "--step", "4", "--trust_run"])
    assert ran.exists()


def test_a_run_that_is_trusted_and_names_no_code_runs_none(run, ran, tmp_path):
    add(run, "model.tokenizer_path", str(write_tokenizer(tmp_path / "tokenizer", ran)))
    assert data(["show", str(run), "--step", "4", "--trust_run"]) == 2 and not ran.exists()


def test_a_job_file_that_the_user_names_is_the_users_own_word(run):
    add(run, "model.trust_remote_code", True)
    assert parse([f"--job.config_file={run}/config.toml"]).model.trust_remote_code
    with pytest.raises(UserError) as error:
        parse_recorded(run, trusted=False)
    assert error.value.setting == f"{run}/config.toml: model.trust_remote_code"


def test_the_commands_read_a_run_from_elsewhere(run, tmp_path):
    env = environment(FLAME_PYTHON=sys.executable)
    for words in (["data", "show", run, "--step", "4"], ["export", "--path", run, "--output", tmp_path / "hf"]):
        command = ["bash", f"{REPO}/scripts/flame.sh", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert (tmp_path / "hf" / "model.safetensors").is_file()
