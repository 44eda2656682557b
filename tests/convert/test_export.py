"""Exports are whole or not at all, and say in a report what they were made from."""

import json
import os
import subprocess
import sys
from hashlib import sha256

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flame.checkpoint.commit import hash_file
from flame.checkpoint.structure import whole
from flame.convert.dcp_file import CorruptedError, read_tensors
from flame.convert.export import convert_dcp_to_hf, export_checkpoint
from flame.convert.hf_structure import read_trained_structure
from flame.convert.output import REPORT, read_report
from flame.convert.safetensors_file import find_files
from tests.convert.models import MODEL, save_run
from tests.launch import environment


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


def test_the_report_names_the_source_the_files_and_the_checks(run, tmp_path):
    export(run, tmp_path / "hf", verify=lambda folder: {"logits": sorted(path.name for path in folder.iterdir())})
    report = read_report(tmp_path / "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert report["tensors"] == len(written)
    assert report["parameters"] == sum(tensor.numel() for tensor in written.values())
    assert report["metadata_sha256"] == hash_file(run / "checkpoint" / "step-1" / ".metadata", sha256)
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    files = {path.name for path in (tmp_path / "hf").iterdir()} - {REPORT}
    assert report["files"] == {name: hash_file(tmp_path / "hf" / name, sha256) for name in files}
    assert set(report["checks"]["logits"]) == files  # the export is verified as it will be


def test_every_chat_template_of_a_tokenizer_is_exported_and_reported(tmp_path):
    save_run(tmp_path, "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "model")  # all but the default in a folder of their own
    export(tmp_path, tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == tokenizer.chat_template
    name = "additional_chat_templates/tool_use.jinja"
    assert read_report(tmp_path / "hf")["files"][name] == hash_file(tmp_path / "hf" / name, sha256)
    assert not export(tmp_path, tmp_path / "hf")


def test_weights_and_a_report_beside_the_recorded_model_are_not_exported(tmp_path):
    expected = save_run(tmp_path, "llama").state_dict()
    for name in ("model.safetensors", "model-00001-of-00002.safetensors"):
        save_file({name: torch.zeros_like(tensor) for name, tensor in expected.items()}, tmp_path / "model" / name)
    for name in ("model.safetensors.index.json", "pytorch_model.bin", REPORT):
        (tmp_path / "model" / name).write_text("{}")
    export(tmp_path, tmp_path / "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    files = {path.name: path for path in (tmp_path / "hf").iterdir() if path.name != REPORT}
    assert read_report(tmp_path / "hf")["files"] == {name: hash_file(path, sha256) for name, path in files.items()}
    weights = [path.name for path in files.values() if path.suffix in (".safetensors", ".bin")]
    assert weights == ["model.safetensors"]


def test_a_recorded_file_that_cannot_be_copied_is_named(tmp_path):
    save_run(tmp_path, "llama")
    os.mkfifo(tmp_path / "model" / "pipe")
    with pytest.raises(OSError, match=r"^`.*/model/pipe` is a named pipe$"):
        export(tmp_path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_export_of_repeated_steps_is_made_again_and_the_old_one_kept(tmp_path):
    save_run(tmp_path, "llama")
    export(tmp_path, tmp_path / "hf")
    old = (tmp_path / "hf" / "model.safetensors").read_bytes()
    save_run(tmp_path, "llama", initializer_range=0.5)
    assert export(tmp_path, tmp_path / "hf")
    assert (tmp_path / "hf.old-1" / "model.safetensors").read_bytes() == old
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() != old


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
def test_an_incomplete_export_is_moved_aside_and_made_again(harm, run, tmp_path):
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


def test_an_export_that_fails_verification_leaves_what_was_there_and_nothing_else(run, tmp_path):
    (tmp_path / "hf").mkdir()
    save_file({}, tmp_path / "hf" / "mine.safetensors")

    def fail(folder):
        raise ValueError("another model")

    with pytest.raises(ValueError, match="another model"):
        export(run, tmp_path / "hf", verify=fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["hf", "mine.safetensors"]


def test_a_changed_byte_is_found_in_a_tensor_that_is_published_in_parts(tmp_path):
    save_run(tmp_path, "mixtral")
    checkpoint = tmp_path / "checkpoint" / "step-1"
    published_as = read_trained_structure(tmp_path / "model").published_as
    cut = {name: t for name, t in read_tensors(checkpoint).items() if name.endswith("experts.gate_up_proj")}
    chunk = next(iter(cut.values())).chunks[0]
    data = bytearray(chunk.file.read_bytes())
    data[chunk.start + chunk.length // 2] ^= 1
    chunk.file.write_bytes(data)
    with pytest.raises(CorruptedError, match=r"found a wrong checksum .*experts.gate_up_proj should be"):
        export(tmp_path, tmp_path / "hf", published_as=published_as)
    assert not (tmp_path / "hf").exists()


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as torchtitan lays it out: the model at the top level, the rest under prefixes."""
    rest = {"optimizer": {"state.model.embed.weight.exp_avg": torch.ones(8, 4)}, "train_state": {"step": 3}}
    dcp.save({**MODEL, **rest}, checkpoint_id=str(tmp_path / "step-3"), no_dist=True)
    (tmp_path / "hf").mkdir()
    return tmp_path / "step-3"


def test_the_models_tensors_alone_are_written_bit_for_bit(checkpoint, tmp_path):
    advanced = []
    digests = convert_dcp_to_hf(read_tensors(checkpoint), tmp_path / "hf", advance=advanced.append)
    assert list(digests) == [file.name for file in (tmp_path / "hf").iterdir()] == ["model.safetensors"]
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == MODEL.keys()
    assert all(torch.equal(written[name], MODEL[name]) for name in MODEL)
    assert sum(advanced) == sum(tensor.nbytes for tensor in MODEL.values())


def test_shards_have_an_index_and_a_cast_leaves_integers_alone(checkpoint, tmp_path):
    out = tmp_path / "hf"
    convert_dcp_to_hf(read_tensors(checkpoint), out, "bfloat16", shard_bytes=64)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    written = {k: v for file in find_files(out) for k, v in load_file(file).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    assert written["model.n"].dtype == torch.int64
    assert torch.equal(written["model.embed.weight"], MODEL["model.embed.weight"].bfloat16())


def test_tensors_that_the_config_does_not_have_keep_their_names(checkpoint, tmp_path):
    convert_dcp_to_hf(read_tensors(checkpoint), tmp_path / "hf", published_as={"embed_out.weight": whole("head", (3,))})
    assert load_file(tmp_path / "hf" / "model.safetensors").keys() == MODEL.keys()


def test_weights_are_validated_before_a_launch_without_torch():
    imports = "import sys, flame.convert.hf_weights"
    code = f"{imports}; print({{'torch', 'transformers'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
