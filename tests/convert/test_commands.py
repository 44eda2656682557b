"""The two conversion scripts, as a user types them."""

import importlib.util
import re
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from flame.checkpoint.commit import MARKER
from flame.convert.output import read_report
from tests.convert.models import publish, save_run
from tests.launch import REPO
from tests.tiny import write_config


def load(name):
    spec = importlib.util.spec_from_file_location(name, REPO / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


to_hf, to_dcp = load("convert_dcp_to_hf"), load("convert_hf_to_dcp")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with two steps."""
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, "gpt_neox", step=3)
    save_run(folder, "gpt_neox", step=12, initializer_range=0.3)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as it is on the hub."""
    folder = tmp_path_factory.mktemp("published") / "hf"
    publish(folder, "gpt_neox")
    return folder


def rejected(capsys, main, *argv):
    """The one line of a command that exits with 2."""
    assert main([str(each) for each in argv]) == 2
    text = capsys.readouterr()
    assert text.out == "" and text.err.count("\n") == 1
    return text.err


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--step=4"], "--step: found 4, must be one of the complete steps of .*checkpoint: 3, 12"),
        (["--output={run}/model"], "--output: found .*model, must be a folder that does not exist"),
        (["--path={run}/config.toml"], "--path: found no folder .*config.toml, must be a run or a checkpoint"),
        (["--output={run}/absent/.."], r"--output: found .*\.\., must be a folder that does not exist"),
        (["--output=s3://bucket/x"], "--output: found s3:.*, must be a folder of this machine's file system"),
        (["--path={run}/model"], "--path: found .*model, .* no complete checkpoint in"),
        (["--path={run}/checkpoint/step-3", "--step=3"], "--step: found 3; .*step-3 is a checkpoint itself"),
        (["--path={run}/checkpoint/step-3"], "--config and --tokenizer: needed, as .* has no config.json"),
        (["--path={run}/checkpoint/step-3", "--config=x"], "^flame: --tokenizer: needed"),
    ],
)
def test_a_mistake_in_an_export_is_one_line(run, capsys, argv, text, tmp_path):
    filled = [each.format(run=run) for each in argv]
    line = rejected(capsys, to_hf.main, f"--path={run}", f"--output={tmp_path}/out", *filled)
    assert re.search(text, line), line
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_itself_is_not_converted_into_itself(run, capsys):
    line = rejected(capsys, to_hf.main, f"--path={run}/checkpoint/step-3", f"--config={run}/model", "--tokenizer=byte")
    assert "--output: needed" in line


def test_an_unknown_flag_or_type_exits_with_2(capsys):
    for argv in (["--path=x", "--stpe=3"], ["--path=x", "--dtype=int8"], []):
        with pytest.raises(SystemExit) as stopped:
            to_hf.main(argv)
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--model={run}/model"], r"/model: found no weights, must be a folder with model\.safetensors or its index"),
        (["--model={run}/absent.safetensors"], r"--model: found .*absent\.safetensors, must be a folder or file"),
        (["--model={run}/model/config.json"], r"config\.json: found .*, must be a whole safetensors file"),
        (
            ["--model", "{run}/one.safetensors", "{run}/two.safetensors"],
            r"two\.safetensors: has a, as .*one\.safetensors does",
        ),
        (["--model={run}/none.safetensors"], r"--model: found .*none\.safetensors; it has no tensors"),
        (["--model={run}/plain"], r"--model: found .*plain, must be a folder with a config\.json .*; --no_verify"),
        (
            ["--model=x", "--checkpoint={run}/model"],
            r"--checkpoint: found .*model, .* not exist",
        ),
    ],
)
def test_a_mistake_in_an_import_is_one_line(run, capsys, argv, text, tmp_path):
    (run / "plain").mkdir(exist_ok=True)
    for file in ("one", "two", "plain/model"):
        save_file({"a": torch.ones(3)}, run / f"{file}.safetensors")
    save_file({}, run / "none.safetensors")
    line = rejected(capsys, to_dcp.main, f"--checkpoint={tmp_path}/step-0", *[each.format(run=run) for each in argv])
    assert re.search(text, line), line
    assert not any(tmp_path.iterdir())


