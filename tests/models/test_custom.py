"""Models from outside: a user's own module, code that a folder brings along, a folder of Hugging Face."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from flame.config.parser import parse
from flame.errors import UserError
from flame.models import table
from flame.models.__main__ import main
from flame.models.hf import import_models, load_hf_config
from flame.training.train_spec import register
from tests.launch import REPO, environment, metrics, torchrun
from tests.models.small import SHIPPED, fields_of

PAGE = (REPO / "docs" / "add_new_model.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The folder that the page's reader has made."""
    (tmp_path / "my_package.py").write_text(blocks("python")[0])
    (tmp_path / "ema.json").write_text(blocks("json")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(table, "BY_MODEL_TYPE", dict(table.BY_MODEL_TYPE))
    yield tmp_path
    sys.modules.pop("my_package", None)


def test_the_pages_model_passes_its_audit_trains_and_loads_again(example, capsys):
    audit, train = (re.sub(r"\\\n", " ", block).split() for block in blocks("bash"))
    assert audit[:3] == ["bash", "scripts/flame.sh", "models"] and main(audit[3:]) == 0
    assert capsys.readouterr().out.count("ok ") == 8

    assert train[:2] == ["bash", "train.sh"]
    command = torchrun("-m", "flame.train", *train[2:], "--metrics.log_freq=1")
    env = environment(PYTHONPATH=f"{REPO}:{example}")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    losses = [record["loss"] for record in metrics(example / "exp/ema")]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    assert 'custom_import = "my_package"' in (example / "exp/ema/config.toml").read_text()
    names: dict[str, Any] = {}
    exec(blocks("python")[1], names)
    assert type(names["model"]).__name__ == "EmaForCausalLM"
    assert all(parameter.isfinite().all() for parameter in names["model"].parameters())


def test_the_row_of_a_module_without_one_is_read_off_its_model(example):
    (example / "my_package.py").write_text(blocks("python")[0].split("FAMILY = ")[0])
    import_models("my_package")
    family, _ = load_hf_config("ema.json")
    assert (family.blocks, family.embedding, family.norm) == ("blocks", "embed", "norm")
    assert not family.fused_loss and family.packing is None


def test_varlen_is_rejected_for_a_model_that_cannot_keep_documents_apart(example):
    flags = ["--model.import=my_package", "--model.config=ema.json", "--training.varlen"]
    with pytest.raises(UserError) as error:
        register(parse(flags))
    assert error.value.setting == "--training.varlen" and "ema" in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("1 / 0", "ZeroDivisionError"),
        ("FAMILY = 'llama'", "FAMILY of type str"),
    ],
)
def test_a_module_that_is_broken_is_rejected_in_one_line(text, words, tmp_path, monkeypatch):
    (tmp_path / "my_broken.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as caught:
        import_models("my_broken")
    error = caught.value
    assert error.setting.startswith("--model.import") and "my_broken" in str(error) and "\n" not in str(error)
    assert words in f"{error.found} {error.hint}"
    sys.modules.pop("my_broken", None)


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_of_hugging_face_is_a_config_and_so_is_its_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**fields_of("llama_7B"), "dtype": "bfloat16"}))
    by_folder, by_file = (load_hf_config(str(path))[1] for path in (tmp_path, tmp_path / "config.json"))
    assert by_folder.to_dict() == by_file.to_dict()
    assert by_folder.hidden_size == 64


def remote(folder: Path) -> str:
    """A folder whose model type is code that it brings along."""
    code = blocks("python")[0].split("AutoConfig.register")[0].replace("from flame.models.family import Family\n", "")
    (folder / "modeling.py").write_text(code.replace('model_type = "ema"', 'model_type = "ema_remote"'))
    fields = json.loads(blocks("json")[0]) | {
        "model_type": "ema_remote",
        "auto_map": {"AutoConfig": "modeling.EmaConfig", "AutoModelForCausalLM": "modeling.EmaForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def test_code_that_a_model_brings_along_runs_only_when_asked_and_is_logged(tmp_path, caplog):
    folder = remote(tmp_path)
    with pytest.raises(UserError) as error:
        load_hf_config(folder)
    assert error.value.setting == f"{folder}: model_type" and "--model.trust_remote_code" in error.value.hint
    family, config = load_hf_config(folder, trust_remote_code=True)
    assert family.blocks == "blocks"
    assert [record.message for record in caplog.records if "running the Python code" in record.message] == [
        f"--model.trust_remote_code: running the Python code that {folder} brings along"
    ]
    assert type(AutoModelForCausalLM.from_config(config)).__name__ == "EmaForCausalLM"  # known from now on, unasked


def test_mamba_is_flas_and_not_transformers_own():
    for name in ("mamba_340M", "mamba2_340M"):
        assert type(load_hf_config(str(SHIPPED[name]))[1]).__module__.startswith("fla.")
