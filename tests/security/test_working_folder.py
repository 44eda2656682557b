"""A file of the folder that flame is started in stands in for no module, as the folder may be somebody else's."""

import subprocess
import sys

import pytest

from tests.launch import REPO, environment

IMPORTED = ("flame", "json", "numpy", "tomli", "torch", "torchtitan", "typing", "tyro", "xxhash")


def run(folder, *command):
    """The output of a script of flame's that is started in a folder."""
    env = environment(FLAME_PYTHON=sys.executable)
    done = subprocess.run(["bash", *command], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_files_of_the_working_folder_are_not_imported_unless_the_user_names_them(tmp_path):
    for name in IMPORTED:
        (tmp_path / f"{name}.py").write_text("import os; os.mkdir('ran')")
    assert "usage: flame" in run(tmp_path, f"{REPO}/scripts/flame.sh", "-h")
    assert "flame: --training.steps" in run(tmp_path, f"{REPO}/train.sh", "--training.steps=x")
    (tmp_path / "my_model.py").touch()
    named = [f"{REPO}/train.sh", "--model.config=there.json", "--model.import"]
    assert "no file or folder there.json" in run(tmp_path, *named, "my_model")
    assert "no module my_other_model" in run(tmp_path, *named, "my_other_model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_a_module_with_settings_is_found_in_the_working_folder(tmp_path):
    (tmp_path / "my_settings.py").write_text("raise ImportError('it was run')")
    assert "it was run" in run(tmp_path, f"{REPO}/train.sh", "--job.custom_config_module=my_settings")