def one_line(capsys, code, main, *argv):
    """The one line of a command that exits with a code other than 0."""
    assert main([str(each) for each in argv]) == code
    text = capsys.readouterr()
    assert text.out == "" and text.err.count("\n") == 1, text.err
    return text.err


@contextmanager
def full_disk(nbytes):
    """No file grows beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.fixture
def weights(tmp_path):
    """A file of weights, and the DCP checkpoint made of it."""
    save_file({"a": torch.randn(300, 300)}, tmp_path / "a.safetensors")
    assert to_dcp.main([f"--model={tmp_path}/a.safetensors", f"--checkpoint={tmp_path}/step-0"]) == 0
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("target", ["afile/x", "afile/x/y", "/proc/x/y"])
def test_an_output_that_cannot_be_written_is_one_line(target, run, weights, tmp_path, capsys):
    (tmp_path / "afile").touch()
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert target in one_line(capsys, 2, to_dcp.main, f"--model={weights}", f"--checkpoint={tmp_path / target}")
    assert target in one_line(capsys, 2, to_hf.main, f"--path={run}", f"--output={tmp_path / target}", "--no_verify")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("nbytes", [0, 5000])
def test_a_full_disk_is_one_line_and_leaves_nothing(nbytes, run, weights, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    with full_disk(nbytes):
        line = one_line(capsys, 1, to_dcp.main, f"--model={weights}", f"--checkpoint={tmp_path}/new/step-1")
    assert "new/step-1: [Errno 27] File too large" in line
    argv = [f"--path={tmp_path}/step-0", f"--config={run}/model", "--tokenizer=byte", f"--output={tmp_path}/new/hf"]
    with full_disk(nbytes):
        line = one_line(capsys, 1, to_hf.main, *argv, "--no_verify")
    assert "new/hf: [Errno 27] File too large" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_without_its_marker_is_not_converted(run, weights, tmp_path, capsys):
    (tmp_path / "step-0" / MARKER).unlink()
    argv = [f"--path={tmp_path}/step-0", f"--config={run}/model", "--tokenizer=byte", f"--output={tmp_path}/hf"]
    assert f"must be a complete checkpoint; {MARKER} is missing" in rejected(capsys, to_hf.main, *argv, "--no_verify")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("config.toml", "[job", r"config\.toml: not valid TOML: .*; or give --path a checkpoint itself"),
        (
            "config.toml",
            "\udcff",
            r"cannot read .*config\.toml as text in UTF-8: .*; or give --path a checkpoint itself",
        ),
        ("model/config.json", "{", r"model/config\.json: is corrupted \(.*\); --config and --tokenizer replace it"),
        ("model/torchtitan.json", "\0", r"model/torchtitan\.json: is corrupted"),
        ("model/tokenizer_config.json", "[", r"model/tokenizer_config\.json: is corrupted"),
        ("model/config.json", "[]", r"model/config\.json: is corrupted \(a list, not an object\)"),
    ],
)
def test_a_corrupted_record_of_the_run_is_one_line(name, content, text, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content, errors="surrogateescape")
    line = rejected(capsys, to_hf.main, f"--path={tmp_path}/run", f"--output={tmp_path}/hf")
    assert re.search(text, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_lost_its_tokenizer_is_one_line(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "model" / "tokenizer.json").unlink()
    line = rejected(capsys, to_hf.main, f"--path={tmp_path}/run", f"--output={tmp_path}/hf", "--no_verify")
    assert re.search(r"--tokenizer: needed, as .*model has no tokenizer\.json", line), line


def test_an_output_that_is_a_link_to_nothing_is_one_line(run, weights, tmp_path, capsys):
    (tmp_path / "link").symlink_to("absent")
    capsys.readouterr()
    for main, *argv in (to_hf.main, f"--path={run}", "--output"), (to_dcp.main, f"--model={weights}", "--checkpoint"):
        assert "must be a folder that does not exist" in rejected(capsys, main, *argv, tmp_path / "link")


def test_weights_of_torchtitans_model_are_reported_to_have_transformers_names(published, tmp_path, capsys):
    shutil.copytree(published, tmp_path / "hf")
    (tmp_path / "hf" / to_dcp.TITAN).write_text("{}")
    assert to_dcp.main([f"--model={tmp_path}/hf", f"--checkpoint={tmp_path}/step-0", "--no_verify"]) == 0
    text = capsys.readouterr().out
    assert f"torchtitan's model starts from {tmp_path}/hf (--checkpoint.initial_load_in_hf)" in text


def test_files_without_a_config_are_converted_and_reported_as_not_checked(tmp_path, capsys):
    for name in "ab":
        save_file({name: torch.randn(3)}, tmp_path / f"{name}.safetensors")
    argv = ["--model", *map(str, tmp_path.glob("*.safetensors")), f"--checkpoint={tmp_path}/new/step-0"]
    assert to_dcp.main(argv) == 0
    assert "step-0: 2 tensors, 24 bytes" in capsys.readouterr().out
    assert read_report(tmp_path / "new" / "step-0")["checks"]["structure"] == "not checked"
    assert rejected(capsys, to_dcp.main, *argv)


@pytest.mark.slow
def test_a_run_is_converted_verified_and_comes_back_unchanged(run, tmp_path, capsys):
    hf = run / "hf" / "step-12"
    assert to_hf.main([f"--path={run}"]) == 0
    report = read_report(hf)
    assert report["checkpoint"].endswith("checkpoint/step-12")
    assert report["checks"]["logits"]["max_abs_difference"] == 0
    assert "embed_out.weight" in load_file(hf / "model.safetensors")  # what the hub calls it; here it is lm_head

    assert to_dcp.main([f"--model={hf}", f"--checkpoint={tmp_path}/checkpoint/step-0"]) == 0
    assert to_hf.main([f"--path={tmp_path}", f"--config={hf}", "--tokenizer=byte", "--no_verify"]) == 0
    assert "step-0: 28 tensors" in capsys.readouterr().out
    first, second = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "hf" / "step-0"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_tensors_of_another_model_are_named_and_exit_with_1(run, tmp_path, capsys):
    config = write_config(tmp_path, "gpt_neox", intermediate_size=96)
    argv = [f"--path={run}", f"--config={config}", "--tokenizer=byte", f"--output={tmp_path}/hf"]
    assert to_hf.main(argv) == 1
    text = capsys.readouterr().err
    assert "shape: gpt_neox.layers.0.mlp.dense_4h_to_h.weight has [64, 128], the config says [64, 96]" in text
    assert not (tmp_path / "hf").exists()
    assert rejected(capsys, to_hf.main, *argv, "--tokenizer=absent.json").startswith("flame: --tokenizer")


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("embed_out.weight", lambda _: {}, r"missing: embed_out\.weight$"),
        ("embed_out.weight", lambda t: {"head.weight": t}, r"missing: embed_out\.weight\n  unexpected: head\.weight$"),
        ("embed_out.weight", lambda t: {"embed_out.weight": t[:, :9]}, r"\[320, 9\], the config says \[320, 64\]$"),
    ],
)
def test_published_weights_of_another_model_are_not_converted(name, change, text, published, tmp_path, capsys):
    tensors = load_file(published / "model.safetensors")
    tensors |= {key: tensor.contiguous() for key, tensor in change(tensors.pop(name)).items()}
    shutil.copy(published / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    assert to_dcp.main([f"--model={tmp_path}", f"--checkpoint={tmp_path}/step-0"]) == 1
    assert re.search(text, capsys.readouterr().err.strip())
    assert not (tmp_path / "step-0").exists()
