"""The README and the quickstart hold what they say: ```bash and ```python blocks run, ```sh blocks are checked."""

import math
import re
import runpy
import shlex
import subprocess
import sys

import pytest

from flame.config.commands import SCRIPTS
from flame.config.parser import parse
from flame.data import __main__ as data_command
from flame.drills import __main__ as drills_command
from flame.models import __main__ as models_command
from tests.fake_hub import serve
from tests.launch import REPO, environment, metrics

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (REPO / page).read_text(), flags=re.DOTALL)


def commands(page, language):
    """The commands in a page's blocks, without comments, continued lines joined."""
    lines = "\n".join(blocks(page, language)).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like a checkout to whoever types relative paths."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("train.sh", "configs", "scripts", "flame", "tests", "README.md", "CONTRIBUTING.md"):
        (folder / name).symlink_to(REPO / name)
    return folder


@pytest.fixture(scope="module")
def hub():
    with serve() as address:
        yield address


def shell(command, folder):
    run = environment(FLAME_PYTHON=sys.executable)
    return subprocess.run(command, shell=True, cwd=folder, env=run, capture_output=True, text=True, timeout=400)


def test_every_command_of_the_readme_runs_in_its_order(checkout):
    tried = [line for line in commands("README.md", "bash") if "test.sh" not in line]
    assert tried[0] == "bash train.sh"
    for command in tried:
        done = shell(command, checkout)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "\x1b" not in done.stdout  # colours are for terminals
    records = metrics(checkout / "exp/debug")
    assert records[0]["loss"] == pytest.approx(math.log(320), abs=0.1)
    assert records[-1]["loss"] < 2.7
    again = shell("bash train.sh", checkout)
    assert "This job is complete: step 200 of 200" in again.stdout
    assert [r["step"] for r in metrics(checkout / "exp/mine")][-1] == 30
    (snippet,) = blocks("README.md", "python")
    said = subprocess.run(
        [sys.executable, "-c", snippet], cwd=checkout, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("def main(")
    assert len(said.stdout) > 30


def test_the_quickstarts_two_ways_to_say_a_batch_are_one_run(checkout):
    for command in commands("docs/quickstart.md", "bash")[1:]:
        done = shell(command, checkout)
        assert done.returncode == 0, done.stderr
    one, other = metrics(checkout / "exp/batch"), metrics(checkout / "exp/batch2")
    assert [(r["loss"], r["data_digest"]) for r in one] == [(r["loss"], r["data_digest"]) for r in other]


@pytest.mark.parametrize("command", commands("README.md", "sh"))
def test_commands_that_need_gpus_or_a_network_are_accepted(command, checkout, hub):
    words = shlex.split(command)
    settings = dict(word.split("=") for word in words[: words.index("bash")])
    flags = words[words.index("train.sh") + 1 :]
    done = subprocess.run(
        [sys.executable, "-m", "flame.preflight", *flags],
        cwd=checkout,
        env=environment(**settings, HF_ENDPOINT=hub, **dict.fromkeys(OFFLINE, "0")),
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")


PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md")))
COMMANDS = [command for page in PAGES for language in ("bash", "sh") for command in commands(page, language)]
PARSERS = {"data": data_command.parse, "models": models_command.parse, "drills": drills_command.parse} | {
    name: runpy.run_path(str(REPO / "scripts" / script))["parse"] for name, script in SCRIPTS.items()
}


@pytest.mark.parametrize("command", sorted({line for line in COMMANDS if "flame.sh" in line}))
def test_every_command_of_the_pages_is_one_that_flame_has(command):
    bash, script, name, *flags = shlex.split(command)
    assert (bash, script) == ("bash", "scripts/flame.sh")
    PARSERS[name](flags)


@pytest.mark.parametrize("command", sorted({line for line in COMMANDS if "train.sh" in line}))
def test_every_job_of_the_pages_has_flags_that_flame_has(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    (tmp_path / "exp/mine").mkdir(parents=True)
    (tmp_path / "exp/mine/config.toml").write_text('[model]\nconfig = "configs/gla_debug.json"\n')
    words = shlex.split(command)
    for name, value in (word.split("=") for word in words[: words.index("bash")]):
        monkeypatch.setenv(name, value)
    assert words[words.index("bash") + 1] == "train.sh"
    parse([flag for flag in words[words.index("train.sh") + 1 :] if flag != "..."])


def test_the_readmes_refusal_is_what_is_said(checkout):
    said = shell("bash train.sh --training.stpes 3", checkout)
    assert said.returncode == 2
    assert said.stderr.strip() in (REPO / "README.md").read_text()
    assert said.stdout == ""


def test_the_readme_is_short_and_its_links_and_tree_are_true():
    text = (REPO / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (REPO / link).exists(), link
    tree = text.split("## The tree")[1].split("```")[1]
    for path in sorted((REPO / "flame").iterdir()):
        if path.name not in ("__init__.py", "__pycache__"):
            assert path.name in tree, f"{path.name} is not in the tree"
