import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flame.convert.dcp_file import CorruptedError, read_tensors
from flame.convert.export import export_checkpoint
from flame.convert.hf_structure import read_trained
from flame.convert.report import REPORT, new_folder, read_report, sha256
from tests.convert.models import save_run
from tests.launch import environment

MAKER = """
import sys
from pathlib import Path
from flame.convert.report import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "first").touch()
    print("begun", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, "llama")
    return folder


def export(run, folder, *more, **options):
    return export_checkpoint(run / "checkpoint" / "step-1", run / "model", folder, *more, **options)


def test_an_export_has_the_tokenizer_and_its_end_of_text_and_loads_as_the_type_it_was_cast_to(run, tmp_path):
    recorded = run / "model" / "config.json"
    recorded.write_text(json.dumps(json.loads(recorded.read_text()) | {"dtype": "float32"}))
    export(run, tmp_path / "hf", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    assert tokenizer("naïve 🔥").input_ids == list("naïve 🔥".encode())
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 256


def test_the_report_says_what_was_made_from_what_and_how_it_was_checked(run, tmp_path):
    export(run, tmp_path / "hf", prove=lambda folder: {"logits": sorted(path.name for path in folder.iterdir())})
    report = read_report(tmp_path / "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert report["tensors"] == len(written)
    assert report["parameters"] == sum(tensor.numel() for tensor in written.values())
    assert report["metadata_sha256"] == sha256(run / "checkpoint" / "step-1" / ".metadata")
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    files = {path.name for path in (tmp_path / "hf").iterdir()} - {REPORT}
    assert report["files"] == {name: sha256(tmp_path / "hf" / name) for name in files}
    assert set(report["checks"]["logits"]) == files  # the proof sees the export as it will be


def test_an_export_of_steps_that_were_done_again_is_made_again_and_the_old_one_kept(tmp_path):
    save_run(tmp_path, "llama")
    export(tmp_path, tmp_path / "hf")
    old = (tmp_path / "hf" / "model.safetensors").read_bytes()
    save_run(tmp_path, "llama", initializer_range=0.5)
    assert export(tmp_path, tmp_path / "hf")
    assert (tmp_path / "hf.old-1" / "model.safetensors").read_bytes() == old
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() != old


@pytest.fixture
def maker(tmp_path):
    """A process that is making the folder tmp_path/hf."""
    command = [sys.executable, "-c", MAKER, str(tmp_path / "hf")]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, env=environment(), text=True, **streams)
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.communicate()


def test_of_two_that_make_a_folder_the_one_that_is_late_is_refused_and_neither_disturbs_the_other(maker, tmp_path):
    with new_folder(tmp_path / "hf") as folder:
        (folder / "second").touch()
    _, said = maker.communicate()
    assert "flame.errors.UserError: " in said and "hf: was made by another in the meantime" in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["hf", "second"]


def test_what_a_folder_that_was_never_finished_has_left_is_deleted_once_nobody_makes_it(maker, tmp_path):
    maker.kill()
    maker.wait()
    (left,) = tmp_path.iterdir()
    assert list(left.rglob("first"))
    with new_folder(tmp_path / "hf"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_that_fails_leaves_none_of_the_folders_above_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b" / "hf"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def _lose_weights(folder):
    (folder / "model.safetensors").unlink()


def _lose_config(folder):
    (folder / "config.json").unlink()


def _cut_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])


def _cut_report(folder):
    (folder / REPORT).write_text("{\n")


@pytest.mark.parametrize("harm", [_lose_weights, _lose_config, _cut_weights, _cut_report])
def test_what_is_left_of_an_export_is_moved_aside_and_the_export_made_again(harm, run, tmp_path):
    export(run, tmp_path / "hf")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    (tmp_path / "hf" / "notes").write_text("mine")
    harm(tmp_path / "hf")
    left = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert export(run, tmp_path / "hf")
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == whole
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf.old-1").iterdir()} == left


def test_a_whole_export_is_left_alone(run, tmp_path):
    assert export(run, tmp_path / "hf")
    written = (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns
    assert not export(run, tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mtime_ns == written


def test_an_export_whose_proof_fails_leaves_what_was_there_and_nothing_else(run, tmp_path):
    (tmp_path / "hf").mkdir()
    save_file({}, tmp_path / "hf" / "mine.safetensors")

    def fail(folder):
        raise ValueError("another model")

    with pytest.raises(ValueError, match="another model"):
        export(run, tmp_path / "hf", prove=fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["hf", "mine.safetensors"]


def test_a_changed_byte_is_found_in_a_tensor_that_is_published_in_parts(tmp_path):
    save_run(tmp_path, "mixtral")
    checkpoint, parts = tmp_path / "checkpoint" / "step-1", read_trained(tmp_path / "model").published_as
    cut = {name: t for name, t in read_tensors(checkpoint).items() if name.endswith("experts.gate_up_proj")}
    chunk = next(iter(cut.values())).chunks[0]
    data = bytearray(chunk.file.read_bytes())
    data[chunk.start + chunk.length // 2] ^= 1
    chunk.file.write_bytes(data)
    with pytest.raises(CorruptedError, match=r"found checksum .*experts.gate_up_proj should be"):
        export(tmp_path, tmp_path / "hf", parts=parts)
    assert not (tmp_path / "hf").exists()
